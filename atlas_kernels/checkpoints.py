"""Files in and out: state dicts of any origin in, safetensors that describe themselves out."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import pickles

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
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


class FileFormatError(ValueError):
    """A file is not what it should be; the message says what it is and what was expected."""


def read_state_dict(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, by name.

    Reads ``.safetensors`` (memory-mapped) and ``.pt / .pth / .bin / .ckpt`` (``torch.load`` with
    ``weights_only=True``). A training checkpoint's inner ``state_dict`` is unwrapped, and the
    ``module.`` prefix of a data-parallel wrapper removed, as open_clip's own loader does.

    Warning:
        ``allow_pickle`` is for files from people you trust. It also reads whole models that were
        pickled, such as the ``zeroshot.pt`` and ``finetuned.pt`` of the task-vector papers, whose
        code need not be installed. Python's unpickler runs whatever a file asks for; ours rebuilds
        tensors and replaces every other class and function by a stub, so that no code of the file
        runs. But it is our own lock, not PyTorch's, and a file may still exhaust the memory. Names
        are those of the tree of modules, without a ``model.`` or ``module.`` that all begin with:
        open_clip's names for the models mentioned.

    Args:
        path: of the checkpoint.
        allow_pickle: whether to read what ``torch.load(..., weights_only=True)`` refuses.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the ending is unknown, the file is damaged, or it is no state dict.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if path.suffix not in _PICKLED:
        raise FileFormatError(
            f"{path}: unknown ending {path.suffix!r}, expected .safetensors or one of "
            f"{', '.join(_PICKLED)}"
        )
    try:
        loaded = _unpickled(path) if allow_pickle else _loaded(path)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble over
        pickled = (
            "" if allow_pickle else ", or allow a pickled model (allow_pickle, --allow-pickle)"
        )
        raise FileFormatError(
            f"{path}: cannot be read as a checkpoint of plain tensors ({_first_line(error)}). Save "
            "model.state_dict(), not the model itself, in the format of torch.save since 1.6"
            f"{pickled}"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise FileFormatError(f"{path}: expected a dictionary of tensors (a state dict)")
    return _without_prefix(loaded, "module.")


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _unpickled(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        # torch.load would hand it to another loader, which does run code.
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("a TorchScript archive")
    loaded = torch.load(
        path, map_location="cpu", weights_only=False, mmap=True, pickle_module=pickles
    )
    if not pickles.is_module(loaded):
        return loaded
    # The second is what the task-vector papers call the CLIP model within their image encoder.
    return _without_prefix(dict(pickles.module_tensors(loaded)), "module.", "model.")


def _without_prefix(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    for prefix in prefixes:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


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
        raise OSError(f"cannot write {path}: {_first_line(error)}") from error


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
    with open(_existing(path), "rb") as file, parts_of(path):
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
    path = _existing(path)
    with _opened(path) as file:
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


@contextmanager
def parts_of(path: str | Path) -> Iterator[None]:
    """Inside, a part that a file should have and has not, or not as it should be, is its damage."""
    try:
        yield
    except FileFormatError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{path}: the file is damaged, or was not written by atlas_kernels "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def describe(path: str | Path) -> tuple[str, dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """A safetensors file's kind, fields and tensors (dtype, shape), without reading any tensor."""
    path = _existing(path)
    with _opened(path) as file:
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


def write_atomically(path: str | Path, write: Callable[[str], object]) -> None:
    """Calls ``write(temporary name)`` beside ``path`` and renames; nothing is left on failure."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        # mkstemp makes private files; ours are as readable as any other that the user creates.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise FileFormatError(
            f"{path}: not a readable safetensors file ({_first_line(error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
