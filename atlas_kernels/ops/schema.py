"""Every operator's schema and fake, once for each backend's namespace.

`torch.ops.atlas_kernels_<backend>` holds the same eight functional operators for every backend; a
backend only implements them (`backends/`). They carry no derivative formulas and are private: the
derivatives live in the autograd Functions of `compose.py`.

In the list form a delta of the shape `ABSENT` stands for "this task vector has no such block".
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

SCHEMAS = {
    "compose": "(Tensor[] base, Tensor[] deltas, Tensor coef) -> Tensor[]",
    "coef_grad": "(Tensor[] grads, Tensor[] deltas, ScalarType dtype) -> Tensor",
    "bank_compose": (
        "(Tensor base, Tensor deltas, Tensor coef, Tensor tile_block, Tensor tile_offset) -> Tensor"
    ),
    "bank_coef_grad": (
        "(Tensor grad, Tensor deltas, Tensor tile_block, Tensor tile_offset, Tensor block_tile,"
        " int num_vectors, ScalarType dtype) -> Tensor"
    ),
    "packed_compose": (
        "(Tensor base, Tensor words, Tensor scales, int bits, Tensor coef, Tensor tile_block,"
        " Tensor tile_offset) -> Tensor"
    ),
    "packed_coef_grad": (
        "(Tensor grad, Tensor words, Tensor scales, int bits, Tensor tile_block,"
        " Tensor tile_offset, Tensor block_tile, int num_vectors, ScalarType dtype) -> Tensor"
    ),
    # Of any codec: no scales and 0 bits for floating-point deltas.
    "partition_compose": (
        "(Tensor base, Tensor deltas, Tensor? scales, int bits, Tensor coef, Tensor tile_block,"
        " Tensor tile_offset, Tensor tile_key) -> Tensor"
    ),
    "partition_coef_grad": (
        "(Tensor grad, Tensor deltas, Tensor? scales, int bits, Tensor tile_offset,"
        " Tensor tile_key, Tensor chunk_tile, Tensor block_chunk, int num_vectors, int groups,"
        " ScalarType dtype) -> Tensor"
    ),
}

# Kept alive for as long as the module: a Library that is collected takes its operators along.
_libraries: list[torch.library.Library] = []


def namespace(backend: str) -> str:
    """The operator namespace of a backend."""
    return f"atlas_kernels_{backend}"


def _compose_fake(base: Sequence[Tensor], deltas: Sequence[Tensor], coef: Tensor) -> list[Tensor]:
    torch._check(coef.dim() == 2 and coef.shape[1] == len(base))
    torch._check(len(deltas) == coef.shape[0] * len(base))
    return [torch.empty_like(block, memory_format=torch.contiguous_format) for block in base]


def _coef_grad_fake(
    grads: Sequence[Tensor], deltas: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    num_vectors = len(deltas) // len(grads)
    torch._check(len(deltas) == num_vectors * len(grads))
    return grads[0].new_empty((num_vectors, len(grads)), dtype=dtype)


def _bank_compose_fake(
    base: Tensor, deltas: Tensor, coef: Tensor, tile_block: Tensor, tile_offset: Tensor
) -> Tensor:
    torch._check(coef.dim() == 2 and base.dim() == 1 and deltas.dim() == 1)
    torch._check(deltas.numel() == coef.shape[0] * base.numel())
    torch._check(tile_offset.numel() == tile_block.numel() + 1)
    return torch.empty_like(base)


def _bank_coef_grad_fake(
    grad: Tensor,
    deltas: Tensor,
    tile_block: Tensor,
    tile_offset: Tensor,
    block_tile: Tensor,
    num_vectors: int,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(deltas.numel() == num_vectors * grad.numel())
    torch._check(tile_offset.numel() == tile_block.numel() + 1)
    return grad.new_empty((num_vectors, block_tile.numel() - 1), dtype=dtype)


def _packed_compose_fake(
    base: Tensor,
    words: Tensor,
    scales: Tensor,
    bits: int,
    coef: Tensor,
    tile_block: Tensor,
    tile_offset: Tensor,
) -> Tensor:
    _check_packed(base, words, scales, bits, coef.shape[0])
    torch._check(tile_offset.numel() == tile_block.numel() + 1)
    return torch.empty_like(base)


def _packed_coef_grad_fake(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    bits: int,
    tile_block: Tensor,
    tile_offset: Tensor,
    block_tile: Tensor,
    num_vectors: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_packed(grad, words, scales, bits, num_vectors)
    torch._check(tile_offset.numel() == tile_block.numel() + 1)
    return grad.new_empty((num_vectors, block_tile.numel() - 1), dtype=dtype)


def _partition_compose_fake(
    base: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    bits: int,
    coef: Tensor,
    tile_block: Tensor,
    tile_offset: Tensor,
    tile_key: Tensor,
) -> Tensor:
    torch._check(coef.dim() == 3 and 0 < coef.shape[2] <= TILE)
    _check_stored(base, deltas, scales, bits, coef.shape[0])
    torch._check(tile_offset.numel() == tile_block.numel() + 1 == tile_key.numel() + 1)
    return torch.empty_like(base)


def _partition_coef_grad_fake(
    grad: Tensor,
    deltas: Tensor,
    scales: Tensor | None,
    bits: int,
    tile_offset: Tensor,
    tile_key: Tensor,
    chunk_tile: Tensor,
    block_chunk: Tensor,
    num_vectors: int,
    groups: int,
    dtype: torch.dtype,
) -> Tensor:
    torch._check(0 < groups <= TILE)
    _check_stored(grad, deltas, scales, bits, num_vectors)
    torch._check(tile_offset.numel() == tile_key.numel() + 1)
    return grad.new_empty((num_vectors, block_chunk.numel() - 1, groups), dtype=dtype)


def _check_stored(
    wide: Tensor, deltas: Tensor, scales: Tensor | None, bits: int, num_vectors: int
) -> None:
    if scales is None:
        torch._check(not bits and deltas.numel() == num_vectors * wide.numel())
    else:
        _check_packed(wide, deltas, scales, bits, num_vectors)


def _check_packed(wide: Tensor, words: Tensor, scales: Tensor, bits: int, num_vectors: int) -> None:
    elements = num_vectors * wide.numel()
    torch._check(words.numel() * 32 == elements * bits)
    torch._check(scales.numel() * GROUP == elements)


_FAKES: dict[str, Callable[..., Any]] = {
    "compose": _compose_fake,
    "coef_grad": _coef_grad_fake,
    "bank_compose": _bank_compose_fake,
    "bank_coef_grad": _bank_coef_grad_fake,
    "packed_compose": _packed_compose_fake,
    "packed_coef_grad": _packed_coef_grad_fake,
    "partition_compose": _partition_compose_fake,
    "partition_coef_grad": _partition_coef_grad_fake,
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
