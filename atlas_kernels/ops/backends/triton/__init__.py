"""Triton kernels for NVIDIA and AMD GPUs; on the CPU under `TRITON_INTERPRET=1`, to test them."""

from __future__ import annotations

import importlib.util

import torch

from ...schema import SCHEMAS, namespace

_libraries: list[torch.library.Library] = []


def unavailable() -> str | None:
    """Why the kernels cannot run here, together with the remedy; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _interpreting() or torch.cuda.is_available():
        return None
    return (
        "no CUDA or ROCm device is visible to PyTorch: install a PyTorch built for your GPU "
        "(https://pytorch.org/get-started), or choose backend='auto' to run on the CPU"
    )


def devices() -> tuple[str, ...]:
    """The GPU, which PyTorch calls "cuda" for ROCm as well; the CPU when interpreting."""
    return ("cpu",) if _interpreting() else ("cuda",)


def register() -> None:
    """Implements the operators by the host functions of `ops`."""
    from . import ops

    library = torch.library.Library(namespace("triton"), "IMPL")
    _libraries.append(library)
    for name in SCHEMAS:
        for device in devices():
            library.impl(name, getattr(ops, name), device.upper())


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
