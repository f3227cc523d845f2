"""The CUDA extension: `csrc/cuda`."""

from __future__ import annotations

import ctypes

import torch

from .native import Extension

EXTENSION = Extension("_cuda", "CUDA", "the CUDA toolkit", "ATLAS_KERNELS_CUDA=1 ")


def unavailable() -> str | None:
    """Why the extension cannot run here, with the remedy; None if it can."""
    missing = EXTENSION.missing()
    if missing is not None:
        return missing
    if torch.version.cuda is None:
        return (
            f"the CUDA extension is built, but PyTorch {torch.__version__} is a build without "
            "CUDA: install one with CUDA from https://pytorch.org"
        )
    if not torch.cuda.is_available():
        return (
            "the CUDA extension is built, but PyTorch sees no GPU: check with `nvidia-smi` that "
            f"the NVIDIA driver runs and serves CUDA {torch.version.cuda}"
        )
    return EXTENSION.load() or _unfit()


def devices() -> tuple[str, ...]:
    """The extension serves CUDA tensors."""
    return ("cuda",)


def register() -> None:
    """Implements the operators; loading the binary does."""
    EXTENSION.load()


def _unfit() -> str | None:
    """Why the binary's kernels do not run on this GPU, with the remedy; None if they do."""
    find_error = ctypes.CDLL(str(EXTENSION.path)).atlas_kernels_cuda_error
    find_error.restype = ctypes.c_char_p
    words = find_error()
    if words is None:
        return None
    return (
        f"the CUDA extension does not run on {torch.cuda.get_device_name()} with its driver "
        f"({words.decode()}): rebuild it with {EXTENSION.rebuild}, by a CUDA toolkit no newer than "
        "the driver, and with the GPU's compute capability in TORCH_CUDA_ARCH_LIST"
    )
