"""The Triton kernels in Triton's interpreter: values, memory, tables, launches."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from arena import arena_coef_grad, arena_compose
from strategies import DTYPES, float64_sum, make, same_bits
from tolerances import EPS, compose_error, dot_error
from torch import Tensor

from atlas_kernels.ops import groups as partition
from atlas_kernels.ops import layout as layouts
from atlas_kernels.ops import reference
from atlas_kernels.ops.backends import triton as backend
from atlas_kernels.ops.codecs import CODECS, Codec
from atlas_kernels.ops.codecs.packed import GROUP, Packed, levels
from atlas_kernels.ops.layout import CHUNK_TILES, TILE, Layout, pieces
from atlas_kernels.ops.schema import ABSENT

pytestmark = pytest.mark.skipif(
    backend.unavailable() is not None or "cpu" not in backend.devices(),
    reason="Triton is not installed, or does not interpret (TRITON_INTERPRET=1)",
)
if importlib.util.find_spec("triton") is not None:
    from atlas_kernels.ops.backends.triton import config, ops

F32, BF16, F16 = DTYPES
SHAPES = ((13,), (0,), (1,), (17, 3), (TILE,), (2, TILE + 8), (TILE + 1,))
# Of partitioned coefficients, whose interpretation takes longest.
SPLIT = ((13,), (0,), (TILE + 1,))
COUNTS = (0, 1, 2, 8, 9, 21)
LAUNCHES = tuple((tile, warps) for tile in (1024, 2048, 4096) for warps in (4, 8))
PACKED = tuple(codec for codec in CODECS.values() if isinstance(codec, Packed))
by_codec = pytest.mark.parametrize("codec", PACKED, ids=[codec.name for codec in PACKED])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arenas(count: int, base: torch.dtype, delta: torch.dtype) -> tuple[Layout, list[Tensor]]:
    """A layout of SHAPES and [base, deltas, coef, grad] for it, zeros in the padding."""
    layout = Layout.from_shapes(SHAPES)
    valid = torch.zeros(layout.numel)
    for block in layout.split(valid):
        block.fill_(1)
    rows = torch.empty(count * layout.numel)
    for first, end in zip(layout.tile_offset, layout.tile_offset[1:], strict=False):
        rows[count * first : count * end] = valid[first:end].repeat(count)
    random = generator(count)
    return layout, [
        (torch.randn(layout.numel, generator=random) * valid).to(base),
        (torch.randn(rows.numel(), generator=random) * 0.1 * rows).to(delta),
        torch.randn(count, len(SHAPES), generator=random),
        (torch.randn(layout.numel, generator=random) * valid).to(base),
    ]


def rows_of(layout: Layout, deltas: Tensor, count: int) -> list[tuple[Tensor, ...]]:
    """The blocks of every vector of an interleaved arena."""
    flat = torch.empty(count, layout.numel, dtype=deltas.dtype)
    for first, end in zip(layout.tile_offset, layout.tile_offset[1:], strict=False):
        flat[:, first:end] = deltas[count * first : count * end].view(count, end - first)
    return [layout.split(row) for row in flat]


def check_bank(count: int, base_dtype: torch.dtype, delta_dtype: torch.dtype) -> None:
    """Both bank operators against the float64 oracle, block by block, and the reference."""
    layout, (base, deltas, coef, grad) = arenas(count, base_dtype, delta_dtype)
    stored = (deltas, None, 0)
    out = arena_compose(ops, base, stored, coef, layout)
    dots = arena_coef_grad(ops, grad, stored, layout, count)
    assert out.dtype == base_dtype
    assert dots.shape == (count, len(SHAPES))
    rows = rows_of(layout, deltas, count)
    grads = layout.split(grad)
    for b, (result, block) in enumerate(zip(layout.split(out), layout.split(base), strict=True)):
        column = [row[b] for row in rows]
        check_close(result, block, column, coef[:, b])
        for i, delta in enumerate(column):
            check_dot(dots[i, b], grads[b], delta)
    exact = arena_compose(reference, base, stored, coef, layout)
    # Padding included: it is zero, and stays so.
    assert (out.double() - exact.double()).abs().max() <= 0.05


def check_close(result: Tensor, base: Tensor, deltas: list[Tensor], coef: Tensor) -> None:
    oracle = float64_sum(base, deltas, coef)
    error = (result.double() - oracle).abs()
    assert (error <= compose_error(base, deltas, coef)).all(), error.max()


def check_dot(result: Tensor, grad: Tensor, delta: Tensor) -> None:
    oracle = (grad.double() * delta.double()).sum()
    assert (result.double() - oracle).abs() <= dot_error(grad, delta)


def lists(
    count: int, base: torch.dtype | None, delta: torch.dtype | None, form: str
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Foreign tensors: dtypes differ where None, every seventh delta is absent."""
    random = generator(count)
    blocks = [make(shape, base or DTYPES[b % 3], form, random) for b, shape in enumerate(SHAPES)]
    deltas = []
    for k in range(count * len(SHAPES)):
        b = k % len(SHAPES)
        if k % 7 == 5:
            deltas.append(torch.empty(ABSENT))
        else:
            dtype = delta or DTYPES[(k // 2) % 3]
            deltas.append(make(SHAPES[b], dtype, form, random, scale=0.1))
    return blocks, deltas, torch.randn(count, len(SHAPES), generator=random)


def check_list(
    count: int, base_dtype: torch.dtype | None, delta_dtype: torch.dtype | None, form: str
) -> None:
    """Both list operators against the float64 oracle; an absent delta has derivative zero."""
    base, deltas, coef = lists(count, base_dtype, delta_dtype, form)
    out = ops.compose(base, deltas, coef)
    dots = ops.coef_grad(base, deltas, F32)
    assert dots.shape == (count, len(base))
    for b, result in enumerate(out):
        assert result.dtype == base[b].dtype
        assert result.is_contiguous()
        column = deltas[b :: len(base)]
        there = [i for i, delta in enumerate(column) if delta.shape == base[b].shape]
        check_close(result, base[b], [column[i] for i in there], coef[there, b])
        for i in range(count):
            if i in there:
                check_dot(dots[i, b], base[b], column[i])
            else:
                assert dots[i, b] == 0


def packed_arenas(
    codec: Packed, count: int, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> tuple[Layout, list[Tensor]]:
    """A layout of the shapes and [base, words, scales, coef, grad]: any codes, padding included."""
    layout = Layout.from_shapes(shapes, codec.alignment)
    valid = torch.zeros(layout.numel)
    for block in layout.split(valid):
        block.fill_(1)
    random = generator(count)
    words = (codec.items(count * layout.numel),)
    scales = torch.rand(codec.scales(count * layout.numel), generator=random) + 0.1
    return layout, [
        (torch.randn(layout.numel, generator=random) * valid).to(dtype),
        torch.randint(-(2**31), 2**31, words, generator=random).int(),
        scales.bfloat16(),
        torch.randn(count, len(shapes), generator=random),
        (torch.randn(layout.numel, generator=random) * valid).to(dtype),
    ]


def packed_rows(layout: Layout, items: Tensor, count: int, b: int) -> list[Tensor]:
    """The words or scales of block b of every vector."""
    start, end = layout.offsets[b : b + 2]
    per_row = items.numel() // count
    first, last = (count * per_row * offset // layout.numel for offset in (start, end))
    cut = pieces(items[first:last], end - start, count)
    return [torch.cat([items[:0], *(piece[:, i].flatten() for piece in cut)]) for i in range(count)]


def check_packed(codec: Packed, count: int, dtype: torch.dtype) -> None:
    """Both packed operators against the float64 oracle, block by block, and the reference."""
    layout, (base, words, scales, coef, grad) = packed_arenas(codec, count, dtype)
    stored = (words, scales, codec.bits)
    out = arena_compose(ops, base, stored, coef, layout)
    dots = arena_coef_grad(ops, grad, stored, layout, count)
    assert dots.shape == (count, len(SHAPES))
    for b, (start, end) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False)):
        if count == 0:
            assert same_bits(out[start:end], base[start:end])
            continue
        column = packed_rows(layout, words, count, b)
        factors = [row.float() for row in packed_rows(layout, scales, count, b)]
        # The factor of a level is rounded by definition: to the oracle it is the coefficient.
        coefs = [
            c * row.repeat_interleave(GROUP) for c, row in zip(coef[:, b], factors, strict=True)
        ]
        wide = [levels(row, codec.bits) for row in column]
        check_close(out[start:end], base[start:end], wide, torch.stack(coefs))
        for i, (row, factor) in enumerate(zip(column, factors, strict=True)):
            check_dot(dots[i, b], grad[start:end], codec.decode(row, factor))
    # The interpreter does not fuse, and so rounds as the reference does: padding included.
    assert same_bits(out, arena_compose(reference, base, stored, coef, layout))


def partitioned(
    codec: Codec,
    count: int,
    groups: int,
    dtype: torch.dtype = F32,
    shapes: tuple[tuple[int, ...], ...] = SPLIT,
) -> tuple[Layout, list[Tensor], tuple[Tensor, Tensor | None, int]]:
    """A layout, [base, coef, grad, tile_key] for it, and what is stored: (deltas, scales, bits)."""
    random = generator(groups)
    stored: tuple[Tensor, Tensor | None, int]
    if isinstance(codec, Packed):
        layout, (base, words, scales, _, grad) = packed_arenas(codec, count, dtype, shapes)
        stored = (words, scales, codec.bits)
    else:
        layout = Layout.from_shapes(shapes)
        base, grad = torch.randn(2, layout.numel, generator=random).to(dtype)
        stored = (torch.randn(count * layout.numel, generator=random).to(codec.dtype), None, 0)
    coef = torch.randn(count, len(shapes), groups, generator=random)
    keys = partition.tile_keys([str(shape) for shape in shapes], layout, seed=groups)
    return layout, [base, coef, grad, keys], stored


def partition_dots(
    layout: Layout, grad: Tensor, stored: Any, keys: Tensor, count: int, groups: int
) -> Tensor:
    return arena_coef_grad(ops, grad, stored, layout, count, keys, groups)


def check_partition(
    codec: Codec,
    count: int,
    groups: int,
    dtype: torch.dtype = F32,
    shapes: tuple[tuple[int, ...], ...] = SPLIT,
) -> None:
    """Both operators: the composition bit for bit, the sums against float64 and decoded deltas."""
    layout, (base, coef, grad, keys), stored = partitioned(codec, count, groups, dtype, shapes)
    # The interpreter does not fuse, and so rounds as the reference does.
    out = arena_compose(ops, base, stored, coef, layout, keys)
    assert same_bits(out, arena_compose(reference, base, stored, coef, layout, keys))
    dots = partition_dots(layout, grad, stored, keys, count, groups)
    wide = codec.decode(*stored[:2])
    exact, magnitude = (
        arena_coef_grad(
            reference, part(grad), (part(wide), None, 0), layout, count, keys, groups, torch.float64
        )
        for part in (torch.Tensor.double, torch.Tensor.abs)
    )
    # A term is rounded twice, then by every sum on its way: over the tiles of a chunk, the chunks
    # of a block, and what NumPy adds one by one (up to 16) and in pairs (12) of a group's slots.
    steps = 2 + CHUNK_TILES + layout.block_chunk.diff().max().item() + 28
    assert dots.shape == exact.shape
    assert ((dots - exact).abs() <= 1.01 * steps * EPS / 2 * magnitude).all()


@pytest.mark.parametrize("count", COUNTS)
def test_bank(count: int) -> None:
    check_bank(count, F32, BF16)


@pytest.mark.parametrize(("base", "delta"), [(BF16, BF16), (F32, F16), (F16, F32)])
def test_bank_dtypes(base: torch.dtype, delta: torch.dtype) -> None:
    check_bank(3, base, delta)


@pytest.mark.parametrize("count", COUNTS)
def test_list(count: int) -> None:
    check_list(count, F32, BF16, "plain")


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize(
    ("base", "delta", "form"),
    [
        (BF16, BF16, "offset"), (F16, F32, "transposed"), (F32, F16, "sliced"),
        (None, None, "plain"), (None, BF16, "offset"), (F32, None, "plain"),
    ],
)  # fmt: skip
def test_list_dtypes_and_forms(
    count: int, base: torch.dtype | None, delta: torch.dtype | None, form: str
) -> None:
    check_list(count, base, delta, form)


@pytest.mark.parametrize(("count", "dtype"), [(0, BF16), (1, F32), (3, BF16), (3, F16), (9, F32)])
@by_codec
def test_packed(codec: Packed, count: int, dtype: torch.dtype) -> None:
    check_packed(codec, count, dtype)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_partition(codec: Codec) -> None:
    check_partition(codec, 2, 5)


@pytest.mark.parametrize("groups", [1, 80, 1200, TILE])
@pytest.mark.parametrize("codec", ["bf16", "int3"])
def test_numbers_of_groups(codec: str, groups: int) -> None:
    check_partition(CODECS[codec], 1, groups)


@pytest.mark.parametrize(
    ("codec", "count", "dtype"), [("bf16", 3, BF16), ("sign", 1, F16), ("fp32", 0, F32)]
)
def test_partition_dtypes(codec: str, count: int, dtype: torch.dtype) -> None:
    check_partition(CODECS[codec], count, 80, dtype)


def test_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # The kernels take them from a table; the interpreter has no time for long ones.
    monkeypatch.setattr(layouts, "CHUNK_TILES", 2)
    check_partition(CODECS["bf16"], 1, 80, shapes=((4 * TILE + 1,), (13,), (2 * TILE + 1,)))


def check_slots() -> None:
    """Composition and sums tell the slot of every element, for many keys, bit for bit."""
    tiles = 8
    layout = Layout.from_shapes([(TILE,)] * tiles)
    # The first and the last key of either sign, and any.
    keys = torch.randint(-(2**31), 2**31, (tiles,), generator=generator())
    keys[:4] = torch.tensor([0, -1, 2**31 - 1, -(2**31)])
    slots = partition.slots(keys, TILE)
    coef = torch.arange(TILE).float().expand(1, tiles, TILE)
    ones = torch.ones(tiles * TILE)
    out = arena_compose(ops, 0 * ones, (ones, None, 0), coef, layout, keys.int())
    assert torch.equal(out.long(), slots.flatten())
    elements = torch.arange(TILE).float().repeat(tiles)
    (dots,) = partition_dots(layout, elements, (ones, None, 0), keys.int(), 1, TILE)
    assert torch.equal(dots.long(), slots.argsort(1))


def test_slots_are_those_of_the_definition() -> None:
    check_slots()


@by_codec
def test_every_code_is_decoded_exactly(codec: Packed) -> None:
    shapes = ((8 * TILE,),)
    layout, (base, words, scales, coef, _) = packed_arenas(codec, 1, F32, shapes)
    # Every plane of a group, so every field of a word, has met every code.
    for plane in levels(words, codec.bits).view(-1, GROUP // 16, 16).unbind(1):
        assert plane.unique().numel() == 2**codec.bits
    zero, one = torch.zeros_like(base), torch.ones_like(coef)
    out = arena_compose(ops, zero, (words, scales, codec.bits), one, layout)
    assert same_bits(out, codec.decode(words, scales))


def test_no_blocks_and_no_elements() -> None:
    layout = Layout.from_shapes([(0,), (3, 0)])
    empty = torch.empty(0)
    packed = (torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=BF16), 3)
    for stored in ((empty, None, 0), packed):
        assert arena_compose(ops, empty, stored, torch.ones(2, 2), layout).shape == (0,)
        assert same_bits(arena_coef_grad(ops, empty, stored, layout, 2), torch.zeros(2, 2))
    for codec in (CODECS["fp32"], PACKED[0]):
        layout, (base, coef, _, keys), stored = partitioned(codec, 2, 5, F32, ((0,), (3, 0)))
        assert arena_compose(ops, base, stored, coef, layout, keys).shape == (0,)
        dots = partition_dots(layout, base, stored, keys, 2, 5)
        assert same_bits(dots, torch.zeros(2, 2, 5))
    blocks = [torch.empty(0), torch.empty(3, 0)]
    assert [out.shape for out in ops.compose(blocks, blocks * 2, torch.ones(2, 2))] == [
        (0,),
        (3, 0),
    ]
    assert same_bits(ops.coef_grad(blocks, blocks * 2, F32), torch.zeros(2, 2))


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3e38, 1e-40])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    values = torch.cat([halfway, special])
    zero = torch.zeros(values.numel(), dtype=BF16)
    (out,) = ops.compose([zero], [values], torch.ones(1, 1))
    assert torch.equal(out.nan_to_num(7), values.to(BF16).nan_to_num(7))
    assert torch.equal(out.isnan(), values.isnan())


# ---- launches -----------------------------------------------------------------------------------


def forced(monkeypatch: pytest.MonkeyPatch, tile: int, warps: int, unroll: int) -> None:
    launch = config.Launch(tile, warps, unroll)
    monkeypatch.setattr(config, "forward", lambda *_: launch)


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(("tile", "warps"), LAUNCHES)
def test_every_launch_gives_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tile: int, warps: int, unrolled: bool
) -> None:
    count = 2
    layout, (base, deltas, coef, _) = arenas(count, F32, BF16)
    blocks, foreign, coefs = lists(count, BF16, F16, "plain")
    stored = (deltas, None, 0)
    expected = [
        arena_compose(ops, base, stored, coef, layout),
        *ops.compose(blocks, foreign, coefs),
    ]
    forced(monkeypatch, tile, warps, count if unrolled else 0)
    results = [
        arena_compose(ops, base, stored, coef, layout),
        *ops.compose(blocks, foreign, coefs),
    ]
    assert all(map(same_bits, results, expected))


def test_repeated_calls_give_the_same_bits() -> None:
    layout, (_, deltas, _, grad) = arenas(2, F32, BF16)
    base, foreign, _ = lists(2, None, None, "offset")
    small, (_, words, scales, _, wide) = packed_arenas(PACKED[0], 2, F32, ((TILE + 1,),))
    packed = (words, scales, PACKED[0].bits)
    split, (_, _, parts, keys), stored = partitioned(PACKED[0], 2, 5)
    calls: list[Callable[[], Tensor]] = [
        lambda: partition_dots(split, parts, stored, keys, 2, 5),
        lambda: arena_coef_grad(ops, grad, (deltas, None, 0), layout, 2),
        lambda: ops.coef_grad(base, foreign, F32),
        lambda: arena_coef_grad(ops, wide, packed, small, 2),
    ]
    for call in calls:
        first = call()
        assert all(same_bits(first, call()) for _ in range(2))


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Counting:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            launched.append(name)
            return getattr(self.module, name)

    for module in ("kernels", "packed", "groups"):
        monkeypatch.setattr(ops, module, Counting(getattr(ops, module)))
    layout, (base, deltas, coef, grad) = arenas(2, F32, BF16)
    dense = (deltas, None, 0)
    blocks, foreign, coefs = lists(2, None, None, "offset")
    small, (values, words, scales, factors, wide) = packed_arenas(PACKED[0], 2, F32, ((13,), (7,)))
    stored = (words, scales, PACKED[0].bits)
    parts, keys = torch.ones(2, 2, 5), torch.zeros_like(small.tile_block)
    for call, names in (
        (lambda: arena_compose(ops, base, dense, coef, layout), ["arena_compose_kernel"]),
        (
            lambda: arena_coef_grad(ops, grad, dense, layout, 2),
            ["arena_partial_kernel", "sum_tiles_kernel"],
        ),
        (
            lambda: arena_compose(ops, values, stored, factors, small),
            ["packed_compose_kernel"],
        ),
        (
            lambda: arena_coef_grad(ops, wide, stored, small, 2),
            ["packed_partial_kernel", "sum_tiles_kernel"],
        ),
        (
            lambda: arena_compose(ops, values, stored, parts, small, keys),
            ["group_compose_kernel"],
        ),
        (
            lambda: partition_dots(small, wide, stored, keys, 2, 5),
            ["group_partial_kernel", "group_sum_kernel"],
        ),
        (lambda: ops.compose(blocks, foreign, coefs), ["compose_kernel"]),
        (lambda: ops.coef_grad(blocks, foreign, F32), ["partial_kernel", "sum_tiles_kernel"]),
    ):
        launched.clear()
        call()
        assert launched == names


@pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100"]
)
@pytest.mark.parametrize("count", COUNTS)
def test_launch_configuration(architecture: str, count: int) -> None:
    lanes = 64 if architecture == "gfx942" else 32
    for dtypes in ((F32,), (F32, BF16), (F16, BF16), (F32, BF16, F16)):
        launch = config.forward(dtypes, count, architecture)
        assert (launch.tile, launch.num_warps) in LAUNCHES
        assert TILE % launch.tile == 0
        narrowest = min(dtype.itemsize for dtype in dtypes)
        assert launch.tile * narrowest % (lanes * launch.num_warps * 16) == 0
        assert launch.unroll == (count if count <= 8 else 0)
    assert config.BACKWARD.tile == TILE
    # Four of the words that eight planes have in common, in 128 bits per thread.
    for bits in (1, 2, 3, 4, 8):
        packed = config.packed(architecture, bits)
        assert packed.tile == TILE == 4 * 8 * lanes * packed.num_warps
        assert packed.unroll == (4 if bits != 3 and lanes == 32 else 1)
    # Eight slots, or bfloat16 values in 128 bits, per thread.
    split = config.groups(architecture)
    assert split.tile == TILE == 8 * lanes * split.num_warps
    dense = config.groups(architecture, dense_forward=True)
    assert dense.num_warps == split.num_warps // (2 if lanes == 32 else 1)


# ---- tables -------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_copies", "_writes", "_captured"):
        monkeypatch.setattr(ops, name, type(getattr(ops, name))())


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, _fresh_tables: None) -> list[Any]:
    """The keys of the tables that had to be copied to the device."""
    keys: list[Any] = []
    original = ops._copied

    def counting(key: Any, build: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Any:
        def built() -> tuple[Tensor, ...]:
            keys.append(key)
            return build()

        return original(key, built, device)

    monkeypatch.setattr(ops, "_copied", counting)
    return keys


def test_tables_are_copied_once(copied: list[Any]) -> None:
    base, deltas, coef = lists(2, None, None, "offset")
    first = ops.compose(base, deltas, coef)
    ops.coef_grad(base, deltas, F32)
    assert [key[0] for key in copied] == ["tiles", "deltas", "codes", "tiles"]
    copied.clear()
    # New coefficients, gradients and values: the addresses of deltas and all sizes are as before.
    deltas[0].mul_(2)
    again = ops.compose([block.clone() for block in base], deltas, 2 * coef)
    ops.coef_grad([block.clone() for block in base], deltas, F32)
    assert not copied
    assert not torch.equal(first[0], again[0])
    deltas[0] = deltas[0].clone()
    moved = ops.compose(base, deltas, 2 * coef)
    assert [key[0] for key in copied] == ["deltas"]
    assert all(map(same_bits, moved, again))


def test_table_of_addresses() -> None:
    deltas = [torch.zeros(32), torch.zeros(33)[1:], torch.empty(0), torch.zeros(4)]
    table = ops._delta_table(deltas, 2, torch.device("cpu")).view(3, 2)
    assert table[:2].flatten().tolist() == [delta.data_ptr() for delta in deltas]
    assert table[1, 0] == 0
    assert (table[2] % 16 == 0).tolist() == [True, deltas[1].data_ptr() % 16 == 0]
    assert ops._written(deltas[:2]).tolist() == table[0].tolist()


@pytest.mark.usefixtures("_fresh_tables")
def test_number_of_tables_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_CACHED", 3)
    tensors = [torch.ones(k + 1) for k in range(8)]
    for tensor in tensors:
        (out,) = ops.compose([tensor], [tensor], torch.ones(1, 1))
        assert torch.equal(out, 2 * tensor)
        assert len(ops._copies) <= 3
        assert len(ops._writes) <= 3


def test_graph_capture(monkeypatch: pytest.MonkeyPatch, copied: list[Any]) -> None:
    """What the tables do while a CUDA graph is captured; the capture itself needs a GPU."""
    base, deltas, coef = lists(2, F32, BF16, "plain")
    monkeypatch.setattr(ops, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before the capture"):
        ops.compose(base, deltas, coef)
    monkeypatch.setattr(ops, "_capturing", lambda device: False)
    expected = ops.compose(base, deltas, coef)
    written = len(ops._writes)
    monkeypatch.setattr(ops, "_capturing", lambda device: True)
    copied.clear()
    captured = ops.compose([block.clone() for block in base], deltas, coef)
    assert all(map(same_bits, captured, expected))
    assert not copied
    # Tables that the graph reads are kept for good; those that it writes are nobody else's.
    assert len(ops._captured) == 2
    assert len(ops._writes) == written
    monkeypatch.setattr(ops, "_capturing", lambda device: False)
    ops._copies.clear()
    ops.compose(base, deltas, coef)
    assert [key[0] for key in copied] == []


# ---- memory -------------------------------------------------------------------------------------


def fenced(tensor: Tensor) -> Tensor:
    """A copy that ends where its last byte is followed by memory that no one may touch."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_size_t] * 1,
        *[ctypes.c_int] * 3,
        ctypes.c_long,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    # Reserved on either side, so that no stray access lands in another tensor.
    room = 64 * mmap.PAGESIZE
    start = libc.mmap(None, pages * mmap.PAGESIZE + 2 * room, 0, flags, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value)
    assert not libc.mprotect(start + room, pages * mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE)
    memory = (ctypes.c_char * size).from_address(start + room + pages * mmap.PAGESIZE - size)
    copy = torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def fenced_tables(layout: Layout) -> Layout:
    return Layout(layout.shapes, layout.offsets, *map(fenced, layout.tables))


def fence_allocations() -> None:
    """What is allocated from here on is fenced: for a process that ends soon."""
    empty, empty_like = torch.empty, torch.empty_like
    torch.empty = lambda *size, **options: fenced(empty(*size, **options))
    torch.empty_like = lambda tensor, **_: fenced(empty_like(tensor))  # type: ignore[assignment]


def compute_between_fences() -> None:
    """All operators but the partitioned on tensors whose neighbours may not be touched."""
    fence_allocations()
    layout, (base, deltas, coef, grad) = arenas(2, F32, BF16)
    layout = fenced_tables(layout)
    base, deltas, coef, grad = map(fenced, (base, deltas, coef, grad))
    arena_compose(ops, base, (deltas, None, 0), coef, layout)
    arena_coef_grad(ops, grad, (deltas, None, 0), layout, 2)
    blocks, foreign, coefs = lists(2, None, BF16, "plain")
    blocks, foreign, coefs = [*map(fenced, blocks)], [*map(fenced, foreign)], fenced(coefs)
    ops.compose(blocks, foreign, coefs)
    ops.coef_grad(blocks, foreign, F32)
    for codec in PACKED:
        layout, tensors = packed_arenas(codec, 2, F32, ((1,), (TILE + 1,)))
        base, words, scales, coef, grad = map(fenced, tensors)
        stored, layout = (words, scales, codec.bits), fenced_tables(layout)
        arena_compose(ops, base, stored, coef, layout)
        arena_coef_grad(ops, grad, stored, layout, 2)


def compute_partitions_between_fences() -> None:
    """Both operators on partitioned coefficients, likewise."""
    fence_allocations()
    for name in ("fp32", "int4", "int3"):
        layout, tensors, (deltas, scales, bits) = partitioned(
            CODECS[name], 2, 5, F32, ((1,), (TILE + 1,))
        )
        base, coef, grad, keys = map(fenced, tensors)
        stored = (fenced(deltas), None if scales is None else fenced(scales), bits)
        layout = fenced_tables(layout)
        arena_compose(ops, base, stored, coef, layout, keys)
        arena_coef_grad(ops, grad, stored, layout, 2, keys, 5)


def status_of(function: Callable[[], None]) -> int:
    """The exit status of a copy of this process that runs the function."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        faulthandler.disable()
        torch.set_num_threads(1)
        function()
    except BaseException:
        os._exit(1)
    os._exit(0)


def check_fences(compute: Callable[[], None] = compute_between_fences) -> None:
    assert status_of(compute) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="uses fork and mmap of Linux")
@pytest.mark.parametrize(
    "compute", [compute_between_fences, compute_partitions_between_fences], ids=["all", "partition"]
)
def test_memory_of_others_is_not_touched(compute: Callable[[], None]) -> None:
    check_fences(compute)


# ---- registration -------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.unavailable() is None
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = backend.unavailable()
    assert reason is not None
    assert "no CUDA or ROCm device is visible" in reason
    assert backend.devices() == ("cuda",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reason = backend.unavailable()
    assert reason is not None
    assert reason.endswith("pip install triton")


def test_import_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import atlas_kernels; "
        "import atlas_kernels.ops.backends.triton"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
