"""``info``: what runs here, and what to install for the rest."""

from __future__ import annotations

from typing import Any

from .extras import EXTRAS, missing

_PACKAGES = ("triton", "safetensors", "numpy", "open_clip_torch", "matplotlib", "rich")


def info() -> dict[str, Any]:
    """Prints four tables."""
    import os
    import platform

    import torch

    import atlas_kernels as ak

    from ..report import print_table

    versions = {
        "atlas_kernels": ak.__version__,
        "python": platform.python_version(),
        # With the kind of build, which the package's metadata does not name.
        "torch": str(torch.__version__),
    }
    versions |= {name: _version(name) or "not installed" for name in _PACKAGES}
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in PyTorch"
    devices = {"cpu": f"{platform.machine()}, {threads}"}
    devices |= {f"cuda:{index}": _gpu(index) for index in range(torch.cuda.device_count())}
    extras = {name: missing(name) for name in EXTRAS}
    print_table(("package", "version"), list(versions.items()), title="Versions")
    print_table(("device", "what it is"), list(devices.items()), title="Devices")
    print_table(("backend", "state"), list(ak.backends().items()), title="Backends")
    print_table(
        ("extra", "for", "state"),
        [
            (
                name,
                EXTRAS[name][0],
                f"lacks {', '.join(lacking)}: pip install 'atlas_kernels[{name}]'"
                if lacking
                else "installed",
            )
            for name, lacking in extras.items()
        ],
        title="Extras",
    )
    return {
        "versions": versions,
        "devices": devices,
        "backends": ak.backends(),
        "missing": extras,
    }


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
