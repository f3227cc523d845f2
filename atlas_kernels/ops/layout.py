"""Where every element of a bank lies: blocks padded to whole vectors, cut into interleaved tiles.

A bank with N task vectors over B blocks keeps its base in one flat arena of P elements and its
deltas in one flat arena of N * P elements:

    base    | tile 0            | tile 1            | ...
    deltas  | tile 0 of tau_0 .. tau_{N-1} | tile 1 of tau_0 .. tau_{N-1} | ...

Tile t covers base elements [tile_offset[t], tile_offset[t + 1]); its deltas start at
N * tile_offset[t], vector i of it at + i * (length of the tile). One pass therefore reads the
whole bank front to back, a block is one contiguous range, and no address needs a search.

Packed deltas lie in the same order, with fewer stored items (words, scales) than elements: an
element's offset times the items per element is the offset of its item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

# Elements. Every block starts at, and is zero-padded to, a multiple of this, or of the larger unit
# that a codec packs together: full 128-bit loads for every storage dtype, and zeros keep sums
# exact.
ALIGNMENT = 16
# Elements. Fixed, because the backward sums tile by tile: were it tunable, so would be the result's
# last bits. 4096 fp32 accumulators (16 KiB) stay in a CPU's first-level cache and in a GPU's
# registers (measured for the GPU at compile time: 7.0 instructions per element at 1024, 4.1 here).
TILE = 4096
# Tiles whose partial sums are one where partitions are summed: part of the result's last bits too.
CHUNK_TILES = 64


def padded(elements: int, alignment: int) -> int:
    """`elements` rounded up to a multiple of `alignment`."""
    return -(-elements // alignment) * alignment


@dataclass(frozen=True)
class Layout:
    """Offsets and tile tables of B blocks with the given `shapes`.

    Attributes (P elements in T tiles):
        shapes: the B block shapes.
        offsets: B + 1 element offsets; block b is [offsets[b], offsets[b] + numel(b)), and padding.
        tile_block: int32 [T], the block that a tile belongs to.
        tile_offset: int64 [T + 1], the first element of a tile.
        block_tile: int32 [B + 1], the first tile of a block.
        chunk_tile: int32 [C + 1], the first tile of a chunk: up to CHUNK_TILES tiles of a block.
        block_chunk: int32 [B + 1], the first chunk of a block.
    """

    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    tile_block: Tensor
    tile_offset: Tensor
    block_tile: Tensor
    chunk_tile: Tensor
    block_chunk: Tensor

    @classmethod
    def from_shapes(cls, shapes: Sequence[Sequence[int]], alignment: int = ALIGNMENT) -> Layout:
        """The layout of blocks with these shapes, padded to `alignment`, tables on the CPU."""
        sizes = [padded(prod(shape), alignment) for shape in shapes]
        offsets = (0, *accumulate(sizes))
        counts = torch.tensor([-(-size // TILE) for size in sizes], dtype=torch.int64)
        block_tile = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=block_tile[1:])
        tile_block = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        tile_in_block = torch.arange(int(block_tile[-1])) - block_tile[tile_block]
        starts = torch.tensor(offsets, dtype=torch.int64)
        tile_offset = torch.empty(len(tile_block) + 1, dtype=torch.int64)
        tile_offset[:-1] = starts[tile_block] + tile_in_block * TILE
        tile_offset[-1] = offsets[-1]
        chunk_counts = -(-counts // CHUNK_TILES)
        block_chunk = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        torch.cumsum(chunk_counts, 0, out=block_chunk[1:])
        chunk_block = torch.repeat_interleave(torch.arange(len(sizes)), chunk_counts)
        chunk_tile = torch.empty(len(chunk_block) + 1, dtype=torch.int64)
        chunk_in_block = torch.arange(len(chunk_block)) - block_chunk[chunk_block]
        chunk_tile[:-1] = block_tile[chunk_block] + chunk_in_block * CHUNK_TILES
        chunk_tile[-1] = block_tile[-1]
        return cls(
            shapes=tuple(tuple(shape) for shape in shapes),
            offsets=offsets,
            tile_block=tile_block.int(),
            tile_offset=tile_offset,
            block_tile=block_tile.int(),
            chunk_tile=chunk_tile.int(),
            block_chunk=block_chunk.int(),
        )

    @property
    def numel(self) -> int:
        """P: elements of one arena row, padding included."""
        return self.offsets[-1]

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """All five, in the order of `arena.Arena`."""
        return (
            self.tile_block,
            self.tile_offset,
            self.block_tile,
            self.chunk_tile,
            self.block_chunk,
        )

    def to(self, device: torch.device | str) -> Layout:
        """The same layout with its tables on `device`."""
        return Layout(self.shapes, self.offsets, *(table.to(device) for table in self.tables))

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of the blocks in a flat arena row [P].

        One `torch.split` with the pads as chunks of their own, so that its backward, if one is
        recorded, is a single concatenation: slices would zero-fill P elements per block.
        """
        sizes: list[int] = []
        kept = []
        for shape, padded_length in zip(self.shapes, self._lengths, strict=True):
            length = prod(shape)
            kept.append(len(sizes))
            padding = padded_length - length
            sizes += [length, padding] if padding else [length]
        chunks = torch.split(flat, sizes)
        return tuple(
            # A chunk has one dimension; a view of each would cost more than the split.
            chunks[k] if len(shape) == 1 else chunks[k].view(shape)
            for k, shape in zip(kept, self.shapes, strict=True)
        )

    def join(self, blocks: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """The inverse of `split`: [P], zero where a block is None; a view where one block fills it.

        Args:
            blocks: B of them.
            like: any tensor of their dtype and device.
        """
        flat = []
        for block, shape, length in zip(blocks, self.shapes, self._lengths, strict=True):
            missing = length if block is None else length - prod(shape)
            flat += [] if block is None else [block.reshape(-1)]
            flat += [like.new_zeros(missing)] if missing else []
        return flat[0] if len(flat) == 1 else torch.cat(flat) if flat else like.new_zeros(0)

    @property
    def _lengths(self) -> list[int]:
        """Of the blocks, with padding."""
        return [end - start for start, end in pairwise(self.offsets)]


def pieces(region: Tensor, length: int, num_vectors: int = 1) -> list[Tensor]:
    """One block's interleaved rows as views [tiles, N, items]: its full tiles, then its tail.

    `region` is the block's flat range of N rows of `length` elements (padding included), each
    stored as a number of items. With the default N = 1 this cuts a range of the base, of the output
    or of a gradient alike.
    """
    if not length:
        return []
    items = region.numel() // num_vectors if num_vectors else 0
    per_tile = items * TILE // length
    full = length // TILE
    cut = full * num_vectors * per_tile
    views = []
    if full:
        views.append(region[:cut].view(full, num_vectors, per_tile))
    if full * TILE < length:
        views.append(region[cut:].view(1, num_vectors, items - full * per_tile))
    return views
