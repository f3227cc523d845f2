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
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arena import Arena
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


def arena_compose(base: Tensor, *arguments: Any) -> Tensor:
    """The same on an arena: base [P] and an `Arena`, then coef (N, B), gives [P].

    The scale of a group of packed deltas is multiplied into the coefficient first, and that product
    is rounded: base + sum_i (coef[i, b] * scale) * level. With a ``tile_key`` coef is (N, B, K):
    base[e] + sum_i coef[i, b, group(e)] * delta_i[e].
    """
    *fields, coef = arguments
    arena = Arena(*fields)
    composed = torch.empty_like(base)
    for b, start, end in _blocks(arena):
        for target, source, row, group in zip(
            pieces(composed[start:end], end - start),
            pieces(base[start:end], end - start),
            _rows(arena, start, end, coef.shape[0]),
            _groups(arena, b, end - start, coef.shape[-1]),
            strict=True,
        ):
            total = source[:, 0].to(coef.dtype, copy=True)
            for i in range(coef.shape[0]):
                value, scale = row(i, coef.dtype)
                factor = coef[i, b] if group is None else coef[i, b][group]
                total += (factor if scale is None else factor * scale) * value
            target[:, 0] = total.to(base.dtype)
    return composed


def arena_coef_grad(grad: Tensor, *arguments: Any) -> Tensor:
    """<grad, tau_i> over each block of an arena: grad [P] and an `Arena`, then N, K and a dtype.

    (N, B) in that dtype. With a ``tile_key`` (N, B, K): products are added slot by slot over the
    tiles of a block, then slots over a group. Packed deltas without one are summed within groups of
    one scale first: sum_groups scale * <grad, level>.
    """
    *fields, num_vectors, num_groups, dtype = arguments
    arena = Arena(*fields)
    groups = () if arena.tile_key is None else (num_groups,)
    shape = (num_vectors, arena.num_blocks, *groups)
    result = torch.zeros(shape, dtype=dtype, device=grad.device)
    for b, start, end in _blocks(arena):
        by_slot = result.new_zeros(num_vectors, TILE)
        for wide, row, slot in zip(
            pieces(grad[start:end], end - start),
            _rows(arena, start, end, num_vectors),
            _slots(arena, b, end - start),
            strict=True,
        ):
            for i in range(num_vectors):
                value, scale = row(i, dtype)
                factor = wide[:, 0].to(dtype)
                if slot is not None:
                    product = factor * (value if scale is None else scale * value)
                    spread = result.new_zeros(len(wide), TILE).scatter_(1, slot, product)
                    by_slot[i] += spread.sum(0)
                elif scale is None:
                    result[i, b] += tree_sum((factor * value).flatten())
                else:
                    sums = (factor * value).unflatten(1, (-1, GROUP)).sum(2)
                    result[i, b] += tree_sum((sums * scale[:, ::GROUP]).flatten())
        if arena.tile_key is not None:
            for i in range(num_vectors):
                result[i, b] = sum_groups(by_slot[i], num_groups)
    return result


def _slots(arena: Arena, block: int, length: int) -> Iterator[Tensor | None]:
    """For each piece of a block: the slots [tiles, elements] of its elements, if there are any."""
    if arena.tile_key is None:
        yield from [None] * len(pieces(torch.empty(length, device="meta"), length))
        return
    keys = arena.tile_key[arena.tile_block == block]
    for piece in pieces(torch.empty(length, device="meta"), length):
        here, keys = keys[: len(piece)], keys[len(piece) :]
        yield slots(here, piece.shape[-1])


def _groups(arena: Arena, block: int, length: int, num_groups: int) -> Iterator[Tensor | None]:
    """The same for the groups of elements."""
    for slot in _slots(arena, block, length):
        yield None if slot is None else group_of(slot, num_groups)


def _rows(
    arena: Arena, start: int, end: int, num_vectors: int
) -> Iterator[Callable[[int, torch.dtype], tuple[Tensor, Tensor | None]]]:
    """For each piece of a block: i and dtype to its values, and their scales if they have any.

    Both [tiles, elements]. Decoded one vector at a time, so that a bank is never expanded.
    """
    length = end - start

    def region(items: Tensor, numerator: int, denominator: int) -> list[Tensor]:
        first, last = (num_vectors * at * numerator // denominator for at in (start, end))
        return pieces(items[first:last], length, num_vectors)

    if arena.scales is None:
        for piece in region(arena.deltas, 1, 1):
            yield partial(_dense_row, piece)
    else:
        words, scales = region(arena.deltas, arena.bits, 32), region(arena.scales, 1, GROUP)
        for word, scale in zip(words, scales, strict=True):
            yield partial(_packed_row, word, scale, arena.bits)


def _dense_row(piece: Tensor, vector: int, dtype: torch.dtype) -> tuple[Tensor, None]:
    return piece[:, vector].to(dtype), None


def _packed_row(
    words: Tensor, scales: Tensor, bits: int, vector: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scale = scales[:, vector].to(dtype).repeat_interleave(GROUP, 1)
    return levels(words[:, vector], bits).to(dtype), scale


def tree_sum(values: Tensor) -> Tensor:
    """The sum of a flat tensor in an order that depends on its length alone.

    `values.sum()` of a long tensor is split among threads, so its last bits depend on their number;
    sums of rows of one tile are not.
    """
    while values.numel() > 1:
        values = pad(values, (0, -values.numel() % TILE)).view(-1, TILE).sum(1)
    return values.sum()


def _blocks(arena: Arena) -> Iterator[tuple[int, int, int]]:
    """(block, first element, end) of every block that has elements."""
    bounds = arena.tile_offset[arena.block_tile.long()].tolist()
    for block, (start, end) in enumerate(pairwise(bounds)):
        if end > start:
            yield block, start, end


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")
