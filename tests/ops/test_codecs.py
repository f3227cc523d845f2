"""Packed codecs: the layout of codes, the choice of scales, and what the operators make of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FUSED, for_examples, on_each_backend, same_bits
from tolerances import EPS, dot_error
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels.bank.segment import Segment
from atlas_kernels.ops import schema as ops
from atlas_kernels.ops.backends import resolve
from atlas_kernels.ops.codecs import CODECS, codec_named
from atlas_kernels.ops.codecs.packed import GROUP, Packed, levels
from atlas_kernels.ops.layout import TILE

PACKED = ("int8", "int4", "int3", "int2", "sign")


def packed(name: str) -> Packed:
    codec = codec_named(name)
    assert isinstance(codec, Packed)
    return codec


def field(words: list[int], element: int, bits: int) -> int:
    """The code of an element, read out of the documented layout one bit field at a time."""
    if bits == 3:
        unit, within = divmod(element, 512)
        low = field(words[48 * unit : 48 * unit + 32], within, 2)
        return low + 4 * field(words[48 * unit + 32 : 48 * unit + 48], within, 1)
    unit, within = divmod(element, 16 * 32 // bits)
    word = words[16 * unit + within % 16] % 2**32
    return (word >> (within // 16 * bits)) % 2**bits


@pytest.mark.parametrize("name", PACKED)
def test_codes_lie_where_the_layout_documents_them(name: str) -> None:
    codec = packed(name)
    row = torch.randn(3 * codec.alignment, generator=torch.Generator().manual_seed(1))
    words, scales = codec.encode(row)
    assert (words.dtype, scales.dtype) == (torch.int32, torch.bfloat16)
    decoded = codec.decode(words, scales)
    listed = words.tolist()
    for element in range(row.numel()):
        level = 2 * field(listed, element, codec.bits) + 1 - 2**codec.bits
        assert decoded[element].item() == level * scales[element // GROUP].item()
    stored = 32 * words.numel() + 16 * scales.numel()
    assert stored == codec.bits_per_weight * row.numel()


def test_bits_per_weight() -> None:
    """The limits that the format was designed for."""
    assert CODECS["int4"].bits_per_weight <= 4.3
    assert CODECS["sign"].bits_per_weight <= 1.2


@pytest.mark.parametrize("name", PACKED)
def test_every_code_is_used_and_the_nearest(name: str) -> None:
    """No code within the codec is nearer to its element, and a wide range meets all of them."""
    codec = packed(name)
    row = torch.linspace(-1, 1, 4 * 512)
    words, scales = codec.encode(row)
    grid = torch.arange(1 - 2**codec.bits, 2**codec.bits, 2).double()
    assert set(levels(words, codec.bits).tolist()) <= set(grid.tolist())
    spread = torch.linspace(-1, 1, GROUP).repeat(4)
    used = levels(codec.encode(spread)[0], codec.bits).unique().numel()
    # 128 evenly spread elements meet 128 of the 256 levels of eight bits.
    assert used == min(2**codec.bits, GROUP)
    candidates = scales.double().repeat_interleave(GROUP).unsqueeze(1) * grid
    nearest = (candidates - row.double().unsqueeze(1)).abs().amin(1)
    error = (codec.decode(words, scales).double() - row.double()).abs()
    # Elements on the border of two cells may fall to either side: half a unit in the last place.
    assert bool((error <= nearest + EPS).all())


@pytest.mark.parametrize("name", PACKED)
def test_decoding_is_exact_in_float32(name: str) -> None:
    codec = packed(name)
    row = torch.randn(2048, generator=torch.Generator().manual_seed(2)) * 1e-3
    words, scales = codec.encode(row)
    exact = levels(words, codec.bits).double() * scales.double().repeat_interleave(GROUP)
    assert torch.equal(codec.decode(words, scales).double(), exact)


@pytest.mark.parametrize("name", PACKED)
def test_error_on_normal_elements(name: str) -> None:
    """Against the least error of an even grid on a normal distribution, scale known.

    Uniform quantisers of a standard normal variable (Max 1960, table 2) have mean squared errors of
    0.3634 (1 bit), 0.1188, 0.03744 and 0.01154 (4 bits). Scales chosen per group of 128 adapt to
    the sample, and so may lie a little below or above. Eight bits: the largest of 128 elements is
    2.6 on average and below 4 almost always, so steps are at most 2 * 4 / 255, error step**2 / 12.
    """
    codec = packed(name)
    row = torch.randn(2**16, generator=torch.Generator().manual_seed(3))
    error = (codec.decode(*codec.encode(row)) - row).double().square().mean().item()
    bound = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 8: (8 / 255) ** 2 / 12}[codec.bits]
    assert error < 1.02 * bound
    if codec.bits < 8:
        assert error > 0.85 * bound


@pytest.mark.parametrize("name", PACKED)
@settings(deadline=None, max_examples=40)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 99))
def test_powers_of_two_scale_along(name: str, exponent: int, seed: int) -> None:
    codec = packed(name)
    row = torch.randn(512, generator=torch.Generator().manual_seed(seed))
    words, scales = codec.encode(row)
    scaled_words, scaled_scales = codec.encode(row * 2.0**exponent)
    assert torch.equal(words, scaled_words)
    assert torch.equal(scales.double() * 2.0**exponent, scaled_scales.double())


@pytest.mark.parametrize("name", PACKED)
def test_groups_of_zeros_are_exact_and_do_not_spoil_others(name: str) -> None:
    codec = packed(name)
    row = torch.zeros(1024)
    row[GROUP : 2 * GROUP] = 1
    decoded = codec.decode(*codec.encode(row))
    assert torch.equal(decoded == 0, row == 0)
    assert bool((decoded[GROUP : 2 * GROUP] - 1).abs().max() <= 2**-8)


# -- banks -----------------------------------------------------------------------------------------


def base_and_vectors(count: int = 3) -> tuple[dict[str, Tensor], dict[str, ak.TaskVector]]:
    generator = torch.Generator().manual_seed(4)
    shapes = {"large": (3, TILE - 5), "matrix": (37, 11), "bias": (13,), "scalar": ()}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    vectors = {}
    for i in range(count):
        deltas = {
            name: 0.1 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
            if (i, name) != (1, "matrix")
        }
        vectors[f"task-{i}"] = ak.TaskVector(deltas)
    return base, vectors


def decoded(segment: Segment, block: int, vector: int) -> Tensor:
    """A delta as the segment holds it, through the codec: one row at a time, no kernel."""
    alone = segment.blocks()[block]
    length = alone.layout.numel
    row = []
    codec = alone.codec
    for first in range(0, length, TILE):
        size = min(TILE, length - first)
        at = alone.num_vectors * first + vector * size
        items = alone.deltas[codec.items(at) : codec.items(at) + codec.items(size)]
        scales = None
        if alone.scales is not None:
            scales = alone.scales[codec.scales(at) : codec.scales(at) + codec.scales(size)]
        row.append(codec.decode(items, scales))
    shape = alone.layout.shapes[0]
    return torch.cat(row)[: math.prod(shape)].view(shape)


@pytest.mark.parametrize("name", PACKED)
@on_each_backend
def test_one_vector_with_coefficient_one_is_the_decoded_delta(name: str, backend: str) -> None:
    """With a base of zeros nothing rounds: every backend decodes the same bits."""
    base, vectors = base_and_vectors()
    zeros = {block: torch.zeros_like(tensor) for block, tensor in base.items()}
    bank = ak.TaskVectorBank.from_task_vectors(zeros, vectors, codec=name)
    for i in range(len(vectors)):
        coef = torch.zeros(len(vectors))
        coef[i] = 1
        composed = bank.compose(coef, backend=backend)
        for segment in bank.segments:
            for k, column in enumerate(segment.columns):
                expected = decoded(segment, k, i)
                assert torch.equal(composed[bank.blocks[column]], expected)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_each_backend
def test_composition_and_gradient_against_float64(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    base, vectors = base_and_vectors()
    base = {block: tensor.to(dtype) for block, tensor in base.items()}
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=name)
    (segment,) = bank.segments
    generator = torch.Generator().manual_seed(5)
    coef = torch.randn(len(vectors), len(base), generator=generator).requires_grad_()
    composed = bank.compose(coef, backend=backend)
    cotangents = {b: torch.randn(t.shape, generator=generator).to(dtype) for b, t in base.items()}
    torch.autograd.backward([composed[b] for b in base], [cotangents[b] for b in base])
    assert coef.grad is not None
    for k, block in enumerate(base):
        deltas = [decoded(segment, k, i).double() for i in range(len(vectors))]
        exact = base[block].double()
        magnitude = exact.abs()
        for i, delta in enumerate(deltas):
            exact = exact + coef[i, k].double() * delta
            magnitude = magnitude + (coef[i, k].double() * delta).abs()
            bound = dot_error(cotangents[block], delta)
            found = coef.grad[i, k].double()
            assert abs(found - (cotangents[block].double() * delta).sum()) <= bound
        # Each of N terms rounds its factor, its product and its sum, by eps/2 of what has come
        # together so far; then the storage dtype rounds once. 1.01 for the second order.
        steps = (2 + len(deltas)) * EPS / 2 * magnitude
        last = torch.finfo(dtype).eps / 2 * (exact.abs() + steps) if dtype != torch.float32 else 0
        error = (composed[block].double() - exact).abs()
        assert bool((error <= 1.01 * (steps + last) + torch.finfo(dtype).smallest_normal).all())


@on_each_backend
def test_reference_is_met_bit_for_bit_where_it_is_promised(backend: str) -> None:
    """`cpp` rounds as the reference does; a GPU fuses multiply and add, and so may not."""
    if backend in FUSED:
        pytest.skip("fused multiply-add")
    strategy = st.tuples(
        st.sampled_from(PACKED),
        st.integers(0, 5),
        st.lists(st.integers(1, 3 * TILE), min_size=1, max_size=3),
        st.integers(0, 99),
    )

    def check(arguments: tuple[str, int, list[int], int]) -> None:
        name, count, sizes, seed = arguments
        generator = torch.Generator().manual_seed(seed)
        base = {str(b): torch.randn(size, generator=generator) for b, size in enumerate(sizes)}
        vectors = {
            str(i): ak.TaskVector(
                {b: torch.randn(t.shape, generator=generator) for b, t in base.items()}
            )
            for i in range(count)
        }
        bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=name)
        coef = torch.randn(count, len(bank.blocks), generator=generator)
        expected = bank.compose(coef, backend="torch")
        composed = bank.compose(coef, backend=backend)
        assert all(same_bits(composed[block], expected[block]) for block in bank.blocks)

    for_examples(backend, strategy, divide=2)(check)


@pytest.mark.parametrize("name", ["int4", "int3", "sign"])
@on_each_backend
def test_opcheck(name: str, backend: str) -> None:
    resolve(backend, "cpu", False)
    namespace = getattr(torch.ops, ops.namespace(backend))
    base, vectors = base_and_vectors()
    (segment,) = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=name).segments
    stored = segment.deltas, segment.scales, segment.codec.bits
    arguments = (segment.base, *stored, *segment.layout.tables, None)
    coef = torch.randn(len(vectors), len(base))
    torch.library.opcheck(namespace.arena_compose.default, (*arguments, coef))
    torch.library.opcheck(namespace.arena_coef_grad.default, (*arguments, 3, 0, torch.float32))


@on_each_backend
def test_transforms(backend: str) -> None:
    """Double backward, vmap, func.grad and compile see a packed bank as they see a dense one."""
    base, vectors = base_and_vectors(2)
    (segment,) = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="int4").segments
    generator = torch.Generator().manual_seed(6)
    coef = torch.randn(2, len(base), generator=generator)

    def loss(coef: Tensor, using: str = backend) -> Tensor:
        # Without the padding, which decodes to anything but zero.
        blocks = segment.layout.split(segment.compose(coef, using))
        return torch.cat([block.flatten() for block in blocks]).square().sum()

    # Half the Hessian of |base + sum c_i tau_i|^2 is the Gram matrix of the decoded deltas.
    jacobian: Any = torch.func.jacrev(torch.func.grad(loss))(coef)
    for k in range(len(base)):
        rows = [decoded(segment, k, i).double().flatten() for i in range(2)]
        for i in range(2):
            for j in range(2):
                exact = 2 * (rows[i] * rows[j]).sum()
                bound = 2 * dot_error(rows[i], rows[j]) + 4 * EPS * float(exact.abs())
                assert abs(jacobian[i, k, j, k].double() - exact) <= bound
    batch = torch.stack([coef, 2 * coef])
    batched = torch.func.vmap(lambda c: segment.compose(c, backend))(batch)
    assert torch.equal(batched, torch.stack([segment.compose(c, backend) for c in batch]))
    if backend == "torch":
        eager = segment.compose(coef, backend)
        compiled = torch.compile(
            lambda c: segment.compose(c, backend), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(coef), eager)


# -- budgets ---------------------------------------------------------------------------------------


def blocks_of_all_kinds() -> tuple[dict[str, Tensor], dict[str, ak.TaskVector]]:
    """Deltas that are easy (constant magnitude) and hard (heavy tails) to store in few bits."""
    generator = torch.Generator().manual_seed(7)
    base = {f"block-{k}": torch.zeros(40, 128) for k in range(6)}
    deltas = {}
    for k, block in enumerate(base):
        normal = torch.randn(40, 128, generator=generator)
        deltas[block] = normal.sign() * normal.abs() ** (k / 2)
    return base, {"task": ak.TaskVector(deltas)}


@pytest.mark.parametrize("budget", [1.125, 1.2, 2.0, 3.5, 4.125, 7.0, 16.0])
def test_budget_is_kept_with_the_least_error(budget: float) -> None:
    base, vectors = blocks_of_all_kinds()
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=f"auto:{budget}")
    assert bank.codec == f"auto:{budget}"
    assert bank.bits_per_weight <= budget
    ladder = ("sign", "int2", "int3", "int4", "int8", "bf16")
    errors = {
        name: ak.TaskVectorBank.from_task_vectors(base, vectors, codec=name).errors[0]
        for name in ladder
    }
    # Each block has the smallest codec within some error e ...
    chosen = torch.stack([errors[name][k] for k, name in enumerate(bank.codecs)])
    limit = chosen.max()
    for k, name in enumerate(bank.codecs):
        assert all(errors[other][k] > limit for other in ladder[: ladder.index(name)])
    # ... and no smaller e would keep the budget.
    smaller = max((e for row in errors.values() for e in row if e < limit), default=None)
    # (With bf16 among them, it serves those blocks whatever e is.)
    if smaller is not None and "bf16" not in bank.codecs:
        smallest = [
            next(name for name in ladder if name == "bf16" or errors[name][k] <= smaller)
            for k in range(len(base))
        ]
        bits = [CODECS[name].bits_per_weight for name in smallest]
        assert sum(bits) / len(bits) > budget


def test_errors_are_those_of_the_stored_deltas() -> None:
    base, vectors = base_and_vectors()
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="int3")
    (segment,) = bank.segments
    for i, vector in enumerate(vectors.values()):
        for k, block in enumerate(base):
            delta = vector.deltas.get(block)
            if delta is None:
                assert bank.errors[i, k] == 0
                continue
            stored = decoded(segment, k, i).double()
            expected = (stored - delta.double()).norm() / delta.double().norm()
            # The difference rounds by eps/2 of the elements, however small it is.
            assert abs(bank.errors[i, k] - expected) <= 4 * EPS
    absent = list(base).index("matrix")
    assert bool((decoded(segment, absent, 1) == 0).all())


@pytest.mark.parametrize("name", [*PACKED, "auto:3"])
def test_float64_gradients_flow_through_the_python_function(name: str) -> None:
    """A packed segment's composition is linear in coef, on which no gradient then depends."""
    base, vectors = base_and_vectors()
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=name)
    coef = torch.zeros(len(vectors), len(bank.blocks), requires_grad=True)

    def gradient(at: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(sum(t.sum() for t in bank.compose(at).values()), coef)
        return found

    assert same_bits(gradient(coef), gradient(coef + 1))
    for segment in bank.segments:
        assert torch.equal(segment.compose(torch.zeros(len(vectors))), segment.base)
