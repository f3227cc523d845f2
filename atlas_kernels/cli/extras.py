"""The extras of the package: what each is for, and what of it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

# What an extra is for, and the packages by which it is recognised (import name, package name).
EXTRAS = {
    "clip": ("open_clip models and heads", {"open_clip": "open_clip_torch"}),
    "data": ("the paper's data sets", {"torchvision": "torchvision", "scipy": "scipy"}),
    "demo": (
        "the demo, with its pictures",
        {"open_clip": "open_clip_torch", "matplotlib": "matplotlib"},
    ),
    "gradient-free": ("learning without gradients", {"nevergrad": "nevergrad"}),
    "triton": ("the Triton backend", {"triton": "triton"}),
}


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed; nothing is imported."""
    return [package for module, package in EXTRAS[extra][1].items() if find_spec(module) is None]


def need(extra: str, what: str) -> None:
    """Raises ImportError that says what to install, if a package of an extra is missing."""
    lacking = missing(extra)
    if lacking:
        raise ImportError(
            f"{what} needs {', '.join(lacking)}: run pip install 'atlas_kernels[{extra}]'"
        )
