"""Deltas stored as integers of a few bits, with one scale for every group of 128 elements.

The values of a group lie on an even grid without a zero, so that every code is used and the grid is
symmetric down to one bit, where it is the sign:

    delta[e] = scale[e // GROUP] * (2 * u[e] + 1 - 2**bits),    0 <= u[e] < 2**bits

Scales are bfloat16. Both factors have at most eight significant bits: a decoded delta is exact in
float32. A group of zeros has the scale zero.

Codes lie in 32-bit words, in units of 16 words that serve 16 lanes alike: field k of word c,
counted from the lowest bit, is element 16 * k + c of the unit. A field has `bits` bits, but for
three bits: there a unit of 512 elements is two units of 2-bit fields (the low bits), then one of
1-bit fields.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
WORDS = 16

# Elements encoded together: what is computed on the way stays in a cache.
_PART = 1 << 17

# Fractions of a group's largest magnitude that the outermost level is tried at. Measured on
# fine-tuned CLIP: finer steps lower no codec's error by one percent.
_CLIPS = {8: (1.0,), 4: (1.0, 0.9, 0.8, 0.7), 3: (1.0, 0.85, 0.7, 0.55), 2: (0.85, 0.65, 0.5)}


@dataclass(frozen=True)
class Packed:
    """``stored = u``, so that ``|delta - scale * (2 * u + 1 - 2**bits)|`` is small in the square.

    Attributes:
        name: "int8", "int4", "int3", "int2" or "sign".
        bits: of a code: 8, 4, 3, 2 or 1.
    """

    name: str
    bits: int

    dtype = torch.int32

    @property
    def alignment(self) -> int:
        """Elements: whole units and whole groups."""
        return max(GROUP, 32 * WORDS // (1 if self.bits == 3 else self.bits))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element, scales included."""
        return self.bits + 16 / GROUP

    def items(self, elements: int) -> int:
        """Stored words of so many elements, a multiple of `alignment`."""
        return elements * self.bits // 32

    def scales(self, elements: int) -> int:
        """Scales of so many elements, a multiple of `alignment`."""
        return elements // GROUP

    def encode(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Words int32 and scales bfloat16 of a row [n], n a multiple of `alignment`."""
        parts = [self._encode(part.view(-1, GROUP)) for part in row.float().split(_PART)]
        if not parts:
            return row.new_empty(0, dtype=torch.int32), row.new_empty(0, dtype=torch.bfloat16)
        words, scales = zip(*parts, strict=True)
        return torch.cat(words), torch.cat(scales)

    def _encode(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        grid, scales = quantize(groups, self.bits)
        codes = ((grid + (2**self.bits - 1)) / 2).to(torch.int32)
        return _pack(codes.view(-1), self.bits), scales.view(-1)

    def decode(self, words: Tensor, scales: Tensor | None) -> Tensor:
        """The row [n] in float32, exact."""
        assert scales is not None
        return levels(words, self.bits) * scales.float().repeat_interleave(GROUP, -1)


def quantize(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels float32 [g, size] and scales bfloat16 [g, 1] of groups [g, size] in float32."""
    scales = _scales(groups, bits)
    return _nearest(groups, scales.float(), bits), scales


def levels(words: Tensor, bits: int) -> Tensor:
    """``2 * u + 1 - 2**bits`` of packed words [..., w] as float32 [..., 32 * w / bits]."""
    if bits == 3:
        units = words.unflatten(-1, (-1, 3 * WORDS))
        low = _fields(units[..., : 2 * WORDS].flatten(-2), 2)
        codes = low + 4 * _fields(units[..., 2 * WORDS :].flatten(-2), 1)
    else:
        codes = _fields(words, bits)
    grid: Tensor = (2 * codes + (1 - 2**bits)).float()
    return grid


def _fields(words: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device).unsqueeze(1)
    planes: Tensor = (words.unflatten(-1, (-1, 1, WORDS)) >> shifts) & (2**bits - 1)
    return planes.flatten(-3)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Words int32 [n * bits / 32] of codes int32 [n]."""
    if bits == 3:
        low = _pack(codes & 3, 2).view(-1, 2 * WORDS)
        return torch.cat([low, _pack(codes >> 2, 1).view(-1, WORDS)], 1).view(-1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=codes.device).unsqueeze(1)
    # Fields do not overlap, so that a sum joins them.
    return (codes.view(-1, 32 // bits, WORDS) << shifts).sum(1, dtype=torch.int32).view(-1)


def _nearest(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The levels ``2 * u + 1 - 2**bits`` nearest to groups [g, size] for scales [g, 1]."""
    # A scale of zero serves a group of zeros: any level will do.
    cells = groups / torch.where(scales > 0, 2 * scales, 1.0)
    half = 2 ** (bits - 1)
    return cells.floor_().clamp_(-half, half - 1).mul_(2).add_(1)


def _scales(groups: Tensor, bits: int) -> Tensor:
    """The bfloat16 scales [g, 1] of the least squared error among a few candidates."""
    magnitudes = groups.abs()
    if bits == 1:
        # The mean is the minimum: d/ds sum (|x| - s)^2 = 0.
        return magnitudes.mean(1, keepdim=True).bfloat16()
    outermost: Tensor = magnitudes.amax(1, keepdim=True) / (2**bits - 1)
    if len(_CLIPS[bits]) == 1:
        return outermost.bfloat16()
    best, least = outermost.bfloat16(), torch.full_like(outermost, torch.inf)
    for clip in _CLIPS[bits]:
        # The levels fixed, the best scale is the projection of the group on them.
        grid = _nearest(groups, outermost * clip, bits)
        projected = (groups * grid).sum(1, keepdim=True) / grid.square().sum(1, keepdim=True)
        candidate = projected.bfloat16()
        wide = candidate.float()
        decoded = _nearest(groups, wide, bits).mul_(wide)
        error = decoded.sub_(groups).square_().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best
