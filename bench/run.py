"""Measures composition against its alternatives and against the memory bandwidth of the machine.

    python -m bench.run [--vectors 1 8 21] [--device cuda] [--threads 2] [--repeats 9]
                        [--ways ...] [--out FILE]

Every way is verified before it is timed, and all are timed in turn, together with a large sum and a
large copy. FILE receives one JSON line per measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from atlas_kernels.ops import reference

from . import arguments
from .cases import Inputs, tiny, vit_b_32
from .measure import (
    Seconds,
    bandwidth_probes,
    interleaved,
    with_peak,
    write_rows,
)
from .peers import TOLERANCE, WAYS

Row = dict[str, Any]


def main() -> None:
    """Runs the measurements and prints a table for each number of task vectors."""
    parser = arguments.timing("run", __doc__, 9)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 8, 21], metavar="N")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS))
    args = parser.parse_args()
    console, device = arguments.started(args)
    ways = args.ways or [w for w in WAYS if args.device == "cuda" or not w.startswith("triton")]
    rows: list[Row] = []
    for num_vectors in args.vectors:
        rows += throughput(num_vectors, ways, args.repeats, args.device)
        console.print(throughput_table(rows, num_vectors))
    ours = [way for way in ways if way.split()[0] in ("atlas", "triton")]
    rows += host_cost(args.vectors, ours, args.device)
    console.print(host_table(rows))
    write_rows(args.out, rows, device)


def throughput(num_vectors: int, ways: Sequence[str], repeats: int, device: str) -> Iterator[Row]:
    """Verified, interleaved times of both directions on ViT-B/32."""
    inputs = Inputs.random(vit_b_32(num_vectors), device)
    functions, peaks = _verified(inputs, ways, device)
    probes, probe_bytes = bandwidth_probes(device)
    seconds = interleaved({**probes, **functions}, repeats, device)
    bandwidth = max(probe_bytes[probe] / seconds[probe].median for probe in probes)
    for name in functions:
        way, direction = name.split(" / ")
        row = _row(inputs, way, direction, seconds[name])
        moved = inputs.case.bytes(direction)
        yield row | {
            "bytes": moved,
            "bytes_per_second": moved / seconds[name].median,
            "bandwidth": bandwidth,
            "fraction_of_bandwidth": moved / seconds[name].median / bandwidth,
            "speedup_over_loop": (
                seconds[f"loop / {direction}"].median / seconds[name].median
                if "loop" in ways
                else None
            ),
            "peak_extra_bytes": peaks[name],
        }


def host_cost(vectors: Sequence[int], ways: Sequence[str], device: str) -> Iterator[Row]:
    """Times of calls that have next to nothing to compute."""
    for num_vectors in vectors:
        inputs = Inputs.random(tiny(num_vectors), device)
        functions, _ = _verified(inputs, ways, device)
        for name, seconds in interleaved(functions, 200, device).items():
            way, direction = name.split(" / ")
            yield _row(inputs, way, direction, seconds)


def _row(inputs: Inputs, way: str, direction: str, seconds: Seconds) -> Row:
    case = inputs.case
    return {
        "case": case.name,
        "parameters": case.numel,
        "blocks": len(case.shapes),
        "vectors": case.num_vectors,
        "base_dtype": str(case.base_dtype).removeprefix("torch."),
        "delta_dtype": str(case.delta_dtype).removeprefix("torch."),
        "way": way,
        "direction": direction,
        "seconds_q20": seconds.low,
        "seconds": seconds.median,
        "seconds_q80": seconds.high,
    }


def _verified(
    inputs: Inputs, ways: Sequence[str], device: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, int | None]]:
    """The functions to time, each checked once, and how much memory that first call took."""
    deltas = [delta for vector in inputs.deltas for delta in vector]
    expected = {
        "forward": reference.compose(inputs.base, deltas, inputs.coef),
        "backward": [reference.coef_grad(inputs.grads, deltas, torch.float32)],
    }
    functions: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    for way in ways:
        for direction, function in zip(expected, WAYS[way](inputs), strict=True):
            name = f"{way} / {direction}"
            result, peaks[name] = with_peak(function, device)
            tensors = [result] if isinstance(result, Tensor) else result
            for tensor, wanted in zip(tensors, expected[direction], strict=True):
                _check(name, tensor, wanted, TOLERANCE.get(way, 1e-4))
            del result, tensors
            functions[name] = function
    return functions, peaks


def _check(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (result - expected).abs().max()
    if not error <= tolerance * expected.abs().max():
        raise SystemExit(f"{name} is wrong by {error:.3g}: nothing is measured")


def throughput_table(rows: Sequence[Row], num_vectors: int) -> Table:
    """Times, rates and ratios for one number of task vectors."""
    chosen = [row for row in rows if row["vectors"] == num_vectors and "bytes" in row]
    bandwidth = chosen[0]["bandwidth"] / 1e9
    table = Table(
        title=f"{chosen[0]['case']}, N = {num_vectors}; sum or copy: {bandwidth:.1f} GB/s",
        title_justify="left",
    )
    for heading in ("way", "direction"):
        table.add_column(heading)
    for heading in ("ms", "q20 - q80", "GB/s", "of bandwidth", "x loop", "peak MB"):
        table.add_column(heading, justify="right")
    for row in sorted(chosen, key=lambda row: row["direction"], reverse=True):
        speedup, peak = row["speedup_over_loop"], row["peak_extra_bytes"]
        table.add_row(
            row["way"],
            row["direction"],
            f"{row['seconds'] * 1e3:.3g}",
            f"{row['seconds_q20'] * 1e3:.3g} - {row['seconds_q80'] * 1e3:.3g}",
            f"{row['bytes_per_second'] / 1e9:.4g}",
            f"{row['fraction_of_bandwidth']:.2f}",
            "-" if speedup is None else f"{speedup:.1f}",
            "-" if peak is None else f"{peak / 1e6:.0f}",
        )
    return table


def host_table(rows: Sequence[Row]) -> Table:
    """Milliseconds per call."""
    table = Table(title="152 tiny blocks: cost of a call", title_justify="left")
    for heading in ("way", "direction", "N", "ms", "q20 - q80"):
        table.add_column(heading, justify="left" if heading in ("way", "direction") else "right")
    for row in rows:
        if "bytes" not in row:
            low, high = row["seconds_q20"] * 1e3, row["seconds_q80"] * 1e3
            table.add_row(
                row["way"],
                row["direction"],
                str(row["vectors"]),
                f"{row['seconds'] * 1e3:.2f}",
                f"{low:.2f} - {high:.2f}",
            )
    return table


if __name__ == "__main__":
    main()
