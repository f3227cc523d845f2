"""Clocks, memory and the description of the machine."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atlas_kernels as ak

# What is measured on which device.
BACKENDS = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
GPU_CALLS = 8


@dataclass(frozen=True)
class Seconds:
    """Median and 0.2 / 0.8 quantiles of repeated runs."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Seconds:
        """The quantiles of at least two samples."""
        quintiles = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(quintiles[0], statistics.median(samples), quintiles[3])


def interleaved(
    functions: dict[str, Callable[[], Any]], repeats: int, device: str = "cpu"
) -> dict[str, Seconds]:
    """Times every function, one after the other, `repeats` times over.

    Whatever slows the machine down for a while then slows all of them. Each timed call follows a
    call like it, as in training: caches and allocators are as that one left them. On a GPU a sample
    is the mean of GPU_CALLS calls that wait for nothing but each other, as in training too: what
    the host does for a call counts only where the GPU has to wait for it. (One call, if that takes
    a tenth of a second.)
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            wait()
            short = time.perf_counter() - start < 0.1
            calls = GPU_CALLS if device == "cuda" and short else 1
            start = time.perf_counter()
            for _ in range(calls):
                result = function()
            wait()
            samples[name].append((time.perf_counter() - start) / calls)
            del result
    return {name: Seconds.of(values) for name, values in samples.items()}


def bandwidth_probes(
    device: str = "cpu", bytes_each: int = 2**30
) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """A large sum and a large copy, as functions to time, and the bytes that each moves."""
    source = torch.ones(bytes_each // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    probes: dict[str, Callable[[], Any]] = {
        "sum": source.sum,
        "copy": lambda: target.copy_(source),
    }
    return probes, {"sum": bytes_each, "copy": 2 * bytes_each}


def with_peak(function: Callable[[], Any], device: str = "cpu") -> tuple[Any, int | None]:
    """A function's result, and by how many bytes the process grew at most while it ran.

    On a GPU: what PyTorch allocated there. None where the system does not tell.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        result = function()
        return result, torch.cuda.max_memory_allocated() - allocated
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
    except OSError:
        return function(), None
    result = function()
    return result, status("VmHWM") - before


def status(key: str) -> int:
    """A size of this process in bytes, such as its resident one (VmRSS), as Linux tells it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def learning_step(model: ak.ComposedModel, images: Tensor) -> Tensor:
    """The gradient of the coefficients in one step of learning."""
    model.coef.grad = None
    with torch.no_grad():
        # As after an optimiser's step: weights are kept only while the coefficients stay.
        model.coef.add_(0)
    model(images).square().mean().backward()
    assert model.coef.grad is not None
    return model.coef.grad


def write_rows(path: Path | None, rows: Iterable[dict[str, Any]], device: dict[str, Any]) -> None:
    """One JSON line per row, each with the machine that it was measured on, if there is a path."""
    if path:
        path.write_text("".join(json.dumps(row | device) + "\n" for row in rows))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on."""
    on_gpu = device == "cuda"
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **({"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if on_gpu else {}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "atlas_kernels": ak.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "backends": ak.backends(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
