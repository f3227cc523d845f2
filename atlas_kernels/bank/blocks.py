"""A segment's blocks: composed in one pass, their gradients reduced where autograd made them.

One gradient per block becomes one number per task vector and block. On a CPU neighbours are reduced
in buckets that stay in the cache, and a longer block that ends with a tile is not copied at all: no
gradient of a whole model is made of them. Every bucket is a call, which on a GPU is a launch, and
the compiler's graph holds them all: there the gradients are gathered, and one call reduces them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..ops import Composition, Layout

# Bytes of the small gradients that are reduced together. In the memory mode "whole", for ViT-B/32's
# image tower (B = 152) any size up to a few MiB takes as long as block by block, for an encoder of
# 56 small blocks 1 MiB a third; larger ones leave the cache.
BUCKET = 1 << 20

S = TypeVar("S", bound="Divisible")


class Divisible(Protocol):
    """Of a segment: what its blocks are composed from, and the parts that it cuts into."""

    @property
    def columns(self) -> tuple[int, ...]:
        """The blocks' places in the bank's order."""

    @property
    def layout(self) -> Layout:
        """Where a block's elements lie."""

    @property
    def base(self) -> Tensor:
        """[P]."""

    def part(self: S, first: int, last: int) -> S:
        """The blocks [first, last) as a segment of their own."""

    def composition(self, backend: str, tile_key: Tensor | None, groups: int) -> Composition:
        """What is differentiated: with a tile_key for K groups."""


def parts(segment: S, limit: int) -> Iterator[S]:
    """All blocks: one by one, or as many neighbours as have no more than ``limit`` bytes."""
    offsets, size = segment.layout.offsets, segment.base.element_size()
    first = 0
    for last in range(1, len(segment.columns) + 1):
        ends = last == len(segment.columns)
        if ends or (offsets[last + 1] - offsets[first]) * size > limit:
            yield segment.part(first, last)
            first = last


class Blocks:
    """A segment's blocks, for any coefficients.

    Args:
        segment: what they are composed from.
    """

    def __init__(self, segment: Divisible) -> None:
        self.segment = segment

    @cached_property
    def buckets(self) -> tuple[Divisible, ...]:
        """Made once, and only if there is a backward pass."""
        return tuple(parts(self.segment, BUCKET))

    def with_coef(
        self, num_vectors: int, backend: str, tile_key: Tensor | None, groups: int
    ) -> _BlockComposition:
        """What is differentiated."""
        return _BlockComposition(self, num_vectors, backend, tile_key, groups)


@dataclass(frozen=True)
class _BlockComposition:
    """An `ops.BlockComposition`."""

    blocks: Blocks
    num_vectors: int
    backend: str
    tile_key: Tensor | None
    groups: int

    def composed(self, coef: Tensor, based: bool) -> tuple[Tensor, ...]:
        segment = self.blocks.segment
        base = segment.base if based else torch.zeros_like(segment.base)
        whole = segment.composition(self.backend, self.tile_key, self.groups)
        return segment.layout.split(whole.composed(coef, base))

    def dots(self, grads: Sequence[Tensor | None]) -> Tensor:
        segment = self.blocks.segment
        gathers = segment.base.device.type != "cpu" or torch.compiler.is_compiling()
        buckets = (segment,) if gathers else self.blocks.buckets
        columns, first, tile = [], 0, 0
        for part in buckets:
            count, tiles = len(part.columns), part.layout.tile_block.numel()
            key = None if self.tile_key is None else self.tile_key[tile : tile + tiles]
            columns.append(self._dots(part, grads[first : first + count], key))
            first, tile = first + count, tile + tiles
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    def _dots(
        self, part: Divisible, grads: Sequence[Tensor | None], tile_key: Tensor | None
    ) -> Tensor:
        if all(grad is None for grad in grads):
            shape = (self.num_vectors, len(grads), *([self.groups] if self.groups else []))
            return part.base.new_zeros(shape, dtype=torch.float32)
        flat = part.layout.join(grads, part.base)
        return part.composition(self.backend, tile_key, self.groups).dots(flat)
