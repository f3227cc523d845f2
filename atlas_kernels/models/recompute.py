"""Weights on use: a block is composed when a module asks for it, and again for the backward.

Nothing but the base, the bank and the activations outlives a use: what the module's operations save
for their backward is not the block, but a note to compose it again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..bank import LowRankSegment, Segment, TaskVectorBank
from ..ops import per_block, tile_keys
from .passes import Bucket, buckets


class Blocks(Protocol):
    """What one block of a bank at a time is composed from; P' is its size with padding."""

    def compose(self, column: int, coef: Tensor, /) -> Tensor:
        """``base + sum_i coef[i] * delta_i`` [P'] of the block in this column.

        For coef (N,); (N, K) where blocks are partitioned.
        """

    def coef_grad(self, column: int, grad: Tensor, /) -> Tensor:
        """``<grad, delta_i>``, (N,) or (N, K), of the block in this column, for grad [P']."""


class ResidentBlocks:
    """The blocks of a bank in memory; differentiable twice.

    Args:
        bank: its blocks.
        groups: K, if they are partitioned, else 0.
        seed: of the partition.
    """

    def __init__(self, bank: TaskVectorBank, groups: int = 0, seed: int = 0) -> None:
        self._bank = bank
        parts = {part.columns[0]: part for segment in bank.segments for part in segment.blocks()}
        self._parts = [parts[column] for column in range(len(parts))]
        self._groups = groups
        self._keys = [
            tile_keys([name], part.layout, seed) if groups else None
            for name, part in zip(bank.blocks, self._parts, strict=True)
        ]

    def compose(self, column: int, coef: Tensor, /) -> Tensor:
        """See `Blocks`."""
        self._bank.check_unchanged()
        return self._parts[column].compose(coef.unsqueeze(1), tile_key=self._keys[column])

    def coef_grad(self, column: int, grad: Tensor, /) -> Tensor:
        """See `Blocks`."""
        self._bank.check_unchanged()
        part, key = self._parts[column], self._keys[column]
        return part.coef_grad(grad, tile_key=key, groups=self._groups).squeeze(1)


class OnUse:
    """The memory modes "recompute" and "stream" (a `passes.Mode`).

    Args:
        bank: what is composed.
        blocks: what from.
    """

    def __init__(self, bank: TaskVectorBank, blocks: Blocks) -> None:
        self.bank = bank
        self.blocks = blocks
        self.buckets: dict[str, Bucket] = {}

        def reducer(part: Segment | LowRankSegment) -> Any:
            (column,) = part.columns
            return lambda flat: blocks.coef_grad(column, flat).unsqueeze(1)

        for bucket in buckets(bank, 0, reducer):
            self.buckets[bucket.names[0]] = bucket

    def snapshot(self, coef: Tensor, /) -> _Snapshot:
        """See `passes.Mode`."""
        return _Snapshot(self, coef)

    def forget(self) -> None:
        """Nothing is kept."""


@dataclass(frozen=True)
class _Note:
    """What is saved for the backward instead of a view of a composed block."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Snapshot:
    """The coefficients of a pass, and its composed blocks that are alive."""

    def __init__(self, mode: OnUse, coef: Tensor) -> None:
        self._mode = mode
        # A copy: the backward composes with these, whatever becomes of coef. (N,) or (N, K) each.
        rows = per_block(coef.detach(), len(mode.bank.blocks)).transpose(0, 1)
        self._rows = rows.clone(memory_format=torch.contiguous_format).unbind()
        # Storages of composed blocks: what a tensor must have in common to be a view of one.
        self._storages: WeakKeyDictionary[torch.UntypedStorage, tuple[str, torch.dtype, int]] = (
            WeakKeyDictionary()
        )
        # Plain references, as in `passes.Pass`.
        self._again: dict[str, ref[Tensor]] = {}

    def compose(self, name: str, /) -> Tensor:
        """See `passes.Snapshot`."""
        bucket = self._mode.buckets[name]
        (column,), (shape,) = bucket.columns, bucket.layout.shapes
        flat = self._mode.blocks.compose(column, self._rows[column])
        # To autograd no view: a module may change it in place, as embeddings with max_norm do.
        block: Tensor = torch.ops.aten._unsafe_view(flat[: prod(shape)], shape)
        if not block.is_inference():
            self._storages[block.untyped_storage()] = (name, block.dtype, block._version)
        return block

    def hooks(self) -> AbstractContextManager[Any]:
        """Notes in place of blocks."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout == torch.strided:
            name, dtype, version = self._storages.get(tensor.untyped_storage(), ("", None, -1))
            # Neither reinterpreted (as complex numbers, say) nor changed in place since.
            if tensor.dtype == dtype and tensor._version == version and not tensor.is_neg():
                return _Note(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor, tensor._version

    def _unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, _Note):
            with torch.no_grad():
                again = self._again.get(saved.name)
                block = again() if again else None
                if block is None:
                    block = self.compose(saved.name)
                    self._again[saved.name] = ref(block)
                return block.as_strided(saved.size, saved.stride, saved.offset)
        tensor: Tensor
        tensor, version = saved
        # Autograd checks this itself, but not where hooks are in use.
        if tensor._version != version:
            raise RuntimeError(
                "a tensor that the backward needs was modified in place after it was saved: "
                f"{tuple(tensor.shape)}, version {tensor._version}, expected {version}"
            )
        return tensor
