"""The composition operators: their checks, their derivatives, their dispatch.

Composition and its coefficient gradient are each other's derivative, so each is an
`autograd.Function` whose backward calls the other: any order of differentiation works. There are
three pairs: lists of tensors that the caller owns, anything else that composes one flat tensor (an
`arena`, low-rank factors, a stream), which comes as one object, and the blocks of such a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import resolve
from .groups import check_groups
from .internals import any_requires_grad, in_transform, is_transformed
from .schema import ABSENT, operators

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def compose(
    base: Sequence[Tensor],
    deltas: Sequence[Sequence[Tensor | None]],
    coef: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Adds task vectors to a base, each block with its own coefficients.

    ``composed[b] = base[b] + sum_i coef[i, b] * deltas[i][b]``

    The sum runs in float32, in the order of i, and is rounded once, to the dtype of ``base[b]``.
    The same inputs give the same bits on every call, for any number of threads. Deltas are read
    where they lie; only a non-contiguous one is copied, for the duration of the call.

    Args:
        base: B tensors of any shapes, float32, bfloat16 or float16, all on one device.
        deltas: N task vectors, each a sequence of B tensors shaped like ``base``, or None where the
            vector has no such block. Dtypes as for ``base``, free to differ.
        coef: (N, B), one coefficient per vector and block, or (N,), one per vector. Floating point.
        backend: "auto", or one of the names that ``atlas_kernels.backends()`` lists.

    Returns:
        B new tensors with the shapes and dtypes of ``base``, differentiable (twice) in ``coef``,
        ``base`` and ``deltas``. Works under ``torch.compile``, ``torch.func.grad`` and ``vmap``;
        forward-mode differentiation raises NotImplementedError.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names the vector and the block.
        BackendUnavailableError: the backend asked for cannot run here.

    float64 tensors are accepted by ``backend="torch"`` and "auto", and computed in float64.

    Source: aTLAS, arXiv 2407.02880, equation 3.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> base = [torch.ones(2, 3), torch.zeros(4)]
        >>> deltas = [[torch.ones(2, 3), torch.ones(4)], [torch.ones(2, 3), None]]
        >>> coef = torch.tensor([[0.5, 2.0], [0.25, 0.0]], requires_grad=True)
        >>> weight, bias = ak.compose(base, deltas, coef)
        >>> weight[0, 0].item(), bias[0].item()
        (1.75, 2.0)
    """
    if isinstance(base, Tensor | Mapping):
        raise TypeError(f"base is a {type(base).__name__}, expected a list of one tensor per block")
    base = tuple(base)
    deltas = tuple(tuple(vector) for vector in deltas)
    if _is_plain(base, deltas, coef):
        chosen = resolve(backend, base[0].device.type, False)
        if chosen != "torch":
            # These backends check for next to nothing what takes longer here than composing.
            try:
                return _compose(chosen, base, deltas, coef.to(torch.float32))
            except (RuntimeError, TypeError, ValueError):
                check(base, deltas, coef)
                if not _any_float64(base, deltas):
                    raise
    check(base, deltas, coef)
    if not base:
        return ()
    accumulate = torch.float64 if _any_float64(base, deltas) else torch.float32
    chosen = resolve(backend, base[0].device.type, accumulate == torch.float64)
    return _compose(chosen, base, deltas, coef.to(accumulate))


def _is_plain(
    base: tuple[Tensor, ...], deltas: Sequence[Sequence[Tensor | None]], coef: Tensor
) -> bool:
    """Whether all that an operator would not notice by itself is right, and nothing traces it."""
    return (
        not (torch.compiler.is_compiling() or is_transformed())
        and bool(base)
        and all(len(vector) == len(base) for vector in deltas)
        and all(isinstance(tensor, Tensor) for tensor in (coef, *base))
        and coef.is_floating_point()
        and coef.device == base[0].device
    )


def _compose(
    backend: str,
    base: tuple[Tensor, ...],
    deltas: Sequence[Sequence[Tensor | None]],
    coef: Tensor,
) -> tuple[Tensor, ...]:
    absent = base[0].new_empty(ABSENT)
    flat = [absent if delta is None else delta for vector in deltas for delta in vector]
    visible = torch.compiler.is_compiling() or is_transformed()
    visible = visible or (torch.is_grad_enabled() and any_requires_grad(flat))
    # Thousands of tensors cost more to pass through autograd than to compose.
    seen, hidden = (flat, None) if visible else ([], flat)
    composed: tuple[Tensor, ...] = _call(
        _ComposeList, backend, len(base), hidden, per_block(coef, len(base)), *base, *seen
    )
    return composed


class Composition(Protocol):
    """Anything linear in coefficients: ``base + sum_i coef[i] * delta_i`` on one flat tensor."""

    def composed(self, coef: Tensor, base: Tensor) -> Tensor:
        """The sum, like base [P]; coef is (N, B) or (N, B, K), float32."""

    def dots(self, grad: Tensor) -> Tensor:
        """``<grad, delta_i>`` over each block or group, shaped like coef, for grad [P]."""


def compose_with(composition: Composition, coef: Tensor, base: Tensor) -> Tensor:
    """``composition.composed``, differentiable (in any order) in ``coef`` and ``base``."""
    result: Tensor = _call(_Compose, composition, coef, base)
    return result


def dots_with(composition: Composition, grad: Tensor) -> Tensor:
    """``composition.dots``, what `compose_with` hands back to ``coef``; differentiable."""
    result: Tensor = _call(_Dots, composition, grad)
    return result


class BlockComposition(Protocol):
    """The same with its result in blocks, whose gradients are taken where they lie."""

    def composed(self, coef: Tensor, based: bool) -> tuple[Tensor, ...]:
        """Every block of the sum, or without the base of the deltas' alone."""

    def dots(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Shaped like coef; None is the gradient of a block that has no part in the loss."""


def compose_blocks_with(
    composition: BlockComposition, coef: Tensor, based: bool
) -> tuple[Tensor, ...]:
    """``composition.composed``, differentiable (in any order) in ``coef``."""
    result: tuple[Tensor, ...] = _call(_ComposeBlocks, composition, coef, based)
    return result


def per_block(coef: Tensor, num_blocks: int) -> Tensor:
    """A coefficient per block: coef (N,) as (N, B)."""
    return coef if coef.dim() > 1 else coef.unsqueeze(1).expand(-1, num_blocks)


def check_coef(
    coef: Tensor,
    num_vectors: int,
    num_blocks: int,
    device: torch.device | None,
    partitions: bool = False,
) -> None:
    """Raises unless ``coef`` is floating point, (N, B) or (N,), on ``device``.

    With ``partitions`` it may be (N, B, K) too, for K groups of each block's elements.
    """
    if not isinstance(coef, Tensor):
        raise TypeError(f"coef must be a tensor, got {type(coef).__name__}")
    if not coef.is_floating_point():
        raise TypeError(f"coef has dtype {coef.dtype}, expected a floating-point dtype")
    shape = tuple(coef.shape)
    grouped = partitions and len(shape) == 3
    if (shape[:2] if grouped else shape) not in ((num_vectors, num_blocks), (num_vectors,)):
        more = f", or ({num_vectors}, {num_blocks}, K) for K groups of elements"
        raise ValueError(
            f"coef has shape {shape}, expected ({num_vectors}, {num_blocks}) for "
            f"{num_vectors} task vectors and {num_blocks} blocks, or ({num_vectors},) for one "
            f"coefficient per task vector{more if partitions else ''}"
        )
    if grouped:
        check_groups(shape[2])
    if coef.device != device:
        raise ValueError(f"coef is on {coef.device}, but base is on {device}: move it with coef.to")


def check(base: Sequence[Tensor], deltas: Sequence[Sequence[Tensor | None]], coef: Tensor) -> None:
    """Raises one TypeError or ValueError that names the first argument that does not fit."""
    for b, block in enumerate(base):
        where = f"base block {b}"
        _check_tensor(where, block)
        if block.device != base[0].device:
            raise ValueError(
                f"{where} is on {block.device}, but base block 0 is on {base[0].device}: "
                "move all blocks to one device"
            )
    for i, vector in enumerate(deltas):
        if len(vector) != len(base):
            raise ValueError(
                f"task vector {i} has {len(vector)} blocks, expected {len(base)} as in base: "
                "put None where a vector has no such block"
            )
        for b, delta in enumerate(vector):
            if delta is None:
                continue
            where = f"task vector {i}, block {b}"
            _check_tensor(where, delta)
            if delta.shape != base[b].shape:
                raise ValueError(
                    f"{where} has shape {tuple(delta.shape)}, expected {tuple(base[b].shape)} "
                    "as in base"
                )
            if delta.device != base[b].device:
                raise ValueError(
                    f"{where} is on {delta.device}, but base is on {base[b].device}: move it there"
                )
    # Without blocks nothing says where coef should be.
    device = base[0].device if base else coef.device if isinstance(coef, Tensor) else None
    check_coef(coef, len(deltas), len(base), device)


def _check_tensor(where: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} is a {type(tensor).__name__}, expected a tensor")
    if tensor.dtype not in (*STORAGE_DTYPES, torch.float64):
        raise TypeError(f"{where} has dtype {tensor.dtype}, expected float32, bfloat16 or float16")
    if tensor.layout != torch.strided:
        raise TypeError(f"{where} has layout {tensor.layout}, expected a dense (strided) tensor")


def _any_float64(base: Sequence[Tensor], deltas: Sequence[Sequence[Tensor | None]]) -> bool:
    tensors = (*base, *(delta for vector in deltas for delta in vector if delta is not None))
    return any(tensor.dtype == torch.float64 for tensor in tensors)


def _call(function: Any, *args: Any) -> Any:
    """``function.apply``, or where nothing is recorded its bare forward.

    To PyTorch, applying a Function with a setup_context costs 80 microseconds: as much as a block.
    """
    recorded = torch.compiler.is_compiling() or torch.is_grad_enabled() or is_transformed()
    return function.apply(*args) if recorded else function.forward(*args)


class _Batched(torch.autograd.Function):
    """A Function whose vmap is a loop: one composed model per sample is what was asked for."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = [
            cls.apply(
                *(
                    arg.select(dim, sample) if isinstance(dim, int) else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for sample in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)


class _Compose(_Batched):
    """(composition, coef, base [P]) -> composed [P]."""

    @staticmethod
    def forward(composition: Composition, coef: Tensor, base: Tensor) -> Tensor:
        return composition.composed(coef, base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.composition = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        coef_grad = _call(_Dots, ctx.composition, grad) if ctx.needs_input_grad[1] else None
        return None, coef_grad, grad if ctx.needs_input_grad[2] else None


class _Dots(_Batched):
    """(composition, grad [P]) -> coef's gradient."""

    @staticmethod
    def forward(composition: Composition, grad: Tensor) -> Tensor:
        return composition.dots(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.composition, grad = inputs
        ctx.numel, ctx.dtype = grad.numel(), grad.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        zeros = grad.new_zeros(ctx.numel, dtype=ctx.dtype)
        return None, _call(_Compose, ctx.composition, grad, zeros)


class _ComposeBlocks(_Batched):
    """(composition, coef, based) -> B composed blocks."""

    @staticmethod
    def forward(composition: BlockComposition, coef: Tensor, based: bool) -> tuple[Tensor, ...]:
        return composition.composed(coef, based)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.composition = inputs[0]
        # Neither the compiler nor a transform can pass None on.
        ctx.set_materialize_grads(torch.compiler.is_compiling() or in_transform())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # As in `_ComposeList`.
        if torch.compiler.is_compiling():
            return None, _DotsBlocks.forward(ctx.composition, *grads), None
        return None, _call(_DotsBlocks, ctx.composition, *grads), None


class _DotsBlocks(_Batched):
    """(composition, *grads [B]) -> coef's gradient."""

    @staticmethod
    def forward(composition: BlockComposition, *grads: Tensor | None) -> Tensor:
        return composition.dots(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.composition = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        blocks = _call(_ComposeBlocks, ctx.composition, grad, False)
        needs = ctx.needs_input_grad[1:]
        return None, *(block if need else None for block, need in zip(blocks, needs, strict=True))


class _ComposeList(_Batched):
    """(backend, B, hidden [N * B] or None, coef [N, B], *base [B], *deltas [N * B] if not hidden).

    Gives B composed blocks. Hidden deltas, which need no gradient, are one argument to autograd.
    """

    @staticmethod
    def forward(
        backend: str, num_blocks: int, hidden: list[Tensor] | None, coef: Tensor, *tensors: Tensor
    ) -> Any:
        base, deltas = tensors[:num_blocks], tensors[num_blocks:] if hidden is None else hidden
        return tuple(operators(backend).compose(base, deltas, coef.contiguous()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, ctx.num_blocks, hidden, coef, *tensors = inputs
        if hidden is None:
            ctx.save_for_backward(coef, *tensors[ctx.num_blocks :])
        elif ctx.needs_input_grad[3]:
            ctx.save_for_backward(coef, *hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needs = ctx.needs_input_grad[4:]
        # Nothing is saved where only the base needs a gradient.
        coef, *deltas = ctx.saved_tensors or (grads[0],)
        coef_grad = None
        if ctx.needs_input_grad[3]:
            arguments = (ctx.backend, ctx.num_blocks, coef.dtype, *grads, *deltas)
            # Dynamo cannot call a Function of variable length inside a backward, and a compiled
            # backward is not differentiated again.
            if torch.compiler.is_compiling():
                coef_grad = _DotsList.forward(*arguments)
            else:
                coef_grad = _call(_DotsList, *arguments)
        base_needs, delta_needs = needs[: ctx.num_blocks], needs[ctx.num_blocks :]
        base_grads = [grad if need else None for grad, need in zip(grads, base_needs, strict=True)]
        delta_grads = _scaled(coef, grads, deltas, delta_needs) if delta_needs else []
        return None, None, None, coef_grad, *base_grads, *delta_grads


class _DotsList(_Batched):
    """(backend, B, dtype, *grads [B], *deltas [N * B]) -> <grad_b, delta_ib> [N, B]."""

    @staticmethod
    def forward(backend: str, num_blocks: int, dtype: torch.dtype, *tensors: Tensor) -> Any:
        return operators(backend).coef_grad(tensors[:num_blocks], tensors[num_blocks:], dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, ctx.num_blocks, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads, deltas = ctx.saved_tensors[: ctx.num_blocks], ctx.saved_tensors[ctx.num_blocks :]
        needs = ctx.needs_input_grad[3:]
        grad_grads: Sequence[Tensor | None] = [None] * ctx.num_blocks
        if any(needs[: ctx.num_blocks]):
            zeros = [torch.zeros_like(block) for block in grads]
            grad_grads = _ComposeList.apply(
                ctx.backend, ctx.num_blocks, None, grad, *zeros, *deltas
            )
        delta_grads = _scaled(grad, grads, deltas, needs[ctx.num_blocks :])
        return None, None, None, *grad_grads, *delta_grads


def _scaled(
    coef: Tensor, grads: Sequence[Tensor], deltas: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """coef[i, b] * grads[b] for every delta that needs it, in plain (differentiable) PyTorch."""
    scaled: list[Tensor | None] = []
    for index, (delta, need) in enumerate(zip(deltas, needs, strict=True)):
        i, b = divmod(index, len(grads))
        product = coef[i, b] * grads[b].to(coef.dtype) if need else None
        scaled.append(None if product is None else product.to(delta.dtype))
    return scaled
