"""Measures launch configurations of the Triton kernels on a GPU: what `config` chooses, and others.

    python -m bench.launches [--vectors 1 8 21] [--repeats 9] [--out FILE]

Rates are shares of what a large sum or copy reaches in the same run. FILE receives one JSON line
per kernel and configuration.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.table import Table

import atlas_kernels as ak
from atlas_kernels.bank import Segment
from atlas_kernels.ops.backends.triton import config
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.layout import TILE

from . import arguments
from .cases import Inputs, vit_b_32
from .codecs import random_segment
from .measure import bandwidth_probes, interleaved, write_rows
from .partitions import coefficients, keys_of

Row = dict[str, Any]
# (tile, warps, whether the vectors are unrolled): below, N up to 8 alone may be.
FORWARD = tuple(itertools.product((1024, 2048, 4096), (4, 8), (False, True)))
WARPS = {"backward": (4, 8, 16), "packed": (2, 4, 8, 16), "partition": (8, 16, 32)}


def main() -> None:
    """Runs the measurements and prints a table."""
    parser = arguments.timing("launches", __doc__, 9, ("cuda",))
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 8, 21], metavar="N")
    args = parser.parse_args()
    console, device = arguments.started(args)
    rows = [row for n in args.vectors for row in measured(n, args.repeats)]
    table = Table(title=device["gpu"], title_justify="left")
    for heading in ("kernel", "N", "tile", "warps", "unrolled", "ms", "of bandwidth"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    write_rows(args.out, rows, device)


def measured(num_vectors: int, repeats: int) -> Iterator[Row]:
    """Every kernel with every configuration, in turn, for one number of vectors."""
    functions: dict[tuple[Any, ...], Callable[[], Any]] = {}
    moved: dict[str, float] = {}
    case = vit_b_32(num_vectors)
    inputs = Inputs.random(case, "cuda")
    bank = random_segment(CODECS["bf16"], case.shapes, num_vectors, "cuda")
    coef = inputs.coef
    for tile, warps, unrolled in FORWARD:
        if unrolled and num_vectors > config.UNROLL_LIMIT:
            continue
        launch = config.Launch(tile, warps, num_vectors if unrolled else 0)
        functions["list forward", launch] = lambda: ak.compose(
            inputs.base, inputs.deltas, coef, backend="triton"
        )
        functions["bank forward", launch] = lambda: bank.compose(coef, "triton")
    moved["list forward"] = moved["bank forward"] = case.bytes("forward")
    for warps in WARPS["backward"]:
        launch = config.Launch(TILE, warps, 0)
        functions["bank backward", launch] = lambda: bank.coef_grad(bank.base, "triton")
    moved["bank backward"] = case.bytes("backward")
    for codec in ("int8", "int4", "int3", "sign"):
        segment = random_segment(CODECS[codec], case.shapes, num_vectors, "cuda")
        deltas = case.numel * num_vectors * CODECS[codec].bits_per_weight / 8
        for direction, wide, its in _directions(segment, coef):
            name = f"{codec} {direction}"
            moved[name] = case.numel * wide + deltas
            for warps, unroll in itertools.product(WARPS["packed"], (1, 4)):
                functions[name, config.Launch(TILE, warps, unroll)] = its
    for codec, groups in (("bf16", 5), ("bf16", 80), ("bf16", 1200), ("int4", 80)):
        segment = random_segment(CODECS[codec], case.shapes, num_vectors, "cuda")
        deltas = case.numel * num_vectors * CODECS[codec].bits_per_weight / 8
        parts, keys = coefficients(segment, groups), keys_of(segment)
        for direction, wide, its in _directions(segment, parts, keys, groups):
            name = f"{codec}, K = {groups} {direction}"
            moved[name] = case.numel * wide + deltas
            for warps in WARPS["partition"]:
                functions[name, config.Launch(TILE, warps, 0)] = its
    probes, probe_bytes = bandwidth_probes("cuda")
    timed = {key: _configured(key, function) for key, function in functions.items()}
    seconds = interleaved({**probes, **timed}, repeats, "cuda")
    bandwidth = max(probe_bytes[probe] / seconds[probe].median for probe in probes)
    for name, launch in functions:
        median = seconds[name, launch].median
        yield {
            "kernel": name,
            "N": num_vectors,
            "tile": launch.tile,
            "warps": launch.num_warps,
            "unrolled": launch.unroll,
            "ms": 1e3 * median,
            "share": moved[name] / median / bandwidth,
        }


def _directions(
    segment: Segment, coef: Any, keys: Any = None, groups: int = 0
) -> tuple[tuple[str, int, Callable[[], Any]], ...]:
    return (
        ("forward", 8, lambda: segment.compose(coef, "triton", keys)),
        ("backward", 4, lambda: segment.coef_grad(segment.base, "triton", keys, groups)),
    )


def _configured(key: tuple[Any, ...], function: Callable[[], Any]) -> Callable[[], Any]:
    launch = key[1]

    def call() -> Any:
        with _forced(launch):
            return function()

    return call


@contextmanager
def _forced(launch: config.Launch) -> Iterator[None]:
    names = ("forward", "packed", "partition", "BACKWARD")
    before = {name: getattr(config, name) for name in names}
    for name in names[:3]:
        setattr(config, name, lambda *_, **__: launch)
    config.BACKWARD = launch
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


if __name__ == "__main__":
    main()
