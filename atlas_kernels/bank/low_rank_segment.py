"""Blocks whose deltas are low-rank: composed from their factors, no delta is ever formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..files import crc
from ..ops import (
    CHUNK_TILES,
    TILE,
    Codec,
    Composition,
    Layout,
    compose_with,
    dots_with,
    group_of,
    group_sums,
    per_block,
    resolve,
    slots,
)

# Elements of a block that are in float32 at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Factors:
    """One block's deltas of all task vectors, R ranks in total, side by side.

    Attributes:
        up: [out, R].
        down: [R, in].
        spread: float32 [N, R], a vector's scale at its own ranks and zero elsewhere.
        ranks: how many of them each vector has.
    """

    up: Tensor
    down: Tensor
    spread: Tensor
    ranks: tuple[int, ...]

    def add(self, base: Tensor, coef: Tensor, total: Tensor) -> None:
        """Writes ``base + sum_i coef[i] * delta_i`` into total, all [out, in], for coef (N,)."""
        weights, down = coef @ self.spread, self.down.float()
        for rows in _rows(base):
            part = base[rows].to(torch.float32, copy=True)
            total[rows] = part.addmm_(self.up[rows].float() * weights, down)

    def dots(self, grad: Tensor) -> Tensor:
        """``<grad, delta_i>`` (N,) for grad [out, in]."""
        down = self.down.float()
        sums = grad.new_zeros(down.shape[0], dtype=torch.float32)
        for rows in _rows(grad):
            sums += ((grad[rows].float() @ down.T) * self.up[rows].float()).sum(0)
        return self.spread @ sums

    def add_groups(self, base: Tensor, coef: Tensor, tile_key: Tensor, total: Tensor) -> None:
        """`add` for coef (N, K): element e of delta_i times ``coef[i, group(e)]``."""
        source, target = base.flatten(), total.view(-1)
        for elements, keys in _chunks(base, tile_key):
            group = group_of(slots(keys, TILE), coef.shape[1]).flatten()
            part = source[elements].to(torch.float32, copy=True)
            for factors, delta in zip(coef, self._deltas(elements), strict=True):
                part += factors[group[: len(part)]] * delta
            target[elements] = part

    def group_dots(self, grad: Tensor, tile_key: Tensor, groups: int) -> Tensor:
        """`dots` over each group: (N, K)."""
        flat = grad.flatten()
        result = grad.new_zeros((len(self.spread), groups), dtype=torch.float32)
        for elements, keys in _chunks(grad, tile_key):
            part, slot = flat[elements].float(), slots(keys, TILE)
            for sums, delta in zip(result, self._deltas(elements), strict=True):
                sums += group_sums(part * delta, slot, groups)
        return result

    def _deltas(self, elements: slice) -> Iterator[Tensor]:
        """The deltas' elements, vector by vector: no more than two further rows are formed."""
        width = self.down.shape[1]
        first, last = elements.start // width, -(-elements.stop // width)
        cut = slice(elements.start - first * width, elements.stop - first * width)
        up = self.up[first:last].float() * self.spread.sum(0)
        for its_up, its_down in zip(
            up.split(self.ranks, 1), self.down.split(self.ranks), strict=True
        ):
            yield (its_up @ its_down.float()).flatten()[cut]


def factor_views(
    factors: Tensor, shapes: Sequence[Sequence[int]], ranks: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor]]:
    """Every block's ``up`` [out, R] and ``down`` [R, in], one after the other in a flat tensor."""
    sizes = [
        sum(its) * size
        for shape, its in zip(shapes, ranks, strict=True)
        for size in (shape[0], prod(shape[1:]))
    ]
    parts = iter(factors.split(sizes))
    return [
        (next(parts).view(shape[0], sum(its)), next(parts).view(sum(its), prod(shape[1:])))
        for shape, its in zip(shapes, ranks, strict=True)
    ]


def num_factor_elements(shapes: Sequence[Sequence[int]], ranks: Sequence[Sequence[int]]) -> int:
    """Elements of the flat tensor that `factor_views` cuts."""
    return sum(
        sum(its) * (shape[0] + prod(shape[1:])) for shape, its in zip(shapes, ranks, strict=True)
    )


@dataclass(frozen=True)
class LowRankSegment:
    """The blocks of one base dtype whose deltas are low-rank; otherwise like a `Segment`.

    Composed as ``base + [c_1 s_1 up_1, ..., c_N s_N up_N] @ [down_1; ...; down_N]``, by PyTorch's
    matrix product in float32: no delta is ever formed.

    Attributes (B' blocks, N task vectors, P elements):
        columns: the blocks' places in the bank's order.
        index: the same as int64 [B'] on the device.
        layout: where a block's elements lie in the base; no padding.
        codec: how factors are stored: as floating point.
        ranks: of every block the rank in each task vector, 0 where it has no such block.
        scales: likewise.
        base: [P].
        factors: flat, in the order of `factor_views`.
        parts: the same, cut into blocks.
    """

    columns: tuple[int, ...]
    index: Tensor
    layout: Layout
    codec: Codec
    ranks: tuple[tuple[int, ...], ...]
    scales: tuple[tuple[float, ...], ...]
    base: Tensor
    factors: Tensor
    parts: tuple[Factors, ...]

    @classmethod
    def of(
        cls,
        columns: Sequence[int],
        shapes: Sequence[Sequence[int]],
        codec: Codec,
        ranks: Sequence[Sequence[int]],
        scales: Sequence[Sequence[float]],
        base: Tensor,
        factors: Tensor,
    ) -> LowRankSegment:
        """A segment of these tensors.

        Raises:
            ValueError: they do not fit the shapes, the codec and the ranks.
        """
        # In plain numbers first: a file's shapes could ask for tables without end.
        for what, tensor, count, dtype in (
            ("the base", base, sum(map(prod, shapes)), base.dtype),
            ("the factors", factors, num_factor_elements(shapes, ranks), codec.dtype),
        ):
            if (tensor.numel(), tensor.dtype) != (count, dtype):
                raise ValueError(
                    f"{what} of low-rank blocks are {(tensor.numel(), tensor.dtype)} (items, "
                    f"dtype), expected {(count, dtype)}"
                )
        layout = Layout.from_shapes(shapes, alignment=1).to(base.device)
        spreads = (
            torch.block_diag(*(torch.full((1, r), s) for r, s in zip(*its, strict=True)))
            for its in zip(ranks, scales, strict=True)
        )
        views = factor_views(factors, shapes, ranks)
        return cls(
            tuple(columns),
            torch.tensor(columns, dtype=torch.int64, device=base.device),
            layout,
            codec,
            tuple(map(tuple, ranks)),
            tuple(map(tuple, scales)),
            base,
            factors,
            tuple(
                Factors(up, down, spread.to(base.device), tuple(its))
                for (up, down), spread, its in zip(views, spreads, ranks, strict=True)
            ),
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        return {"base": self.base, "factors": self.factors}

    @property
    def bits(self) -> float:
        """Stored bits of one task vector's blocks, on average."""
        return 8.0 * self.factors.nbytes / max(1, *map(len, self.ranks))

    def compose(
        self, coef: Tensor, backend: str = "auto", tile_key: Tensor | None = None
    ) -> Tensor:
        """The composed arena [P] for coef (N, B') or (N,), with a tile_key for (N, B', K).

        Differentiable (twice) in coef. The products are PyTorch's own, whatever the backend, which
        only has to exist. With a tile_key they are formed a few tiles at a time.
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
        """<grad, delta_i> over each block (N, B'), or its groups (N, B', K), for grad [P].

        Differentiable in it.
        """
        return dots_with(self.composition(backend, tile_key, groups), grad)

    def composition(self, backend: str, tile_key: Tensor | None, groups: int) -> Composition:
        """What is differentiated: with a tile_key for K groups."""
        resolve(backend, self.base.device.type, False)
        return _LowRankComposition(self, tile_key, groups)

    def blocks(self) -> list[LowRankSegment]:
        """Every block as a segment of its own."""
        return [self.part(k, k + 1) for k in range(len(self.columns))]

    def part(self, first: int, last: int) -> LowRankSegment:
        """The blocks [first, last) as a segment of their own: views, one contiguous range."""
        sizes = [part.up.numel() + part.down.numel() for part in self.parts]
        start, end = self.layout.offsets[first], self.layout.offsets[last]
        return LowRankSegment.of(
            self.columns[first:last],
            self.layout.shapes[first:last],
            self.codec,
            self.ranks[first:last],
            self.scales[first:last],
            self.base[start:end],
            self.factors[sum(sizes[:first]) : sum(sizes[:last])],
        )

    def checksums(self) -> Tensor:
        """int64 [1]: CRC-32 of the factors."""
        return torch.tensor([crc(self.factors)], dtype=torch.int64)

    def verify(self, expected: Tensor) -> None:
        """Raises ValueError unless `checksums` are as expected."""
        if not torch.equal(self.checksums(), expected):
            raise ValueError("a checksum of the factors fails")


@dataclass(frozen=True)
class _LowRankComposition:
    """A segment's products as what is differentiated.

    Attributes:
        segment: the factors.
        tile_key: of groups, if coefficients belong to them.
        num_groups: K, or 0.
    """

    segment: LowRankSegment
    tile_key: Tensor | None
    num_groups: int

    def composed(self, coef: Tensor, base: Tensor) -> Tensor:
        """[P], for coef (N, B') or (N, B', K) and base [P]."""
        total = torch.empty_like(base)
        # Autocast would round the coefficients and the factors.
        with torch.autocast(base.device.type, enabled=False):
            for part, keys, its, source, target in zip(
                self.segment.parts,
                self._keys(),
                coef.unbind(1),
                self._matrices(base),
                self._matrices(total),
                strict=True,
            ):
                if keys is None:
                    part.add(source, its, target)
                else:
                    part.add_groups(source, its, keys, target)
        return total

    def dots(self, grad: Tensor) -> Tensor:
        """Shaped like coef, for grad [P]."""
        with torch.autocast(grad.device.type, enabled=False):
            columns = [
                part.dots(block) if keys is None else part.group_dots(block, keys, self.num_groups)
                for part, keys, block in zip(
                    self.segment.parts, self._keys(), self._matrices(grad), strict=True
                )
            ]
        return torch.stack(columns, 1)

    def _keys(self) -> Sequence[Tensor | None]:
        """Every block's."""
        if self.tile_key is None:
            return [None] * len(self.segment.parts)
        sizes = [-(-prod(shape) // TILE) for shape in self.segment.layout.shapes]
        keys: Sequence[Tensor] = self.tile_key.split(sizes)
        return keys

    def _matrices(self, flat: Tensor) -> list[Tensor]:
        return [block.flatten(1) for block in self.segment.layout.split(flat)]


def _chunks(matrix: Tensor, tile_key: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive elements of a flattened block, each time with the keys of their tiles."""
    for first, keys in enumerate(tile_key.split(CHUNK_TILES)):
        start = first * CHUNK_TILES * TILE
        yield slice(start, min(start + len(keys) * TILE, matrix.numel())), keys


def _rows(matrix: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], step):
        yield slice(first, first + step)
