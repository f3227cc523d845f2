"""Measures a whole learning step of aTLAS: from coefficients to their gradient.

    python -m bench.step [--vectors 21] [--batch 128] [--codecs bf16 int4] [--device cuda]
                         [--threads 2] [--repeats 5] [--out FILE]

On the ViT-B/32 image encoder, in every memory mode (on a GPU "stream" reads from host memory; for
files see `bench.memory`), against the loop that published code has: blocks composed one by one by
PyTorch, autograd through all of it. FILE receives one JSON line per way.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

import atlas_kernels as ak
from atlas_kernels.tasks.clip import image_encoder

from . import arguments
from .measure import interleaved, learning_step, with_peak, write_rows

Row = dict[str, Any]


def main() -> None:
    """Runs the measurements and prints a table."""
    parser = arguments.timing("step", __doc__, 5)
    parser.add_argument("--vectors", type=int, default=21, metavar="N")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--codecs", nargs="+", default=["bf16", "int4"])
    args = parser.parse_args()
    console, device = arguments.started(args)
    rows = list(measured(args))
    table = Table(
        title=f"ViT-B/32, N = {args.vectors}, batch {args.batch}, float32", title_justify="left"
    )
    table.add_column("way")
    for heading in ("ms", "q20 - q80", "peak MB above the bank"):
        table.add_column(heading, justify="right")
    for row in rows:
        low, median, high = (1e3 * row[f"seconds{q}"] for q in ("_q20", "", "_q80"))
        peak = "-" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
        table.add_row(row["way"], f"{median:.3g}", f"{low:.3g} - {high:.3g}", peak)
    console.print(table)
    write_rows(args.out, rows, device)


def measured(args: argparse.Namespace) -> Iterator[Row]:
    """Verified, interleaved times of every way."""
    torch.manual_seed(0)
    module = image_encoder("ViT-B-32").to(args.device)
    base = {name: p.detach() for name, p in module.named_parameters()}
    vectors = [
        ak.TaskVector({name: (1e-3 * torch.randn_like(p)).bfloat16() for name, p in base.items()})
        for _ in range(args.vectors)
    ]
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    functions: dict[str, Callable[[], Tensor]] = {
        "forward and backward of the model alone": lambda: _alone(module, images)
    }
    named = {f"v{i}": vector for i, vector in enumerate(vectors)}
    for codec in args.codecs:
        bank = ak.TaskVectorBank.from_task_vectors(base, named, codec=codec)
        for memory in ("whole", "recompute"):
            functions[f"{codec}, {memory}"] = _ours(module, bank, memory, images)
        if args.device == "cuda":
            streamed = bank.to("cpu").to(args.device, deltas=False)
            functions[f"{codec}, stream"] = _ours(module, streamed, "stream", images)
    functions["bf16, loop"] = _loop(module, base, vectors, images)
    exact = functions["bf16, loop"]()
    peaks = {}
    for name, function in functions.items():
        found, peaks[name] = with_peak(function, args.device)
        if name.startswith("bf16"):
            error = (found - exact).norm() / exact.norm()
            # The loop's products are bfloat16: a coefficient of no dimension widens nothing.
            if not error < 2e-2:
                raise SystemExit(f"{name} is wrong by {error:.1e}: nothing is measured")
    for name, seconds in interleaved(functions, args.repeats, args.device).items():
        yield {
            "way": name,
            "vectors": args.vectors,
            "batch": args.batch,
            "seconds_q20": seconds.low,
            "seconds": seconds.median,
            "seconds_q80": seconds.high,
            "peak": peaks[name],
        }


def _alone(module: nn.Module, images: Tensor) -> Tensor:
    parameters = list(module.parameters())
    loss = module(images).square().mean()
    return torch.autograd.grad(loss, parameters)[0]


def _ours(
    module: nn.Module, bank: ak.TaskVectorBank, memory: Any, images: Tensor
) -> Callable[[], Tensor]:
    model = ak.ComposedModel(copy.deepcopy(module), bank, memory=memory)

    return partial(learning_step, model, images)


def _loop(
    module: nn.Module, base: dict[str, Tensor], vectors: list[ak.TaskVector], images: Tensor
) -> Callable[[], Tensor]:
    coef = torch.zeros(len(vectors), len(base), device=images.device, requires_grad=True)

    def step() -> Tensor:
        composed = {
            name: block + sum(coef[i, b] * vector.deltas[name] for i, vector in enumerate(vectors))
            for b, (name, block) in enumerate(base.items())
        }
        loss = functional_call(module, composed, images).square().mean()
        return torch.autograd.grad(loss, coef)[0]

    return step


if __name__ == "__main__":
    main()
