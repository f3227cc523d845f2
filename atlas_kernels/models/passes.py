"""How composed weights enter autograd's graph, the same in every memory mode.

Of every block and pass there is one *token*, a tensor without storage that stands for the block in
the graph, and a *use* for each time that the block is asked for. A use hands its gradient to the
token, so autograd sums the gradients of all uses before the token's bucket reduces them to one
number per task vector. Neither saves a tensor: a pass can serve any number of backward passes, and
the gradient of a block is gone as soon as its bucket is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from ..bank import LowRankSegment, Segment, TaskVectorBank, factor_names, multiply, parts
from ..ops import Layout, per_block


@dataclass(frozen=True)
class Bucket:
    """Blocks whose gradients become those of their coefficients together.

    Attributes:
        names: of the blocks.
        columns: their places in the bank.
        layout: of their gradients.
        like: any tensor of their dtype and device.
        reduce: their gradients, flat and with padding, to those of their coefficients (N, k) or
            (N, k, K); differentiable.
    """

    names: tuple[str, ...]
    columns: tuple[int, ...]
    layout: Layout
    like: Tensor
    reduce: Callable[[Tensor], Tensor]

    def coef_grad(self, grads: Sequence[Tensor | None]) -> Tensor:
        """The gradient of the coefficients, for that of every block that has one."""
        return self.reduce(self.layout.join(grads, self.like))


def buckets(
    bank: TaskVectorBank,
    limit: int,
    reducer: Callable[[Segment | LowRankSegment], Callable[[Tensor], Tensor]],
) -> Iterator[Bucket]:
    """All blocks: one by one, or as many neighbours as have no more than ``limit`` bytes."""
    for segment in bank.segments:
        for part in parts(segment, limit):
            names = tuple(bank.blocks[column] for column in part.columns)
            yield Bucket(names, part.columns, part.layout, part.base, reducer(part))


class Snapshot(Protocol):
    """The weights of a bank for the coefficients of one pass."""

    def compose(self, name: str, /) -> Tensor:
        """A block or weight, without a graph, and to autograd no view of another tensor."""

    def hooks(self) -> AbstractContextManager[Any]:
        """Inside, the module runs forward."""


class Mode(Protocol):
    """When blocks are composed, and how long they live.

    Attributes:
        bank: what from.
        buckets: by the name of each of their blocks.
    """

    bank: TaskVectorBank
    buckets: dict[str, Bucket]

    def snapshot(self, coef: Tensor, /) -> Snapshot:
        """What a pass composes."""


class Pass:
    """Weights as parts of one graph: those of a forward pass, or of all while ``coef`` stays.

    Args:
        mode: what composes them.
        coef: (N, B), (N,) or (N, B, K).
        cut: applied to every new token, to take the graph before it apart.
    """

    def __init__(self, mode: Mode, coef: Tensor, cut: Callable[[Tensor], Tensor] | None) -> None:
        self._mode = mode
        self._cut = cut
        self._coef, self._version = coef, coef._version
        self._modes = _modes(coef)
        self._snapshot = mode.snapshot(coef)
        self.hooks = self._snapshot.hooks
        self._columns: tuple[Tensor, ...] = ()
        self._tokens: dict[str, Tensor] = {}
        # Not a WeakValueDictionary: an interrupt that falls into its callbacks is lost.
        self._live: dict[str, ref[Tensor]] = {}
        # Kept alive until another weight is asked for: modules such as nn.MultiheadAttention look
        # at a weight several times before they use it.
        self.last: Tensor | None = None

    def is_of(self, coef: Tensor) -> bool:
        """Whether these coefficients are still what it composes from."""
        return coef is self._coef and coef._version == self._version

    def serves(self, coef: Tensor) -> bool:
        """Whether a new pass would compose the same."""
        return self.is_of(coef) and _modes(coef) == self._modes

    def weight(self, name: str) -> Tensor:
        """The composed weight, shared while it is alive; part of the graph if the pass records."""
        live = self._live.get(name)
        value = live() if live else None
        if value is None:
            # Before another one is made, so that it takes no more memory than a use does.
            self.last = None
            records, inference = self._modes
            # Like a parameter, which is the same whatever mode the module reads it in.
            with torch.inference_mode(inference), torch.set_grad_enabled(records):
                if records and name in self._mode.bank.products:
                    # Not shared: a backward pass uses up the graph of a product.
                    return self._product(name)
                compose = partial(self._snapshot.compose, name)
                value = _Use.apply(self._token(name), compose) if records else compose()
            self._live[name] = ref(value)
        self.last = value
        return value

    def _product(self, name: str) -> Tensor:
        bank = self._mode.bank
        factors = {factor: self.weight(factor) for factor in factor_names(name)}
        return multiply(factors, bank.constants, {name: bank.products[name]})[name]

    def _token(self, name: str) -> Tensor:
        # Made at the first use and not before: autograd runs nodes in the reverse order of their
        # making, so gradients are reduced right after the bucket's last use has handed them over.
        token = self._tokens.get(name)
        if token is None:
            num_blocks = len(self._mode.bank.blocks)
            # Not index_select or the like, which save tensors that a backward pass uses up.
            self._columns = self._columns or per_block(self._coef.float(), num_blocks).unbind(1)
            bucket = self._mode.buckets[name]
            tokens = _Tokens.apply(bucket, *(self._columns[column] for column in bucket.columns))
            tokens = map(self._cut, tokens) if self._cut else tokens
            self._tokens |= zip(bucket.names, tokens, strict=True)
            token = self._tokens[name]
        return token


class Recorded:
    """In place of a `Pass`: weights whose composition is itself part of a graph.

    For function transforms and the compiler, which cannot follow passes.
    """

    last: Tensor | None = None

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def is_of(self, coef: Tensor) -> bool:
        """True: whoever made it knows."""
        return True

    serves = is_of

    def weight(self, name: str) -> Tensor:
        """The composed weight."""
        return self._weights[name]

    def hooks(self) -> AbstractContextManager[None]:
        """None."""
        return nullcontext()


def _modes(coef: Tensor) -> tuple[bool, bool]:
    """Whether composing now records a graph, and whether it runs in inference mode."""
    return torch.is_grad_enabled() and coef.requires_grad, torch.is_inference_mode_enabled()


# Both without `setup_context`, which would cost more than most compositions: PyTorch then inspects
# the signature of `forward` at every call.
class _Tokens(torch.autograd.Function):
    """(bucket, *coef[:, column] of its blocks) -> tensors like the blocks, without storage."""

    @staticmethod
    def forward(ctx: Any, bucket: Bucket, *columns: Tensor) -> tuple[Tensor, ...]:
        ctx.bucket = bucket
        ctx.set_materialize_grads(False)
        return tuple(bucket.like.new_empty(()).expand(shape) for shape in bucket.layout.shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, *ctx.bucket.coef_grad(grads).unbind(1)


class _Use(torch.autograd.Function):
    """(token, compose) -> the composed block."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, compose: Callable[[], Tensor]) -> Tensor:
        # A tensor of its own, if what is composed is kept.
        return compose().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
