"""The reference as a backend: runs everywhere, and is what every other backend must equal."""

from __future__ import annotations

import torch

from .. import reference
from .. import schema as ops

_libraries: list[torch.library.Library] = []


def unavailable() -> str | None:
    """None: PyTorch is always there."""
    return None


def devices() -> None:
    """None: every device."""
    return None


def register() -> None:
    """Implements the operators for every device by the functions of `reference`."""
    library = torch.library.Library(ops.namespace("torch"), "IMPL")
    _libraries.append(library)
    for name in ops.SCHEMAS:
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
