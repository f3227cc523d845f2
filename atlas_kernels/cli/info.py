"""``info``: what runs here, and what to install for the rest."""

from __future__ import annotations

import argparse
from typing import Any

# What an extra is for, and the packages by which it is recognised (import name, package name).
EXTRAS = {
    "clip": ("open_clip models and heads", {"open_clip": "open_clip_torch"}),
    "data": (
        "the paper's data sets",
        {"torchvision": "torchvision", "scipy": "scipy"},
    ),
    "demo": (
        "the demo, with its pictures",
        {
            "open_clip": "open_clip_torch",
            "matplotlib": "matplotlib",
            "rich": "rich",
            "tqdm": "tqdm",
        },
    ),
    "gradient-free": ("learning without gradients", {"nevergrad": "nevergrad"}),
    "triton": ("the Triton backend", {"triton": "triton"}),
}
_PACKAGES = ("triton", "safetensors", "numpy", "open_clip_torch", "matplotlib", "rich")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "info",
        parents=[common],
        help="backends, devices, versions, what to install for what is missing",
        description="Shows the backends, devices and versions that are here, and what to install "
        "for what is missing.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Prints four tables."""
    import os
    import platform

    import torch

    import atlas_kernels as ak

    from ..report import print_table

    versions = [
        ("atlas_kernels", ak.__version__),
        ("python", platform.python_version()),
        # With the kind of build, which the package's metadata does not name.
        ("torch", str(torch.__version__)),
    ]
    versions += [(name, _version(name) or "not installed") for name in _PACKAGES]
    print_table(("package", "version"), versions, title="Versions")
    devices = [
        (
            "cpu",
            f"{platform.machine()}, {os.cpu_count()} cores, "
            f"{torch.get_num_threads()} threads in PyTorch",
        )
    ]
    devices += [(f"cuda:{index}", _gpu(index)) for index in range(torch.cuda.device_count())]
    print_table(("device", "what it is"), devices, title="Devices")
    print_table(("backend", "state"), list(ak.backends().items()), title="Backends")
    print_table(
        ("extra", "for", "state"),
        [
            (
                name,
                purpose,
                "installed"
                if not missing(name)
                else f"lacks {', '.join(missing(name))}: pip install 'atlas_kernels[{name}]'",
            )
            for name, (purpose, _) in EXTRAS.items()
        ],
        title="Extras",
    )


def missing(extra: str) -> list[str]:
    """The packages of an extra that are not installed; nothing is imported."""
    from importlib.util import find_spec

    return [package for module, package in EXTRAS[extra][1].items() if find_spec(module) is None]


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
        f"compute capability {properties.major}.{properties.minor}"
    )
