"""aTLAS x K: the partition, and banks composed by it."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from arena import arena_coef_grad, arena_compose
from hypothesis import given
from hypothesis import strategies as st
from strategies import CPU_BACKENDS, INTERPRETED, need, same_bits, shapes
from tolerances import compose_error, dot_error
from torch import Tensor

import atlas_kernels as ak
from atlas_kernels.ops import reference
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.groups import group_of, group_sums, slots, tile_keys
from atlas_kernels.ops.layout import CHUNK_TILES, TILE, Layout

# In the interpreter these would take minutes; test_triton has smaller ones.
BACKENDS = tuple(backend for backend in CPU_BACKENDS if backend not in INTERPRETED)
GROUPS = (1, 2, 5, 80, 1200, 4095, 4096)


def make_bank(codec: str = "bf16", count: int = 3, **base_shapes: Any) -> ak.TaskVectorBank:
    generator = torch.Generator().manual_seed(0)
    base = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (base_shapes or {"a": (70, 99), "b": (3,), "c": (2, TILE)}).items()
    }
    vectors = {
        f"v{i}": ak.TaskVector(
            {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()}
        )
        for i in range(count)
    }
    return ak.TaskVectorBank.from_task_vectors(base, vectors, codec=codec)


def groups_of(name: str, size: int, groups: int, seed: int) -> Tensor:
    """int64 [size]: the group of every element of a block."""
    keys = tile_keys([name], Layout.from_shapes([(size,)], alignment=1), seed)
    return group_of(slots(keys, TILE).flatten()[:size], groups)


def deltas_of(bank: ak.TaskVectorBank) -> list[dict[str, Tensor]]:
    """What each task vector adds to a base of zeros, as stored: exact."""
    found: list[dict[str, Tensor]] = [{} for _ in bank.names]
    for segment in bank.segments:
        for block in replace(segment, base=torch.zeros_like(segment.base)).blocks():
            name = bank.blocks[block.columns[0]]
            for deltas, row in zip(found, torch.eye(len(bank.names)), strict=True):
                (deltas[name],) = block.layout.split(block.compose(row, "torch").double())
    return found


# -- the partition ---------------------------------------------------------------------------------


def test_slots_as_files_that_exist_have_them() -> None:
    """By the definition, number by number: coefficients that were saved depend on all of it."""

    def slot(seed: int, name: str, element: int) -> int:
        word = 0xFFFFFFFF
        tile, place = divmod(element, 4096)
        digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
        key = (int.from_bytes(digest, "little") + tile * 0x9E3779B9) & word
        key = ((key ^ key >> 16) * 0x85EBCA6B) & word
        key = ((key ^ key >> 13) * 0xC2B2AE35) & word
        key ^= key >> 16
        for _ in range(4):
            place = (place * (key % 4096 | 1) + (key >> 12) % 4096) % 4096
            place ^= place >> 6
            key = (key * 0x2C1B3C6D + 0x297A2D39) & word
            key ^= key >> 15
        return place

    name, size = "visual.proj", 2 * TILE + 5
    elements = (0, 1, 2, 4095, 4096, 8191, 8192, 8196)
    for seed in (0, 7, -1, 2**70):
        found = groups_of(name, size, TILE, seed)
        assert [found[e] for e in elements] == [slot(seed, name, e) for e in elements]


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, TILE))
def test_slots_are_a_bijection_of_every_tile(key: int, elements: int) -> None:
    keys = torch.tensor([key], dtype=torch.int32)
    whole = slots(keys, TILE)
    assert torch.equal(whole.sort().values[0], torch.arange(TILE))
    assert torch.equal(slots(keys, elements), whole[:, :elements])


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_balanced_within_every_tile(groups: int) -> None:
    found = groups_of("w", 3 * TILE, groups, 0).view(3, TILE)
    for tile in found:
        sizes = torch.bincount(tile, minlength=groups)
        assert len(sizes) == groups
        assert sizes.min() >= TILE // groups
        assert sizes.max() <= -(-TILE // groups)


def excess(left: Tensor, right: Tensor, groups: int) -> float:
    """Cramer's V of two group numbers, less what independent ones would show by chance.

    Their chi-square has d = (groups - 1)^2 degrees of freedom, thus a mean of d and a variance of
    2 d: six standard deviations are chance.
    """
    counts = torch.bincount((left * groups + right).flatten(), minlength=groups**2).double()
    expected = counts.sum() / groups**2
    chi_square = ((counts - expected).square() / expected).sum().item()
    freedom = (groups - 1) ** 2
    more = max(0.0, chi_square - freedom - 6 * (2 * freedom) ** 0.5)
    return float((more / (counts.sum() * (groups - 1))) ** 0.5)


@pytest.mark.parametrize("groups", [2, 5, 16])
def test_groups_of_two_elements_are_independent(groups: int) -> None:
    """Associations (Cramer's V) of less than one percent.

    Measured over 75 distances in 64 tiles of three seeds: 0.7 percent at most; 2 percent with a
    round less in `slots`.
    """
    found = groups_of("w", 64 * TILE, groups, 0).view(64, TILE)
    for distance in (*range(1, 17), 31, 32, 48, 63, 64, 96, 128, 256, 512, 768, 1024, 2048, 3072):
        assert excess(found[:, :-distance], found[:, distance:], groups) < 0.01, distance
    for name, other in (
        ("tiles", found.roll(1, 0)),
        ("blocks", groups_of("v", 64 * TILE, groups, 0).view(64, TILE)),
        ("seeds", groups_of("w", 64 * TILE, groups, 1).view(64, TILE)),
    ):
        assert excess(found, other, groups) < 0.01, name
    assert excess(found, found, groups) > 0.9


@pytest.mark.parametrize("groups", GROUPS)
def test_sums_of_groups(groups: int) -> None:
    # Whole numbers, whose sums are exact.
    values = torch.randint(-9, 10, (2 * TILE + 13,)).float()
    keys = tile_keys(["w"], Layout.from_shapes([values.shape], alignment=1), 3)
    group = groups_of("w", len(values), groups, 3)
    expected = torch.zeros(groups).index_add_(0, group, values)
    assert torch.equal(group_sums(values, slots(keys, TILE), groups), expected)


# -- banks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codec", [*CODECS, "auto:3"])
def test_equal_coefficients_are_plain_atlas_bit_for_bit(codec: str, backend: str) -> None:
    need(backend)
    bank = make_bank(codec)
    coef = torch.randn(3, 3)
    plain = bank.compose(coef, backend=backend)
    for groups in (1, 5, 4096):
        equal = coef.unsqueeze(2).expand(-1, -1, groups)
        composed = bank.compose(equal, backend=backend, seed=groups)
        assert all(same_bits(composed[name], plain[name]) for name in plain), groups


def masks(bank: ak.TaskVectorBank, groups: int, seed: int = 0) -> dict[str, Tensor]:
    """Each block's elements that each group's coefficient moves: bool [N, K, ...]."""
    base = bank.base
    rows: dict[str, list[Tensor]] = {name: [] for name in base}
    for i in range(len(bank.names)):
        for k in range(groups):
            coef = torch.zeros(len(bank.names), len(bank.blocks), groups)
            coef[i, :, k] = 1
            for name, value in bank.compose(coef, seed=seed).items():
                rows[name].append(value != base[name])
    return {name: torch.stack(its).unflatten(0, (-1, groups)) for name, its in rows.items()}


def ones_bank(codec: str, *names: str, shape: tuple[int, ...] = (70, 99)) -> ak.TaskVectorBank:
    base = {name: torch.zeros(shape if name == "w" else (33,)) for name in names}
    vector = {name: torch.ones(t.shape) for name, t in base.items()}
    vectors = {"v": ak.TaskVector(vector), "u": ak.TaskVector(vector)}
    return ak.TaskVectorBank.from_task_vectors(base, vectors, codec=codec)


@pytest.mark.parametrize("codec", ["fp32", "int4", "sign"])
def test_groups_partition_every_block_alike_for_all_vectors(codec: str) -> None:
    """Whatever the codec, and whatever lies before the block in the bank."""
    for names in (("w",), ("x", "w"), ("w", "y", "x")):
        bank = ones_bank(codec, *names)
        found = masks(bank, 5, seed=2)
        for name, mask in found.items():
            assert bool((mask.sum(1) == 1).all())
            expected = groups_of(name, mask[0, 0].numel(), 5, 2).view(mask.shape[2:])
            for i in range(2):
                assert torch.equal(mask[i].int().argmax(0), expected)
    assert not torch.equal(masks(bank, 5, seed=3)["w"], found["w"])


def test_more_groups_than_elements() -> None:
    bank = make_bank("fp32", w=(13,))
    coef = torch.randn(3, 1, 4096, requires_grad=True)
    composed = bank.compose(coef)["w"]
    composed.sum().backward()
    assert coef.grad is not None
    group = groups_of("w", 13, 4096, 0)
    touched = coef.grad.abs().sum(0)[0] > 0
    assert torch.equal(touched.nonzero().flatten(), group.sort().values)
    for i, delta in enumerate(deltas_of(bank)):
        assert torch.equal(coef.grad[i, 0, group], delta["w"].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str) -> None:
    """Values, and the gradient group by group, for shapes of every kind and any codec."""
    need(backend)

    @given(
        st.lists(shapes(), min_size=1, max_size=3),
        st.sampled_from([*CODECS, "auto:3"]),
        st.sampled_from(GROUPS[:5]),
        st.integers(0, 9),
    )
    def check(several: list[tuple[int, ...]], codec: str, groups: int, seed: int) -> None:
        bank = make_bank(codec, 2, **{f"block{b}": shape for b, shape in enumerate(several)})
        generator = torch.Generator().manual_seed(seed)
        coef = torch.randn(2, len(bank.blocks), groups, generator=generator, requires_grad=True)
        composed = bank.compose(coef, backend=backend, seed=seed)
        grads = {
            name: torch.randn(value.shape, generator=generator) for name, value in composed.items()
        }
        loss = sum((composed[name] * grads[name]).sum() for name in composed)
        (found,) = torch.autograd.grad(torch.as_tensor(loss) + 0 * coef.sum(), coef)
        deltas = deltas_of(bank)
        for b, (name, base) in enumerate(bank.base.items()):
            group = groups_of(name, base.numel(), groups, seed)
            rows = [delta[name].flatten() for delta in deltas]
            factors = coef.detach()[:, b].double()[:, group]
            expected = base.flatten().double() + sum(
                factor * row for factor, row in zip(factors, rows, strict=True)
            )
            # As for one coefficient: the bound is elementwise, of these coefficients' products. A
            # packed delta's scale times the coefficient rounds once more.
            scaled = [factor * row for factor, row in zip(factors, rows, strict=True)]
            allowed = compose_error(base.flatten(), [*scaled, *scaled], torch.ones(4))
            error = (composed[name].detach().flatten().double() - expected).abs()
            assert bool((error <= allowed).all())
            for i, row in enumerate(rows):
                products = grads[name].flatten().double() * row
                for k in group.unique()[:: max(1, groups // 20)].tolist():
                    its = group == k
                    bound = dot_error(grads[name].flatten()[its], row[its])
                    assert abs(found[i, b, k].item() - products[its].sum().item()) <= bound

    check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_chunks(backend: str) -> None:
    need(backend)
    size = (CHUNK_TILES + 1) * TILE + 48
    bank = make_bank("bf16", 2, small=(17,), large=(size,))
    coef = torch.randn(2, 2, 80, requires_grad=True)
    composed = bank.compose(coef, backend=backend)["large"]
    grad = torch.randn(size)
    (found,) = torch.autograd.grad(composed, coef, grad)
    group = groups_of("large", size, 80, 0)
    for i, delta in enumerate(deltas_of(bank)):
        row = delta["large"]
        exact = torch.zeros(80, dtype=torch.float64).index_add_(0, group, row * grad)
        for k in range(80):
            its = group == k
            assert abs(found[i, 1, k] - exact[k]) <= dot_error(grad[its], row[its])
    assert not found[:, 0].any()


@pytest.mark.parametrize("codec", ["bf16", "int3"])
def test_reference_in_float64(codec: str) -> None:
    """The reference is its own oracle: in float64 its sums are those of any order."""
    bank = make_bank(codec)
    (segment,) = bank.segments
    layout, stored = segment.layout, (segment.deltas, segment.scales, segment.codec.bits)
    keys = tile_keys(bank.blocks, layout, 5)
    coef = torch.randn(3, 3, 7, dtype=torch.float64)
    zeros = torch.zeros(layout.numel, dtype=torch.float64)
    found = arena_compose(reference, zeros, stored, coef, layout, keys)
    grad = torch.randn(layout.numel, dtype=torch.float64)
    dots = arena_coef_grad(reference, grad, stored, layout, 3, keys, 7, torch.float64)
    # Each is the transpose of the other.
    assert float((found * grad).sum()) == pytest.approx(float((coef * dots).sum()), rel=1e-12)
    deltas = deltas_of(bank)
    for b, (name, value) in enumerate(zip(bank.blocks, layout.split(found), strict=True)):
        group = groups_of(name, value.numel(), 7, 5).view(value.shape)
        expected = sum(coef[i, b][group] * delta[name] for i, delta in enumerate(deltas))
        assert torch.allclose(value, torch.as_tensor(expected), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_gradients_summed_over_groups_are_the_plain_gradient(codec: str) -> None:
    bank = make_bank(codec)
    grads = {name: torch.randn(t.shape) for name, t in bank.base.items()}

    def gradient(coef: Tensor) -> Tensor:
        coef = coef.requires_grad_()
        composed = bank.compose(coef)
        return torch.autograd.grad(list(composed.values()), coef, list(grads.values()))[0]

    plain = gradient(torch.zeros(3, 3))
    summed = gradient(torch.zeros(3, 3, 80)).double().sum(2)
    for i, delta in enumerate(deltas_of(bank)):
        for b, name in enumerate(bank.blocks):
            # Both are sums of the same products, each as far from the exact one as that allows.
            bound = 2 * dot_error(grads[name], delta[name])
            assert abs(summed[i, b] - plain[i, b].double()) <= bound
            assert abs(plain[i, b]) > bound


def test_second_derivatives_and_transforms() -> None:
    bank = make_bank("bf16", w=(70, 99))

    def loss(coef: Tensor) -> Tensor:
        return bank.compose(coef, seed=1)["w"].square().sum()

    coef = torch.randn(4, 3, 1, 5)
    rows = torch.func.vmap(torch.func.grad(loss))(coef)
    for row, its in zip(rows, coef, strict=True):
        leaf = its.clone().requires_grad_()
        assert torch.equal(row, torch.autograd.grad(loss(leaf), leaf)[0])
    leaf = coef[0].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(loss, leaf).view(15, 15)
    group = groups_of("w", 70 * 99, 5, 1)
    rows = torch.stack([delta["w"].flatten() for delta in deltas_of(bank)])
    moved = torch.stack([row * (group == k) for row in rows for k in range(5)])
    # Sums of 1,400 products of size 0.02, rounded at a relative 6e-8 each.
    assert torch.allclose(hessian.double(), 2 * moved @ moved.T, rtol=1e-5, atol=1e-4)


def test_compiled() -> None:
    bank = make_bank("auto:4")
    torch._dynamo.reset()
    coef = torch.randn(3, 3, 5, requires_grad=True)
    # Compiled first, when the keys of this seed are yet to be made.
    compiled = torch.compile(
        lambda coef: bank.compose(coef, seed=9), fullgraph=True, backend="aot_eager"
    )(coef)
    eager = bank.compose(coef, seed=9)
    assert all(same_bits(compiled[name], eager[name]) for name in eager)
    gradients = [
        torch.autograd.grad(sum(t.square().sum() for t in result.values()), coef)[0]
        for result in (eager, compiled)
    ]
    assert torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("groups", [0, 4097])
def test_numbers_of_groups_that_are_refused(groups: int) -> None:
    bank = make_bank()
    with pytest.raises(ValueError, match=f"{groups} groups .* expected 1 to 4096"):
        bank.compose(torch.zeros(3, 3, groups))


def test_coefficients_that_do_not_fit() -> None:
    bank = make_bank()
    with pytest.raises(ValueError, match=r"\(3, 2, 5\), expected \(3, 3\).*, or \(3, 3, K\) for K"):
        bank.compose(torch.zeros(3, 2, 5))
    base = list(bank.base.values())
    with pytest.raises(ValueError, match=r"coef has shape \(1, 3, 5\), expected \(1, 3\)"):
        ak.compose(base, [base], torch.zeros(1, 3, 5))
    with pytest.raises(TypeError):
        bank.compose(torch.zeros(3, 3, 5), seed=0.5)  # type: ignore[arg-type]


def test_the_same_file_and_seed_give_the_same_weights(tmp_path: Path) -> None:
    bank = make_bank("int4")
    coef = torch.randn(3, 3, 80)
    composed = bank.state_dict(coef, seed=11)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ak.TaskVectorBank.load(tmp_path / "bank.safetensors").state_dict(coef, seed=11)
    assert all(same_bits(loaded[name], composed[name]) for name in composed)
    other = bank.state_dict(coef, seed=12)
    assert not torch.equal(other["a"], composed["a"])
