"""The CPU extension: `csrc/cpu`, built by `setup.py` into one binary beside this package."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_BINARY = Path(__file__).parent.parent / "_cpp.abi3.so"
_REBUILD = "`pip install --no-build-isolation --force-reinstall --no-deps .` in the checkout"


def unavailable() -> str | None:
    """Why the extension cannot run here, with the remedy; None if it can."""
    if not _BINARY.exists():
        return (
            "the C++ extension is not built: install a C++17 compiler (g++ or clang++) and run "
            + _REBUILD
        )
    return _load()


def devices() -> tuple[str, ...]:
    """The extension serves CPU tensors."""
    return ("cpu",)


def register() -> None:
    """Implements the operators; loading the binary does."""
    _load()


@functools.cache
def _load() -> str | None:
    try:
        torch.ops.load_library(_BINARY)
    except OSError as error:
        # PyTorch hides the loader's words behind its own.
        return (
            f"the C++ extension does not load into PyTorch {torch.__version__}, which must be 2.11 "
            f"or later ({error.__cause__ or error}): rebuild it with {_REBUILD}"
        )
    return None
