"""Where a composed module's weights come from: passes, every thread's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from ..ops import in_transform
from .door import install
from .passes import Pass, Recorded
from .recompute import OnUse
from .whole import Whole

T = TypeVar("T")

# Models that share a module take turns.
_TURN = threading.RLock()


class Source:
    """Hands out composed weights by name (a `door.Door`).

    A forward pass of the model is a `Pass` of its own, unless passes are shared. Whoever reads
    weights at another time does so in a pass that lasts until the coefficients change.

    Args:
        mode: composes them.
        coef: the model's coefficients, asked for at every use.
        module: which asks for its weights here; None, if the model hands them to it.
    """

    installed = False

    def __init__(
        self, mode: Whole | OnUse, coef: Callable[[], Tensor], module: nn.Module | None
    ) -> None:
        self._mode = mode
        self._coef = coef
        self._module = module
        self._local = _Local()
        # Threads in a forward pass.
        self._busy: set[int] = set()
        self._traced: Recorded | None = None
        self._install()

    def weight(self, name: str, parameter: Tensor | None = None) -> Tensor:
        """The composed weight, in place of a parameter."""
        if torch.compiler.is_compiling() and self._traced is not None:
            return self._traced.weight(name)
        local = self._local
        if parameter is not None and _alive(local.copying) is not None:
            return parameter
        running = local.running
        # An interrupt may have left it behind.
        if running is None or not running.is_of(self._coef()):
            running = self._between()
        return running.weight(name)

    def weights(self) -> dict[str, Tensor]:
        """All composed weights by name."""
        return {name: self.weight(name) for name in self._mode.bank.weights}

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, the model runs forward.

        Raises:
            RuntimeError: another model runs on the same module, in another thread.
        """
        if torch.compiler.is_compiling() and isinstance(self._mode, Whole):
            # A graph has no use for what is kept, and the compiler none for threads.
            self._traced = Recorded(self._mode.compose(self._coef()))
            try:
                yield
            finally:
                self._traced = None
            return
        local, thread = self._local, threading.get_ident()
        current = self._between() if _alive(local.shared) else self._new_pass()
        try:
            # First, so that no other model takes the module from here on.
            self._busy.add(thread)
            self._install()
            local.running = current
            with current.hooks():
                yield
        finally:
            local.running = current.last = None
            self._busy.discard(thread)

    @contextmanager
    def shared_pass(self, accumulate: bool) -> Iterator[None]:
        """Inside, all of this thread's passes are one, as long as the coefficients stay.

        Args:
            accumulate: whether gradients stop at the blocks, and go on at the end.
        """
        local, sums = self._local, _Sums() if accumulate else None
        shared = _Kept(sums.cut if sums else None)
        local.between.current = None
        local.shared = ref(shared)
        try:
            yield
            if sums:
                sums.send()
        finally:
            local.shared = None

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Inside, this thread finds the parameters themselves: some modules look when copied."""
        local, copying = self._local, _Mark()
        local.copying = ref(copying)
        try:
            yield
        finally:
            local.copying = None

    def forget(self) -> None:
        """Drops what is kept between passes."""
        self._mode.forget()
        self._local = _Local()

    def check_idle(self) -> None:
        """Raises RuntimeError if it is in use in another thread."""
        if self._busy - {threading.get_ident()}:
            raise RuntimeError(
                "a ComposedModel of this module is running in another thread, and models that "
                "share a module take turns: give each thread's model a copy of the module"
            )

    def _install(self) -> None:
        if self._module is not None and not self.installed:
            with _TURN:
                install(self._module, self._mode.bank.weights, self)

    def _between(self) -> Pass | Recorded:
        coef, kept = self._coef(), self._local.kept
        if in_transform():
            return self._new_pass()
        if kept.current is None or not kept.current.serves(coef):
            # Dropped first, with what it holds.
            kept.current = None
            kept.current = self._new_pass()
        return kept.current

    def _new_pass(self) -> Pass | Recorded:
        if in_transform() and isinstance(self._mode, Whole):
            return Recorded(self._mode.compose(self._coef()))
        return Pass(self._mode, self._coef(), self._local.kept.cut)


class _Mark:
    """Lives as long as a `with` block."""


class _Kept:
    """The pass of forward passes that share one, or between forward passes.

    Attributes:
        current: the pass.
        cut: what takes its graph apart, see `Pass`.
    """

    def __init__(self, cut: Callable[[Tensor], Tensor] | None = None) -> None:
        self.current: Pass | Recorded | None = None
        self.cut = cut


class _Local(threading.local):
    """A thread's own.

    What a `with` block brings is held by the block alone: it ends with it, also where an interrupt
    falls into the block's very end and keeps it from being taken back.

    Attributes:
        running: the forward pass.
        between: what is kept between forward passes.
        shared: what is kept while forward passes share one.
        copying: alive while modules are copied.
    """

    running: Pass | Recorded | None = None
    shared: ref[_Kept] | None = None
    copying: ref[_Mark] | None = None

    def __init__(self) -> None:
        self.between = _Kept()

    @property
    def kept(self) -> _Kept:
        """Of the two, the one whose time it is."""
        return _alive(self.shared) or self.between


def _alive(reference: ref[T] | None) -> T | None:
    return reference() if reference else None


class _Sums:
    """Gradients of several backward passes, summed before they go on."""

    def __init__(self) -> None:
        self._cuts: list[tuple[Tensor, Tensor]] = []

    def cut(self, tensor: Tensor) -> Tensor:
        """A leaf in place of the tensor: gradients stop there."""
        leaf = tensor.detach().requires_grad_()
        self._cuts.append((tensor, leaf))
        return leaf

    def send(self) -> None:
        """Sends the sums on through the tensors that were cut."""
        arrived = [(tensor, leaf.grad) for tensor, leaf in self._cuts if leaf.grad is not None]
        if arrived:
            tensors, gradients = zip(*arrived, strict=True)
            torch.autograd.backward(tensors, gradients)
