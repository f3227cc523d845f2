"""Quantised checkpoints: codes in place of weights, which mean nothing without their scales."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_NAMES = (
    ("GPTQ or AWQ", re.compile(r".*\.(qweight|qzeros|g_idx)")),
    ("bitsandbytes", re.compile(r".*\.(absmax|quant_map|SCB|weight_format|quant_state\..*)")),
)
_SCALES = ("_scale", "_scale_inv", "_scales", ".scale", ".scales")


def check_dequantised(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a checkpoint holds codes (fp8, int8 with scales, GPTQ, AWQ, ...)."""
    for name, tensor in tensors.items():
        kind = next((kind for kind, pattern in _NAMES if pattern.fullmatch(name)), None)
        if tensor.is_floating_point() and tensor.element_size() == 1:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} codes"
        elif tensor.dim() > 1 and tensor.element_size() == 1 and _has_scale(name, tensors):
            kind = "8-bit codes with scales"
        if kind is not None:
            raise ValueError(
                f"{what} is quantised ({kind}, in {name!r}), and sums of codes mean nothing: "
                "dequantise it first, for instance by transformers' model.dequantize() and "
                "save_pretrained()"
            )


def _has_scale(name: str, tensors: Mapping[str, Tensor]) -> bool:
    stem = name.removesuffix(".weight")
    return any(f"{start}{ending}" in tensors for start in (name, stem) for ending in _SCALES)
