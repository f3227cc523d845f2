"""Relative error of packed task vectors, by how many elements share a scale; and in residual form.

    python -m bench.errors

On all embedded task vectors: ``|decoded - delta| / |delta|`` over all their elements. In residual
form N vectors share one stored vector, their mean in a few bits, and each keeps its difference from
that as stored: RTVQ (arXiv 2503.06921). Beside it the budget of as many bits. The first eight
vectors are more alike than vectors of different tasks are.
"""

from __future__ import annotations

import itertools

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import pad

import atlas_kernels as ak
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.codecs.packed import GROUP, Packed, quantize
from atlas_kernels.tasks.embedded import load_task_vectors

# The shared vector's bits, the differences' bits.
RESIDUALS = ((3, 2), (4, 2), (4, 1), (2, 2))
COUNTS = (8, 20)
GROUPS = (32, 64, GROUP, 256, 512)


def main() -> None:
    """Prints the tables."""
    vectors = load_task_vectors()
    deltas = [delta.flatten() for its in vectors.values() for delta in its.deltas.values()]
    table = Table(title="Relative error of the embedded task vectors; bits per weight in brackets")
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
    console = Console(width=120)
    console.print(table)
    for count in COUNTS:
        console.print(residual_table(dict(list(vectors.items())[:count])))


def residual_table(vectors: dict[str, ak.TaskVector]) -> Table:
    """Errors of the residual form, each above the budget of the same bits."""
    count = len(vectors)
    cosines = [vectors[a].cosine(vectors[b]) for a, b in itertools.combinations(vectors, 2)]
    table = Table(title=f"{count} vectors, mean cosine {sum(cosines) / len(cosines):.2f}")
    for heading in ("form", "bits per weight", "error", "same bits as a budget"):
        table.add_column(heading, justify="right")
    flat = torch.stack(
        [
            torch.cat([pad(d.flatten(), (0, -d.numel() % GROUP)) for d in its.deltas.values()])
            for its in vectors.values()
        ]
    )
    for shared, own in RESIDUALS:
        bits = own + 16 / GROUP + (shared + 16 / GROUP) / count
        mean = stored(flat.mean(0), shared)
        residual = torch.stack([mean + stored(row - mean, own) for row in flat])
        table.add_row(
            f"mean in {shared}, differences in {own}",
            f"{bits:.3f}",
            f"{relative(residual, flat):.2%}",
            f"{budget_error(vectors, bits):.2%}",
        )
    for bits in (3, 2, 1):
        plain = torch.stack([stored(row, bits) for row in flat])
        table.add_row(
            "sign" if bits == 1 else f"int{bits}",
            f"{bits + 16 / GROUP:.3f}",
            f"{relative(plain, flat):.2%}",
            "",
        )
    return table


def stored(row: Tensor, bits: int) -> Tensor:
    """A flat tensor of whole groups as the codec of so many bits gives it back."""
    levels, scales = quantize(row.view(-1, GROUP), bits)
    return (levels * scales.float()).flatten()


def relative(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|``."""
    return float((found - expected).double().norm() / expected.double().norm())


def budget_error(vectors: dict[str, ak.TaskVector], bits: float) -> float:
    """The error over all vectors with the codec ``auto:<bits>``."""
    base = {
        name: torch.zeros_like(delta) for name, delta in next(iter(vectors.values())).deltas.items()
    }
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=f"auto:{bits}")
    norms = torch.tensor(
        [[float(its.deltas[block].norm()) for block in bank.blocks] for its in vectors.values()],
        dtype=torch.float64,
    )
    return float((bank.errors * norms).norm() / norms.norm())


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
