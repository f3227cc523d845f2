"""Every way to compose that is measured: ours, and what a researcher would write without us.

A way is a function of `Inputs` that prepares what it needs and returns two functions without
arguments, forward and backward: B composed tensors, and the coefficient gradient [N, B].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels.ops import Arena, ArenaComposition, compose_with, resolve

from .cases import Inputs

Way = tuple[Callable[[], Sequence[Tensor]], Callable[[], Tensor]]


def ours_list(inputs: Inputs, backend: str) -> Way:
    """`ak.compose` on tensors that the caller owns."""
    coef = inputs.coef.clone().requires_grad_()
    composed = ak.compose(inputs.base, inputs.deltas, coef, backend=backend)

    def forward() -> Sequence[Tensor]:
        return ak.compose(inputs.base, inputs.deltas, inputs.coef, backend=backend)

    def backward() -> Tensor:
        return _coef_grad(composed[0], inputs.grads)

    return forward, backward


def ours_bank(inputs: Inputs, backend: str) -> Way:
    """A bank's composition, split into blocks, and its gradient on the arena."""
    base, layout = inputs.bank_base, inputs.layout
    arena = Arena(inputs.bank_deltas, None, 0, *layout.tables, None)
    backend = resolve(backend, base.device.type, False)
    composition = ArenaComposition(backend, arena, len(inputs.coef), 0)
    composed = compose_with(composition, inputs.coef.clone().requires_grad_(), base)

    def forward() -> Sequence[Tensor]:
        return layout.split(compose_with(composition, inputs.coef, base))

    def backward() -> Tensor:
        return _coef_grad(composed, [inputs.bank_grad])

    return forward, backward


def _coef_grad(composed: Tensor, grads: Sequence[Tensor]) -> Tensor:
    # What the autograd engine calls; torch.autograd.grad spends a millisecond on its own checks.
    node: Any = composed.grad_fn
    with torch.no_grad():
        result = node.apply(*grads)
    grad: Tensor = next(entry for entry in result if entry is not None)
    return grad


def loop(inputs: Inputs) -> Way:
    """The plain Python loop."""

    def forward() -> Sequence[Tensor]:
        composed = [block.clone() for block in inputs.base]
        for vector, row in zip(inputs.deltas, inputs.coef.tolist(), strict=True):
            for block, delta, c in zip(composed, vector, row, strict=True):
                block.add_(delta, alpha=c)
        return composed

    def backward() -> Tensor:
        rows = [
            torch.stack([(g * d).sum() for g, d in zip(inputs.grads, vector, strict=True)])
            for vector in inputs.deltas
        ]
        return torch.stack(rows)

    return forward, backward


def foreach(inputs: Inputs) -> Way:
    """The loop over task vectors only, by PyTorch's list operators."""

    def forward() -> Sequence[Tensor]:
        composed = [block.clone() for block in inputs.base]
        for vector, row in zip(inputs.deltas, inputs.coef.tolist(), strict=True):
            wide = [delta.float() for delta in vector]
            torch._foreach_mul_(wide, row)
            torch._foreach_add_(composed, wide)
        return composed

    def backward() -> Tensor:
        rows = []
        for vector in inputs.deltas:
            products = torch._foreach_mul(inputs.grads, vector)
            rows.append(torch.stack([product.sum() for product in products]))
        return torch.stack(rows)

    return forward, backward


def matmul(inputs: Inputs) -> Way:
    """One matrix product per block, on deltas stacked beforehand. Products round to bfloat16."""
    stacked = [
        torch.stack([vector[b].flatten() for vector in inputs.deltas])
        for b in range(len(inputs.base))
    ]
    narrow = inputs.coef.to(inputs.case.delta_dtype)

    def forward() -> Sequence[Tensor]:
        return [
            block + (narrow[:, b] @ stacked[b]).view(block.shape)
            for b, block in enumerate(inputs.base)
        ]

    def backward() -> Tensor:
        columns = [
            (stacked[b] @ grad.flatten().to(stacked[b].dtype)).float()
            for b, grad in enumerate(inputs.grads)
        ]
        return torch.stack(columns, 1)

    return forward, backward


def compiled(inputs: Inputs) -> Way:
    """`torch.compile` of one block's loop, for any length; it compiles once per N, in advance."""

    def flat(tensor: Tensor) -> Tensor:
        # A copy: a view has a guard on the shape of what it views, and every shape recompiles.
        return tensor.flatten().clone()

    columns = [[flat(vector[b]) for vector in inputs.deltas] for b in range(len(inputs.base))]
    base, grads = list(map(flat, inputs.base)), list(map(flat, inputs.grads))

    @torch.compile(dynamic=True)
    def add(base: Tensor, coef: Tensor, deltas: list[Tensor]) -> Tensor:
        for i, delta in enumerate(deltas):
            base = base + coef[i] * delta
        return base

    @torch.compile(dynamic=True)
    def dot(grad: Tensor, deltas: list[Tensor]) -> Tensor:
        return torch.stack([(grad * delta).sum() for delta in deltas])

    def forward() -> Sequence[Tensor]:
        return [
            add(base[b], inputs.coef[:, b], columns[b]).view(block.shape)
            for b, block in enumerate(inputs.base)
        ]

    def backward() -> Tensor:
        return torch.stack([dot(grad, columns[b]) for b, grad in enumerate(grads)], 1)

    return forward, backward


WAYS: dict[str, Callable[[Inputs], Way]] = {
    "atlas list": partial(ours_list, backend="auto"),
    "atlas bank": partial(ours_bank, backend="auto"),
    # On a GPU "auto" is the CUDA extension where it is built.
    "triton list": partial(ours_list, backend="triton"),
    "triton bank": partial(ours_bank, backend="triton"),
    "loop": loop,
    "foreach": foreach,
    "matmul": matmul,
    "compile": compiled,
}
# How far a way may lie from the reference, relative to the largest value.
TOLERANCE = {"matmul": 2e-2}
