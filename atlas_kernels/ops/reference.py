"""The definition of every operator in plain PyTorch, forward and backward.

All other backends are checked against this one. Arithmetic runs in the dtype of `coef` (float32, or
float64 as the oracle of tests), in a fixed order, and is rounded once, at the end. The sum over the
task vectors multiplies, rounds, adds, rounds (no fused multiply-add): that is what PyTorch itself
does, and what every CPU can do alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from .codecs.packed import GROUP, levels
from .groups import group_of, slots, sum_groups
from .layout import TILE, pieces


def compose(base: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor) -> list[Tensor]:
    """base[b] + sum_i coef[i, b] * deltas[i * B + b], for every block b.

    base: B tensors.  deltas: N * B tensors shaped like their base, or with no elements where a task
    vector has no such block.  coef: (N, B).  Returns B tensors like `base`.
    """
    composed = []
    for b, block in enumerate(base):
        total = block.to(coef.dtype, copy=True, memory_format=torch.contiguous_format)
        for i in range(coef.shape[0]):
            delta = deltas[i * len(base) + b]
            if delta.numel():
                total += coef[i, b] * delta.to(coef.dtype)
        composed.append(total.to(block.dtype))
    return composed


def coef_grad(grads: Sequence[Tensor], deltas: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """<grads[b], deltas[i * B + b]> for every vector i and block b: (N, B) in `dtype`."""
    num_blocks = len(grads)
    num_vectors = len(deltas) // num_blocks if num_blocks else 0
    result = torch.zeros(num_vectors, num_blocks, dtype=dtype, device=_device(grads))
    for b, grad in enumerate(grads):
        wide = grad.to(dtype)
        for i in range(num_vectors):
            delta = deltas[i * num_blocks + b]
            if delta.numel():
                result[i, b] = tree_sum((wide * delta.to(dtype)).flatten())
    return result


def bank_compose(
    base: Tensor, deltas: Tensor, coef: Tensor, tile_block: Tensor, tile_offset: Tensor
) -> Tensor:
    """The same on arenas: base [P], deltas [N * P], tables as in `layout`. Returns [P]."""
    num_vectors = coef.shape[0]
    composed = torch.empty_like(base)
    for b, start, end in _blocks(tile_block, tile_offset):
        length = end - start
        rows = deltas[num_vectors * start : num_vectors * end]
        for target, source, delta in zip(
            pieces(composed[start:end], length),
            pieces(base[start:end], length),
            pieces(rows, length, num_vectors),
            strict=True,
        ):
            total = source[:, 0].to(coef.dtype, copy=True)
            for i in range(num_vectors):
                total += coef[i, b] * delta[:, i].to(coef.dtype)
            target[:, 0] = total.to(base.dtype)
    return composed


def bank_coef_grad(
    grad: Tensor,
    deltas: Tensor,
    tile_block: Tensor,
    tile_offset: Tensor,
    block_tile: Tensor,
    num_vectors: int,
    dtype: torch.dtype,
) -> Tensor:
    """<grad, tau_i> over each block of the arenas grad [P], deltas [N * P]: (N, B) in `dtype`."""
    result = torch.zeros(num_vectors, block_tile.numel() - 1, dtype=dtype, device=grad.device)
    for b, start, end in _blocks(tile_block, tile_offset):
        length = end - start
        rows = deltas[num_vectors * start : num_vectors * end]
        for wide, delta in zip(
            pieces(grad[start:end], length), pieces(rows, length, num_vectors), strict=True
        ):
            for i in range(num_vectors):
                product = wide[:, 0].to(dtype) * delta[:, i].to(dtype)
                result[i, b] += tree_sum(product.flatten())
    return result


def packed_compose(
    base: Tensor,
    words: Tensor,
    scales: Tensor,
    bits: int,
    coef: Tensor,
    tile_block: Tensor,
    tile_offset: Tensor,
) -> Tensor:
    """The same with packed deltas: words int32, scales bfloat16 (see `codecs.packed`).

    The scale of a group is multiplied into the coefficient first, and that product is rounded:
    base + sum_i (coef[i, b] * scale) * level.
    """
    num_vectors = coef.shape[0]
    composed = torch.empty_like(base)
    for b, start, end in _blocks(tile_block, tile_offset):
        targets = pieces(composed[start:end], end - start)
        sources = pieces(base[start:end], end - start)
        rows = _packed_rows(words, scales, bits, start, end, num_vectors)
        for target, source, (level, scale) in zip(targets, sources, rows, strict=True):
            total = source[:, 0].to(coef.dtype, copy=True)
            for i in range(num_vectors):
                factor = coef[i, b] * scale[:, i].to(coef.dtype)
                total += factor.repeat_interleave(GROUP, 1) * level(i).to(coef.dtype)
            target[:, 0] = total.to(base.dtype)
    return composed


def packed_coef_grad(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    bits: int,
    tile_block: Tensor,
    tile_offset: Tensor,
    block_tile: Tensor,
    num_vectors: int,
    dtype: torch.dtype,
) -> Tensor:
    """<grad, tau_i> over each block with packed deltas: (N, B) in `dtype`.

    Summed within groups of one scale first: sum_groups scale * <grad, level>.
    """
    result = torch.zeros(num_vectors, block_tile.numel() - 1, dtype=dtype, device=grad.device)
    for b, start, end in _blocks(tile_block, tile_offset):
        wides = pieces(grad[start:end], end - start)
        rows = _packed_rows(words, scales, bits, start, end, num_vectors)
        for wide, (level, scale) in zip(wides, rows, strict=True):
            for i in range(num_vectors):
                product = wide[:, 0].to(dtype) * level(i).to(dtype)
                sums = product.unflatten(1, (-1, GROUP)).sum(2)
                result[i, b] += tree_sum((sums * scale[:, i].to(dtype)).flatten())
    return result


def partition_compose(
    base: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    bits: int,
    coef: Tensor,
    tile_block: Tensor,
    tile_offset: Tensor,
    tile_key: Tensor,
) -> Tensor:
    """base[e] + sum_i coef[i, b, group(e)] * delta_i[e] on arenas of any codec (see `partition`).

    coef: (N, B, K).  tile_key: int32 [T].  Rounded like `bank_compose` and `packed_compose`.
    """
    num_vectors, _, groups = coef.shape
    composed = torch.empty_like(base)
    for b, start, end in _blocks(tile_block, tile_offset):
        keys = tile_key[tile_block == b]
        targets = pieces(composed[start:end], end - start)
        sources = pieces(base[start:end], end - start)
        rows = _rows(deltas, scales, bits, start, end, num_vectors)
        for target, source, row in zip(targets, sources, rows, strict=True):
            here, keys = keys[: len(target)], keys[len(target) :]
            group = group_of(slots(here, target.shape[-1]), groups)
            total = source[:, 0].to(coef.dtype, copy=True)
            for i in range(num_vectors):
                value, scale = row(i, coef.dtype)
                factor = coef[i, b][group]
                total += (factor if scale is None else factor * scale) * value
            target[:, 0] = total.to(base.dtype)
    return composed


def partition_coef_grad(
    grad: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    bits: int,
    tile_offset: Tensor,
    tile_key: Tensor,
    chunk_tile: Tensor,
    block_chunk: Tensor,
    num_vectors: int,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    """<grad, tau_i> over the elements of each group of each block: (N, B, K) in `dtype`.

    Products are added slot by slot over the tiles of a block, then slots over a group.
    """
    num_blocks = block_chunk.numel() - 1
    result = torch.zeros(num_vectors, num_blocks, groups, dtype=dtype, device=grad.device)
    bounds = chunk_tile[block_chunk.long()].tolist()
    for b, (first, last) in enumerate(pairwise(bounds)):
        start, end = int(tile_offset[first]), int(tile_offset[last])
        keys = tile_key[first:last]
        wides = pieces(grad[start:end], end - start)
        rows = _rows(deltas, scales, bits, start, end, num_vectors)
        by_slot = result.new_zeros(num_vectors, TILE)
        for wide, row in zip(wides, rows, strict=True):
            here, keys = keys[: len(wide)], keys[len(wide) :]
            slot = slots(here, wide.shape[-1])
            for i in range(num_vectors):
                value, scale = row(i, dtype)
                product = wide[:, 0].to(dtype) * (value if scale is None else scale * value)
                by_slot[i] += result.new_zeros(len(wide), TILE).scatter_(1, slot, product).sum(0)
        for i in range(num_vectors):
            result[i, b] = sum_groups(by_slot[i], groups)
    return result


def _rows(
    deltas: Tensor, scales: Tensor | None, bits: int, start: int, end: int, num_vectors: int
) -> Iterator[Callable[[int, torch.dtype], tuple[Tensor, Tensor | None]]]:
    """For each piece of a block: i and dtype to its values, and their scales if they have any.

    Both [tiles, elements].
    """
    if scales is None:
        dense = deltas[num_vectors * start : num_vectors * end]
        for piece in pieces(dense, end - start, num_vectors):
            yield partial(_dense_row, piece)
    else:
        for level, scale in _packed_rows(deltas, scales, bits, start, end, num_vectors):
            yield partial(_packed_row, level, scale)


def _dense_row(piece: Tensor, vector: int, dtype: torch.dtype) -> tuple[Tensor, None]:
    return piece[:, vector].to(dtype), None


def _packed_row(
    level: Callable[[int], Tensor], scale: Tensor, vector: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return level(vector).to(dtype), scale[:, vector].to(dtype).repeat_interleave(GROUP, 1)


def _packed_rows(
    words: Tensor, scales: Tensor, bits: int, start: int, end: int, num_vectors: int
) -> Iterator[tuple[Callable[[int], Tensor], Tensor]]:
    """For each piece of a block: i to the levels [tiles, elements], and scales [tiles, N, groups].

    Decoded one vector at a time, so that a bank is never expanded.
    """

    def region(items: Tensor, elements_per_item: int, numerator: int = 1) -> Tensor:
        first = num_vectors * start * numerator // elements_per_item
        return items[first : num_vectors * end * numerator // elements_per_item]

    length = end - start
    for word, scale in zip(
        pieces(region(words, 32, bits), length, num_vectors),
        pieces(region(scales, GROUP), length, num_vectors),
        strict=True,
    ):
        yield partial(_levels_of, word, bits), scale


def _levels_of(words: Tensor, bits: int, vector: int) -> Tensor:
    return levels(words[:, vector], bits)


def tree_sum(values: Tensor) -> Tensor:
    """The sum of a flat tensor in an order that depends on its length alone.

    `values.sum()` of a long tensor is split among threads, so its last bits depend on their number;
    sums of rows of one tile are not.
    """
    while values.numel() > 1:
        values = pad(values, (0, -values.numel() % TILE)).view(-1, TILE).sum(1)
    return values.sum()


def _blocks(tile_block: Tensor, tile_offset: Tensor) -> Iterator[tuple[int, int, int]]:
    """(block, first element, end) of every block that has elements."""
    blocks, counts = torch.unique_consecutive(tile_block, return_counts=True)
    first = 0
    for b, count in zip(blocks.tolist(), counts.tolist(), strict=True):
        yield b, int(tile_offset[first]), int(tile_offset[first + count])
        first += count


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")
