"""Launch configurations: data, chosen by pure functions of dtypes, N and architecture.

Chosen from generated code (registers, instructions, load widths), and by `bench.launches` on an
H200; no other GPU has timed them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...layout import TILE

# Up to here a forward kernel is compiled for its N and the loads of all vectors are in flight
# together. Above, N is a run-time argument: 64 unrolled vectors on tiles of 4096 spill 11 KB, and
# the binary grows with N (sm_90, Triton 3.8).
UNROLL_LIMIT = 8


@dataclass(frozen=True)
class Launch:
    """How a kernel is compiled and launched.

    Attributes:
        tile: elements per program, a divisor of `layout.TILE`.
        num_warps: warps per program.
        unroll: N for a kernel compiled for this N, 0 for one with N as a run-time argument. Of
            packed deltas: vectors whose loads are in flight together.
    """

    tile: int
    num_warps: int
    unroll: int


# The partial sums of the gradient. One constant, because it decides the last bits of the result. A
# whole storage tile per program: the two barriers of a reduction over warps come once per vector
# (7.0 instructions per element with tiles of 1024, 4.1 here). Never unrolled: loads do not move
# across those barriers, so unrolling 8 vectors gave the same 56 registers and 5 times the code.
BACKWARD = Launch(TILE, 4, 0)


def forward(dtypes: tuple[torch.dtype, ...], num_vectors: int, architecture: str) -> Launch:
    """The launch of a composition that streams these dtypes; `architecture` like "sm_90", "gfx942".

    The tile gives every lane one 128-bit load of the narrowest dtype, or two where the loop over
    task vectors is not unrolled and has to keep as many bytes in flight by itself.
    """
    unroll = num_vectors if num_vectors <= UNROLL_LIMIT else 0
    lanes = _lanes(architecture)
    loads = 1 if unroll else 2
    narrowest = min(dtype.itemsize for dtype in dtypes)
    num_warps = 4
    tile = max(1024, num_warps * lanes * loads * 16 // narrowest)
    return Launch(tile, num_warps, unroll)


def packed(architecture: str, bits: int) -> Launch:
    """The launch of either direction of packed deltas, whatever their number.

    128 threads for a storage tile: each then has four words side by side, one 128-bit load, of
    eight planes: 32 elements in 56 to 80 registers. Twice as many took 94 to 128 on sm_90, for at
    most 7 % fewer instructions. Four vectors at a time took 0.85 to 0.87 of the time of one on an
    H200, but 1.07 for three bits, whose fields take more registers; for gfx942 the code has 1.4
    times the instructions.
    """
    lanes = _lanes(architecture)
    return Launch(TILE, 128 // lanes, 4 if lanes == 32 and bits != 3 else 1)


def groups(architecture: str, dense_forward: bool = False) -> Launch:
    """The launch of either direction of coefficients by group, of any codec.

    512 threads for a storage tile: each then has eight slots, and at most 64 registers on NVIDIA.
    Half as many threads took up to 127 and spilled, for a sixth fewer instructions per element; but
    the composition of floating-point deltas, with 64 at most, then takes 0.8 of the time (H200).
    """
    lanes = _lanes(architecture)
    return Launch(TILE, (256 if dense_forward and lanes == 32 else 512) // lanes, 0)


def _lanes(architecture: str) -> int:
    """Threads of a warp."""
    return 64 if architecture.startswith("gfx9") else 32
