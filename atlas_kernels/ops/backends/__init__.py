"""The implementations of the operators: which exist here, and which one serves a call.

A backend is a module of this folder with the three functions of `Backend`. None of them runs at
import: the first call that needs a backend registers it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Protocol, cast

import torch.version as torch_version

from ..schema import BACKENDS

_log = logging.getLogger("atlas_kernels")

# What "auto" tries for a device, best first; "torch" serves every other device, and float64. On an
# H200 the CUDA extension took 0.4 of Triton's time for lists, and 0.5 to 1.08 for banks.
_PREFERENCE = {
    "cpu": ("cpp", "torch"),
    "cuda": ("cuda", "triton", "torch"),
    "hip": ("triton", "torch"),
}


class Backend(Protocol):
    """What a module of this folder provides."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, together with the remedy; None if it can."""

    def devices(self) -> tuple[str, ...] | None:
        """The device types it serves; None for all."""

    def register(self) -> None:
        """Implements the operators of `atlas_kernels.ops` in the backend's namespace."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that cannot run here; the message says why and what to do."""


def backends() -> dict[str, str]:
    """Each backend's name and "available", or the reason why it is not, with the remedy.

    Example:
        >>> import atlas_kernels as ak
        >>> ak.backends()["torch"]
        'available'
    """
    return {name: _unavailable(name) or "available" for name in BACKENDS}


def resolve(backend: str, device_type: str, float64: bool) -> str:
    """The name of the registered backend that serves this request.

    Raises `ValueError` for an unknown name or a device that the backend does not serve and
    `BackendUnavailableError` for one that cannot run here. "auto" never raises: it falls back, and
    says so once.
    """
    if backend == "auto":
        return _automatic(device_type, float64)
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown backend {backend!r}: expected 'auto' or one of "
            f"{', '.join(map(repr, BACKENDS))}"
        )
    reason = _unavailable(backend)
    if reason is not None:
        raise BackendUnavailableError(f"backend {backend!r} requested, but {reason}")
    devices = _module(backend).devices()
    if devices is not None and device_type not in devices:
        raise ValueError(
            f"backend {backend!r} runs on {' and '.join(devices)}, but the tensors are on "
            f"{device_type!r}: move them, or choose backend='auto'"
        )
    if float64 and backend != "torch":
        raise ValueError(
            f"backend {backend!r} does not compute in float64: use backend='torch' or float32"
        )
    _register(backend)
    return backend


# What torch.compiler.assume_constant_result sets. Calling it imports the compiler and Triton, two
# seconds of every program that never compiles anything.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _automatic(device_type: str, float64: bool) -> str:
    # PyTorch calls the GPUs of ROCm "cuda" as well.
    kind = "hip" if device_type == "cuda" and torch_version.hip else device_type
    preference = ("torch",) if float64 else _PREFERENCE.get(kind, ("torch",))
    reasons = []
    for name in preference:
        reason = _unavailable(name)
        if reason is None:
            break
        reasons.append(f"{name}: {reason}")
    if reasons:
        _log.warning(
            "atlas_kernels runs on the slower backend %r for %s tensors: %s",
            name,
            device_type,
            "; ".join(reasons),
        )
    _register(name)
    return name


@functools.cache
def _unavailable(backend: str) -> str | None:
    return _module(backend).unavailable()


@functools.cache
def _register(backend: str) -> None:
    _module(backend).register()


def _module(backend: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{backend}"))
