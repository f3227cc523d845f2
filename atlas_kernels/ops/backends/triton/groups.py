# Constants of a kernel are upper case; what Triton compiles has no Python types, and its tuples
# are joined by sums alone.
# ruff: noqa: N803, RUF005
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
"""The Triton kernels for coefficients of groups (`ops.groups`), of any codec.

Names as in `kernels`, and h_ for words of a hash (uint32), whose products wrap on purpose. A
program holds a storage tile of TILE elements as [TILE / GROUP, GROUP], a row for every scale. BITS
is 0 for floating-point deltas.

Slots are computed in the upper bits of a word: there, products modulo 2**32 are products modulo
TILE, and all that has to be masked is what a shift leaves below.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import layout
from ...codecs import packed as codec
from .kernels import _narrowed
from .packed import _words_of

GROUP = tl.constexpr(codec.GROUP)
WORDS = tl.constexpr(codec.WORDS)
# Bits of a slot, and those of a word that lie below it.
SLOT = tl.constexpr(layout.TILE.bit_length() - 1)
BELOW = tl.constexpr(33 - layout.TILE.bit_length())
ROUNDS = tl.constexpr(4)


# ---- the bijection ------------------------------------------------------------------------------


@triton.jit
def _next(h_key):
    """The key of the next round."""
    h_key = h_key * 0x2C1B3C6D + 0x297A2D39
    return h_key ^ (h_key >> 15)


@triton.jit
def _mixed(h_slot):
    """`slot ^ slot >> 6`: its own inverse, for 6 is half of the bits."""
    return (h_slot ^ (h_slot >> (SLOT // 2))) >> BELOW << BELOW


@triton.jit
def _inverse(h_odd):
    """1 / h_odd modulo TILE: h_odd itself is right in 3 bits, after Newton's steps 6 and 12."""
    h_near = h_odd * (2 - h_odd * h_odd)
    return h_near * (2 - h_odd * h_near)


@triton.jit
def _groups(h_key, o, num_groups):
    """The groups of elements o of the tile with this key."""
    h_slot = o.to(tl.uint32) << BELOW
    for _ in tl.static_range(ROUNDS):
        h_slot = _mixed(h_slot * (h_key | 1) + (h_key >> SLOT << BELOW))
        h_key = _next(h_key)
    # slot * num_groups / TILE
    return tl.umulhi(h_slot, num_groups.to(tl.uint32)).to(tl.int32)


@triton.jit
def _elements(h_key, o_slot):
    """The elements at slots of the tile with this key: the rounds backwards."""
    h_keys = (h_key,)
    for r in tl.static_range(ROUNDS - 1):
        h_keys = h_keys + (_next(h_keys[r]),)
    h_element = o_slot.to(tl.uint32) << BELOW
    for r in tl.static_range(ROUNDS):
        h_key = h_keys[ROUNDS - 1 - r]
        h_element = (_mixed(h_element) - (h_key >> SLOT << BELOW)) * _inverse(h_key | 1)
    return (h_element >> BELOW).to(tl.int32)


# ---- a tile -------------------------------------------------------------------------------------


@triton.jit
def _offsets(TILE: tl.constexpr):
    """The elements of a tile, [TILE / GROUP, GROUP]."""
    return tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def _items_of(elements, BITS: tl.constexpr):
    """The number of stored items, values or words, of so many elements."""
    if BITS:
        elements = _words_of(elements, BITS)
    return elements


@triton.jit
def _fields(p_words, o, m, BITS: tl.constexpr):
    """The fields of elements o in words from p_words on; each loads its word, from the cache."""
    count: tl.constexpr = 32 // BITS
    b_words = tl.load(p_words + (o // (WORDS * count) * WORDS + o % WORDS), mask=m, other=0)
    return (b_words >> (o // WORDS % count * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _values(p_items, o, m, BITS: tl.constexpr):
    """Elements o of a row of deltas, or their levels, as float32 where m."""
    if BITS == 0:
        b_values = tl.load(p_items + o, mask=m, other=0)
    elif BITS == 3:
        # Two units of low bits and one of high bits after them, for 512 elements.
        o_unit = o // (32 * WORDS) * WORDS
        b_low = _fields(p_items + o_unit, o, m, 2)
        b_high = _fields(p_items + 2 * WORDS + 2 * o_unit, o, m, 1)
        b_values = 2 * (b_low + 4 * b_high) - 7
    else:
        b_values = 2 * _fields(p_items, o, m, BITS) + (1 - 2**BITS)
    return b_values.to(tl.float32)


@triton.jit
def _scales(p_scales, num_scales, TILE: tl.constexpr):
    """The scales of a row of deltas, float32 [TILE / GROUP, 1]."""
    o = tl.arange(0, TILE // GROUP)[:, None]
    return tl.load(p_scales + o, mask=o < num_scales, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["num_vectors", "num_blocks", "num_groups"])
def group_compose_kernel(
    p_base,
    p_deltas,
    p_scales,
    p_coef,
    p_tile_block,
    p_tile_offset,
    p_tile_key,
    p_out,
    num_vectors,
    num_blocks,
    num_groups,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`out = base + sum_i coef[i, block, group] * delta_i` on one storage tile of TILE.

    base, out [P]; deltas [N * P], or words int32 [N * P * BITS / 32] and scales bfloat16
    [N * P / GROUP], interleaved by tile; coef [N, B, K] float32; tile_block and tile_key [T] int32,
    tile_offset [T + 1] int64; grid (T,).
    """
    i_t = tl.program_id(0)
    start = tl.multiple_of(tl.load(p_tile_offset + i_t), 16)
    length = tl.multiple_of(tl.load(p_tile_offset + i_t + 1), 16) - start
    o = _offsets(TILE)  # [TILE / GROUP, GROUP]
    m = o < length
    h_key = tl.load(p_tile_key + i_t).to(tl.uint32, bitcast=True)
    o_group = _groups(h_key, o, num_groups)
    p_deltas += _items_of(num_vectors * start, BITS)
    row = _items_of(length, BITS)
    p_coef += tl.load(p_tile_block + i_t).to(tl.int64) * num_groups
    stride = num_blocks.to(tl.int64) * num_groups
    b_acc = tl.load(p_base + start + o, mask=m, other=0).to(tl.float32)
    for i in range(num_vectors):
        b_factor = tl.load(p_coef + i * stride + o_group)
        if BITS:
            scale = (num_vectors * start + i * length) // GROUP
            b_factor *= _scales(p_scales + scale, length // GROUP, TILE)
        b_acc += b_factor * _values(p_deltas + i * row, o, m, BITS)
    tl.store(p_out + start + o, _narrowed(b_acc, p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_vectors"])
def group_partial_kernel(
    p_grad,
    p_deltas,
    p_scales,
    p_tile_offset,
    p_tile_key,
    p_chunk_tile,
    p_part,
    num_vectors,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`part[c, i, s] = sum_t (grad * delta_i)[element of t at slot s]` over tiles t of chunk c.

    chunk_tile [C + 1] int32, part [C, N, TILE] float32; all else as above with grad for base; grid
    (C * N,). A thread keeps its slots for all tiles: sums stay in registers, and it is the products
    that change places, in shared memory and once per tile.
    """
    i_c = tl.program_id(0) // num_vectors
    i = tl.program_id(0) % num_vectors
    o = _offsets(TILE)  # [TILE / GROUP, GROUP]
    o_slot = tl.arange(0, TILE)  # [TILE]
    b_sums = tl.zeros([TILE], tl.float32)
    for i_t in range(tl.load(p_chunk_tile + i_c), tl.load(p_chunk_tile + i_c + 1)):
        start = tl.multiple_of(tl.load(p_tile_offset + i_t), 16)
        length = tl.multiple_of(tl.load(p_tile_offset + i_t + 1), 16) - start
        m = o < length
        row = _items_of(num_vectors * start, BITS) + i * _items_of(length, BITS)
        b_products = tl.load(p_grad + start + o, mask=m, other=0).to(tl.float32)
        b_products *= _values(p_deltas + row, o, m, BITS)
        if BITS:
            scale = (num_vectors * start + i * length) // GROUP
            b_products *= _scales(p_scales + scale, length // GROUP, TILE)
        h_key = tl.load(p_tile_key + i_t).to(tl.uint32, bitcast=True)
        # Where the tile is short, the elements of some slots are beyond it: their products are 0.
        o_element = _elements(h_key, o_slot)
        b_sums += tl.gather(tl.reshape(b_products, [TILE]), o_element, 0)
    tl.store(p_part + tl.program_id(0).to(tl.int64) * TILE + o_slot, b_sums)


@triton.jit(do_not_specialize=["num_vectors", "num_blocks", "num_groups"])
def group_sum_kernel(
    p_part,
    p_block_chunk,
    p_out,
    num_vectors,
    num_blocks,
    num_groups,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`out[i, b, k] = sum_s sum_c part[c, i, s]` over chunks c of block b, slots s of group k.

    part [C, N, TILE] and out [N, B, K] float32, block_chunk [B + 1] int32. GROUPS is at least K,
    WIDTH at least the slots of a group; all in a fixed order; grid (N * B,).
    """
    i = tl.program_id(0) // num_blocks
    i_b = tl.program_id(0) % num_blocks
    p_part += i.to(tl.int64) * TILE + tl.arange(0, TILE)
    stride = num_vectors.to(tl.int64) * TILE
    b_slots = tl.zeros([TILE], tl.float32)
    for i_c in range(tl.load(p_block_chunk + i_b), tl.load(p_block_chunk + i_b + 1)):
        b_slots += tl.load(p_part + i_c * stride)
    o_group = tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    o_first = (o_group * TILE + num_groups - 1) // num_groups
    o_end = (o_group * TILE + TILE + num_groups - 1) // num_groups
    o_slot = o_first + tl.arange(0, WIDTH)[None, :]  # [GROUPS, WIDTH]
    o_inside = tl.reshape(o_slot % TILE, [GROUPS * WIDTH])
    b_members = tl.reshape(tl.gather(b_slots, o_inside, 0), [GROUPS, WIDTH])
    b_sums = tl.sum(tl.where(o_slot < o_end, b_members, 0), axis=1)  # [GROUPS]
    o_out = tl.program_id(0).to(tl.int64) * num_groups + tl.arange(0, GROUPS)
    tl.store(p_out + o_out, b_sums, mask=tl.arange(0, GROUPS) < num_groups)
