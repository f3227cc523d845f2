"""How far a correct float32 computation may lie from its float64 oracle."""

import math

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def compose_error(base: Tensor, deltas: list[Tensor], coef: Tensor) -> Tensor:
    """Elementwise bound for ``base + sum_i coef[i] * deltas[i]``, stored in ``base``'s dtype.

    Each of the N products and N sums rounds once, by at most eps/2 of a magnitude that never
    exceeds A = |base| + sum_i |coef_i * delta_i|; N sums and one product per term: (N + 1) * eps/2 * A
    to first order, a fused multiply-add less. The float32 value of coef is exact by construction.
    The final rounding adds half a unit in the last place of the storage dtype; 1.01 covers the
    second-order terms, the tiny constant results in the subnormal range.
    """
    magnitude = base.double().abs()
    for c, delta in zip(coef.double(), deltas, strict=True):
        magnitude = magnitude + (c * delta.double()).abs()
    info = torch.finfo(base.dtype)
    rounding = info.eps / 2 if base.dtype != torch.float32 else 0.0
    steps = (len(deltas) + 1) * EPS / 2
    return 1.01 * magnitude * (steps + rounding) + info.smallest_normal * info.eps


def dot_error(grad: Tensor, delta: Tensor) -> float:
    """Bound for ``<grad, delta>`` of K terms summed in a fixed, blocked order.

    Rounding errors of a blocked sum behave like a random walk: eps * rms(term) * sqrt(K log2 K),
    relative to the terms and not to the result, which may cancel. Lanes of up to TILE/16 = 256
    sequential additions add sqrt(256 / 3) ~ 9 in the worst blocking; 16 is that with margin, far
    below what a dropped or doubled element of average size would change for K < 10^9.
    """
    terms = (grad.double() * delta.double()).flatten()
    count = terms.numel()
    if count == 0:
        return 0.0
    rms = terms.square().mean().sqrt().item()
    return 16 * EPS * rms * math.sqrt(count * max(1.0, math.log2(count))) + 1e-38
