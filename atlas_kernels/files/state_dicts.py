"""Checkpoints of any origin: state dicts in."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import pickles
from .errors import FileFormatError, existing, first_line
from .tensors import opened

_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


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
    path = existing(path)
    if path.suffix == ".safetensors":
        with opened(path) as file:
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
            f"{path}: cannot be read as a checkpoint of plain tensors ({first_line(error)}). Save "
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
