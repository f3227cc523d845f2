"""Safetensors that describe themselves: ours out and in, and what any holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import write_atomically
from .errors import FileFormatError, existing, first_line, parts_of

_VERSION = 1
# Bytes. Data begin on a page, so that a mapped arena is aligned for every load.
_PAGE = 4096
# As safetensors calls them.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], kind: str = "", **fields: Any
) -> None:
    """Writes a safetensors file in one step: a crash leaves the old file, or none.

    ``kind`` and ``fields`` (anything that JSON holds) are what `read_tensors` checks and returns.
    Tensors may live on any device and share memory; the file holds each in full.
    """
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copied = tensor.detach().cpu().contiguous()
        storage = copied.untyped_storage().data_ptr()
        plain[name] = copied.clone() if storage in seen else copied
        seen.add(storage)
    metadata = _metadata(kind, fields)
    try:
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata))
    except SafetensorError as error:  # its only reason here: the disk, which it reports in words
        raise OSError(f"cannot write {path}: {first_line(error)}") from error


def write_mapped(
    path: str | Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    fill: Callable[[dict[str, Tensor]], object],
    kind: str,
    **fields: Any,
) -> None:
    """The same for tensors that memory does not hold: ``fill`` writes them where they lie.

    ``specs`` gives dtype and shape by name. ``fill`` receives tensors of zeros that are mapped to
    the file, so that the system can take their memory back at any time.

    Raises:
        OSError: the disk has no room for the file; nothing is written.
    """
    # Wider dtypes first: every tensor is aligned to its own elements.
    ordered = sorted(specs, key=lambda name: -specs[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": _metadata(kind, fields)}
    end = 0
    for name in ordered:
        dtype, shape = specs[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(len(encoded) + 8) % _PAGE)
    first = len(encoded) + 8

    def write(temporary: str) -> None:
        with open(temporary, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                # Without it, a full disk would kill the process at some later store.
                os.posix_fallocate(file.fileno(), 0, first + end)
            else:
                file.truncate(first + end)
            file.write(len(encoded).to_bytes(8, "little") + encoded)
        mapped = torch.from_file(temporary, shared=True, size=first + end, dtype=torch.uint8)
        tensors = {}
        for name in ordered:
            start, stop = (first + offset for offset in header[name]["data_offsets"])
            tensors[name] = mapped[start:stop].view(specs[name][0]).view(specs[name][1])
        fill(tensors)

    write_atomically(path, write)


def data_offsets(path: str | Path) -> dict[str, tuple[int, int]]:
    """The first byte in the file, and the end, of every tensor of a safetensors file."""
    with open(existing(path), "rb") as file, parts_of(path):
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        return {
            name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
            for name, entry in header.items()
            if name != "__metadata__"
        }


def read_tensors(
    path: str | Path, kind: str, mmap: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the fields of a file that `write_tensors` wrote as ``kind``.

    With ``mmap`` the tensors are views of the mapped file: pages are read when they are used.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is damaged, of another kind, or of a newer version.
    """
    path = existing(path)
    with opened(path) as file:
        metadata = file.metadata() or {}
        found = metadata.get("format", "nothing that names its format")
        if found != f"atlas_kernels.{kind}":
            raise FileFormatError(f"{path}: expected a file of atlas_kernels.{kind}, found {found}")
        with parts_of(path):
            version = int(metadata["version"])
        if version > _VERSION:
            raise FileFormatError(
                f"{path}: written by a newer atlas_kernels (file version {version}, "
                f"this one reads up to {_VERSION}): upgrade atlas_kernels"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if not mmap:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with parts_of(path):
        fields = {k: json.loads(v) for k, v in metadata.items() if k not in ("format", "version")}
    return tensors, fields


def describe(path: str | Path) -> tuple[str, dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """A safetensors file's kind, fields and tensors (dtype, shape), without reading any tensor."""
    path = existing(path)
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        kind = metadata.pop("format", "")
        metadata.pop("version", None)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        tensors = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    ours = kind.startswith("atlas_kernels.")
    fields = {key: json.loads(value) for key, value in metadata.items()} if ours else metadata
    return kind.removeprefix("atlas_kernels.") if ours else "", fields, tensors


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


def _metadata(kind: str, fields: Mapping[str, Any]) -> dict[str, str]:
    return {
        "format": f"atlas_kernels.{kind}" if kind else "pt",
        "version": str(_VERSION),
        **{key: json.dumps(value) for key, value in fields.items()},
    }


def opened(path: Path) -> Any:
    """A safetensors file as its library opens it."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path}: not a readable safetensors file ({first_line(error)})"
        ) from error
