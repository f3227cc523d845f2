"""Deltas stored as floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import ALIGNMENT

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Dense:
    """``stored = delta`` rounded to a floating-point dtype; no scales.

    Attributes:
        name: "fp32", "bf16" or "fp16".
    """

    name: str

    # What the operators call a delta that is not packed.
    bits = 0
    alignment = ALIGNMENT

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored items, one per element."""
        return _DTYPES[self.name]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return 8.0 * self.dtype.itemsize

    def items(self, elements: int) -> int:
        """Stored items of so many elements."""
        return elements

    def scales(self, elements: int) -> int:
        """Scales of so many elements."""
        return 0

    def encode(self, row: Tensor) -> tuple[Tensor, None]:
        """The row [n] in the codec's dtype."""
        return row.to(self.dtype), None

    def decode(self, items: Tensor, scales: Tensor | None) -> Tensor:
        """The row [n] in float32."""
        return items.float()
