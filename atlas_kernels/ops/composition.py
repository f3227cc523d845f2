"""The composition operator: its checks, its derivatives, its dispatch.

Composition and its coefficient gradient are each other's derivative, so each is an
`autograd.Function` whose backward calls the other: any order of differentiation works.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import schema as ops
from .backends import resolve
from .groups import check_groups
from .layout import Layout

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
    base = tuple(base)
    deltas = tuple(tuple(vector) for vector in deltas)
    composed = _compose_plain(base, deltas, coef, backend)
    if composed is not None:
        return composed
    check(base, deltas, coef)
    if not base:
        return ()
    accumulate = _accumulation_dtype(base, deltas, coef)
    chosen = resolve(backend, base[0].device.type, accumulate == torch.float64)
    absent = base[0].new_empty(ops.ABSENT)
    flat = [absent if delta is None else delta for vector in deltas for delta in vector]
    result: tuple[Tensor, ...] = _Compose.apply(
        chosen, len(base), _per_block(coef.to(accumulate), len(base)), *base, *flat
    )
    return result


def _compose_plain(
    base: tuple[Tensor, ...],
    deltas: Sequence[Sequence[Tensor | None]],
    coef: Tensor,
    backend: str,
) -> tuple[Tensor, ...] | None:
    """Composes by a backend that checks its arguments, if they are plain and fit; None if not.

    Thousands of small tensors cost more to check one by one, and to pass through autograd, than to
    compose. These backends check dtypes, shapes and devices for next to nothing; what they refuse
    goes the general way, which finds the words.
    """
    if torch.compiler.is_compiling() or _is_transformed():
        return None
    if not base or any(len(vector) != len(base) for vector in deltas):
        return None
    if not all(isinstance(tensor, Tensor) for tensor in (coef, *base)):
        return None
    if not coef.is_floating_point() or coef.device != base[0].device:
        return None
    absent = base[0].new_empty(ops.ABSENT)
    flat = [absent if delta is None else delta for vector in deltas for delta in vector]
    try:
        # Ten times as fast as asking each delta.
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return None
        chosen = resolve(backend, base[0].device.type, False)
        if chosen == "torch":
            return None
        coef = _per_block(coef.to(torch.float32), len(base))
        composed: tuple[Tensor, ...] = _ComposePlain.apply(chosen, coef, flat, *base)
    except (RuntimeError, TypeError, ValueError):
        return None
    return composed


def bank_compose(
    base: Tensor,
    deltas: Tensor,
    coef: Tensor,
    layout: Layout,
    backend: str = "auto",
    scales: Tensor | None = None,
    bits: int = 0,
    tile_key: Tensor | None = None,
) -> Tensor:
    """The composed arena [P] of arenas ``base`` [P] and ``deltas`` [N * P], laid out by ``layout``.

    ``coef`` is (N, B) or (N,) on the same device; with a ``tile_key`` it is (N, B, K) (see
    `partition`). With ``bits``, ``deltas`` are packed words that have ``scales`` (see
    `codecs.packed`). Differentiable in ``coef`` and ``base``.
    """
    num_blocks = len(layout.shapes)
    result: Tensor = _call(
        _BankCompose,
        resolve(backend, base.device.type, False),
        _per_block(coef.to(torch.float32), num_blocks),
        base,
        bits,
        deltas,
        scales,
        layout.tile_block,
        layout.tile_offset,
        layout.block_tile,
        tile_key,
        layout.chunk_tile,
        layout.block_chunk,
    )
    return result


def bank_coef_grad(
    grad: Tensor,
    deltas: Tensor,
    num_vectors: int,
    layout: Layout,
    backend: str = "auto",
    scales: Tensor | None = None,
    bits: int = 0,
    tile_key: Tensor | None = None,
    groups: int = 0,
) -> Tensor:
    """``<grad, tau_i>`` over each block (N, B): what `bank_compose` hands back to ``coef``.

    ``grad`` is an arena [P]; differentiable in it. With a ``tile_key``: (N, B, groups).
    """
    result: Tensor = _call(
        _BankCoefGrad,
        resolve(backend, grad.device.type, False),
        num_vectors,
        groups,
        torch.float32,
        grad,
        bits,
        deltas,
        scales,
        layout.tile_block,
        layout.tile_offset,
        layout.block_tile,
        tile_key,
        layout.chunk_tile,
        layout.block_chunk,
    )
    return result


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


def _accumulation_dtype(
    base: Sequence[Tensor], deltas: Sequence[Sequence[Tensor | None]], coef: Tensor
) -> torch.dtype:
    tensors = (*base, *(delta for vector in deltas for delta in vector if delta is not None))
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _is_transformed() -> bool:
    """Whether a function transform (`vmap`, `torch.func.grad`) or a dispatch mode is at work."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _call(function: Any, *args: Any) -> Any:
    """``function.apply``, or where nothing is recorded its bare forward.

    To PyTorch, applying a Function with a setup_context costs 80 microseconds: as much as a block.
    """
    recorded = torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_transformed()
    return function.apply(*args) if recorded else function.forward(*args)


def _per_block(coef: Tensor, num_blocks: int) -> Tensor:
    # After the conversion, so that the gradient is summed over blocks before it is rounded.
    return coef if coef.dim() > 1 else coef.unsqueeze(1).expand(-1, num_blocks)


class Batched(torch.autograd.Function):
    """A Function whose vmap is a loop: one composed model per sample is what was asked for."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        """PyTorch's rule."""
        results = [
            cls.apply(
                *(
                    arg if dim is None else arg.select(dim, sample)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for sample in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)


class _Compose(Batched):
    """(backend, B, coef [N, B], *base [B], *deltas [N * B]) -> B composed blocks."""

    @staticmethod
    def forward(backend: str, num_blocks: int, coef: Tensor, *tensors: Tensor) -> Any:
        op = getattr(torch.ops, ops.namespace(backend)).compose
        return tuple(op(tensors[:num_blocks], tensors[num_blocks:], coef.contiguous()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, ctx.num_blocks, coef, *tensors = inputs
        ctx.dtypes = tuple(block.dtype for block in tensors[: ctx.num_blocks])
        ctx.save_for_backward(coef, *tensors[ctx.num_blocks :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        coef, *deltas = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        coef_grad = None
        if ctx.needs_input_grad[2]:
            # Dynamo cannot call a Function of variable length inside a backward, and a compiled
            # backward is not differentiated again.
            call = _CoefGrad.forward if torch.compiler.is_compiling() else _CoefGrad.apply
            coef_grad = call(ctx.backend, ctx.num_blocks, coef.dtype, *grads, *deltas)
        base_grads = [
            grad if need else None
            for grad, need in zip(grads, needs[: ctx.num_blocks], strict=True)
        ]
        delta_grads = _scaled(coef, grads, deltas, needs[ctx.num_blocks :])
        return None, None, coef_grad, *base_grads, *delta_grads


class _ComposePlain(torch.autograd.Function):
    """(backend, coef [N, B], deltas [N * B], *base [B]) -> B composed blocks.

    The deltas are one argument, hidden from autograd: they need no gradient.
    """

    @staticmethod
    def forward(backend: str, coef: Tensor, deltas: list[Tensor], *base: Tensor) -> Any:
        op = getattr(torch.ops, ops.namespace(backend)).compose
        return tuple(op(base, deltas, coef.contiguous()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, _, deltas, *base = inputs
        ctx.num_blocks = len(base)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(*deltas)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        coef_grad = None
        if ctx.needs_input_grad[1]:
            differentiable = torch.is_grad_enabled() or _is_transformed()
            call = _CoefGrad.apply if differentiable else _CoefGrad.forward
            coef_grad = call(ctx.backend, ctx.num_blocks, torch.float32, *grads, *ctx.saved_tensors)
        needs = ctx.needs_input_grad[3:]
        base_grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        return None, coef_grad, None, *base_grads


class _CoefGrad(Batched):
    """(backend, B, dtype, *grads [B], *deltas [N * B]) -> <grad_b, delta_ib> [N, B]."""

    @staticmethod
    def forward(backend: str, num_blocks: int, dtype: torch.dtype, *tensors: Tensor) -> Any:
        op = getattr(torch.ops, ops.namespace(backend)).coef_grad
        return op(tensors[:num_blocks], tensors[num_blocks:], dtype)

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
            grad_grads = _Compose.apply(ctx.backend, ctx.num_blocks, grad, *zeros, *deltas)
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


class _BankCompose(Batched):
    """(backend, coef [N, B] or [N, B, K], base [P], bits, deltas, scales, *tables) -> composed [P].

    The tables are those of `Layout`, with the key of every tile, or None, before those of chunks.
    """

    @staticmethod
    def forward(
        backend: str,
        coef: Tensor,
        base: Tensor,
        bits: int,
        deltas: Tensor,
        scales: Tensor | None,
        tile_block: Tensor,
        tile_offset: Tensor,
        block_tile: Tensor,
        tile_key: Tensor | None,
        chunk_tile: Tensor,
        block_chunk: Tensor,
    ) -> Tensor:
        ops_of = getattr(torch.ops, ops.namespace(backend))
        base, coef = base.contiguous(), coef.contiguous()
        composed: Tensor
        if tile_key is not None:
            composed = ops_of.partition_compose(
                base, deltas, scales, bits, coef, tile_block, tile_offset, tile_key
            )
        elif bits:
            composed = ops_of.packed_compose(
                base, deltas, scales, bits, coef, tile_block, tile_offset
            )
        else:
            composed = ops_of.bank_compose(base, deltas, coef, tile_block, tile_offset)
        return composed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, coef, _, ctx.bits, *tensors = inputs
        ctx.num_vectors, ctx.dtype = coef.shape[0], coef.dtype
        ctx.groups = coef.shape[2] if coef.dim() == 3 else 0
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        coef_grad = None
        if ctx.needs_input_grad[1]:
            coef_grad = _call(
                _BankCoefGrad,
                ctx.backend,
                ctx.num_vectors,
                ctx.groups,
                ctx.dtype,
                grad,
                ctx.bits,
                *ctx.saved_tensors,
            )
        base_grad = grad if ctx.needs_input_grad[2] else None
        return None, coef_grad, base_grad, *(None,) * 9


class _BankCoefGrad(Batched):
    """(backend, N, K or 0, dtype, grad [P], bits, deltas, scales, *tables) -> coef's gradient."""

    @staticmethod
    def forward(
        backend: str,
        num_vectors: int,
        groups: int,
        dtype: torch.dtype,
        grad: Tensor,
        bits: int,
        deltas: Tensor,
        scales: Tensor | None,
        tile_block: Tensor,
        tile_offset: Tensor,
        block_tile: Tensor,
        tile_key: Tensor | None,
        chunk_tile: Tensor,
        block_chunk: Tensor,
    ) -> Tensor:
        ops_of = getattr(torch.ops, ops.namespace(backend))
        grad, tables = grad.contiguous(), (tile_block, tile_offset, block_tile)
        result: Tensor
        if tile_key is not None:
            result = ops_of.partition_coef_grad(
                grad,
                deltas,
                scales,
                bits,
                tile_offset,
                tile_key,
                chunk_tile,
                block_chunk,
                num_vectors,
                groups,
                dtype,
            )
        elif bits:
            result = ops_of.packed_coef_grad(
                grad, deltas, scales, bits, *tables, num_vectors, dtype
            )
        else:
            result = ops_of.bank_coef_grad(grad, deltas, *tables, num_vectors, dtype)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend, _, _, _, grad, ctx.bits, *tensors = inputs
        ctx.grad_dtype, ctx.numel = grad.dtype, grad.numel()
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        zeros = grad.new_zeros(ctx.numel, dtype=ctx.grad_dtype)
        composed = _call(_BankCompose, ctx.backend, grad, zeros, ctx.bits, *ctx.saved_tensors)
        return *(None,) * 4, composed, *(None,) * 9
