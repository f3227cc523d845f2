"""The host side: tables, allocation, launches. Nothing here waits for the GPU or reads from it.

The list operators hand addresses of foreign tensors to their kernels in device tables. A table is
looked up by its own contents, so it can never be stale:

- Addresses of deltas, dtypes and shapes rarely change: copied to the device once.
- Addresses of bases, outputs and gradients may change with every call, and do inside a CUDA graph,
  whose memory is its own: written by `_foreach_add_`, which passes numbers as kernel arguments.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from operator import attrgetter, or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...arena import Arena
from ...layout import TILE
from ...schema import ABSENT
from . import config, groups, kernels, packed

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_CODE = {
    torch.float32: kernels.FLOAT32.value,
    torch.bfloat16: kernels.BFLOAT16.value,
    torch.float16: kernels.FLOAT16.value,
}
# Thousands of tensors are asked at a time, by what does not interpret a line for each.
_dtype_of = attrgetter("dtype")
_shape_of = attrgetter("shape")
# Partial sums added side by side; part of the result's definition, like the tile.
_LANES = 512
# Tables kept; a table of 21 vectors by 152 blocks is 27 KB.
_CACHED = 256


def arena_compose(base: Tensor, *arguments: Any) -> Tensor:
    """`reference.arena_compose` in one launch."""
    *fields, coef = arguments
    arena, coef = Arena(*fields), coef.contiguous()
    out = torch.empty_like(base)
    num_vectors, num_blocks = coef.shape[:2]
    num_tiles = arena.tile_block.numel()
    if not num_tiles:
        return out
    tables = (arena.tile_block, arena.tile_offset)
    architecture = _architecture(base.device)
    with _on(base.device):
        if arena.tile_key is not None:
            launch = config.groups(architecture, dense_forward=not arena.bits)
            groups.group_compose_kernel[(num_tiles,)](
                base, arena.deltas, arena.scales, coef, *tables, arena.tile_key, out,
                num_vectors, num_blocks, coef.shape[2], arena.bits, launch.tile,
                num_warps=launch.num_warps,
            )  # fmt: skip
        elif arena.bits:
            launch = config.packed(architecture, arena.bits)
            packed.packed_compose_kernel[(num_tiles,)](
                base, arena.deltas, arena.scales, coef, *tables, out, num_vectors, num_blocks,
                arena.bits, launch.tile, launch.unroll, num_warps=launch.num_warps,
            )  # fmt: skip
        else:
            dtypes = (base.dtype, arena.deltas.dtype) if num_vectors else (base.dtype,)
            launch = config.forward(dtypes, num_vectors, architecture)
            kernels.arena_compose_kernel[(num_tiles * (TILE // launch.tile),)](
                base, arena.deltas, coef, *tables, out, num_vectors, num_blocks,
                TILE, launch.tile, launch.unroll, num_warps=launch.num_warps,
            )  # fmt: skip
    return out


def arena_coef_grad(grad: Tensor, *arguments: Any) -> Tensor:
    """`reference.arena_coef_grad` in two launches."""
    *fields, num_vectors, num_groups, dtype = arguments
    arena, grad = Arena(*fields), grad.contiguous()
    if arena.tile_key is not None:
        return _group_coef_grad(grad, arena, num_vectors, num_groups).to(dtype)
    num_tiles = arena.tile_block.numel()
    part = torch.empty((num_vectors, num_tiles), dtype=torch.float32, device=grad.device)
    if part.numel():
        with _on(grad.device):
            if arena.bits:
                launch = config.packed(_architecture(grad.device), arena.bits)
                packed.packed_partial_kernel[(num_tiles,)](
                    grad, arena.deltas, arena.scales, arena.tile_offset, part, num_vectors,
                    num_tiles, arena.bits, launch.tile, num_warps=launch.num_warps,
                )  # fmt: skip
            else:
                launch = config.BACKWARD
                kernels.arena_partial_kernel[(num_tiles,)](
                    grad, arena.deltas, arena.tile_offset, part, num_vectors, num_tiles,
                    launch.tile, num_warps=launch.num_warps,
                )  # fmt: skip
    return _sum_tiles(part, arena.block_tile, dtype)


def _group_coef_grad(grad: Tensor, arena: Arena, num_vectors: int, num_groups: int) -> Tensor:
    num_chunks, num_blocks = arena.chunk_tile.numel() - 1, arena.num_blocks
    launch = config.groups(_architecture(grad.device))
    options: Any = {"dtype": torch.float32, "device": grad.device}
    part = torch.empty((num_chunks, num_vectors, launch.tile), **options)
    result = torch.empty((num_vectors, num_blocks, num_groups), **options)
    with _on(grad.device):
        if part.numel():
            groups.group_partial_kernel[(num_chunks * num_vectors,)](
                grad, arena.deltas, arena.scales, arena.tile_offset, arena.tile_key,
                arena.chunk_tile, part, num_vectors, arena.bits, launch.tile,
                num_warps=launch.num_warps,
            )  # fmt: skip
        if result.numel():
            groups.group_sum_kernel[(num_vectors * num_blocks,)](
                part, arena.block_chunk, result, num_vectors, num_blocks, num_groups, launch.tile,
                triton.next_power_of_2(num_groups),
                triton.next_power_of_2(triton.cdiv(launch.tile, num_groups)),
                num_warps=launch.num_warps,
            )  # fmt: skip
    return result


def compose(base: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor) -> list[Tensor]:
    """`reference.compose` in one launch."""
    base_dtypes, delta_dtypes = _dtypes(base), _dtypes(deltas)
    dtypes = base_dtypes | delta_dtypes
    _check(base, deltas, dtypes)
    out = [torch.empty_like(block, memory_format=torch.contiguous_format) for block in base]
    if not any(block.numel() for block in base):
        return out
    num_vectors, num_blocks = coef.shape
    base, deltas = _contiguous(base), _contiguous(deltas)
    base_dtype, delta_dtype = _common(base_dtypes, base), _common(delta_dtypes, deltas)
    device = base[0].device
    launch = config.forward(tuple(dtypes), num_vectors, _architecture(device))
    with _on(device):
        numel, block_tile, tile_block = _tiles(base, launch.tile)
        kernels.compose_kernel[(tile_block.numel(),)](
            _written(base),
            _written(out),
            _delta_table(deltas, num_blocks, device),
            _code_table(base, deltas) if base_dtype is None or delta_dtype is None else block_tile,
            coef.contiguous(),
            numel, block_tile, tile_block, num_vectors, num_blocks,
            base_dtype, delta_dtype, launch.tile, launch.unroll, num_warps=launch.num_warps,
        )  # fmt: skip
    return out


def coef_grad(grads: Sequence[Tensor], deltas: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`reference.coef_grad` in two launches."""
    num_blocks = len(grads)
    num_vectors = len(deltas) // num_blocks
    grads, deltas = _contiguous(grads), _contiguous(deltas)
    grad_dtype, delta_dtype = _common(_dtypes(grads), grads), _common(_dtypes(deltas), deltas)
    device = grads[0].device
    launch = config.BACKWARD
    with _on(device):
        numel, block_tile, tile_block = _tiles(grads, launch.tile)
        num_tiles = tile_block.numel()
        part = torch.empty((num_vectors, num_tiles), dtype=torch.float32, device=device)
        if part.numel():
            mixed = grad_dtype is None or delta_dtype is None
            kernels.partial_kernel[(num_tiles,)](
                _written(grads),
                _delta_table(deltas, num_blocks, device),
                _code_table(grads, deltas) if mixed else block_tile,
                numel, block_tile, tile_block, part, num_vectors, num_blocks, num_tiles,
                grad_dtype, delta_dtype, launch.tile, num_warps=launch.num_warps,
            )  # fmt: skip
    return _sum_tiles(part, block_tile, dtype)


def _sum_tiles(part: Tensor, block_tile: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, B]: the sums of part [N, T] over the tiles of every block."""
    num_vectors, num_tiles = part.shape
    num_blocks = block_tile.numel() - 1
    result = torch.empty((num_vectors, num_blocks), dtype=torch.float32, device=part.device)
    if result.numel():
        with _on(part.device):
            kernels.sum_tiles_kernel[(result.numel(),)](
                part, block_tile, result, num_blocks, num_tiles, _LANES, num_warps=4
            )
    return result.to(dtype)


def _dtypes(tensors: Sequence[Tensor]) -> set[torch.dtype]:
    return set(map(_dtype_of, tensors))


def _check(base: Sequence[Tensor], deltas: Sequence[Tensor], dtypes: set[torch.dtype]) -> None:
    """Raises unless the kernels can compose these, by as few steps of Python as may be.

    `composition.check` finds the words.
    """
    if not _CODE.keys() >= dtypes:
        raise TypeError("expected float32, bfloat16 or float16")
    if set(map(Tensor.get_device, deltas)) - {base[0].get_device()}:
        raise ValueError("deltas are on another device")
    shapes = list(map(_shape_of, base))
    for first in range(0, len(deltas), len(base)):
        found = list(map(_shape_of, deltas[first : first + len(base)]))
        if found != shapes and any(
            its not in (shape, ABSENT) for its, shape in zip(found, shapes, strict=True)
        ):
            raise ValueError("a delta must have the shape of its block")


def _contiguous(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [tensor.contiguous() for tensor in tensors]


def _common(dtypes: set[torch.dtype], tensors: Sequence[Tensor]) -> Any:
    """The Triton dtype of all tensors, of these dtypes, that have elements; None if they differ."""
    if len(dtypes) > 1:
        # A placeholder for an absent delta may have another dtype than the deltas.
        dtypes = {tensor.dtype for tensor in tensors if tensor.numel()}
    if len(dtypes) > 1:
        return None
    return _TRITON[dtypes.pop()] if dtypes else tl.float32


# ---- tables -------------------------------------------------------------------------------------


def _tiles(blocks: Sequence[Tensor], tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables (numel int64 [B], block_tile int32 [B + 1], tile_block int32 [T]) of cut blocks."""
    sizes = tuple(map(Tensor.numel, blocks))

    def build() -> tuple[Tensor, ...]:
        numel = torch.tensor(sizes, dtype=torch.int64)
        counts = (numel + tile - 1) // tile
        block_tile = torch.tensor((0, *accumulate(counts.tolist())), dtype=torch.int32)
        tile_block = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), counts)
        return numel, block_tile, tile_block

    numel, block_tile, tile_block = _copied(("tiles", tile, sizes), build, blocks[0].device)
    return numel, block_tile, tile_block


def _delta_table(deltas: Sequence[Tensor], num_blocks: int, device: torch.device) -> Tensor:
    """Addresses int64 [N + 1, B], 0 where there are no elements, then the bits set in a column."""
    addresses = tuple(map(Tensor.data_ptr, deltas))

    def build() -> tuple[Tensor, ...]:
        bits = (functools.reduce(or_, addresses[b::num_blocks], 0) for b in range(num_blocks))
        return (torch.tensor((*addresses, *bits), dtype=torch.int64),)

    return _copied(("deltas", num_blocks, addresses), build, device)[0]


def _code_table(base: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """Dtype codes int32 [N + 1, B] of the deltas, then of the base."""
    codes = tuple(_CODE[tensor.dtype] for tensor in (*deltas, *base))

    def build() -> tuple[Tensor, ...]:
        return (torch.tensor(codes, dtype=torch.int32),)

    return _copied(("codes", codes), build, base[0].device)[0]


_copies: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()
_writes: OrderedDict[Hashable, Tensor] = OrderedDict()
# A graph reads these for as long as it can be replayed, which nobody tells us.
_captured: dict[Hashable, tuple[Tensor, ...]] = {}


def _copied(
    key: Hashable, build: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[Tensor, ...]:
    """What `build` returns, on `device`; copied there by the first call with this key."""
    key = (key, device)
    capturing = _capturing(device)
    tables = _captured.get(key) or _copies.get(key)
    if tables is None:
        if capturing:
            raise RuntimeError(
                "a CUDA graph capture needs tables on the device that are not there yet: before "
                "the capture, run the same step once with the same, contiguous task vectors"
            )
        tables = tuple(table.to(device) for table in build())
    if capturing:
        _captured[key] = tables
    else:
        _remember(_copies, key, tables)
        if device.type == "cuda":
            for table in tables:
                table.record_stream(torch.cuda.current_stream(device))
    return tables


def _written(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of tensors, int64 [B] on their device, written there by kernels alone."""
    addresses = tuple(map(Tensor.data_ptr, tensors))
    device = tensors[0].device
    # Complete for later work of the same stream only, and if a graph writes it, for no other work.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    key = (addresses, device, stream)
    capturing = _capturing(device)
    table = None if capturing else _writes.get(key)
    if table is None:
        table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), addresses)
    if not capturing:
        _remember(_writes, key, table)
    return table


def _remember(cache: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > _CACHED:
        cache.popitem(last=False)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# ---- device -------------------------------------------------------------------------------------


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _architecture(device: torch.device) -> str:
    """A name like "sm_90" or "gfx942"; the former when interpreting."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
