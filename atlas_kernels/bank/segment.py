"""Segment: blocks of one base dtype and one codec, in arenas, and the parts that they cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..files import crc
from ..ops import (
    TILE,
    Arena,
    ArenaComposition,
    Codec,
    Composition,
    Layout,
    compose_with,
    dots_with,
    padded,
    per_block,
    resolve,
)

# Bytes of deltas that are read and checked together: part of the file format.
CHUNK = 1 << 23


@dataclass(frozen=True)
class Segment:
    """The blocks of one base dtype and codec: one arena for the base, one for the deltas.

    Attributes (B' blocks, N task vectors, P elements with padding):
        columns: the blocks' places in the bank's order.
        index: the same as int64 [B'] on the device, so that no call waits for it.
        layout: where a block's elements lie.
        codec: how deltas are stored.
        num_vectors: N.
        base: [P].
        deltas: the stored items of N * P elements, interleaved as `layout` says.
        scales: theirs, if the codec has any.
    """

    columns: tuple[int, ...]
    index: Tensor
    layout: Layout
    codec: Codec
    num_vectors: int
    base: Tensor
    deltas: Tensor
    scales: Tensor | None

    @classmethod
    def of(
        cls,
        columns: Sequence[int],
        shapes: Sequence[Sequence[int]],
        codec: Codec,
        num_vectors: int,
        base: Tensor,
        deltas: Tensor,
        scales: Tensor | None,
    ) -> Segment:
        """A segment of these arenas, its tables on their device.

        Raises:
            ValueError: they do not fit the shapes, the codec and the number of task vectors.
        """
        # In plain numbers first: a file's shapes could ask for tables without end.
        numel = sum(padded(prod(shape), codec.alignment) for shape in shapes)
        elements = num_vectors * numel
        for what, tensor, count, dtype in (
            ("the base", base, numel, base.dtype),
            ("the deltas", deltas, codec.items(elements), codec.dtype),
            ("the scales", scales, codec.scales(elements), torch.bfloat16),
        ):
            found = None if tensor is None else (tensor.numel(), tensor.dtype)
            expected = (count, dtype) if tensor is not None or codec.bits else None
            if found != expected:
                raise ValueError(
                    f"{what} of {num_vectors} task vectors in {codec.name} are {found} (items, "
                    f"dtype), expected {expected}"
                )
        layout = Layout.from_shapes(shapes, codec.alignment).to(base.device)
        index = torch.tensor(columns, dtype=torch.int64, device=base.device)
        return cls(tuple(columns), index, layout, codec, num_vectors, base, deltas, scales)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        stored = {"base": self.base, "deltas": self.deltas}
        return stored if self.scales is None else {**stored, "scales": self.scales}

    @property
    def bits(self) -> float:
        """Stored bits of one task vector's blocks, scales included, padding not."""
        return self.codec.bits_per_weight * sum(map(prod, self.layout.shapes))

    def compose(
        self, coef: Tensor, backend: str = "auto", tile_key: Tensor | None = None
    ) -> Tensor:
        """The composed arena [P] for coef (N, B') or (N,), with a tile_key for (N, B', K).

        Differentiable, in any order, in coef.
        """
        coef = per_block(coef.to(torch.float32), len(self.columns))
        groups = coef.shape[2] if coef.dim() == 3 else 0
        return compose_with(self.composition(backend, tile_key, groups), coef, self.base)

    def coef_grad(
        self,
        grad: Tensor,
        backend: str = "auto",
        tile_key: Tensor | None = None,
        groups: int = 0,
    ) -> Tensor:
        """<grad, tau_i> over each block (N, B'), or its groups (N, B', K), for grad [P].

        Differentiable in it.
        """
        return dots_with(self.composition(backend, tile_key, groups), grad)

    def composition(self, backend: str, tile_key: Tensor | None, groups: int) -> Composition:
        """What is differentiated: with a tile_key for K groups."""
        backend = resolve(backend, self.base.device.type, False)
        tables = self.layout.tables
        arena = Arena(self.deltas, self.scales, self.codec.bits, *tables, tile_key)
        return ArenaComposition(backend, arena, self.num_vectors, groups)

    def blocks(self) -> list[Segment]:
        """Every block as a segment of its own: views, one contiguous range each."""
        return [self.part(k, k + 1) for k in range(len(self.columns))]

    def part(self, first: int, last: int) -> Segment:
        """The blocks [first, last) as a segment of their own: views, one contiguous range."""
        start, end = self.layout.offsets[first], self.layout.offsets[last]
        return Segment.of(
            self.columns[first:last],
            self.layout.shapes[first:last],
            self.codec,
            self.num_vectors,
            self.base[start:end],
            *self._stored(start, end),
        )

    def checksums(self) -> Tensor:
        """int64 [chunks]: CRC-32 of the stored deltas, then scales, of each of `chunks`."""
        cuts = chunks(self.layout, self.codec, self.num_vectors)
        return torch.tensor(
            [crc(*self._stored(chunk.start, chunk.end)) for chunk in cuts], dtype=torch.int64
        )

    def verify(self, expected: Tensor) -> None:
        """Raises ValueError unless `checksums` are as expected."""
        if not torch.equal(self.checksums(), expected):
            raise ValueError("a checksum of the deltas fails")

    def _stored(self, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        """Deltas and scales of the elements [start, end) of the base, whole tiles of one block."""
        first, last = self.num_vectors * start, self.num_vectors * end
        items, scales = self.codec.items, self.codec.scales
        return self.deltas[items(first) : items(last)], (
            None if self.scales is None else self.scales[scales(first) : scales(last)]
        )


@dataclass(frozen=True)
class Chunk:
    """Consecutive tiles of one block: what is read from a file, and checked, at a time.

    Attributes:
        block: its place in the segment.
        start, end: its elements in the arena of the base.
    """

    block: int
    start: int
    end: int


def chunks(layout: Layout, codec: Codec, num_vectors: int) -> list[Chunk]:
    """The blocks cut into chunks of as many tiles as CHUNK bytes hold, but at least one."""
    tile_bytes = num_vectors * TILE * codec.bits_per_weight / 8
    step = TILE * max(1, int(CHUNK // tile_bytes)) if tile_bytes else TILE
    return [
        Chunk(block, first, min(first + step, end))
        for block, (start, end) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False))
        for first in range(start, end, step)
    ]
