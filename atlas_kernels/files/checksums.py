"""CRC-32, as zip and PNG have it, of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from zlib_ng import zlib_ng


def crc(*stored: Tensor | None) -> int:
    """CRC-32 of the bytes of contiguous tensors, one after the other."""
    value = 0
    for tensor in stored:
        if tensor is not None:
            flat = tensor.detach().cpu().view(-1).view(torch.uint8)
            # Four times as fast as the standard library's, and the same number.
            value = zlib_ng.crc32(flat.numpy().data, value)
    return value
