"""Safetensors that describe themselves: ours out and in, and what any holds.

A file of ours is a safetensors file whose metadata say of which kind it is and hold fields as JSON.
One more tensor, ``checksums``, holds the CRC-32 of the header and of every other tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .atomic import write_atomically
from .checksums import crc
from .errors import FileFormatError, existing, first_line, parts_of

# From 2 on a file holds checksums, so that one which lacks them is damaged.
_VERSION = 2
_OURS = "atlas_kernels."
_CHECKSUMS = "checksums"
# In the place of the checksum of a tensor whose bytes its writer guards in pieces.
_ELSEWHERE = -1
# Bytes. Data begin on a page, so that a mapped arena is aligned for every load.
_PAGE = 4096
# As safetensors calls them.
_DTYPES = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Origin:
    """The file that tensors were read from, as it was then.

    Attributes:
        path: its name.
        checksums: CRC-32 by tensor, but for those that are guarded in pieces.
        state: device, inode, size and time of the last change; () if nothing is mapped from it.
    """

    path: Path
    checksums: Mapping[str, int]
    state: tuple[int, ...]

    def verify(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises FileFormatError if one of the tensors is not what was written."""
        for name, tensor in tensors.items():
            if name in self.checksums and crc(tensor) != self.checksums[name]:
                raise FileFormatError(
                    f"{self.path}: the checksum of {name!r} fails: the file was damaged or changed "
                    "since it was written"
                )

    def __reduce__(self) -> Any:
        # What is pickled and read again is mapped no longer.
        return Origin, (self.path, self.checksums, ())

    def check_unchanged(self) -> None:
        """Raises FileFormatError if what is mapped was overwritten in place (as ``cp`` does).

        A file that was moved away, or replaced by another one, is still what it was.
        """
        try:
            now = _state(self.path)
        except OSError:
            return
        if now != self.state and now[:2] == self.state[:2]:
            raise FileFormatError(
                f"{self.path} was overwritten in place since it was loaded, so that what is mapped "
                "from it is lost: load it again, and replace such files with mv, never with cp"
            )


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    kind: str = "",
    guarded: Collection[str] = (),
    **fields: Any,
) -> None:
    """Writes a safetensors file in one step: a crash leaves the old file, or none.

    ``kind`` and ``fields`` (anything that JSON holds) are what `read_tensors` checks and returns;
    without a ``kind`` it is a plain state dict. Tensors may live on any device and share memory;
    the file holds each in full. Otherwise as `write_mapped`.
    """

    def fill(mapped: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            mapped[name].copy_(tensor.detach())

    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_mapped(path, specs, fill, kind, guarded, **fields)


def write_mapped(
    path: str | Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fill: Callable[[dict[str, Tensor]], object],
    kind: str,
    guarded: Collection[str] = (),
    **fields: Any,
) -> None:
    """The same for tensors that memory does not hold: ``fill`` writes them where they lie.

    ``specs`` gives dtype and shape by name. ``fill`` receives tensors of zeros that are mapped to
    the file, so that the system can take their memory back at any time. Every tensor gets a
    checksum, but for those that are ``guarded``: other tensors of the file hold theirs, by pieces.

    Raises:
        TypeError: safetensors has no such dtype; nothing is written.
        OSError: the file cannot be written, or the disk has no room for it; nothing is changed.
    """
    for name, (dtype, _) in specs.items():
        if dtype not in _DTYPES:
            raise TypeError(f"cannot write {path}: tensor {name!r} has dtype {dtype}")
    if kind:
        specs = {**specs, _CHECKSUMS: (torch.int64, (1 + len(specs),))}
    # Wider dtypes first: every tensor is aligned to its own elements.
    ordered = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    metadata = {"format": _OURS + kind, "version": str(_VERSION)} if kind else {"format": "pt"}
    metadata |= {key: json.dumps(value) for key, value in fields.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in ordered:
        dtype, shape = specs[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % _PAGE)
    encoded = len(encoded).to_bytes(8, "little") + encoded
    first = len(encoded)

    def write(temporary: str) -> None:
        with open(temporary, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                # Without it, a full disk would kill the process at some later store.
                os.posix_fallocate(file.fileno(), 0, first + end)
            else:
                file.truncate(first + end)
            file.write(encoded)
        mapped = torch.from_file(temporary, shared=True, size=first + end, dtype=torch.uint8)
        tensors = {}
        for name in ordered:
            start, stop = (first + offset for offset in header[name]["data_offsets"])
            tensors[name] = mapped[start:stop].view(specs[name][0]).view(specs[name][1])
        checksums = tensors.pop(_CHECKSUMS) if kind else None
        fill(tensors)
        if checksums is not None:
            sums = [_ELSEWHERE if name in guarded else crc(tensors[name]) for name in tensors]
            checksums.copy_(torch.tensor([crc(mapped[:first]), *sums]))

    write_atomically(path, write, first + end)


def data_offsets(path: str | Path) -> dict[str, tuple[int, int]]:
    """The first byte in the file, and the end, of every tensor of a safetensors file."""
    path = existing(path)
    with opened(path):
        return _Header.of(path).offsets


def read_tensors(
    path: str | Path, kind: str, mmap: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the fields of a file that `write_tensors` wrote as ``kind``.

    With ``mmap`` the tensors are views of the mapped file: pages are read when they are used.
    Without, all is read and every checksum verified, but for those that guard pieces.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is damaged, of another kind, or of a newer version.
    """
    tensors, fields, origin = map_tensors(path, kind)
    if not mmap:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        origin.verify(tensors)
    return tensors, fields


def map_tensors(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any], Origin]:
    """As `read_tensors` with ``mmap``, and what verifies them later."""
    path = existing(path)
    state = _state(path)
    with opened(path) as file:
        header = _Header.of(path)
        if header.kind != kind:
            found = _OURS + header.kind if header.kind else "nothing that names its format"
            raise FileFormatError(f"{path}: expected a file of {_OURS}{kind}, found {found}")
        if header.version > _VERSION:
            raise FileFormatError(
                f"{path}: written by a newer atlas_kernels (file version {header.version}, "
                f"this one reads up to {_VERSION}): upgrade atlas_kernels"
            )
        with parts_of(path):
            fields, checksums = header.fields, header.checksums(file)
        names = [name for name in file.keys() if name not in header.own]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    return tensors, fields, Origin(path, checksums, state)


def describe(path: str | Path) -> tuple[str, dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """A safetensors file's kind, fields and tensors (dtype, shape), without reading any tensor."""
    path = existing(path)
    with opened(path) as file, parts_of(path):
        header = _Header.of(path)
        header.checksums(file)
        names = [name for name in file.keys() if name not in header.own]  # noqa: SIM118
        slices = {name: file.get_slice(name) for name in names}
        tensors = {name: (its.get_dtype(), its.get_shape()) for name, its in slices.items()}
        return header.kind, header.fields, tensors


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that safetensors, or PyTorch, calls by this name. Raises ValueError if none."""
    for dtype, its in _DTYPES.items():
        if name in (its, str(dtype).removeprefix("torch.")):
            return dtype
    raise ValueError(f"unknown dtype {name!r}")


def digest(tensor: Tensor) -> str:
    """A hexadecimal fingerprint (BLAKE2b, 128 bits) of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    hasher = hashlib.blake2b(f"{plain.dtype}{tuple(plain.shape)}".encode(), digest_size=16)
    # One element or none is contiguous with any stride, but only stride 1 can be viewed as bytes.
    flat = plain.as_strided((plain.numel(),), (1,))
    hasher.update(flat.view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def opened(path: Path) -> Any:
    """A safetensors file as its library opens it: sizes and offsets fit the file."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path}: not a readable safetensors file ({first_line(error)})"
        ) from error


@dataclass(frozen=True)
class _Header:
    """What a safetensors file says before its data.

    Attributes:
        kind: of our files, else "".
        version: of our files, else 0.
        metadata: the strings besides.
        offsets: first byte in the file, and end, of every tensor.
        own: names of tensors that are no data.
        checksum: CRC-32 of the header's bytes.
    """

    kind: str
    version: int
    metadata: dict[str, str]
    offsets: dict[str, tuple[int, int]]
    own: tuple[str, ...]
    checksum: int

    @classmethod
    def of(cls, path: Path) -> _Header:
        """That of a file which safetensors has opened, and so found to be in order."""
        with open(path, "rb") as file:
            length = file.read(8)
            encoded = length + file.read(int.from_bytes(length, "little"))
        with parts_of(path):
            header = _json(encoded[8:])
            metadata = header.pop("__metadata__", {})
            named = metadata.pop("format", "")
            ours = named.startswith(_OURS)
            version = metadata.pop("version", None)
            if ours and (version is None or int(version) < 1):
                raise ValueError(f"its version is {version!r}")
        first = len(encoded)
        starts_and_ends = {name: entry["data_offsets"] for name, entry in header.items()}
        return cls(
            named.removeprefix(_OURS) if ours else "",
            int(version) if ours else 0,
            metadata,
            {name: (first + start, first + end) for name, (start, end) in starts_and_ends.items()},
            (_CHECKSUMS,) if ours and (int(version) > 1 or _CHECKSUMS in header) else (),
            crc(torch.frombuffer(bytearray(encoded), dtype=torch.uint8)),
        )

    @property
    def fields(self) -> dict[str, Any]:
        """Of our files what their JSON holds, of others the strings themselves."""
        if not self.kind:
            return {**self.metadata}
        return {name: _json(value) for name, value in self.metadata.items()}

    def checksums(self, file: Any) -> dict[str, int]:
        """Those of tensors that are not guarded in pieces. Raises ValueError if its own fails."""
        if not self.own:
            return {}
        if _CHECKSUMS not in self.offsets:
            raise ValueError("it lacks its checksums")
        its, *sums = file.get_tensor(_CHECKSUMS).tolist()
        if its != self.checksum:
            raise ValueError("the checksum of its header fails")
        names = [name for name in self.offsets if name != _CHECKSUMS]
        pairs = zip(names, sums, strict=True)
        return {name: checksum for name, checksum in pairs if checksum != _ELSEWHERE}


def _json(encoded: bytes | str) -> Any:
    """What JSON holds. Raises ValueError if it is damaged, or names something twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("it names something twice")
        return found

    return json.loads(encoded, object_pairs_hook=unique)


def _state(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
