"""Measures composition with every codec of the deltas.

    python -m bench.codecs [--vectors 21] [--device cuda] [--threads 2] [--repeats 9] [--out FILE]

Every codec is verified on the first blocks before it is timed on all of ViT-B/32, and all are timed
in turn, together with a large sum and a large copy. FILE receives one JSON line per codec and
backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from atlas_kernels.bank import Segment
from atlas_kernels.ops.codecs import CODECS, Codec
from atlas_kernels.ops.codecs.packed import Packed
from atlas_kernels.ops.layout import Layout

from . import arguments
from .cases import Case, vit_b_32
from .measure import BACKENDS, bandwidth_probes, interleaved, write_rows

Row = dict[str, Any]
NAMES = ("bf16", "int8", "int4", "int3", "int2", "sign")
DIRECTIONS = ("forward", "backward")
# Of 152. The reference is slow; the rest differs in nothing but its shapes.
VERIFIED_BLOCKS = 12


def main() -> None:
    """Runs the measurements and prints a table."""
    parser = arguments.timing("codecs", __doc__, 9)
    parser.add_argument("--vectors", type=int, default=21, metavar="N")
    args = parser.parse_args()
    console, device = arguments.started(args)
    rows = list(throughput(vit_b_32(args.vectors), args.repeats, args.device))
    for backend in BACKENDS[args.device]:
        console.print(table([row for row in rows if row["backend"] == backend]))
    write_rows(args.out, rows, device)


def throughput(case: Case, repeats: int, device: str) -> Iterator[Row]:
    """Verified, interleaved times of both directions with every codec."""
    functions: dict[str, Callable[[], Any]] = {}
    few = case.shapes[:VERIFIED_BLOCKS]
    for name in NAMES:
        verified = random_segment(CODECS[name], few, case.num_vectors, device)
        segment = random_segment(CODECS[name], case.shapes, case.num_vectors, device)
        for backend in BACKENDS[device]:
            _verify(verified, backend)
            for direction, function in zip(DIRECTIONS, _functions(segment, backend), strict=True):
                functions[f"{backend} {name} / {direction}"] = function
    probes, probe_bytes = bandwidth_probes(device)
    seconds = interleaved({**probes, **functions}, repeats, device)
    bandwidth = max(probe_bytes[probe] / seconds[probe].median for probe in probes)

    def both(name: str) -> float:
        return sum(seconds[f"{name} / {direction}"].median for direction in DIRECTIONS)

    for backend, name in itertools.product(BACKENDS[device], NAMES):
        row: Row = {
            "case": case.name,
            "parameters": case.numel,
            "vectors": case.num_vectors,
            "backend": backend,
            "codec": name,
            "bandwidth": bandwidth,
            "speedup_over_bf16": both(f"{backend} bf16") / both(f"{backend} {name}"),
        }
        for direction in DIRECTIONS:
            measured = seconds[f"{backend} {name} / {direction}"]
            # The base and the output, or the gradient, in float32.
            wide = 8 if direction == "forward" else 4
            deltas = case.num_vectors * CODECS[name].bits_per_weight / 8
            moved = case.numel * (wide + deltas)
            row[direction] = {
                "seconds_q20": measured.low,
                "seconds": measured.median,
                "seconds_q80": measured.high,
                "bytes": moved,
                "fraction_of_bandwidth": moved / measured.median / bandwidth,
            }
        yield row


def random_segment(
    codec: Codec, shapes: Sequence[Sequence[int]], num_vectors: int, device: str = "cpu"
) -> Segment:
    """A segment of random stored deltas: what they are worth does not matter to the kernels."""
    numel = Layout.from_shapes(shapes, codec.alignment).numel
    items, scales = codec.items(num_vectors * numel), codec.scales(num_vectors * numel)
    if isinstance(codec, Packed):
        deltas = torch.randint(-(2**31), 2**31, (items,), dtype=torch.int32, device=device)
        sizes = torch.rand(scales, device=device).mul_(0.01).bfloat16()
    else:
        deltas, sizes = torch.empty(items, dtype=codec.dtype, device=device).normal_(0, 0.1), None
    columns, base = range(len(shapes)), torch.randn(numel, device=device)
    return Segment.of(columns, shapes, codec, num_vectors, base, deltas, sizes)


def _functions(segment: Segment, backend: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    coef = torch.randn(segment.num_vectors, len(segment.columns), generator=generator)
    coef = coef.to(segment.base.device)
    return (
        lambda: segment.compose(coef, backend),
        lambda: segment.coef_grad(segment.base, backend),
    )


def _verify(segment: Segment, backend: str) -> None:
    ours, reference = _functions(segment, backend), _functions(segment, "torch")
    for direction, function, expected in zip(DIRECTIONS, ours, reference, strict=True):
        wanted = expected()
        error = (function() - wanted).abs().max()
        if not error <= 1e-4 * wanted.abs().max():
            raise SystemExit(
                f"{backend} {segment.codec.name} / {direction} is wrong by {error:.3g}: nothing is "
                "measured"
            )


def table(rows: Sequence[Row]) -> Table:
    """Times, shares of the machine's bandwidth and speed-ups."""
    first = rows[0]
    title = f"{first['case']}, N = {first['vectors']}, {first['backend']}"
    result = Table(
        title=f"{title}; sum or copy: {first['bandwidth'] / 1e9:.1f} GB/s", title_justify="left"
    )
    result.add_column("codec")
    for direction in DIRECTIONS:
        for heading in (f"{direction} ms", "q20 - q80", "of bandwidth"):
            result.add_column(heading, justify="right")
    result.add_column("x bf16, both", justify="right")
    for row in rows:
        cells = [row["codec"]]
        for direction in DIRECTIONS:
            entry = row[direction]
            cells.append(f"{entry['seconds'] * 1e3:.3g}")
            cells.append(f"{entry['seconds_q20'] * 1e3:.3g} - {entry['seconds_q80'] * 1e3:.3g}")
            cells.append(f"{entry['fraction_of_bandwidth']:.2f}")
        result.add_row(*cells, f"{row['speedup_over_bf16']:.2f}")
    return result


if __name__ == "__main__":
    main()
