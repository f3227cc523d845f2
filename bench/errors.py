"""Relative error of packed task vectors, by how many elements share a scale.

    python -m bench.errors

On all task vectors of the demo: ``|decoded - delta| / |delta|`` over all their elements.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

from atlas_kernels.codecs import CODECS, Packed
from atlas_kernels.codecs.packed import GROUP, quantize
from atlas_kernels.demo.assets import load_task_vectors

GROUPS = (32, 64, GROUP, 256, 512)


def main() -> None:
    """Prints the table."""
    deltas = [
        delta.flatten() for vector in load_task_vectors().values() for delta in vector.values()
    ]
    table = Table(title="Relative error of the demo's task vectors; bits per weight in brackets")
    table.add_column("codec")
    for size in GROUPS:
        table.add_column(f"one scale per {size}", justify="right")
    table.add_column("per tensor", justify="right")
    for codec in CODECS.values():
        if isinstance(codec, Packed):
            cells = [
                f"{error(deltas, codec.bits, size):.2%} ({codec.bits + 16 / size:.3f})"
                for size in GROUPS
            ]
            table.add_row(codec.name, *cells, f"{error(deltas, codec.bits, None):.2%}")
    Console(width=120).print(table)


def error(deltas: list[Tensor], bits: int, size: int | None) -> float:
    """Over all deltas together; ``size`` None gives every tensor one scale."""
    wrong, total = 0.0, 0.0
    for delta in deltas:
        groups = pad(delta, (0, -delta.numel() % (size or 1))).view(-1, size or delta.numel())
        levels, scales = quantize(groups, bits)
        decoded = levels * scales.float()
        difference = (decoded - groups).flatten()[: delta.numel()]
        wrong += float(difference.double().square().sum())
        total += float(delta.double().square().sum())
    return float(torch.tensor(wrong / total).sqrt())


if __name__ == "__main__":
    main()
