"""The CUDA extension: `csrc/cuda`, built by `setup.py` into one binary beside this package."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

_BINARY = Path(__file__).parent.parent / "_cuda.abi3.so"
_REBUILD = "`ATLAS_KERNELS_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .`"


def unavailable() -> str | None:
    """Why the extension cannot run here, with the remedy; None if it can."""
    if not _BINARY.exists():
        return (
            "the CUDA extension is not built: install the CUDA toolkit and run "
            f"{_REBUILD} in the checkout"
        )
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
    return _load()


def devices() -> tuple[str, ...]:
    """The extension serves CUDA tensors."""
    return ("cuda",)


def register() -> None:
    """Implements the operators; loading the binary does."""
    _load()


@functools.cache
def _load() -> str | None:
    try:
        torch.ops.load_library(_BINARY)
    except OSError as error:
        reason = error.__cause__ or error  # PyTorch chains the loader's own error
        return (
            f"the CUDA extension does not load into PyTorch {torch.__version__}, which must be "
            f"2.11 or later ({reason}): rebuild it with {_REBUILD} in the checkout"
        )
    find_error = ctypes.CDLL(str(_BINARY)).atlas_kernels_cuda_error
    find_error.restype = ctypes.c_char_p
    words = find_error()
    if words is not None:
        return (
            f"the CUDA extension does not run on {torch.cuda.get_device_name()} with its driver "
            f"({words.decode()}): rebuild it with {_REBUILD} in the checkout, by a CUDA toolkit no "
            "newer than the driver, and with the GPU's compute capability in TORCH_CUDA_ARCH_LIST"
        )
    return None
