"""The arena operators as tests call them: on any backend, by a layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atlas_kernels.ops import (
    Arena,
    ArenaComposition,
    Layout,
    compose_with,
    per_block,
    resolve,
)

Stored = tuple[Tensor, Tensor | None, int]


def arena_compose(
    ops: Any, base: Tensor, stored: Stored, coef: Tensor, layout: Layout, key: Tensor | None = None
) -> Tensor:
    """``arena_compose`` of ``ops``: operators, the reference, or a backend's host functions."""
    result: Tensor = ops.arena_compose(base, *stored, *layout.tables, key, coef)
    return result


def arena_coef_grad(
    ops: Any,
    grad: Tensor,
    stored: Stored,
    layout: Layout,
    num_vectors: int,
    key: Tensor | None = None,
    groups: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``arena_coef_grad`` likewise."""
    result: Tensor = ops.arena_coef_grad(
        grad, *stored, *layout.tables, key, num_vectors, groups, dtype
    )
    return result


def differentiable(
    base: Tensor,
    stored: Stored,
    coef: Tensor,
    layout: Layout,
    backend: str = "auto",
    key: Tensor | None = None,
) -> Tensor:
    """The composed arena with its derivatives, as a bank's segment has it."""
    coef = per_block(coef, len(layout.shapes))
    groups = coef.shape[2] if coef.dim() == 3 else 0
    backend = resolve(backend, base.device.type, coef.dtype == torch.float64)
    arena = Arena(*stored, *layout.tables, key)
    return compose_with(ArenaComposition(backend, arena, len(coef), groups, coef.dtype), coef, base)
