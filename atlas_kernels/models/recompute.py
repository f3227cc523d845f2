"""Weights on use: a block is composed when a module asks for it, and again for the backward.

Nothing but the base, the bank and the activations outlives a use. Of every block and forward pass
there is one *token*, a tensor without storage that stands for the block in the autograd graph, and
a *use* each time the block is composed from it. A use hands its gradient to the token, so autograd
sums the gradients of all uses before the token reduces them to one number per task vector. What
the module's operations save for their backward is not the block, but a note to compose it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad

from ..bank import TaskVectorBank
from ..ops import per_block, tile_keys


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
        parts = {part.columns[0]: part for segment in bank.segments for part in segment.blocks()}
        self._parts = [parts[column] for column in range(len(parts))]
        self._groups = groups
        self._keys = [
            tile_keys([name], part.layout, seed) if groups else None
            for name, part in zip(bank.blocks, self._parts, strict=True)
        ]

    def compose(self, column: int, coef: Tensor, /) -> Tensor:
        """See `Blocks`."""
        return self._parts[column].compose(coef.unsqueeze(1), tile_key=self._keys[column])

    def coef_grad(self, column: int, grad: Tensor, /) -> Tensor:
        """See `Blocks`."""
        part, key = self._parts[column], self._keys[column]
        return part.coef_grad(grad, tile_key=key, groups=self._groups).squeeze(1)


class OnUse:
    """Composes a module's weights where it asks for them (see `door`).

    Args:
        bank: which blocks, and how long each is with padding.
        blocks: what to compose them from.
        coef: (N, B), (N,) or (N, B, K), read anew by every forward pass.
    """

    installed = False

    def __init__(self, bank: TaskVectorBank, blocks: Blocks, coef: Tensor) -> None:
        self.bank = bank
        self.coef = coef
        self._blocks = _Blocks(blocks, bank)
        self._pass: _Pass | None = None

    @contextmanager
    def forward_pass(
        self, keep: bool = False, cut: Callable[[Tensor], Tensor] | None = None
    ) -> Iterator[None]:
        """Inside, the module runs forward.

        Args:
            keep: whether the next pass shares this one's tokens, unless ``coef`` has changed.
            cut: applied to every new token, to take the graph before it apart.
        """
        self.bank.check_unchanged()
        if self._pass is None or not self._pass.serves():
            self._pass = self._new_pass(cut)
        current = self._pass
        try:
            with saved_tensors_hooks(current.pack, current.unpack):
                yield
        finally:
            current.last = None
            if not keep:
                self._pass = None

    def end(self) -> None:
        """Forgets the pass that was kept."""
        self._pass = None

    def serves(self, bank: TaskVectorBank, coef: Tensor) -> bool:
        """Whether this composes from these, and still in the module."""
        return self.installed and bank is self.bank and coef is self.coef

    def block(self, column: int, parameter: Tensor) -> Tensor:
        """The composed block in place of a parameter.

        Activation checkpointing comes back here during the backward, when there may be no pass.
        """
        return (self._pass or self._new_pass(None)).block(column, parameter)

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """All composed blocks by name, one after another, without gradients."""
        current = self._new_pass(None)
        for column, name in enumerate(self.bank.blocks):
            yield name, current.compose(column)

    def _new_pass(self, cut: Callable[[Tensor], Tensor] | None) -> _Pass:
        return _Pass(self._blocks, self.coef, cut)


@dataclass(frozen=True)
class _Note:
    """What is saved for the backward instead of a view of a composed block."""

    column: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Pass:
    """One forward pass: its coefficients, its tokens, and the composed blocks that are alive."""

    def __init__(
        self,
        blocks: _Blocks,
        coef: Tensor,
        cut: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._blocks = blocks
        self._cut = cut
        self._coef, self._version = coef, coef._version
        self._modes = _modes(coef)
        num_blocks = len(blocks.shapes)
        self._per_block = per_block(coef, num_blocks)
        # A copy: the backward composes with these, whatever becomes of coef. (N,) or (N, K) each.
        rows = self._per_block.detach().transpose(0, 1)
        rows = rows.clone(memory_format=torch.contiguous_format)
        self._rows = rows.unbind()
        self._columns: tuple[Tensor, ...] = ()
        self._tokens: dict[int, Tensor] = {}
        self._live: WeakValueDictionary[tuple[int, bool], Tensor] = WeakValueDictionary()
        # Kept alive until another block is asked for: modules such as nn.MultiheadAttention look
        # at a weight several times before they use it.
        self.last: Tensor | None = None
        # Storages of composed blocks: what a tensor must have in common to be a view of one.
        self._storages: WeakKeyDictionary[torch.UntypedStorage, tuple[int, torch.dtype, int]] = (
            WeakKeyDictionary()
        )

    def serves(self) -> bool:
        """Whether a new pass would compose the same."""
        return self._coef._version == self._version and _modes(self._coef) == self._modes

    def block(self, column: int, parameter: Tensor) -> Tensor:
        """The composed block, shared while it is alive; part of the graph if the pass records."""
        records, inference = self._modes
        value = self._live.get((column, records))
        if value is None:
            # Before another one is made, so that it takes no more memory than a use does.
            self.last = None
            # Like a parameter, which is the same whatever mode the module reads it in.
            with torch.inference_mode(inference), torch.set_grad_enabled(records):
                if records:
                    token = self._token(column, parameter)
                    value = _Use.apply(token, partial(self.compose, column))
                else:
                    value = self.compose(column)
            self._live[column, records] = value
            if not inference:
                self._storages[value.untyped_storage()] = (column, value.dtype, value._version)
        self.last = value
        return value

    def compose(self, column: int) -> Tensor:
        """The composed block, new and without a graph."""
        return self._blocks.compose(column, self._rows[column])

    def pack(self, tensor: Tensor) -> Any:
        """What autograd saves of a tensor that a backward will need."""
        if tensor.layout == torch.strided:
            column, dtype, version = self._storages.get(tensor.untyped_storage(), (-1, None, -1))
            # Neither reinterpreted (as complex numbers, say) nor changed in place since.
            if tensor.dtype == dtype and tensor._version == version and not tensor.is_neg():
                return _Note(column, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor, tensor._version

    def unpack(self, saved: Any) -> Tensor:
        """The tensor again."""
        if isinstance(saved, _Note):
            with torch.no_grad():
                value = self._live.get((saved.column, False))
                if value is None:
                    value = self.compose(saved.column)
                    self._live[saved.column, False] = value
                return value.as_strided(saved.size, saved.stride, saved.offset)
        tensor: Tensor
        tensor, version = saved
        # Autograd checks this itself, but not where hooks are in use.
        if tensor._version != version:
            raise RuntimeError(
                "a tensor that the backward needs was modified in place after it was saved: "
                f"{tuple(tensor.shape)}, version {tensor._version}, expected {version}"
            )
        return tensor

    def _token(self, column: int, parameter: Tensor) -> Tensor:
        # Made at the first use and not before: autograd runs nodes in the reverse order of their
        # making, so a gradient is reduced right after the block's last use has handed it over.
        token = self._tokens.get(column)
        if token is None:
            self._columns = self._columns or self._per_block.unbind(1)
            token = _Token.apply(self._columns[column], self._blocks, column, parameter)
            self._tokens[column] = token = self._cut(token) if self._cut else token
        return token


class _Blocks:
    """Blocks in the shapes of the parameters, without padding."""

    def __init__(self, blocks: Blocks, bank: TaskVectorBank) -> None:
        self.shapes = bank.shapes
        self._padded = blocks
        self._padding = [0] * len(bank.shapes)
        for segment in bank.segments:
            offsets = segment.layout.offsets
            for column, start, end in zip(segment.columns, offsets, offsets[1:], strict=False):
                self._padding[column] = end - start - prod(bank.shapes[column])

    def compose(self, column: int, coef: Tensor) -> Tensor:
        flat = self._padded.compose(column, coef)
        block = flat[: flat.numel() - self._padding[column]]
        # To autograd no view: a module may change it in place, as embeddings with max_norm do.
        result: Tensor = torch.ops.aten._unsafe_view(block, self.shapes[column])
        return result

    def coef_grad(self, column: int, grad: Tensor) -> Tensor:
        flat, padding = grad.reshape(-1), self._padding[column]
        return self._padded.coef_grad(column, pad(flat, (0, padding)) if padding else flat)


def _modes(coef: Tensor) -> tuple[bool, bool]:
    """Whether composing now records a graph, and whether it runs in inference mode."""
    return torch.is_grad_enabled() and coef.requires_grad, torch.is_inference_mode_enabled()


# Both without `setup_context`, which would cost more than most compositions: PyTorch then inspects
# the signature of `forward` at every call.
class _Token(torch.autograd.Function):
    """(coef[:, column], blocks, column, parameter) -> a tensor like it, without storage."""

    @staticmethod
    def forward(ctx: Any, coef: Tensor, blocks: _Blocks, column: int, parameter: Tensor) -> Tensor:
        ctx.blocks, ctx.column = blocks, column
        return parameter.new_empty(()).expand(parameter.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.blocks.coef_grad(ctx.column, grad), None, None, None


class _Use(torch.autograd.Function):
    """(token, compose) -> the composed block."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, compose: Callable[[], Tensor]) -> Tensor:
        return compose()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
