"""Measures how much memory a learning step needs, and how fast it streams a bank from a file.

    python -m bench.memory peaks [--vectors 4 16 64] [--codec int4] [--batch 8]
    python -m bench.memory stream FILE [--vectors 48] [--codec bf16] [--batch 8] [--steps 2]

`peaks` runs one step on ViT-B/32 in every memory mode, each in a process of its own: bytes of
tensors alive at once, counted; the resident size of the process, above what it had before the bank
was loaded; and what `atlas_kernels.plan` predicts. It compares gradients with those of "whole".
`stream` packs FILE if it is not there, reads it from end to end before and after, and learns from
it in between: always around the system's cache. Pack in a run of its own to see what a step holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.bank import open_direct
from atlas_kernels.models import PeakMemory, activation_bytes
from atlas_kernels.tasks.clip import image_encoder

from . import arguments
from .measure import learning_step, status

MODES = ("whole", "recompute", "stream")
_MEGABYTE = 1e6


def main() -> None:
    """Runs what the command line names."""
    parser = arguments.parser("memory", __doc__)
    commands = parser.add_subparsers(required=True)
    several = commands.add_parser("peaks")
    several.set_defaults(run=peaks, device="cpu")
    several.add_argument("--vectors", type=int, nargs="+", default=[4, 16, 64], metavar="N")
    streaming = commands.add_parser("stream")
    streaming.set_defaults(run=stream)
    streaming.add_argument("file", type=Path)
    streaming.add_argument("--vectors", type=int, default=48, metavar="N")
    streaming.add_argument("--steps", type=int, default=2)
    single = commands.add_parser("step")
    single.set_defaults(run=lambda args: print(json.dumps(one_step(args.file, args.mode, args))))
    single.add_argument("file", type=Path)
    single.add_argument("mode", choices=MODES)
    for command, codec in ((several, "int4"), (streaming, "bf16"), (single, "")):
        command.add_argument("--codec", default=codec)
        command.add_argument("--batch", type=int, default=8)
        command.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.run(args)


def peaks(args: argparse.Namespace) -> None:
    """Prints a table of peaks by memory mode and number of task vectors."""
    console, _ = arguments.started(args)
    table = Table(title=f"One step on ViT-B/32, codec {args.codec}, batch {args.batch}; MB")
    for heading in ("memory", "N", "bank", "counted", "resident", "predicted", "gradient"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for count in args.vectors:
            path = Path(folder) / f"{count}.safetensors"
            pack(path, count, args.codec)
            expected: list[float] = []
            for mode in MODES:
                options = [f"--batch={args.batch}", f"--threads={args.threads}"]
                command = [sys.executable, "-m", "bench.memory", "step", str(path), mode]
                out = subprocess.run([*command, *options], check=True, capture_output=True)
                row = json.loads(out.stdout)
                expected = expected or row["gradient"]
                difference = (
                    (torch.tensor(row["gradient"]) - torch.tensor(expected)).norm()
                    / torch.tensor(expected).norm()
                ).item()
                if not difference < 1e-4:
                    raise RuntimeError(f"{mode} gives another gradient: {difference:.1e}")
                sizes = (row[key] / _MEGABYTE for key in ("bank", "counted", "resident", "plan"))
                table.add_row(
                    mode, str(count), *(f"{size:.0f}" for size in sizes), f"{difference:.0e}"
                )
            path.unlink()
    console.print(table)


def stream(args: argparse.Namespace) -> None:
    """Prints at which share of the disk's own rate steps read a bank."""
    if not args.file.exists():
        pack(args.file, args.vectors, args.codec)
    drop_cache(args.file)
    before = read_rate(args.file)
    row = one_step(args.file, "stream", args)
    after = read_rate(args.file)
    best = max(before, after)
    rate = row["read"] / row["seconds"]
    print(f"bank of {row['bank'] / 1e9:.1f} GB, {args.steps} steps after the first")
    print(
        f"disk, read from end to end before and after: {before / 1e9:.2f}, {after / 1e9:.2f} GB/s"
    )
    print(
        f"step: {row['seconds'] / args.steps:.1f} s for {row['read'] / args.steps / 1e9:.1f} GB "
        f"({row['read'] / args.steps / row['bank']:.2f} banks), {rate / 1e9:.2f} GB/s"
    )
    print(f"share of the disk's rate: {rate / best:.2f}")
    print(f"resident at most: {row['high_water'] / 1e9:.2f} GB")


def one_step(path: Path, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Peaks, seconds, bytes read and the gradient of a learning step on the bank at ``path``."""
    torch.manual_seed(0)
    module = encoder()
    images = torch.randn(args.batch, 3, 224, 224)
    activations = activation_bytes(module, [images])
    base_tensors = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
    resident = status("VmRSS")
    bank = ak.TaskVectorBank.load(path)
    model = ak.ComposedModel(module, bank, memory=mode)  # type: ignore[arg-type]

    step = partial(learning_step, model, images)
    # The first step learns the order of the blocks.
    with PeakMemory() as memory:
        gradient = step()
    read, seconds = [0], 0.0
    if mode == "stream":
        _count_reads(model, read)
        started = time.perf_counter()
        for _ in range(args.steps if "steps" in args else 1):
            step()
        seconds = time.perf_counter() - started
    its = ak.plan(
        base_tensors,
        len(bank.names),
        codec=bank.codec,
        memory=mode,  # type: ignore[arg-type]
        activations=activations,
    )
    deltas = sum(
        s.deltas.nbytes + (0 if s.scales is None else s.scales.nbytes) for s in bank.segments
    )
    base = sum(s.base.nbytes for s in bank.segments)
    return {
        "bank": deltas,
        # Tensors made in the step, and those that were there: the base, and the bank if it is read.
        "counted": memory.peak + base + (0 if mode == "stream" else deltas),
        "resident": status("VmHWM") - resident + base,
        "high_water": status("VmHWM"),
        "plan": its.peak,
        "read": read[0],
        "seconds": seconds,
        "gradient": gradient.flatten().tolist(),
    }


def pack(path: Path, count: int, codec: str) -> None:
    """A bank of ViT-B/32 with ``count`` task vectors of the size that fine-tuning makes."""
    torch.manual_seed(0)
    base = encoder().state_dict()
    vectors = {}
    # A few different ones, again and again: no more would fit into memory.
    distinct = [
        ak.TaskVector({name: 1e-3 * torch.randn_like(t) for name, t in base.items()})
        for _ in range(min(count, 4))
    ]
    for i in range(count):
        vectors[f"task-{i}"] = distinct[i % len(distinct)]
    ak.TaskVectorBank.pack(path, base, vectors, codec=codec, progress=True)


def encoder() -> nn.Module:
    """The ViT-B/32 image encoder with random weights, always the same."""
    torch.manual_seed(1)
    return image_encoder("ViT-B-32")


def read_rate(path: Path, bytes_each: int = 1 << 23) -> float:
    """Bytes per second of reading a file from end to end, as a stream does it."""
    descriptor, buffer = open_direct(path), mmap(-1, bytes_each)
    try:
        size, started = path.stat().st_size, time.perf_counter()
        for position in range(0, size, bytes_each):
            os.preadv(descriptor, [buffer], position)
        return size / (time.perf_counter() - started)
    finally:
        os.close(descriptor)


def drop_cache(path: Path) -> None:
    """Makes the next read of a file come from the disk, whatever the file system."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _count_reads(model: ak.ComposedModel, total: list[int]) -> None:
    source: Any = model._source._mode.blocks._source  # type: ignore[union-attr]
    read = source.read

    def counted(name: str, offset: int, count: int, room: Tensor) -> Tensor:
        total[0] += count
        found: Tensor = read(name, offset, count, room)
        return found

    source.read = counted


if __name__ == "__main__":
    main()
