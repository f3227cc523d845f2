"""Measures composition with coefficients by groups of elements (aTLAS x K).

    python -m bench.partitions [--groups 5 80 1200] [--vectors 21] [--blocks 152] [--device cuda]
                               [--threads 2] [--repeats 5] [--out FILE]

Against plain composition with one coefficient per block, and against PyTorch with the groups as
stored indices: it looks coefficients up, and adds products into groups, vector by vector. All are
verified on the first blocks before they are timed, in turn, on the first `--blocks` of ViT-B/32.
FILE receives one JSON line per way and direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from atlas_kernels.bank import Segment
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.groups import group_of, slots, tile_keys
from atlas_kernels.ops.layout import TILE, pieces

from . import arguments
from .cases import Case, vit_b_32
from .codecs import DIRECTIONS, VERIFIED_BLOCKS, random_segment
from .measure import BACKENDS, interleaved, write_rows

Row = dict[str, Any]
Functions = dict[str, Callable[[], Tensor]]
NAMES = ("bf16", "int4")
TILES_AT_ONCE = 512


def main() -> None:
    """Runs the measurements and prints a table."""
    parser = arguments.timing("partitions", __doc__, 5)
    parser.add_argument("--groups", type=int, nargs="+", default=[5, 80, 1200], metavar="K")
    parser.add_argument("--vectors", type=int, default=21, metavar="N")
    parser.add_argument("--blocks", type=int, default=152)
    args = parser.parse_args()
    console, device = arguments.started(args)
    case = vit_b_32(args.vectors)
    case = Case(case.name, case.shapes[: args.blocks], args.vectors)
    rows = list(throughput(case, args.groups, args.repeats, args.device))
    console.print(table(rows))
    write_rows(args.out, rows, device)


def throughput(case: Case, groups: Sequence[int], repeats: int, device: str) -> Iterator[Row]:
    """Verified, interleaved times of both directions for every number of groups."""
    functions: Functions = {}
    few, n = case.shapes[:VERIFIED_BLOCKS], case.num_vectors
    for codec in NAMES:
        verified = random_segment(CODECS[codec], few, n, device)
        segment = random_segment(CODECS[codec], case.shapes, n, device)
        for backend in BACKENDS[device]:
            _verify(verified, groups, backend)
            functions |= _plain(segment, backend)
            for count in groups:
                functions |= _ours(segment, count, backend)
        if codec == "bf16":
            # Values do not matter to its speed: the bank's, as if they lay vector by vector.
            rows = segment.deltas.view(n, -1)
            for count in groups:
                functions |= _torch(segment, rows, count)
    seconds = interleaved(functions, repeats, device)
    for name, measured in seconds.items():
        way, direction = name.split(" / ")
        yield {
            "case": case.name,
            "parameters": case.numel,
            "vectors": case.num_vectors,
            "way": way,
            "direction": direction,
            "seconds_q20": measured.low,
            "seconds": measured.median,
            "seconds_q80": measured.high,
        }


def _plain(segment: Segment, backend: str) -> Functions:
    coef = segment.base.new_ones(segment.num_vectors, len(segment.columns))
    name, base = f"{backend}, {segment.codec.name}, by block", segment.base
    return {
        f"{name} / forward": lambda: segment.compose(coef, backend),
        f"{name} / backward": lambda: segment.coef_grad(base, backend),
    }


def _ours(segment: Segment, groups: int, backend: str) -> Functions:
    coef, keys, base = coefficients(segment, groups), keys_of(segment), segment.base
    name = f"{backend}, {segment.codec.name}, K = {groups}"
    return {
        f"{name} / forward": lambda: segment.compose(coef, backend, keys),
        f"{name} / backward": lambda: segment.coef_grad(base, backend, keys, groups),
    }


def _torch(segment: Segment, rows: Tensor, groups: int) -> Functions:
    """For deltas [N, P], with the group of every element in two bytes."""
    coef, layout = coefficients(segment, groups), segment.layout
    group = torch.empty(layout.numel, dtype=torch.int16, device=segment.base.device)
    offsets = layout.tile_offset.tolist()
    for first, keys in enumerate(keys_of(segment).split(TILES_AT_ONCE)):
        start = first * TILES_AT_ONCE
        for k, its in enumerate(group_of(slots(keys, TILE), groups), start):
            group[offsets[k] : offsets[k + 1]] = its[: offsets[k + 1] - offsets[k]]
    spans = list(zip(layout.offsets, layout.offsets[1:], strict=False))

    def forward() -> Tensor:
        total = segment.base.clone()
        for b, (start, end) in enumerate(spans):
            index = group[start:end].int()
            for its, row in zip(coef[:, b], rows, strict=True):
                total[start:end].addcmul_(its.index_select(0, index), row[start:end].float())
        return total

    def backward() -> Tensor:
        result = rows.new_zeros(len(rows), len(spans), groups, dtype=torch.float32)
        for b, (start, end) in enumerate(spans):
            index, grad = group[start:end].long(), segment.base[start:end]
            for its, row in zip(result[:, b], rows, strict=True):
                its.scatter_add_(0, index, grad * row[start:end])
        return result

    return {
        f"torch, bf16, K = {groups} / forward": forward,
        f"torch, bf16, K = {groups} / backward": backward,
    }


def coefficients(segment: Segment, groups: int) -> Tensor:
    """[N, B, K]."""
    generator = torch.Generator().manual_seed(0)
    coef = torch.randn(segment.num_vectors, len(segment.columns), groups, generator=generator)
    return coef.to(segment.base.device)


def keys_of(segment: Segment) -> Tensor:
    """Of its tiles, with blocks named by their columns."""
    return tile_keys([str(column) for column in segment.columns], segment.layout, 0)


def _verify(segment: Segment, groups: Sequence[int], backend: str) -> None:
    """Stops unless ours is the peer's, on deltas that the codec decodes."""
    count, codec = segment.num_vectors, segment.codec
    rows = []
    for block in segment.blocks():
        length = block.layout.numel
        items = pieces(block.deltas, length, count)
        scales = (
            [None] * len(items) if block.scales is None else pieces(block.scales, length, count)
        )
        for part, its in zip(items, scales, strict=True):
            rows.append(
                torch.stack(
                    [
                        codec.decode(
                            part[:, i].flatten(), its if its is None else its[:, i].flatten()
                        )
                        for i in range(count)
                    ]
                )
            )
    dense = torch.cat(rows, 1)
    for k in groups:
        ours, peer = _ours(segment, k, backend), _torch(segment, dense, k)
        for (name, function), expected in zip(ours.items(), peer.values(), strict=True):
            wanted = expected()
            error = (function() - wanted).abs().max()
            if not error <= 1e-4 * wanted.abs().max():
                raise SystemExit(f"{name} is wrong by {error:.3g}: nothing is measured")


def table(rows: Sequence[Row]) -> Table:
    """Times of both directions, and per element of a task vector."""
    first = rows[0]
    elements = first["parameters"] * first["vectors"]
    title = f"{first['case']}, {first['parameters'] / 1e6:.1f} M parameters, N = {first['vectors']}"
    result = Table(title=title, title_justify="left")
    result.add_column("way")
    for direction in DIRECTIONS:
        for heading in (f"{direction} ms", "q20 - q80", "ps per element"):
            result.add_column(heading, justify="right")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = [way]
        for row in (row for row in rows if row["way"] == way):
            low, median, high = (row[f"seconds{q}"] for q in ("_q20", "", "_q80"))
            cells += [f"{median * 1e3:.3g}", f"{low * 1e3:.3g} - {high * 1e3:.3g}"]
            cells.append(f"{median / elements * 1e12:.3g}")
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    main()
