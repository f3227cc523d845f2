"""What the arena form of the operators takes beside its base or gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .schema import operators


class Arena(NamedTuple):
    """Deltas as they are stored, and the tables that say which block and group an element is of.

    One object everywhere but in PyTorch's schemas, which take tensors and numbers: there it is
    ``*arena`` on the one side, and ``Arena(*arguments)`` on the other.

    Attributes (N task vectors, P elements in T tiles):
        deltas: N * P elements, or the packed words that hold them.
        scales: bfloat16, of packed deltas (see `codecs.packed`).
        bits: per packed element; 0 for floating point.
        tile_block, tile_offset, block_tile, chunk_tile, block_chunk: as in `Layout`.
        tile_key: int32 [T], the key of every tile where coefficients belong to groups (see
            `groups`); None where they belong to blocks.
    """

    deltas: Tensor
    scales: Tensor | None
    bits: int
    tile_block: Tensor
    tile_offset: Tensor
    block_tile: Tensor
    chunk_tile: Tensor
    block_chunk: Tensor
    tile_key: Tensor | None

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.block_tile.numel() - 1


@dataclass(frozen=True)
class ArenaComposition:
    """The arena form as what `composition.compose_with` differentiates.

    Attributes:
        backend: a registered one.
        arena: the deltas and their tables.
        num_vectors: N.
        num_groups: K, or 0 for a coefficient per block.
        dtype: of sums; float64 is for the oracles of tests.
    """

    backend: str
    arena: Arena
    num_vectors: int
    num_groups: int
    dtype: torch.dtype = torch.float32

    def composed(self, coef: Tensor, base: Tensor) -> Tensor:
        """[P], for coef (N, B) or (N, B, K) and base [P]."""
        result: Tensor = operators(self.backend).arena_compose(
            base.contiguous(), *self.arena, coef.contiguous()
        )
        return result

    def dots(self, grad: Tensor) -> Tensor:
        """Shaped like coef, for grad [P]."""
        result: Tensor = operators(self.backend).arena_coef_grad(
            grad.contiguous(), *self.arena, self.num_vectors, self.num_groups, self.dtype
        )
        return result
