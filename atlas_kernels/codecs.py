"""How a bank stores its deltas."""

from __future__ import annotations

import torch

DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def storage_dtype(codec: str) -> torch.dtype:
    """The dtype in which a codec stores deltas. Raises ValueError for an unknown codec."""
    if codec not in DENSE:
        raise ValueError(f"unknown codec {codec!r}: expected one of {', '.join(map(repr, DENSE))}")
    return DENSE[codec]
