# Constants of a kernel are upper case; what Triton compiles has no Python types, and its tuples
# are joined by sums alone.
# ruff: noqa: N803, RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""The Triton kernels for packed deltas (`codecs.packed`): decoded in registers, never in memory.

Names as in `kernels`. A program holds a storage tile as PLANES tensors [GROUPS, WORDS], plane k of
them elements 16 * k to 16 * k + 15 of every group of one scale. All planes take their codes from
the same one or two words per (group, word), so that words are loaded once, and 128 bits per thread
where a thread has four of them side by side; groups that share words load them together.

A code becomes its level in two operations. Masked in place, its field is left in the fraction of a
float whose exponent makes the field's last bit worth two; what is to be subtracted is exact in
float32 if the field starts above bit 0:

    float(exponent of 2**(24 - p), u at bit p) = 2**(24 - p) + 2 * u
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...codecs import packed
from .kernels import _narrowed

GROUP = tl.constexpr(packed.GROUP)
WORDS = tl.constexpr(packed.WORDS)
PLANES = tl.constexpr(packed.GROUP // packed.WORDS)
# Has every bit of the exponents of 2**1 to 2**32, of which a mask leaves those of one: with the
# exponent already there, a single operation masks and places a field.
EXPONENTS = tl.constexpr(0x9F << 23)


@triton.jit
def _words_of(elements, BITS: tl.constexpr):
    """The number of words of whole units; rounding down changes nothing and proves a divisor."""
    return elements * BITS // (32 * WORDS) * WORDS


@triton.jit
def _words(p_words, o_unit, m):
    """WORDS words for every group, from o_unit [GROUPS, 1] * WORDS on: uint32 [GROUPS, WORDS]."""
    o = o_unit * WORDS + tl.arange(0, WORDS)[None, :]  # [GROUPS, WORDS]
    return tl.load(p_words + o, mask=m, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _window(b_words, o_bit, FIRST: tl.constexpr):
    """Words turned until bit o_bit, a multiple of 8, is bit FIRST < 8; set: the EXPONENTS."""
    o_left = (32 + FIRST - o_bit) % 32
    return (b_words << o_left) | (b_words >> (32 - o_left)) | EXPONENTS


@triton.jit
def _field(b_window, P: tl.constexpr, BITS: tl.constexpr, WEIGHT: tl.constexpr):
    """`2**(23 + WEIGHT - P) + 2**WEIGHT * u` of the field u at bit P, P + BITS <= 23."""
    b_bits = b_window & ((((1 << BITS) - 1) << P) | ((127 + 23 + WEIGHT - P) << 23))
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def _level(b_window, P: tl.constexpr, BITS: tl.constexpr):
    """`2 * u + 1 - 2**BITS` of the field u at bit P, 0 < P <= 23 - BITS."""
    return _field(b_window, P, BITS, 1) - (2.0 ** (24 - P) + 2**BITS - 1)


@triton.jit
def _level_of_3(b_low, b_high, P: tl.constexpr, P_HIGH: tl.constexpr):
    """The same of two fields, 2 bits at bit P < 20 and the third at bit P_HIGH, 4 <= P_HIGH < 22.

    Exact: what is subtracted is an integer below 2**24.
    """
    b_rest = _field(b_high, P_HIGH, 1, 3) - (2.0 ** (26 - P_HIGH) + 2.0 ** (24 - P) + 7)
    return _field(b_low, P, 2, 1) + b_rest


@triton.jit
def _levels(p_words, m, BITS: tl.constexpr):
    """The levels of a tile whose words start at p_words: PLANES of float32 [GROUPS, WORDS]."""
    o_group = tl.arange(0, m.shape[0])[:, None]  # [GROUPS, 1]
    b_levels = ()
    if BITS == 3:
        b_low = _words(p_words, o_group // 4 * 3 + o_group // 2 % 2, m)
        b_high = _words(p_words, o_group // 4 * 3 + 2, m)
        b_low = _window(b_low, o_group % 2 * 16, 1)
        b_high = _window(b_high, o_group % 4 * 8, 4)
        for k in tl.static_range(PLANES):
            b_levels = b_levels + (_level_of_3(b_low, b_high, 1 + 2 * k, 4 + k),)
    else:
        for k in tl.static_range(PLANES):
            if BITS * k % 32 == 0:
                b_words = _words(p_words, o_group * BITS // 4 + BITS * k // 32, m)
            if BITS * k % 16 == 0:
                # 16 bits of fields leave room for the exponent.
                b_window = _window(b_words, (o_group * 8 * BITS + BITS * k) % 32, 1)
            b_levels = b_levels + (_level(b_window, 1 + BITS * k % 16, BITS),)
    return b_levels


@triton.jit
def _planes(p_tile, m):
    """The values of a tile that starts at p_tile: PLANES of float32 [GROUPS, WORDS], 0 unless m."""
    o = tl.arange(0, m.shape[0])[:, None] * GROUP + tl.arange(0, WORDS)[None, :]
    b_planes = ()
    for k in tl.static_range(PLANES):
        b_plane = tl.load(p_tile + o + k * WORDS, mask=m, other=0)
        b_planes = b_planes + (b_plane.to(tl.float32),)
    return b_planes


@triton.jit(do_not_specialize=["num_vectors", "num_blocks"])
def packed_compose_kernel(
    p_base,
    p_words,
    p_scales,
    p_coef,
    p_tile_block,
    p_tile_offset,
    p_out,
    num_vectors,
    num_blocks,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`out = base + sum_i (coef[i, block] * scale_i) * level_i` on one storage tile of TILE.

    base, out [P], words int32 [N * P * BITS / 32] and scales bfloat16 [N * P / GROUP] interleaved
    by tile, coef [N, B] float32, tile_block [T] int32, tile_offset [T + 1] int64; grid (T,).
    """
    i_t = tl.program_id(0)
    start = tl.multiple_of(tl.load(p_tile_offset + i_t), 16)
    length = tl.load(p_tile_offset + i_t + 1) - start
    groups = length // GROUP
    o_group = tl.arange(0, TILE // GROUP)  # [GROUPS]
    m_group = o_group < groups
    m = m_group[:, None]
    p_words += _words_of(num_vectors * start, BITS)
    p_scales += num_vectors * start // GROUP
    p_coef += tl.load(p_tile_block + i_t)
    row = _words_of(length, BITS)
    stride = num_blocks.to(tl.int64)
    b_acc = _planes(p_base + start, m)
    for i in tl.range(0, num_vectors, loop_unroll_factor=UNROLL):
        b_levels = _levels(p_words + i * row, m, BITS)
        b_scale = tl.load(p_scales + i * groups + o_group, mask=m_group, other=0)
        b_factor = (tl.load(p_coef + i * stride) * b_scale.to(tl.float32))[:, None]
        b_sums = ()
        for k in tl.static_range(PLANES):
            b_sums = b_sums + (b_acc[k] + b_factor * b_levels[k],)
        b_acc = b_sums
    o = o_group[:, None] * GROUP + tl.arange(0, WORDS)[None, :]  # [GROUPS, WORDS]
    for k in tl.static_range(PLANES):
        b_out = _narrowed(b_acc[k], p_out.dtype.element_ty)
        tl.store(p_out + start + o + k * WORDS, b_out, mask=m)


@triton.jit
def _dots(b_grad, p_words, p_scales, m_group, BITS: tl.constexpr):
    """`scale * <grad, level>` of every group of a vector's tile, 0 unless m: float32 [GROUPS]."""
    b_levels = _levels(p_words, m_group[:, None], BITS)
    b_dot = b_grad[0] * b_levels[0]
    for k in tl.static_range(1, PLANES):
        b_dot += b_grad[k] * b_levels[k]
    o_group = tl.arange(0, m_group.shape[0])  # [GROUPS]
    b_scale = tl.load(p_scales + o_group, mask=m_group, other=0)
    return tl.sum(b_dot, axis=1) * b_scale.to(tl.float32)


@triton.jit
def _sums_of_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit(do_not_specialize=["num_vectors", "num_tiles"])
def packed_partial_kernel(
    p_grad,
    p_words,
    p_scales,
    p_tile_offset,
    p_part,
    num_vectors,
    num_tiles,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`part[i, t] = sum_groups scale_i * <grad, level_i>` on storage tile t of TILE.

    part [N, T] float32; all else as above with grad for base; grid (T,). Four vectors are summed at
    a time, so that they share the barriers of a sum over warps.
    """
    i_t = tl.program_id(0)
    start = tl.multiple_of(tl.load(p_tile_offset + i_t), 16)
    length = tl.load(p_tile_offset + i_t + 1) - start
    groups = length // GROUP
    o_group = tl.arange(0, TILE // GROUP)  # [GROUPS]
    m_group = o_group < groups
    m = m_group[:, None]
    p_words += _words_of(num_vectors * start, BITS)
    p_scales += num_vectors * start // GROUP
    p_part += i_t
    row = _words_of(length, BITS)
    stride = num_tiles.to(tl.int64)
    b_grad = _planes(p_grad + start, m)
    fours = num_vectors & -4
    for first in range(0, fours, 4):
        b_dots = ()
        for k in tl.static_range(4):
            p_row, p_scale = p_words + (first + k) * row, p_scales + (first + k) * groups
            b_dots = b_dots + (_dots(b_grad, p_row, p_scale, m_group, BITS),)
        b_sums = tl.reduce(b_dots, 0, _sums_of_4)
        for k in tl.static_range(4):
            tl.store(p_part + (first + k) * stride, b_sums[k])
    for i in range(fours, num_vectors):
        b_dots = _dots(b_grad, p_words + i * row, p_scales + i * groups, m_group, BITS)
        tl.store(p_part + i * stride, tl.sum(b_dots, axis=0))
