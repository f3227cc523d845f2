"""All weights at once: composed in one pass over the bank, and kept until the coefficients change.

What is kept has no graph, so that it serves every pass of every thread, with gradients or without.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..bank import BUCKET, LowRankSegment, Segment, TaskVectorBank
from ..ops import tile_keys
from .passes import Bucket, buckets


class Whole:
    """The memory mode "whole" (a `passes.Mode`).

    Args:
        bank: what is composed.
        compose: all of its blocks and weights by name, for coefficients; differentiable.
        groups: K, if blocks are partitioned, else 0.
        seed: of the partition.
    """

    def __init__(
        self,
        bank: TaskVectorBank,
        compose: Callable[[Tensor], dict[str, Tensor]],
        groups: int = 0,
        seed: int = 0,
    ) -> None:
        self.bank = bank
        self.compose = compose
        self.buckets: dict[str, Bucket] = {}
        self._kept: _Composition | None = None
        self._lock = threading.RLock()

        def reducer(part: Segment | LowRankSegment) -> Callable[[Tensor], Tensor]:
            names = [bank.blocks[column] for column in part.columns]
            keys = tile_keys(names, part.layout, seed) if groups else None

            def reduce(grad: Tensor) -> Tensor:
                bank.check_unchanged()
                return part.coef_grad(grad, tile_key=keys, groups=groups)

            return reduce

        for bucket in buckets(bank, BUCKET, reducer):
            self.buckets |= dict.fromkeys(bucket.names, bucket)

    def snapshot(self, coef: Tensor, /) -> _Current:
        """See `passes.Mode`."""
        return _Current(self, coef)

    def weights(self, coef: Tensor) -> dict[str, Tensor]:
        """All blocks and weights for these coefficients, composed anew only if need be."""
        kept = self._kept
        if kept is None or not kept.serves(coef):
            with self._lock:
                kept = self._kept
                if kept is None or not kept.serves(coef):
                    # Dropped first, so that two composed models are never alive at once.
                    self._kept = kept = None
                    self._kept = kept = self._composed(coef)
        return kept.weights

    def forget(self) -> None:
        """Drops what is kept."""
        self._kept = None

    def _composed(self, coef: Tensor) -> _Composition:
        version = coef._version
        with torch.inference_mode(False), torch.no_grad():
            # Blocks of one arena, but to autograd no views of it: a change in place, as embeddings
            # with max_norm make it, is one of this block alone.
            weights = {
                name: torch.ops.aten._unsafe_view(weight, weight.shape)
                for name, weight in self.compose(coef.detach()).items()
            }
        return _Composition(weakref.ref(coef), version, weights)


@dataclass(frozen=True)
class _Current:
    """Whatever is composed for these coefficients now. It keeps nothing alive by itself."""

    whole: Whole
    coef: Tensor

    def compose(self, name: str, /) -> Tensor:
        """See `passes.Snapshot`."""
        return self.whole.weights(self.coef)[name]

    def hooks(self) -> AbstractContextManager[None]:
        """None: what is saved for a backward pass is kept anyway."""
        return nullcontext()


@dataclass(frozen=True)
class _Composition:
    """Composed weights, and what they were composed from."""

    coef: weakref.ref[Tensor]
    version: int
    weights: dict[str, Tensor]

    def serves(self, coef: Tensor) -> bool:
        """Whether composing anew would give the same."""
        return self.coef() is coef and coef._version == self.version
