"""Every operator's schema and fake, once for each backend's namespace.

`torch.ops.atlas_kernels_<backend>` holds the same four functional operators for every backend; a
backend only implements them (`backends/`). They carry no derivative formulas and are private: the
derivatives live in the autograd Functions of `composition.py`.

In the list form a delta of the shape `ABSENT` stands for "this task vector has no such block". In
the arena form (see `layout`) `scales` and `bits` say whether deltas are packed, and `tile_key`
whether coefficients belong to groups of a block's elements (see `groups`): which kernel that takes
is the backend's own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .codecs.packed import GROUP
from .layout import TILE

BACKENDS = ("torch", "cpp", "triton", "cuda")

# No elements, and a shape that no parameter has: one that is empty by mistake is still found out.
ABSENT = (0,) * 8

# Of the arena form, alike in both directions: what `arena.Stored` and `arena.Tables` hold.
_STORED = "Tensor deltas, Tensor? scales, int bits"
_TABLES = (
    "Tensor tile_block, Tensor tile_offset, Tensor block_tile, Tensor chunk_tile,"
    " Tensor block_chunk, Tensor? tile_key"
)

SCHEMAS = {
    "compose": "(Tensor[] base, Tensor[] deltas, Tensor coef) -> Tensor[]",
    "coef_grad": "(Tensor[] grads, Tensor[] deltas, ScalarType dtype) -> Tensor",
    "arena_compose": f"(Tensor base, {_STORED}, {_TABLES}, Tensor coef) -> Tensor",
    "arena_coef_grad": (
        f"(Tensor grad, {_STORED}, {_TABLES}, int num_vectors, int num_groups, ScalarType dtype)"
        " -> Tensor"
    ),
}

# Kept alive for as long as the module: a Library that is collected takes its operators along.
_libraries: list[torch.library.Library] = []


def namespace(backend: str) -> str:
    """The operator namespace of a backend."""
    return f"atlas_kernels_{backend}"


def operators(backend: str) -> Any:
    """The operators of a backend, by name."""
    return getattr(torch.ops, namespace(backend))


def _compose_fake(base: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor) -> list[Tensor]:
    _check_devices(*base, *deltas, coef)
    torch._check(coef.dim() == 2 and coef.shape[1] == len(base))
    torch._check(len(deltas) == coef.shape[0] * len(base))
    return [torch.empty_like(block, memory_format=torch.contiguous_format) for block in base]


def _coef_grad_fake(
    grads: Sequence[Tensor], deltas: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    _check_devices(*grads, *deltas)
    num_vectors = len(deltas) // len(grads)
    torch._check(len(deltas) == num_vectors * len(grads))
    return grads[0].new_empty((num_vectors, len(grads)), dtype=dtype)


def _arena_compose_fake(base: Tensor, *rest: Any) -> Tensor:
    *arena, coef = rest
    _check_devices(base, coef)
    torch._check(base.dim() == 1 and coef.dim() == (2 if arena[-1] is None else 3))
    _check_arena(base, coef.shape[0], *arena)
    torch._check(coef.dim() == 2 or 0 < coef.shape[2] <= TILE)
    return torch.empty_like(base)


def _arena_coef_grad_fake(grad: Tensor, *rest: Any) -> Tensor:
    *arena, num_vectors, num_groups, dtype = rest
    _check_arena(grad, num_vectors, *arena)
    shape = (num_vectors, arena[5].numel() - 1)
    if arena[-1] is None:
        return grad.new_empty(shape, dtype=dtype)
    torch._check(0 < num_groups <= TILE)
    return grad.new_empty((*shape, num_groups), dtype=dtype)


def _check_devices(*tensors: Tensor) -> None:
    # One meta tensor among others, and the dispatcher takes the fake for the kernel.
    torch._check(len({tensor.device for tensor in tensors}) == 1, lambda: "tensors on two devices")


def _check_arena(
    wide: Tensor,
    num_vectors: int,
    deltas: Tensor,
    scales: Tensor | None,
    bits: int,
    tile_block: Tensor,
    tile_offset: Tensor,
    block_tile: Tensor,
    chunk_tile: Tensor,
    block_chunk: Tensor,
    tile_key: Tensor | None,
) -> None:
    tables = (tile_block, tile_offset, block_tile, chunk_tile, block_chunk)
    _check_devices(wide, deltas, *tables, *(t for t in (scales, tile_key) if t is not None))
    elements = num_vectors * wide.numel()
    torch._check(deltas.numel() * (32 if bits else 1) == elements * (bits or 1))
    torch._check(bool(bits) == (scales is not None))
    torch._check(scales is None or scales.numel() * GROUP == elements)
    torch._check(tile_offset.numel() == tile_block.numel() + 1)
    torch._check(block_tile.numel() == block_chunk.numel())
    torch._check(tile_key is None or tile_key.numel() == tile_block.numel())


_FAKES: dict[str, Callable[..., Any]] = {
    "compose": _compose_fake,
    "coef_grad": _coef_grad_fake,
    "arena_compose": _arena_compose_fake,
    "arena_coef_grad": _arena_coef_grad_fake,
}


def _define() -> None:
    for backend in BACKENDS:
        library = torch.library.Library(namespace(backend), "DEF")
        _libraries.append(library)
        for name, schema in SCHEMAS.items():
            library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(
                f"{namespace(backend)}::{name}", _FAKES[name], lib=library, allow_override=False
            )


_define()
