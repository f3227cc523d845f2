# Constants of a kernel are upper case; what Triton compiles has no Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernels. Offsets that grow with the model are 64-bit, arithmetic is float32.

Names: p_ pointers, a_ addresses (integers), b_ loaded values, o_ offsets, m_ masks, i_ indices of
tiles, blocks and vectors. N task vectors, B blocks of P elements in T tiles.

Wide (128-bit) accesses need addresses and lengths that the compiler can prove to be multiples of
16. `tl.multiple_of` proves nothing for an argument: it marks the operation that defines a value.
The mark holds wherever that value is used, so it must not be put on a value that a branch for
unaligned tensors uses as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter truncates float32 to bfloat16; compiled code rounds to nearest even.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def _narrowed(b_wide, DTYPE: tl.constexpr):
    """b_wide (float32) rounded to nearest even in DTYPE."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = b_wide.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(b_wide == b_wide, rounded, bits | 0x400000)
        b_narrow = (bits >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        b_narrow = b_wide.to(DTYPE)
    return b_narrow


# ---- the arena of a bank ------------------------------------------------------------------------


@triton.jit
def _row(p_rows, i, length, o, m):
    """Elements o of vector i of a storage tile that starts at p_rows, as float32."""
    return tl.load(p_rows + i * length + o, mask=m, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["num_vectors", "num_blocks"])
def arena_compose_kernel(
    p_base,
    p_deltas,
    p_coef,
    p_tile_block,
    p_tile_offset,
    p_out,
    num_vectors,
    num_blocks,
    STORED: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`out = base + sum_i coef[i, block] * delta_i` on one TILE of a tile of STORED elements.

    base, out [P], deltas [N * P] interleaved by tile, coef [N, B] float32, tile_block [T] int32,
    tile_offset [T + 1] int64; grid (T * STORED / TILE,).
    """
    i_t = tl.program_id(0) // (STORED // TILE)
    i_b = tl.load(p_tile_block + i_t)
    start = tl.multiple_of(tl.load(p_tile_offset + i_t), 16)
    end = tl.multiple_of(tl.load(p_tile_offset + i_t + 1), 16)
    length = end - start
    o_first = (tl.program_id(0) % (STORED // TILE)).to(tl.int64) * TILE
    o = o_first + tl.arange(0, TILE)  # [TILE]
    m = o < length
    p_rows = p_deltas + num_vectors * start
    p_coef += i_b
    stride = num_blocks.to(tl.int64)
    b_acc = tl.load(p_base + start + o, mask=m, other=0).to(tl.float32)
    if UNROLL:
        for i in tl.static_range(UNROLL):
            b_acc += tl.load(p_coef + i * stride) * _row(p_rows, i, length, o, m)
    else:
        for i in range(num_vectors):
            b_acc += tl.load(p_coef + i * stride) * _row(p_rows, i, length, o, m)
    tl.store(p_out + start + o, _narrowed(b_acc, p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_vectors", "num_tiles"])
def arena_partial_kernel(
    p_grad,
    p_deltas,
    p_tile_offset,
    p_part,
    num_vectors,
    num_tiles,
    TILE: tl.constexpr,
):
    """`part[i, t] = <grad, delta_i>` on storage tile t.

    grad [P], deltas [N * P] interleaved by tile, tile_offset [T + 1] int64, part [N, T] float32;
    grid (T,).
    """
    i_t = tl.program_id(0)
    start = tl.multiple_of(tl.load(p_tile_offset + i_t), 16)
    end = tl.multiple_of(tl.load(p_tile_offset + i_t + 1), 16)
    length = end - start
    o = tl.arange(0, TILE)  # [TILE]
    m = o < length
    p_rows = p_deltas + num_vectors * start
    p_part += i_t
    stride = num_tiles.to(tl.int64)
    b_grad = tl.load(p_grad + start + o, mask=m, other=0).to(tl.float32)
    for i in range(num_vectors):
        b_sum = tl.sum(b_grad * _row(p_rows, i, length, o, m), axis=0)
        tl.store(p_part + i * stride, b_sum)


@triton.jit(do_not_specialize=["num_blocks", "num_tiles"])
def sum_tiles_kernel(p_part, p_block_tile, p_out, num_blocks, num_tiles, LANES: tl.constexpr):
    """`out[i, b] = sum_t part[i, t]` over the tiles t of block b, in a fixed order.

    part [N, T] and out [N, B] float32, block_tile [B + 1]; grid (N * B,).
    """
    i_v = tl.program_id(0) // num_blocks
    i_b = tl.program_id(0) % num_blocks
    first = tl.load(p_block_tile + i_b)
    end = tl.load(p_block_tile + i_b + 1)
    p_part += i_v * num_tiles.to(tl.int64)
    b_sum = tl.zeros([LANES], tl.float32)
    for o_first in range(first, end, LANES):
        o = o_first + tl.arange(0, LANES)  # [LANES]
        b_sum += tl.load(p_part + o, mask=o < end, other=0)
    tl.store(p_out + tl.program_id(0), tl.sum(b_sum, axis=0))


# ---- tensors that the caller owns ---------------------------------------------------------------


@triton.jit
def _pointer(a_tensor, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The address of a tensor as a pointer, marked as a multiple of 16 if WIDE."""
    p_tensor = a_tensor.to(tl.pointer_type(DTYPE))
    if WIDE:
        p_tensor = tl.multiple_of(p_tensor, 16)
    return p_tensor


@triton.jit
def _loaded_as(a_tensor, start, o, m, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Elements start + o of the tensor of this dtype at an address as float32, 0 unless m."""
    p_tensor = _pointer(a_tensor, DTYPE, WIDE) + start
    return tl.load(p_tensor + o, mask=m, other=0).to(tl.float32)


@triton.jit
def _loaded(a_tensor, p_code, start, o, m, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The same; where DTYPE is None, the code at p_code says which it is."""
    if DTYPE is None:
        b_code = tl.load(p_code)
        if b_code == FLOAT32:
            b_values = _loaded_as(a_tensor, start, o, m, tl.float32, WIDE)
        elif b_code == BFLOAT16:
            b_values = _loaded_as(a_tensor, start, o, m, tl.bfloat16, WIDE)
        else:
            b_values = _loaded_as(a_tensor, start, o, m, tl.float16, WIDE)
    else:
        b_values = _loaded_as(a_tensor, start, o, m, DTYPE, WIDE)
    return b_values


@triton.jit
def _store_as(a_tensor, start, o, m, b_values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Stores values, rounded once, as elements start + o of a tensor of this dtype where m."""
    tl.store(_pointer(a_tensor, DTYPE, WIDE) + start + o, _narrowed(b_values, DTYPE), mask=m)


@triton.jit
def _store(a_tensor, p_code, start, o, m, b_values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """The same; where DTYPE is None, the code at p_code says which it is."""
    if DTYPE is None:
        b_code = tl.load(p_code)
        if b_code == FLOAT32:
            _store_as(a_tensor, start, o, m, b_values, tl.float32, WIDE)
        elif b_code == BFLOAT16:
            _store_as(a_tensor, start, o, m, b_values, tl.bfloat16, WIDE)
        else:
            _store_as(a_tensor, start, o, m, b_values, tl.float16, WIDE)
    else:
        _store_as(a_tensor, start, o, m, b_values, DTYPE, WIDE)


@triton.jit
def _delta(p_delta, p_code, start, o, m, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """Elements start + o of the delta whose address is at p_delta, 0 if absent."""
    a_delta = tl.load(p_delta)
    # A mask, not a branch: loads of several vectors stay in flight together.
    return _loaded(a_delta, p_code, start, o, m & (a_delta != 0), DTYPE, WIDE)


@triton.jit
def _compose_tile(
    a_base,
    a_out,
    p_delta,
    p_code,
    p_coef,
    start,
    length,
    num_vectors,
    num_blocks,
    BASE: tl.constexpr,
    DELTA: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Composes `length` elements of one block; p_delta, p_code, p_coef point at its columns."""
    if WIDE:
        # Rounding down changes nothing and proves the divisibility.
        length = length // 16 * 16
    o = tl.arange(0, TILE)  # [TILE]
    m = o < length
    p_base_code = p_code + num_vectors * num_blocks if BASE is None else p_code
    b_acc = _loaded(a_base, p_base_code, start, o, m, BASE, WIDE)
    if UNROLL:
        for i in tl.static_range(UNROLL):
            row = i * num_blocks
            b_delta = _delta(p_delta + row, p_code + row, start, o, m, DELTA, WIDE)
            b_acc += tl.load(p_coef + row) * b_delta
    else:
        for i in range(num_vectors):
            row = i * num_blocks
            b_delta = _delta(p_delta + row, p_code + row, start, o, m, DELTA, WIDE)
            b_acc += tl.load(p_coef + row) * b_delta
    _store(a_out, p_base_code, start, o, m, b_acc, BASE, WIDE)


@triton.jit(do_not_specialize=["num_vectors", "num_blocks"])
def compose_kernel(
    p_base,
    p_out,
    p_deltas,
    p_codes,
    p_coef,
    p_numel,
    p_block_tile,
    p_tile_block,
    num_vectors,
    num_blocks,
    BASE: tl.constexpr,
    DELTA: tl.constexpr,
    TILE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`out[b] = base[b] + sum_i coef[i, b] * deltas[i, b]` on one TILE of one block b.

    base, out [B] and deltas [N + 1, B] are int64 addresses, 0 for an absent delta; the last row of
    deltas has a bit set below 16 where an address of the block has. codes [N + 1, B] int32: dtypes
    of the deltas and, last, of the base, read where DELTA or BASE is None. coef [N, B] float32,
    numel [B] int64, block_tile [B + 1] and tile_block [T] int32 for tiles of TILE; grid (T,).
    """
    i_t = tl.program_id(0)
    i_b = tl.load(p_tile_block + i_t)
    start = (i_t - tl.load(p_block_tile + i_b)).to(tl.int64) * TILE
    length = tl.minimum(tl.load(p_numel + i_b) - start, TILE)
    a_base = tl.load(p_base + i_b)
    a_out = tl.load(p_out + i_b)
    stride = num_blocks.to(tl.int64)
    bits = tl.load(p_deltas + num_vectors * stride + i_b) | a_base | a_out | length
    if bits % 16 == 0:
        _compose_tile(
            a_base, a_out, p_deltas + i_b, p_codes + i_b, p_coef + i_b, start, length,
            num_vectors, stride, BASE, DELTA, TILE, UNROLL, True,
        )  # fmt: skip
    else:
        _compose_tile(
            a_base, a_out, p_deltas + i_b, p_codes + i_b, p_coef + i_b, start, length,
            num_vectors, stride, BASE, DELTA, TILE, 0, False,
        )  # fmt: skip


@triton.jit
def _partial_wide(
    a_grad,
    p_delta,
    p_code,
    p_part,
    start,
    length,
    num_vectors,
    num_blocks,
    num_tiles,
    GRAD: tl.constexpr,
    DELTA: tl.constexpr,
    TILE: tl.constexpr,
):
    """The partial sums of `length` elements of one block; pointers as in _compose_tile."""
    length = length // 16 * 16
    o = tl.arange(0, TILE)  # [TILE]
    m = o < length
    p_grad_code = p_code + num_vectors * num_blocks if GRAD is None else p_code
    b_grad = _loaded(a_grad, p_grad_code, start, o, m, GRAD, True)
    for i in range(num_vectors):
        row = i * num_blocks
        b_delta = _delta(p_delta + row, p_code + row, start, o, m, DELTA, True)
        tl.store(p_part + i * num_tiles, tl.sum(b_grad * b_delta, axis=0))


@triton.jit
def _partial_narrow(
    a_grad,
    p_delta,
    p_code,
    p_part,
    start,
    length,
    num_vectors,
    num_blocks,
    num_tiles,
    GRAD: tl.constexpr,
    DELTA: tl.constexpr,
    STEP: tl.constexpr,
):
    """The same at any alignment, STEP elements at a time.

    It reads the gradient once per vector, from the cache: held in registers like the wide one, it
    would cost every program of the kernel 93 registers instead of 56 (124 on sm_100).
    """
    p_grad_code = p_code + num_vectors * num_blocks if GRAD is None else p_code
    for i in range(num_vectors):
        row = i * num_blocks
        b_products = tl.zeros([STEP], tl.float32)
        for o_first in range(0, length, STEP):
            o = o_first + tl.arange(0, STEP)  # [STEP]
            m = o < length
            b_grad = _loaded(a_grad, p_grad_code, start, o, m, GRAD, False)
            b_products += b_grad * _delta(p_delta + row, p_code + row, start, o, m, DELTA, False)
        tl.store(p_part + i * num_tiles, tl.sum(b_products, axis=0))


@triton.jit(do_not_specialize=["num_vectors", "num_blocks", "num_tiles"])
def partial_kernel(
    p_grads,
    p_deltas,
    p_codes,
    p_numel,
    p_block_tile,
    p_tile_block,
    p_part,
    num_vectors,
    num_blocks,
    num_tiles,
    GRAD: tl.constexpr,
    DELTA: tl.constexpr,
    TILE: tl.constexpr,
):
    """`part[i, t] = <grads[b], deltas[i, b]>` on tile t of block b.

    grads [B] are int64 addresses, part is [N, T] float32, the other tables are as for
    compose_kernel with grads for base; grid (T,).
    """
    i_t = tl.program_id(0)
    i_b = tl.load(p_tile_block + i_t)
    start = (i_t - tl.load(p_block_tile + i_b)).to(tl.int64) * TILE
    length = tl.minimum(tl.load(p_numel + i_b) - start, TILE)
    a_grad = tl.load(p_grads + i_b)
    blocks = num_blocks.to(tl.int64)
    tiles = num_tiles.to(tl.int64)
    bits = tl.load(p_deltas + num_vectors * blocks + i_b) | a_grad | length
    if bits % 16 == 0:
        _partial_wide(
            a_grad, p_deltas + i_b, p_codes + i_b, p_part + i_t, start, length,
            num_vectors, blocks, tiles, GRAD, DELTA, TILE,
        )  # fmt: skip
    else:
        _partial_narrow(
            a_grad, p_deltas + i_b, p_codes + i_b, p_part + i_t, start, length,
            num_vectors, blocks, tiles, GRAD, DELTA, TILE // 4,
        )  # fmt: skip
