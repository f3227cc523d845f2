# What Triton compiles has no Python types; its constants are upper case.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernels for packed task vectors (`codecs.packed`); names as in `kernels`.

A program holds one storage tile as GROUPS groups of PLANES planes of WORDS elements, each plane a
tensor [GROUPS, WORDS]: all planes of a group share its scale, and element (group, word) of each has
its code in the same one or two words. Groups that share their words load them together.

A code becomes a number in two operations. Its field, masked in place, is put into the fraction of
a float that is a power of two; subtracting that power, and all that a level is less than twice its
code, is exact:

    float(2**(24 - p) with the field at bit p) = 2**(24 - p) + 2 * u
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...codecs import packed
from .kernels import _narrowed

GROUP = tl.constexpr(packed.GROUP)
WORDS = tl.constexpr(packed.WORDS)
PLANES = tl.constexpr(packed.GROUP // packed.WORDS)


@triton.jit
def _window(b_words, o_bit, FIRST: tl.constexpr):
    o_left = (32 + FIRST - o_bit) % 32
    return (b_words << o_left) | (b_words >> (32 - o_left)) | (0x9F << 23)


@triton.jit
def _weighed(b_window, P: tl.constexpr, BITS: tl.constexpr, LOG_WEIGHT: tl.constexpr):
    """`2**(23 + LOG_WEIGHT - P) + 2**LOG_WEIGHT * u` of the fields u at bit P, P + BITS <= 23."""
    b_bits = b_window & (((1 << BITS) - 1 << P) + ((127 + 23 + LOG_WEIGHT - P) << 23))
    return b_bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(p, m):
    return tl.load(p, mask=m, other=0).to(tl.uint32, bitcast=True)

@triton.jit
def _levels(p_words, m, BITS: tl.constexpr):
    """The levels of the planes of a group, a tuple of float32 [GROUPS, WORDS]; p_words of a tile."""
    o_group = tl.arange(0, m.shape[0])[:, None]  # [GROUPS, 1]
    o_word = tl.arange(0, WORDS)[None, :]  # [1, WORDS]
    b_levels = ()
    if BITS == 3:
        p_unit = p_words + o_group // 4 * (3 * WORDS) + o_word
        b_low = _window(_load(p_unit + o_group // 2 % 2 * WORDS, m), o_group % 2 * 16, 1)
        b_high = _window(_load(p_unit + 2 * WORDS, m), o_group % 4 * 8, 4)
        for k in tl.static_range(PLANES):
            b_rest = _weighed(b_high, 4 + k, 1, 3) - (2.0 ** (22 - k) + 2.0 ** (23 - 2 * k) + 7)
            b_levels = b_levels + (_weighed(b_low, 1 + 2 * k, 2, 1) + b_rest,)
    else:
        for k in tl.static_range(PLANES):
            if k * BITS % 32 == 0:
                b_words = _load(p_words + (o_group * BITS // 4 + k * BITS // 32) * WORDS + o_word, m)
            if k * BITS % 16 == 0:
                b_window = _window(b_words, (o_group * (8 * BITS) + k * BITS // 16 * 16) % 32, 1)
            b_levels = b_levels + (_weighed(b_window, 1 + k * BITS % 16, BITS, 1) - (2.0 ** (23 - k * BITS % 16) + 2**BITS - 1),)
    return b_levels


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
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
):
    i_t = tl.program_id(0)
    i_b = tl.load(p_tile_block + i_t)
    start = tl.load(p_tile_offset + i_t)
    groups = (tl.load(p_tile_offset + i_t + 1) - start) // GROUP
    start = start // GROUP
    o_group = tl.arange(0, GROUPS)
    m = (o_group < groups)[:, None]
    o = start * GROUP + o_group[:, None] * GROUP + tl.arange(0, WORDS)[None, :]
    b_acc = ()
    for k in tl.static_range(PLANES):
        b_acc = b_acc + (tl.load(p_base + o + k * WORDS, mask=m, other=0).to(tl.float32),)
    p_words += num_vectors * start // UNIT * (UNIT * BITS * 4)
    step = groups // UNIT * (UNIT * BITS * 4)
    p_scales += num_vectors * start
    p_coef += i_b
    stride = num_blocks.to(tl.int64)
    for i in range(num_vectors):
        b_levels = _levels(p_words + i * step, m, BITS)
        b_scale = tl.load(p_scales + i * groups + o_group, mask=o_group < groups, other=0)
        b_factor = (tl.load(p_coef + i * stride) * b_scale.to(tl.float32))[:, None]
        b_next = ()
        for k in tl.static_range(PLANES):
            b_next = b_next + (b_acc[k] + b_factor * b_levels[k],)
        b_acc = b_next
    for k in tl.static_range(PLANES):
        tl.store(p_out + o + k * WORDS, _narrowed(b_acc[k], p_out.dtype.element_ty), mask=m)
