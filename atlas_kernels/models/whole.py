"""All weights at once: composed in one pass, and the module's own until the coefficients change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..bank import TaskVectorBank


class Composing(Protocol):
    """A model that composes weights from a bank."""

    training: bool

    @property
    def coef(self) -> Tensor:
        """(N, B), (N,) or (N, B, K)."""

    @property
    def bank(self) -> TaskVectorBank:
        """What from."""

    def _compose(self) -> dict[str, Tensor]:
        """All weights, anew."""


class Whole:
    """Composes all weights of a model when one of them is asked for (see `door`).

    Weights that record no graph are shared by all threads, which wait for the one that composes
    them. Weights that do are each thread's own, for a backward pass uses up what it goes through.

    Args:
        model: whose bank and coefficients, read at every use.
    """

    installed = False

    def __init__(self, model: Composing) -> None:
        self._model = model
        self._shared: _Composition | None = None
        self._lock = threading.RLock()
        self._threads = threading.local()
        self._traced: dict[str, Tensor] | None = None
        self.hold = False
        self.cut: Callable[[Tensor], Tensor] | None = None

    def block(self, column: int, parameter: Tensor) -> Tensor:
        """The composed block in place of a parameter."""
        weights = self.weights() if self._traced is None else self._traced
        return weights[self._model.bank.weights[column]]

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, the module runs forward: in training on a composition of its own."""
        if torch.compiler.is_compiling():
            # A graph has no use for caches, and the compiler none for locks.
            self._traced = self._model._compose()
            try:
                yield
            finally:
                self._traced = None
            return
        anew = self._model.training and not self.hold and self._records()
        if anew:
            self._slot().kept = None
        try:
            yield
        finally:
            if anew:
                # The graph holds what the backward pass needs.
                self._slot().kept = None

    def weights(self) -> dict[str, Tensor]:
        """The composed weights by name; composed anew only if need be."""
        records, slot = self._records(), self._slot()
        kept = slot.kept
        if kept is not None and kept.serves(self._model, records):
            return kept.weights
        # Dropped first, so that two composed models are never alive at once.
        slot.kept = kept = None
        if records:
            self._shared = None
            weights = self._recorded(slot)
            slot.kept = _Composition.of(self._model, weights, records)
            return weights
        with self._lock:
            shared = self._shared
            if shared is None or not shared.serves(self._model, records):
                self._shared = shared = None
                self._shared = shared = _Composition.of(
                    self._model, self._model._compose(), records
                )
            return shared.weights

    def serves(self, bank: TaskVectorBank, coef: Tensor) -> bool:
        """True: whatever bank and coefficients the model has."""
        return True

    def end(self) -> None:
        """Forgets what is kept."""
        self._shared = None
        self._threads = threading.local()

    def _recorded(self, slot: _Slot) -> dict[str, Tensor]:
        weights = self._model._compose()
        if self.cut is not None:
            return {name: self.cut(weight) for name, weight in weights.items()}

        def drop(gradient: Tensor) -> None:
            # The next forward needs another composition; and the memory is needed: gradients are
            # brought into the order of the bank at the end of this pass.
            slot.kept = None

        for weight in weights.values():
            weight.register_hook(drop)
        return weights

    def _records(self) -> bool:
        return torch.is_grad_enabled() and self._model.coef.requires_grad

    def _slot(self) -> _Slot:
        slot: _Slot | None = getattr(self._threads, "slot", None)
        if slot is None:
            slot = self._threads.slot = _Slot()
        return slot


class _Slot:
    """A thread's own composition. Hooks of a GPU's backward pass reach it from another thread."""

    kept: _Composition | None = None


@dataclass(frozen=True)
class _Composition:
    """Composed weights, and what they were composed from."""

    bank: TaskVectorBank
    coef: Tensor
    version: int
    records: bool
    inference: bool
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: Composing, weights: dict[str, Tensor], records: bool) -> _Composition:
        """What a model has just composed."""
        inference = torch.is_inference_mode_enabled()
        return cls(model.bank, model.coef, model.coef._version, records, inference, weights)

    def serves(self, model: Composing, records: bool) -> bool:
        """Whether composing anew would give the same, and gradients if they are asked for."""
        return (
            model.bank is self.bank
            and model.coef is self.coef
            and model.coef._version == self.version
            and records <= self.records
            and torch.is_inference_mode_enabled() == self.inference
        )
