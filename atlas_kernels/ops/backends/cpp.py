"""The CPU extension: `csrc/cpu`."""

from __future__ import annotations

from .native import Extension

EXTENSION = Extension("_cpp", "C++", "a C++17 compiler (g++ or clang++)")


def unavailable() -> str | None:
    """Why the extension cannot run here, with the remedy; None if it can."""
    return EXTENSION.missing() or EXTENSION.load()


def devices() -> tuple[str, ...]:
    """The extension serves CPU tensors."""
    return ("cpu",)


def register() -> None:
    """Implements the operators; loading the binary does."""
    EXTENSION.load()
