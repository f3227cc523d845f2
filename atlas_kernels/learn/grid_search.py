"""The baselines that search instead of learning: one factor on a grid, chosen on validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..models import ComposedModel

GRID = tuple(step / 20 for step in range(21))
"""21 points of [0, 1], as in task arithmetic (arXiv 2212.04089)."""


def search(
    model: ComposedModel,
    candidates: Iterable[Tensor],
    evaluate: Callable[[], float],
) -> tuple[Tensor, float]:
    """The candidate coefficients with the highest score, ties to the earlier one, and that score.

    Each candidate has the shape of ``model.coef``; the model keeps the best.
    """
    best: Tensor | None = None
    best_score = float("-inf")
    for candidate in candidates:
        with torch.no_grad():
            model.coef.copy_(candidate)
        score = evaluate()
        if score > best_score:
            best, best_score = candidate, score
    if best is None:
        raise ValueError("search needs at least one candidate")
    with torch.no_grad():
        model.coef.copy_(best)
    return best, best_score


def isotropic(coef: Tensor, grid: Sequence[float] = GRID) -> Iterable[Tensor]:
    """Candidates ``a * (tau_1 + ... + tau_N)``: every coefficient is a, for every a of the grid."""
    return (torch.full_like(coef, value) for value in grid)


def single_vector(coef: Tensor, grid: Sequence[float] = GRID) -> Iterable[Tensor]:
    """The base, then candidates ``a * tau_i`` for every vector i and every a > 0 of the grid."""
    yield torch.zeros_like(coef)
    for i in range(coef.shape[0]):
        for value in grid:
            if value > 0:
                candidate = torch.zeros_like(coef)
                candidate[i] = value
                yield candidate
