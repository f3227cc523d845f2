"""What the header of a bank's file says, checked before a table is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files import check_unique
from ..ops import STORAGE_DTYPES, codec_named
from .factorwise import factor_names


@dataclass(frozen=True)
class LowRankHeader:
    """Of every block of a segment and every task vector: rank and scale."""

    ranks: tuple[tuple[int, ...], ...]
    scales: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class BankHeader:
    """The fields of a bank (see `Packing.fields`) as they must be.

    Raises:
        ValueError: they contradict each other.
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    codec: str
    segments: tuple[tuple[tuple[int, ...], str], ...]
    base_digests: tuple[str, ...]
    constants: tuple[str, ...]
    aliases: dict[str, str]
    low_rank: dict[str, LowRankHeader] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_unique("task vectors", self.names)
        check_unique("blocks", self.blocks)
        check_unique("constants", self.constants)
        count = len(self.blocks)
        if not len(self.shapes) == len(self.base_digests) == count:
            raise ValueError(
                f"it has {count} blocks, {len(self.shapes)} shapes and {len(self.base_digests)} "
                "fingerprints of their base"
            )
        for block, shape in zip(self.blocks, self.shapes, strict=True):
            # What is empty is never changed, so never a block.
            if any(size < 1 for size in shape):
                raise ValueError(f"block {block!r} has the shape {shape}")
        if sorted(column for columns, _ in self.segments for column in columns) != [*range(count)]:
            raise ValueError(f"its segments do not hold each of the {count} blocks once")
        for index, parts in self.low_rank.items():
            if index not in map(str, range(len(self.segments))):
                raise ValueError(f"it has low-rank blocks in segment {index!r}, which is none")
            columns, codec = self.segments[int(index)]
            table = [len(self.names)] * len(columns)
            if not [*map(len, parts.ranks)] == [*map(len, parts.scales)] == table:
                raise ValueError(f"ranks and scales of segment {index} do not fit its blocks")
            if any(rank < 0 for ranks in parts.ranks for rank in ranks):
                raise ValueError(f"a rank of segment {index} is negative")
            if codec_named(codec).bits or any(not self.shapes[column] for column in columns):
                raise ValueError(f"segment {index} cannot hold factors")
        for weight in self.products:
            needed = {*factor_names(weight)} - {*self.blocks} | {weight} - {*self.constants}
            if needed:
                raise ValueError(f"it lacks {sorted(needed)} of the product {weight!r}")

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError if tensors are missing, or are not what every bank has."""
        needed = ["errors", *(f"constant.{name}" for name in self.constants)]
        for index, (_, codec) in enumerate(self.segments):
            deltas = ["factors"] if str(index) in self.low_rank else ["deltas"]
            scales = ["scales"] if codec_named(codec).bits else []
            needed += [f"{n}.{index}" for n in ("base", *deltas, *scales, "checksums")]
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise ValueError(f"it lacks the tensors {missing[:5]}")
        errors = tensors["errors"]
        expected = len(self.names), len(self.blocks)
        if (errors.dtype, tuple(errors.shape)) != (torch.float32, expected):
            raise ValueError(f"its errors are {errors.dtype} {tuple(errors.shape)}")
        for index in range(len(self.segments)):
            base = tensors[f"base.{index}"]
            if base.dtype not in STORAGE_DTYPES or base.dim() != 1:
                raise ValueError(f"the base of segment {index} is {base.dtype} {tuple(base.shape)}")
