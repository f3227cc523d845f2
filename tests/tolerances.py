"""How far a correct float32 computation may lie from its float64 oracle."""

import torch
from torch import Tensor

from atlas_kernels.ops.layout import TILE

EPS = torch.finfo(torch.float32).eps


def compose_error(base: Tensor, deltas: list[Tensor], coef: Tensor) -> Tensor:
    """Elementwise bound for ``base + sum_i coef[i] * deltas[i]``, stored in ``base``'s dtype.

    Each of the N products and N sums rounds once, by at most eps/2 of a magnitude that never
    exceeds A = |base| + sum_i |coef_i * delta_i|; N sums and one product per term make
    (N + 1) * eps/2 * A to first order, a fused multiply-add less. The float32 value of coef is
    exact by construction.
    The final rounding adds half a unit in the last place of the storage dtype, relative to the
    result and not to A: where terms cancel, one rounded too early shows. 1.01 covers the
    second-order terms, the tiny constant results in the subnormal range.
    """
    result = base.double()
    magnitude = result.abs()
    for c, delta in zip(coef.double(), deltas, strict=True):
        result = result + c * delta.double()
        magnitude = magnitude + (c * delta.double()).abs()
    info = torch.finfo(base.dtype)
    rounding = info.eps / 2 if base.dtype != torch.float32 else 0.0
    steps = (len(deltas) + 1) * EPS / 2 * magnitude if len(deltas) else 0.0 * magnitude
    subnormal = (len(deltas) > 0) * info.smallest_normal * info.eps
    return 1.01 * (steps + rounding * (result.abs() + steps)) + subnormal


def dot_error(grad: Tensor, delta: Tensor) -> float:
    """Bound for ``<grad, delta>`` of K terms summed in a fixed, blocked order.

    Rounding errors of terms of either sign behave like a random walk: eps * rms(term) *
    sqrt(K log2 K), relative to the terms and not to the result, which may cancel. Measured factor:
    at most 2.0 for the backends torch, cpp and triton, K = 2 to 300,000; 8 is that with margin.
    Terms of one sign drift besides: partial sums grow along with the mean, half of it on average.
    Lanes of up to TILE/16 sequential sums of a tile, then the sums of K/TILE tiles, each rounding
    by eps/2: measured at most half of it. Both are far below what a dropped or doubled element
    of average size would change.
    """
    terms = (grad.double() * delta.double()).flatten()
    return dot_errors(terms, torch.zeros(terms.numel(), dtype=torch.int64), 1).item()


def dot_errors(terms: Tensor, group: Tensor, groups: int) -> Tensor:
    """The same bound for sums [groups], of those of the terms [K] that have that `group` [K]."""

    def totals(values: Tensor) -> Tensor:
        return torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values)

    count = totals(torch.ones_like(terms))
    rms = (totals(terms.square()) / count.clamp(min=1)).sqrt()
    walk = 8 * rms * (count * count.log2().clamp(min=1)).sqrt()
    drift = (TILE / 16 + count / TILE) / 4 * totals(terms).abs()
    return torch.where(count > 0, EPS * (walk + drift) + 1e-38, 0)
