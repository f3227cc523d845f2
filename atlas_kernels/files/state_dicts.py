"""Checkpoints of any origin: state dicts in."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import pickles
from .errors import FileFormatError, existing, first_line
from .tensors import opened

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
# A compiled module may have been wrapped as data-parallel, or the other way round.
_PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
# What torch.load takes without a pickled object allowed, and with one.
_LOADERS: tuple[dict[str, Any], ...] = (
    {"weights_only": True},
    {"weights_only": False, "pickle_module": pickles},
)
# Bytes of the records at the end of a zip archive: of 64 bits, where that is, and of 32.
_ENDS = 56 + 20 + 22


def read_state_dict(path: str | Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, by name.

    Reads ``.safetensors`` (memory-mapped) and ``.pt / .pth / .bin / .ckpt`` (``torch.load`` with
    ``weights_only=True``). A training checkpoint's inner ``state_dict``, ``model_state_dict`` or
    ``model`` is unwrapped. Of either kind of file the prefixes are removed that all names begin
    with because a wrapper was saved: ``module.`` (data parallel), ``_orig_mod.`` (compiled).

    Warning:
        ``allow_pickle`` is for files from people you trust. It also reads whole models that were
        pickled, such as the ``zeroshot.pt`` and ``finetuned.pt`` of the task-vector papers, whose
        code need not be installed. Python's unpickler runs whatever a file asks for; ours rebuilds
        tensors and replaces every other class and function by a stub, so that no code of the file
        runs. But it is our own lock, not PyTorch's, and a file may still exhaust the memory. Names
        are those of the tree of modules, without a ``model.`` that all begin with: open_clip's
        names for the models mentioned.

    Args:
        path: of the checkpoint.
        allow_pickle: whether to read what ``torch.load(..., weights_only=True)`` refuses.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it is a folder.
        FileFormatError: the ending is unknown, the file is damaged, or it is no state dict.
    """
    path = existing(path)
    if path.suffix == ".safetensors":
        with opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _without_prefixes(tensors, *_PREFIXES)
    if path.suffix not in _PICKLED:
        raise FileFormatError(
            f"{path}: unknown ending {path.suffix!r}, expected .safetensors or one of "
            f"{', '.join(_PICKLED)}"
        )
    try:
        _check_archive(path)
        # What _check_archive refuses, torch.load would hand to a loader that runs code.
        loaded = torch.load(path, map_location="cpu", mmap=True, **_LOADERS[allow_pickle])
        for wrapper in _WRAPPERS:
            if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict | pickles.Stub):
                loaded = loaded[wrapper]
                break
        if pickles.is_module(loaded):
            # What the task-vector papers call the CLIP model within their image encoder.
            return _without_prefixes(dict(pickles.module_tensors(loaded)), *_PREFIXES, "model.")
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle makes the unpickler stumble over
        pickled = (
            "" if allow_pickle else ", or allow a pickled model (allow_pickle, --allow-pickle)"
        )
        raise FileFormatError(
            f"{path}: cannot be read as a checkpoint of plain tensors ({_reason(error)}). Save "
            "model.state_dict(), not the model itself, in the format of torch.save since 1.6"
            f"{pickled}"
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise FileFormatError(f"{path}: expected a dictionary of tensors (a state dict)")
    return _without_prefixes(loaded, *_PREFIXES)


def _check_archive(path: Path) -> None:
    """Raises ValueError unless every reader of zip archives finds the same, and no TorchScript."""
    with open(path, "rb") as file:
        start = file.read(4)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _ENDS))
        ends = file.read()
    if start != b"PK\x03\x04":
        raise ValueError("it is no zip archive")
    if ends[-22:-18] != b"PK\x05\x06":
        raise ValueError("the end of the archive is missing")
    length, first = struct.unpack("<II", ends[-10:-2])
    end = size - 22
    if ends[-42:-38] == b"PK\x06\x07":
        # The 64-bit record stands in for numbers that are all ones.
        end -= 20 + 56
        wide = ends[:-42]
        if wide[:4] != b"PK\x06\x06" or struct.unpack("<Q", ends[-34:-26])[0] != end:
            raise ValueError("the end of the archive is damaged")
        pairs = zip((length, first), struct.unpack("<QQ", wide[40:56]), strict=True)
        if any(narrow not in (0xFFFFFFFF, its) for narrow, its in pairs):
            raise ValueError("the two ends of the archive differ")
        length, first = struct.unpack("<QQ", wide[40:56])
    # One reader finds the directory by the one number, another by the other.
    if first + length != end:
        raise ValueError("the directory of the archive is not where its end says")
    # As torch.load itself tells them apart.
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("a TorchScript archive")


def _reason(error: Exception) -> str:
    """In our words: torch.load's own are advice to switch its lock off."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it holds an object of {found[1]}"
    if isinstance(error, ValueError):
        return first_line(error)
    return "it is damaged, or holds other objects than tensors"


def _without_prefixes(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    for prefix in prefixes:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
