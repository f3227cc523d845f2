import hashlib
import importlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from arena import arena_coef_grad, arena_compose
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import need
from tolerances import dot_error
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels.ops import reference
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.codecs.packed import GROUP, Packed
from atlas_kernels.ops.groups import group_of, slots, tile_keys
from atlas_kernels.ops.layout import CHUNK_TILES, TILE, Layout, pieces
from atlas_kernels.ops.schema import ABSENT, SCHEMAS

cpp = importlib.import_module("atlas_kernels.ops.backends.cpp")
OPS = torch.ops.atlas_kernels_cpp
ROOT = Path(__file__).parents[2]
FLOAT32, BFLOAT16, FLOAT16 = DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PACKED = [codec for codec in CODECS.values() if isinstance(codec, Packed)]
# Around the 16 lanes, around a tile, and over several tiles.
SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (3, 5, 7), (TILE,), (TILE + 1,), (101, 103)]
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl"],
}


@pytest.fixture(autouse=True)
def _extension() -> None:
    need("cpp")


def capabilities() -> list[str]:
    """The instruction sets of this machine, as PyTorch reports them."""
    best = torch.backends.cpu.get_cpu_capability()
    return ["baseline", *(["avx2"] * best.startswith("AVX")), *(["avx512"] * (best == "AVX512"))]


def equal(left: Tensor, right: Tensor) -> bool:
    """Bit equality, up to the payload of NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = torch.int32 if left.dtype == FLOAT32 else torch.int16
    same = left.contiguous().view(bits) == right.contiguous().view(bits)
    return bool((same | (left.isnan() & right.isnan())).all())


def digest(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return sha.hexdigest()


def blocks(seed: int, num_vectors: int, num_blocks: int) -> tuple[list[Tensor], list[Tensor]]:
    """B base blocks and N * B deltas of random shapes and dtypes, some absent."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shapes = [choose.choice(SHAPES) for _ in range(num_blocks)]

    def tensor(shape: tuple[int, ...]) -> Tensor:
        scale = 10.0 ** choose.randint(-6, 3)
        return (scale * torch.randn(shape, generator=generator)).to(choose.choice(DTYPES))

    base = [tensor(shape) for shape in shapes]
    deltas = [
        torch.empty(ABSENT) if choose.random() < 0.1 else tensor(shape)
        for _ in range(num_vectors)
        for shape in shapes
    ]
    return base, deltas


def bank(
    seed: int, num_vectors: int, shapes: list[tuple[int, ...]]
) -> tuple[Layout, Tensor, Tensor]:
    """A layout, one arena row and the deltas; padding included, all random."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.from_shapes(shapes)
    arena = torch.randn(layout.numel, generator=generator).to(choose.choice(DTYPES))
    deltas = torch.randn(num_vectors * layout.numel, generator=generator)
    return layout, arena, deltas.to(choose.choice(DTYPES))


def packed_bank(
    seed: int, codec: Packed, num_vectors: int, shapes: list[tuple[int, ...]]
) -> tuple[Layout, Tensor, Tensor, Tensor]:
    """A layout, one arena row, and words and scales of the deltas; padding included, all random."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    layout = Layout.from_shapes(shapes, codec.alignment)
    arena = torch.randn(layout.numel, generator=generator).to(choose.choice(DTYPES))
    elements = num_vectors * layout.numel
    words = torch.randint(
        -(2**31), 2**31, (codec.items(elements),), dtype=torch.int32, generator=generator
    )
    scales = torch.randn(codec.scales(elements), generator=generator).bfloat16()
    return layout, arena, words, scales


def stored_bank(
    seed: int, codec: Packed | None, num_vectors: int, shapes: list[tuple[int, ...]]
) -> tuple[Layout, Tensor, tuple[Tensor, Tensor | None, int]]:
    """A layout, one arena row, and the deltas as the partitioned operators take them."""
    if codec is None:
        layout, arena, deltas = bank(seed, num_vectors, shapes)
        return layout, arena, (deltas, None, 0)
    layout, arena, words, scales = packed_bank(seed, codec, num_vectors, shapes)
    return layout, arena, (words, scales, codec.bits)


def deltas_of(
    stored: tuple[Tensor, Tensor | None, int],
    codec: Packed | None,
    num_vectors: int,
    start: int,
    end: int,
) -> Tensor:
    """[N, elements] of a block's range of the arena."""
    deltas, scales, _ = stored
    first, last, length = num_vectors * start, num_vectors * end, end - start
    if codec is None or scales is None:
        return rows_of(deltas[first:last], length, num_vectors)
    return codec.decode(
        rows_of(deltas[codec.items(first) : codec.items(last)], length, num_vectors),
        rows_of(scales[codec.scales(first) : codec.scales(last)], length, num_vectors),
    )


def keys_of(layout: Layout, seed: int) -> Tensor:
    """Of blocks called 0, 1, 2 ..."""
    return tile_keys([str(b) for b in range(len(layout.shapes))], layout, seed)


def rows_of(region: Tensor, length: int, num_vectors: int) -> Tensor:
    """The interleaved rows of a block as [N, items]."""
    views = pieces(region, length, num_vectors)
    rows = [view.transpose(0, 1).flatten(1) for view in views]
    return torch.cat(rows, 1) if rows else region.view(num_vectors, 0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Words of codes [n], one by one as the documentation of `codecs.packed` places them."""
    if bits == 3:
        low = [pack(unit & 3, 2) for unit in codes.split(512)]
        high = [pack(unit >> 2, 1) for unit in codes.split(512)]
        return torch.cat([part for unit in zip(low, high, strict=True) for part in unit])
    words = [0] * (codes.numel() * bits // 32)
    for element, code in enumerate(codes.tolist()):
        unit, within = divmod(element, 16 * 32 // bits)
        words[16 * unit + within % 16] |= code << bits * (within // 16)
    return torch.tensor(words).to(torch.int32)


@given(st.integers(0, 2**32), st.integers(0, 22), st.integers(1, 5))
def test_list_forward_equals_the_reference(seed: int, num_vectors: int, num_blocks: int) -> None:
    base, deltas = blocks(seed, num_vectors, num_blocks)
    coef = torch.randn(num_vectors, num_blocks, generator=torch.Generator().manual_seed(seed))
    composed = OPS.compose(base, deltas, coef)
    expected = reference.compose(base, deltas, coef)
    assert all(map(equal, composed, expected))


@given(st.integers(0, 2**32), st.integers(0, 22), st.lists(st.sampled_from(SHAPES), max_size=5))
def test_bank_forward_equals_the_reference(
    seed: int, num_vectors: int, shapes: list[tuple[int, ...]]
) -> None:
    layout, base, deltas = bank(seed, num_vectors, shapes)
    coef = torch.randn(num_vectors, len(shapes), generator=torch.Generator().manual_seed(seed))
    args = base, (deltas, None, 0), coef, layout
    assert equal(arena_compose(OPS, *args), arena_compose(reference, *args))


@pytest.mark.parametrize("codec", PACKED, ids=lambda codec: codec.name)
@given(st.integers(0, 2**32), st.integers(0, 22), st.lists(st.sampled_from(SHAPES), max_size=5))
def test_packed_forward_equals_the_reference(
    codec: Packed, seed: int, num_vectors: int, shapes: list[tuple[int, ...]]
) -> None:
    layout, base, words, scales = packed_bank(seed, codec, num_vectors, shapes)
    coef = torch.randn(num_vectors, len(shapes), generator=torch.Generator().manual_seed(seed))
    args = base, (words, scales, codec.bits), coef, layout
    assert equal(arena_compose(OPS, *args), arena_compose(reference, *args))


@pytest.mark.parametrize("codec", PACKED, ids=lambda codec: codec.name)
@given(st.integers(0, 2**32), st.integers(0, 22), st.lists(st.sampled_from(SHAPES), max_size=5))
def test_packed_gradient_is_within_rounding(
    codec: Packed, seed: int, num_vectors: int, shapes: list[tuple[int, ...]]
) -> None:
    layout, grad, words, scales = packed_bank(seed, codec, num_vectors, shapes)
    result = arena_coef_grad(OPS, grad, (words, scales, codec.bits), layout, num_vectors)
    assert result.shape == (num_vectors, len(shapes))
    for b, (start, end) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False)):
        deltas = deltas_of((words, scales, codec.bits), codec, num_vectors, start, end)
        for value, delta in zip(result[:, b], deltas, strict=True):
            expected = (grad[start:end].double() * delta.double()).sum()
            assert abs(value - expected) <= dot_error(grad[start:end], delta)


@pytest.mark.parametrize("codec", PACKED, ids=lambda codec: codec.name)
def test_every_code_is_read_exactly_in_every_place(codec: Packed) -> None:
    layout = Layout.from_shapes([(codec.alignment,)], codec.alignment)
    scales = torch.full((codec.scales(layout.numel),), 0.75, dtype=BFLOAT16)
    # Sums of products below 2**24 / 4 in quarters: exact in float32 in any order.
    grad = torch.randint(-8, 9, (layout.numel,)).float()
    for first in range(2**codec.bits):
        codes = torch.arange(first, first + layout.numel) % 2**codec.bits
        expected = 0.75 * (2 * codes + 1 - 2**codec.bits)
        args = pack(codes, codec.bits), scales, codec.bits
        composed = arena_compose(OPS, torch.zeros(layout.numel), args, torch.ones(1, 1), layout)
        assert equal(composed, expected)
        dot = arena_coef_grad(OPS, grad, args, layout, 1)
        assert dot.item() == (grad.double() * expected.double()).sum()


@given(st.integers(0, 2**32), st.integers(1, 22))
def test_both_forms_give_the_same_gradient(seed: int, num_vectors: int) -> None:
    layout, grad, deltas = bank(seed, num_vectors, [(TILE + 32, 2)])
    rows = torch.empty(num_vectors, layout.numel, dtype=deltas.dtype)
    for start, end in zip(layout.tile_offset, layout.tile_offset[1:], strict=False):
        tile = deltas[num_vectors * start : num_vectors * end].view(num_vectors, -1)
        rows[:, start:end] = tile
    from_bank = arena_coef_grad(OPS, grad, (deltas, None, 0), layout, num_vectors)
    assert equal(from_bank, OPS.coef_grad([grad], list(rows), FLOAT32))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_every_16_bit_value_is_read_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    (composed,) = OPS.compose([torch.zeros(2**16)], [values], torch.ones(1, 1))
    # -0.0 + 0.0 is 0.0: hence the sum.
    assert equal(composed, values.float() + 0.0)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
def test_every_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    # Each value of the dtype, the midpoint to the next, and the neighbours of both in float32.
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    bits = values.view(torch.int32)[:, None]
    near = [0, 1, -1, 0x0800, 0x1000, 0x0FFF, 0x1001, 0x8000, 0x7FFF, 0x8001]
    floats = (bits + torch.tensor(near, dtype=torch.int32)).view(FLOAT32).flatten()
    base = torch.zeros(floats.numel(), dtype=dtype)
    (composed,) = OPS.compose([base], [floats], torch.ones(1, 1))
    assert equal(composed, (floats + 0.0).to(dtype))


def partition_results(
    seed: int,
    codec: Packed | None,
    num_vectors: int,
    groups: int,
    shapes: list[tuple[int, ...]],
) -> list[Tensor]:
    """Both directions."""
    layout, arena, stored = stored_bank(seed, codec, num_vectors, shapes)
    generator = torch.Generator().manual_seed(seed)
    coef = torch.randn(num_vectors, len(shapes), groups, generator=generator)
    keys = keys_of(layout, seed)
    return [
        arena_compose(OPS, arena, stored, coef, layout, keys),
        arena_coef_grad(OPS, arena, stored, layout, num_vectors, keys, groups),
    ]


@pytest.mark.parametrize("codec", [None, *PACKED], ids=lambda codec: codec and codec.name)
@settings(max_examples=15)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 2, 3, 5, 17]),
    st.lists(st.sampled_from(SHAPES), max_size=3),
    st.sampled_from([1, 2, 5, 80, 1200, TILE]),
)
def test_partitions_against_the_reference(
    codec: Packed | None, seed: int, num_vectors: int, shapes: list[tuple[int, ...]], groups: int
) -> None:
    layout, arena, stored = stored_bank(seed, codec, num_vectors, shapes)
    composed, result = partition_results(seed, codec, num_vectors, groups, shapes)
    generator = torch.Generator().manual_seed(seed)
    coef = torch.randn(num_vectors, len(shapes), groups, generator=generator)
    keys = keys_of(layout, seed)
    assert equal(composed, arena_compose(reference, arena, stored, coef, layout, keys))
    assert result.shape == coef.shape
    exact = arena_coef_grad(
        reference, arena, stored, layout, num_vectors, keys, groups, torch.float64
    )
    for b, (start, end) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False)):
        group = group_of(slots(keys[layout.tile_block == b], TILE), groups).flatten()
        deltas = deltas_of(stored, codec, num_vectors, start, end)
        for i, delta in enumerate(deltas):
            for k in group[: end - start].unique().tolist()[:: max(1, groups // 3)]:
                its = group[: end - start] == k
                bound = dot_error(arena[start:end][its], delta[its])
                assert abs(result[i, b, k] - exact[i, b, k]) <= bound


def packed_results(seed: int, codec: Packed, num_vectors: int) -> list[Tensor]:
    """Both directions on four blocks of very unequal size."""
    shapes: list[tuple[int, ...]] = [(3,), (0,), (333, 99), (TILE,)]
    layout, arena, words, scales = packed_bank(seed, codec, num_vectors, shapes)
    coef = torch.randn(num_vectors, 4, generator=torch.Generator().manual_seed(seed))
    stored = words, scales, codec.bits
    return [
        arena_compose(OPS, arena, stored, coef, layout),
        arena_coef_grad(OPS, arena, stored, layout, num_vectors),
    ]


def workload() -> str:
    """A digest of both directions of both forms, over all dtypes and group sizes."""
    results = []
    for seed in range(12):
        num_vectors = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 21, 22)[seed]
        base, deltas = blocks(seed, num_vectors, 4)
        coef = torch.randn(num_vectors, 4, generator=torch.Generator().manual_seed(seed))
        results += OPS.compose(base, deltas, coef)
        results.append(OPS.coef_grad(base, deltas, FLOAT32))
        layout, arena, flat = bank(seed, num_vectors, [(333, 99), (7,), (TILE,)])
        dense, fewer = (flat, None, 0), coef[:, :3].contiguous()
        results.append(arena_compose(OPS, arena, dense, fewer, layout))
        results.append(arena_coef_grad(OPS, arena, dense, layout, num_vectors))
        for codec in PACKED:
            results += packed_results(seed, codec, num_vectors)
        for stored in (None, PACKED[seed % len(PACKED)]):
            shapes = [(3,), (0,), (133, 99), (TILE,)]
            results += partition_results(seed, stored, num_vectors, 1 << seed, shapes)
    for dtype in (BFLOAT16, FLOAT16):
        special = torch.tensor([torch.inf, -torch.inf, 65519.0, 65520.0, 1e-7, 3e-8, 2e-8, -1e-40])
        ones = torch.ones(1, 1)
        results += OPS.compose([torch.zeros(8, dtype=dtype)], [special], ones)
        results += OPS.compose([torch.zeros(8)], [special.to(dtype)], ones)
    return digest(*results)


def run_workload(capability: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from atlas_kernels.ops.backends import cpp; cpp.register()\n"
        "import test_cpp; print(test_cpp.workload())"
    )
    env = {
        **os.environ,
        "ATLAS_KERNELS_CPU_CAPABILITY": capability,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/ops")]),
    }
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_every_instruction_set_gives_the_same_bits() -> None:
    digests = {}
    for capability in capabilities():
        result = run_workload(capability)
        assert result.returncode == 0, result.stderr
        digests[capability] = result.stdout.strip()
    assert set(digests.values()) == {workload()}, digests


def test_unknown_instruction_set() -> None:
    result = run_workload("avx3")
    assert "ATLAS_KERNELS_CPU_CAPABILITY=avx3: expected baseline, avx2 or avx512" in result.stderr


def test_every_number_of_threads_gives_the_same_bits() -> None:
    # Large enough for seven threads, with blocks of very unequal size.
    shapes = [(3,), (1999, 1001), (TILE,), (77, 501)]
    layout, grad, flat = bank(0, 3, shapes)
    wide = [torch.randn(shape) for shape in shapes]
    deltas = [torch.randn(shape).bfloat16() for _ in range(3) for shape in shapes]
    coef = torch.randn(3, 4)
    before = torch.get_num_threads()
    digests = {}
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            digests[threads] = digest(
                OPS.coef_grad(wide, deltas, FLOAT32),
                arena_coef_grad(OPS, grad, (flat, None, 0), layout, 3),
                *(composed[:7] for composed in OPS.compose(wide, deltas, coef)),
                arena_compose(OPS, grad, (flat, None, 0), coef, layout)[-999:],
                # Large enough with 55 vectors.
                *(tensor for codec in PACKED for tensor in packed_results(0, codec, 55)),
                # One chunk, shared out vector by vector, and several.
                *partition_results(0, None, 9, 80, [(TILE * CHUNK_TILES,)]),
                *partition_results(0, PACKED[0], 3, 80, [(7,), (TILE * CHUNK_TILES + 1,)]),
            )
    finally:
        torch.set_num_threads(before)
    assert len(set(digests.values())) == 1, digests


def strided(form: str, tensor: Tensor) -> Tensor:
    """The same values, lying differently."""
    if form == "unaligned":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if form == "sliced":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("form", ["unaligned", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_where_they_lie(form: str, dtype: torch.dtype) -> None:
    shapes = [(5, 7), (67, 129), (1, 1)]
    base = [torch.randn(shape).to(dtype) for shape in shapes]
    deltas = [torch.randn(shape).to(dtype) for _ in range(5) for shape in shapes]
    coef = torch.randn(5, 3)
    moved = [strided(form, block) for block in base], [strided(form, delta) for delta in deltas]
    assert all(map(equal, OPS.compose(*moved, coef), OPS.compose(base, deltas, coef)))
    assert all(block.is_contiguous() for block in OPS.compose(*moved, coef))
    expected = OPS.coef_grad(base, deltas, FLOAT32)
    assert equal(OPS.coef_grad(*moved, FLOAT32), expected)


def test_large_outputs_do_not_share_memory() -> None:
    # Beyond 1 MiB outputs reuse the memory of freed ones, never of living ones.
    base = [torch.full((2**19,), float(k)) for k in range(3)]
    absent = [torch.empty(ABSENT)] * 3
    coef = torch.ones(1, 3)
    first = OPS.compose(base, absent, coef)
    kept = first[1]
    addresses = {block.data_ptr() for block in first}
    del first
    second = OPS.compose(base, absent, coef)
    third = OPS.compose(base, absent, coef)
    living = [kept, *second, *third]
    assert len({block.data_ptr() for block in living}) == len(living)
    assert addresses & {block.data_ptr() for block in second}
    assert equal(kept, base[1])
    assert all(map(equal, second, base))
    assert all(map(equal, third, base))
    assert kept.device == base[0].device
    assert kept.storage_offset() == 0


def test_offsets_beyond_32_bits() -> None:
    # Untouched anonymous memory reads as one shared page of zeros: 4 GiB cost nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False
    length = 2**31 + 64
    wide = torch.empty(length, dtype=BFLOAT16)
    wide[-1] = 3.0
    wide[length - 2**31 - 1] = 2.0  # where a 32-bit offset would wrap to
    assert OPS.coef_grad([wide], [wide], FLOAT32).item() == 13.0
    layout = Layout.from_shapes([(length - 64,), (64,)])
    dots = arena_coef_grad(OPS, wide, (wide, None, 0), layout, 1)
    assert dots.tolist() == [[4.0, 9.0]]


def test_offsets_of_packed_deltas_beyond_32_bits() -> None:
    # Beyond 2**31 elements of deltas from the last tile on: 256 MiB as signs.
    codec, num_vectors = CODECS["sign"], 2**11 + 16
    assert isinstance(codec, Packed)
    layout = Layout.from_shapes([(2**20,)], codec.alignment)
    elements = num_vectors * layout.numel
    scales = torch.zeros(codec.scales(elements), dtype=BFLOAT16)
    scales[-1] = 3.0
    stored = torch.zeros(codec.items(elements), dtype=torch.int32), scales, codec.bits
    expected = torch.zeros(layout.numel)
    expected[-GROUP:] = -3.0
    ones = torch.ones(num_vectors, 1)
    composed = arena_compose(OPS, torch.zeros(layout.numel), stored, ones, layout)
    assert equal(composed, expected)
    result = arena_coef_grad(OPS, expected, stored, layout, num_vectors)
    assert result[-1] == 9.0 * GROUP
    assert not result[:-1].any()


def operator_arguments() -> dict[str, tuple[Any, ...]]:
    """By operator, those of the arena form with dense and packed deltas, and with groups."""
    base, deltas = blocks(3, 2, 4)
    layout, arena, flat = bank(3, 2, [(70, 70), (), (0,), (5,)])
    coef = torch.randn(2, 4)
    units, wide, words, scales = packed_bank(3, PACKED[2], 2, [(70, 70), (), (0,), (5,)])
    packed = words, scales, PACKED[2].bits
    grouped, keys = torch.randn(2, 4, 5), keys_of(layout, 0)
    dense = (arena, flat, None, 0, *layout.tables)
    return {
        "compose": (base, deltas, coef),
        "coef_grad": (base, deltas, FLOAT32),
        "arena_compose": (*dense, None, coef),
        "arena_coef_grad": (*dense, None, 2, 0, FLOAT32),
        "arena_compose, packed": (wide, *packed, *units.tables, None, coef),
        "arena_coef_grad, packed": (wide, *packed, *units.tables, None, 2, 0, FLOAT32),
        "arena_compose, groups": (*dense, keys, grouped),
        "arena_coef_grad, groups": (*dense, keys, 2, 5, FLOAT32),
    }


@pytest.mark.parametrize("name", list(operator_arguments()))
def test_opcheck(name: str) -> None:
    cpp.register()
    operator = getattr(OPS, name.partition(",")[0]).default
    torch.library.opcheck(operator, operator_arguments()[name])


def test_opcheck_covers_every_operator() -> None:
    assert {name.partition(",")[0] for name in operator_arguments()} == set(SCHEMAS)


def plain() -> tuple[list[Tensor], list[list[Tensor | None]], Tensor]:
    base, flat = [torch.randn(3, 5), torch.randn(7)], torch.randn(3, 22)
    deltas = [[row[:15].view(3, 5), row[15:].bfloat16()] for row in flat]
    return base, [[deltas[0][0], None], *deltas[1:]], torch.randn(3, 2, requires_grad=True)


def inputs_of(tensor: Tensor) -> int:
    """How many arguments of the operator autograd looks at."""
    return len(tensor.grad_fn.next_functions)


def test_plain_arguments_take_the_short_way() -> None:
    base, deltas, coef = plain()
    short = ak.compose(base, deltas, coef)
    assert inputs_of(short[0]) == 1 + len(base)
    # A delta that needs a gradient takes the general way, to the same result.
    deltas[1][1].requires_grad_()
    general = ak.compose(base, deltas, coef)
    assert inputs_of(general[0]) == 1 + len(base) + len(base) * len(deltas)
    assert all(map(equal, short, general))

    def derivatives(composed: tuple[Tensor, ...]) -> list[Tensor]:
        loss = sum(block.pow(3).sum() for block in composed)
        (first,) = torch.autograd.grad(loss, coef, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), coef)
        return [first.detach(), second]

    assert all(map(equal, derivatives(short), derivatives(general)))


def test_batched_gradients_of_the_short_way() -> None:
    base, deltas, coef = plain()
    block = ak.compose(base, deltas, coef)[0]
    grads = torch.randn(4, *block.shape)

    def pull_back(grad: Tensor) -> Tensor:
        return torch.autograd.grad(block, coef, grad, retain_graph=True)[0]

    assert torch.equal(torch.vmap(pull_back)(grads), torch.stack([pull_back(g) for g in grads]))


def test_short_way_notices_deltas_modified_before_the_backward() -> None:
    base, deltas, coef = plain()
    composed = ak.compose(base, deltas, coef)
    deltas[2][0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        composed[0].sum().backward()


def test_tables_that_do_not_fit_are_refused() -> None:
    arguments = operator_arguments()["arena_compose"]
    base, deltas, scales, bits, tile_block, tile_offset, *rest = arguments

    def compose(base: Tensor, deltas: Tensor, block: Tensor, offset: Tensor) -> None:
        OPS.arena_compose(base, deltas, scales, bits, block, offset, *rest)

    with pytest.raises(RuntimeError, match="tile_offset does not fit"):
        compose(base[:-16], deltas[:-32], tile_block, tile_offset)
    with pytest.raises(RuntimeError, match="tile 0 has 4912"):
        compose(base, deltas, tile_block[1:], tile_offset[[0, 2, 3, 4]])
    with pytest.raises(RuntimeError, match="tile_block does not fit coef"):
        compose(base, deltas, tile_block + 1, tile_offset)
    with pytest.raises(RuntimeError, match="shape of its block"):
        OPS.compose([torch.ones(2, 3)], [torch.ones(3, 2)], torch.ones(1, 1))
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        OPS.compose([torch.ones(2)], [torch.ones(2).double()], torch.ones(1, 1))


def test_packed_arguments_that_do_not_fit_are_refused() -> None:
    base, words, scales, bits, *rest = operator_arguments()["arena_compose, packed"]

    def compose(*changed: Any) -> None:
        OPS.arena_compose(*changed, *rest)

    with pytest.raises(RuntimeError, match="expected 1, 2, 3, 4 or 8 bits, got 5"):
        compose(base, words, scales, 5)
    with pytest.raises(RuntimeError, match="words in int32 and scales in bfloat16"):
        compose(base, words.view(FLOAT32), scales, bits)
    with pytest.raises(RuntimeError, match="words in int32 and scales in bfloat16"):
        compose(base, words, scales.half(), bits)
    with pytest.raises(RuntimeError, match="expected words of shape"):
        compose(base, words[:-1], scales, bits)
    with pytest.raises(RuntimeError, match="expected scales of shape"):
        compose(base, words, scales[:-1], bits)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        compose(base, torch.stack([words, words], 1)[:, 0], scales, bits)
    arguments = operator_arguments()["arena_coef_grad, packed"]
    tile_offset = arguments[5]
    tile_offset[1] -= 16
    with pytest.raises(RuntimeError, match="tile 0 has 4080"):
        OPS.arena_coef_grad(*arguments)


def test_partitions_that_do_not_fit_are_refused() -> None:
    base, deltas, _, _, *tables, keys, coef = operator_arguments()["arena_compose, groups"]

    def compose(deltas: Any = deltas, bits: int = 0, coef: Tensor = coef, keys: Any = keys) -> None:
        OPS.arena_compose(base, deltas, None, bits, *tables, keys, coef)

    with pytest.raises(RuntimeError, match="expected scales of deltas of 4 bits"):
        compose(bits=4)
    with pytest.raises(RuntimeError, match="expected deltas of shape"):
        compose(deltas=deltas[:-16])
    with pytest.raises(RuntimeError, match=r"contiguous coef of shape \(N, B, K\)"):
        compose(coef=coef[..., 0])
    with pytest.raises(RuntimeError, match="expected 1 to 4096 groups, got 4097"):
        compose(coef=torch.zeros(2, 4, 4097))
    with pytest.raises(RuntimeError, match="tile_block does not fit coef"):
        compose(coef=coef[:, :3].contiguous())
    with pytest.raises(RuntimeError, match="tile_key does not fit"):
        compose(keys=keys[1:])
    arguments = list(operator_arguments()["arena_coef_grad, groups"])
    for place, message in ((7, "chunk_tile does not fit"), (8, "block_chunk does not fit")):
        changed = list(arguments)
        changed[place] = changed[place] + 1
        with pytest.raises(RuntimeError, match=message):
            OPS.arena_coef_grad(*changed)


def test_missing_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp.EXTENSION, "path", tmp_path / "_cpp.abi3.so")
    reason = cpp.unavailable()
    assert reason.startswith("the C++ extension is not built: install a C++17 compiler")
    assert "pip install --no-build-isolation" in reason


def test_binary_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_cpp.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpp.EXTENSION, "path", broken)
    reason = cpp.unavailable()
    # The loader's own words are part of it.
    assert "does not load into PyTorch" in reason
    assert "file too short" in reason or "invalid ELF header" in reason
    assert "\n" not in reason


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("capability", list(FLAGS))
def test_kernels_under_sanitizers(capability: str, tmp_path: Path) -> None:
    if capability not in capabilities():
        pytest.skip(f"this machine has no {capability}")
    binary = tmp_path / "kernels"
    sources = [ROOT / "csrc/cpu/kernels.cpp", ROOT / "tests/ops/cpu_sanitize/main.cpp"]
    flags = ["-std=c++17", "-O0", "-g", "-ffp-contract=off", f"-DATLAS_CAPABILITY={capability}"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = ["g++", *flags, *sanitize, *FLAGS[capability]]
    subprocess.run([*compiler, *map(str, sources), "-o", str(binary)], check=True)
    result = subprocess.run([str(binary)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1728 runs\n"
