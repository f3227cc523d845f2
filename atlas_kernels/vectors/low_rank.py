"""Low-rank deltas (LoRA): kept and combined as factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """A delta kept as two factors: ``delta = scale * up @ down``.

    Attributes:
        up: (out, r), LoRA's B.
        down: (r, in), LoRA's A; or (r, *rest) for a block (out, *rest), such as a convolution's.
        scale: LoRA's alpha / r.

    Raises:
        ValueError: shapes, dtypes or devices of the factors differ where they must not.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> delta = ak.LowRank(torch.ones(3, 1), torch.ones(1, 2), scale=0.5)
        >>> delta.shape, delta.dense()[0, 0].item()
        (torch.Size([3, 2]), 0.5)
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        up, down = self.up, self.down
        if up.dim() != 2 or down.dim() < 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not fit: expected "
                "up (out, r) and down (r, in)"
            )
        if (up.dtype, up.device) != (down.dtype, down.device):
            raise ValueError(
                f"factors differ: up is {up.dtype} on {up.device}, down is {down.dtype} on "
                f"{down.device}"
            )

    @property
    def shape(self) -> torch.Size:
        """Of the delta."""
        return torch.Size((self.up.shape[0], *self.down.shape[1:]))

    @property
    def rank(self) -> int:
        """r, of the factors: the product's may be less."""
        return self.up.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors."""
        return self.up.dtype

    def dense(self) -> Tensor:
        """The delta as a tensor, in float32."""
        product = self.scale * self.up.float() @ self.down.flatten(1).float()
        return product.view(self.shape)

    def __neg__(self) -> LowRank:
        return replace(self, scale=-self.scale)

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, scale=self.scale * factor)

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank(
            torch.cat([delta.scale * delta.up.float() for delta in (self, other)], 1),
            torch.cat([delta.down.float() for delta in (self, other)]),
        )

    def __sub__(self, other: LowRank) -> LowRank:
        return self + (-other)

    def dot(self, other: Delta) -> float:
        """``<self, other>`` in float64; of two low-rank deltas through r x r products alone."""
        up, down = self.up.double(), self.down.flatten(1).double()
        if isinstance(other, LowRank):
            scale = self.scale * other.scale
            terms = (up.T @ other.up.double()) * (down @ other.down.flatten(1).double().T)
        else:
            scale = self.scale
            terms = (up.T @ other.flatten(1).double()) * down
        return scale * float(terms.sum())

    def error(self, stored: LowRank) -> float:
        """``|stored - self| / |self|`` for factors that were rounded, with the same scale."""
        up, down = self.up.float(), self.down.float()
        near_up, near_down = stored.up.to(up), stored.down.to(down)
        # (up' - up) down' + up (down' - down): the products' own difference would be rounding.
        difference = LowRank(
            torch.cat([near_up - up, up], 1), torch.cat([near_down, near_down - down]), self.scale
        )
        squares = max(0.0, difference.dot(difference)), max(self.dot(self), 1e-300)
        return math.sqrt(squares[0] / squares[1])

    def is_finite(self) -> bool:
        """Whether both factors are."""
        return all(bool(torch.isfinite(factor).all()) for factor in (self.up, self.down))

    def is_zero(self) -> bool:
        """Whether a factor is zero: a product that merely cancels is not found out."""
        return not (self.scale and self.up.count_nonzero() and self.down.count_nonzero())


Delta = Tensor | LowRank


def to_dense(delta: Delta) -> Tensor:
    """The delta as a tensor; a low-rank one in float32."""
    return delta.dense() if isinstance(delta, LowRank) else delta
