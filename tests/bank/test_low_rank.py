from itertools import product as all_pairs
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import float64_sum, same_bits
from tolerances import EPS
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.bank.low_rank_segment import LowRankSegment
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.models.live_memory import PeakMemory
from atlas_kernels.ops.groups import group_of, slots, tile_keys
from atlas_kernels.ops.layout import TILE, Layout

SHAPES = {
    "one": (1, 1), "prime": (7, 13), "tall": (131, 3), "wide": (5, 257), "conv": (6, 2, 3, 3),
    "tiles": (70, 129),
}  # fmt: skip
# Of three task vectors, different in every block; 0 where a vector lacks the block.
RANKS = {
    "one": (1, 1, 2), "prime": (4, 2, 1), "tall": (3, 0, 5), "wide": (1, 8, 2), "conv": (2, 2, 0),
    "tiles": (16, 4, 7),
}  # fmt: skip
SCALES = (0.5, 1 / 3, -2.0)


def make_delta(shape: tuple[int, ...], rank: int, scale: float = 1.0) -> ak.LowRank:
    return ak.LowRank(torch.randn(shape[0], rank), 0.1 * torch.randn(rank, *shape[1:]), scale)


def make_vectors(ranks: dict[str, tuple[int, ...]] = RANKS) -> list[ak.TaskVector]:
    return [
        ak.TaskVector(
            {
                name: make_delta(SHAPES[name], its[i], SCALES[i])
                for name, its in ranks.items()
                if its[i]
            },
            name=f"task-{i}",
        )
        for i in range(3)
    ]


def make_base(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def make_bank(codec: str = "fp32", dtype: torch.dtype = torch.float32) -> Any:
    base, vectors = make_base(dtype), make_vectors()
    return base, vectors, ak.TaskVectorBank.from_task_vectors(base, vectors, codec=codec)


def exact(delta: ak.LowRank, dtype: torch.dtype = torch.float32) -> Tensor:
    """The product in float64, of factors rounded to a dtype."""
    up, down = delta.up.to(dtype).double(), delta.down.to(dtype).double()
    return delta.scale * (up @ down.flatten(1)).view(delta.shape)


def magnitude(delta: ak.LowRank) -> Tensor:
    """The sum of the magnitudes of the product's terms."""
    terms = delta.up.double().abs() @ delta.down.double().abs().flatten(1)
    return abs(delta.scale) * terms.view(delta.shape)


def composed_error(
    base: Tensor, expected: Tensor, deltas: list[ak.LowRank], coef: Tensor
) -> Tensor:
    """Bound for ``base + sum_i c_i s_i B_i A_i`` with R ranks in total.

    Each of the R terms of an element: s rounds to float32, c s and c s B and c s B A round, and so
    do at most R sums and the one with the base: R + 5 roundings of a magnitude that never exceeds
    |base| + sum_i |c_i| |s_i B_i| |A_i|. Then one to the base's dtype.
    """
    total = base.double().abs()
    for c, delta in zip(coef.double(), deltas, strict=True):
        total = total + c.abs() * magnitude(delta)
    steps = (sum(delta.rank for delta in deltas) + 5) * EPS / 2 * total
    rounding = 0.0 if base.dtype == torch.float32 else torch.finfo(base.dtype).eps / 2
    return 1.01 * (steps + rounding * (expected.abs() + steps))


def gradient_error(grad: Tensor, delta: ak.LowRank, ranks: int) -> float:
    """Bound for ``s <G, B A>``.

    A row of G times A sums `in` terms, times B sums `out` of those, the ranks are summed, with
    zeros of the other vectors between them; a product each, and s rounds.
    """
    steps = delta.shape[0] + delta.shape[1:].numel() + ranks + 4
    return 1.01 * steps * EPS / 2 * float((grad.double().abs() * magnitude(delta)).sum())


def rounded(delta: ak.LowRank, dtype: torch.dtype) -> ak.LowRank:
    return ak.LowRank(delta.up.to(dtype), delta.down.to(dtype), delta.scale)


# A delta on its own.


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (131, 3), (6, 2, 3, 3), (0, 4), (3, 0)])
def test_algebra_keeps_factors(shape: tuple[int, ...]) -> None:
    a, b = make_delta(shape, 3, 0.5), make_delta(shape, 5, -1 / 3)
    # Up to 8 products of numbers below 5, and as many sums, in float32.
    near = {"rtol": 0, "atol": 16 * EPS * 10}
    cases = [
        (a, exact(a), 3), (-a, -exact(a), 3), (a * 0.3, 0.3 * exact(a), 3),
        (a + b, exact(a) + exact(b), 8), (a - b, exact(a) - exact(b), 8),
    ]  # fmt: skip
    for result, expected, rank in cases:
        assert isinstance(result, ak.LowRank)
        assert (result.rank, result.shape) == (rank, shape)
        assert torch.allclose(result.dense().double(), expected, **near)
        assert torch.allclose(exact(result), expected, **near)
    assert a.dense().dtype == torch.float32


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (6, 2, 3, 3), (0, 4)])
def test_dot_without_products(shape: tuple[int, ...]) -> None:
    a, b, dense = make_delta(shape, 3, 0.5), make_delta(shape, 5, -1 / 3), torch.randn(shape)
    scale = float((magnitude(a) * magnitude(b)).sum())
    assert a.dot(b) == pytest.approx(float((exact(a) * exact(b)).sum()), rel=0, abs=1e-13 * scale)
    expected = float((exact(a) * dense.double()).sum())
    assert a.dot(dense) == pytest.approx(expected, rel=1e-11, abs=1e-13)


def test_error_of_rounded_factors() -> None:
    delta = make_delta((30, 50), 4, 0.5)
    stored = rounded(delta, torch.bfloat16)
    difference = exact(stored) - exact(delta)
    assert delta.error(stored) == pytest.approx(float(difference.norm() / exact(delta).norm()))
    assert 1e-4 < delta.error(stored) < 1e-2
    assert delta.error(delta) == 0.0
    # Rounding so slight that the difference of the two squared lengths would not show it.
    up = delta.up.clone()
    up[0, 0] *= 1 + 2**-23
    nearly = ak.LowRank(up, delta.down, delta.scale)
    difference = exact(nearly) - exact(delta)
    assert delta.error(nearly) == pytest.approx(float(difference.norm() / exact(delta).norm()))
    assert delta.error(nearly) > 0


@pytest.mark.parametrize(
    ("up", "down", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 2), r"\(3, 2\) and \(3, 2\) do not fit"),
        (torch.ones(3, 2, 1), torch.ones(2, 2), "do not fit"),
        (torch.ones(3, 2), torch.ones(2), "do not fit"),
        (torch.ones(3, 2).half(), torch.ones(2, 2), "factors differ: up is torch.float16"),
    ],
)
def test_factors_that_do_not_fit(up: Tensor, down: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ak.LowRank(up, down)


# Task vectors.


def test_vectors_keep_factors() -> None:
    first, second, _ = make_vectors({"prime": (4, 2, 1), "conv": (2, 2, 0)})
    for vector in (first + second, first - second, -first, 0.3 * first):
        assert all(isinstance(delta, ak.LowRank) for delta in vector.deltas.values())
    total = (first - 2 * second).dense()
    for name, delta in total.deltas.items():
        expected = exact(first.deltas[name]) - 2 * exact(second.deltas[name])
        assert torch.allclose(delta.double(), expected, rtol=0, atol=100 * EPS)
    # Those of dense copies, which are rounded once.
    dense = [vector.dense() for vector in (first, second)]
    for one, other in all_pairs((first, dense[0]), (second, dense[1])):
        assert one.dot(other) == pytest.approx(dense[0].dot(dense[1]), rel=1e-5)
        assert one.cosine(other) == pytest.approx(dense[0].cosine(dense[1]), rel=1e-5)
    assert first.norm() == pytest.approx(dense[0].norm(), rel=1e-6)
    assert (first - first).norm() < 1e-6 * first.norm()
    mixed = first + dense[1]
    for name, delta in mixed.deltas.items():
        expected = exact(first.deltas[name]) + exact(second.deltas[name])
        assert isinstance(delta, Tensor)
        assert torch.allclose(delta.double(), expected, rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_to(dtype: torch.dtype) -> None:
    (vector, *_) = make_vectors()
    base = make_base(dtype)
    coef = torch.randn(len(vector.deltas))
    applied = vector.apply_to(base, coef)
    for c, (name, delta) in zip(coef, vector.deltas.items(), strict=True):
        expected = base[name].double() + c.double() * exact(delta)
        allowed = composed_error(base[name], expected, [delta], c.reshape(1))
        assert applied[name].dtype == dtype
        assert ((applied[name].double() - expected).abs() <= allowed).all()


def test_a_vector_s_file_keeps_factors(tmp_path: Path) -> None:
    (vector, *_) = make_vectors()
    dense = {"first": torch.randn(3).bfloat16(), "last": torch.randn(2, 2)}
    factors = {**vector.deltas, "prime": rounded(vector.deltas["prime"], torch.float16)}
    vector = ak.TaskVector({"first": dense["first"], **factors, "last": dense["last"]}, name="x")
    vector.save(tmp_path / "v.safetensors")
    loaded = ak.TaskVector.load(tmp_path / "v.safetensors")
    assert list(loaded.deltas) == list(vector.deltas)
    for name, delta in vector.deltas.items():
        found = loaded.deltas[name]
        if isinstance(delta, Tensor):
            assert same_bits(found, delta)
        else:
            assert same_bits(found.up, delta.up)
            assert same_bits(found.down, delta.down)
            assert found.scale == delta.scale
    bad = ak.TaskVector({"w": ak.LowRank(torch.ones(2, 1), torch.tensor([[torch.inf, 1]]))})
    bad.save(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"finite.*\n.*w"):
        ak.TaskVector.load(tmp_path / "bad.safetensors")


# Banks.


@pytest.mark.parametrize("per_block", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_product_is_the_dense_sum(
    codec: str, dtype: torch.dtype, per_block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks of rows, the last one shorter.
    monkeypatch.setattr("atlas_kernels.bank.low_rank_segment._CHUNK", 300)
    base, vectors, bank = make_bank(codec, dtype)
    assert bank.blocks == bank.weights == tuple(SHAPES)
    assert all(isinstance(segment, LowRankSegment) for segment in bank.segments)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16}[codec]
    coef = torch.randn(3, len(SHAPES)) if per_block else torch.randn(3)
    columns = coef if per_block else coef.unsqueeze(1).expand(-1, len(SHAPES))
    leaf = coef.clone().requires_grad_()
    composed = bank.compose(leaf)
    assert list(composed) == list(SHAPES)
    cotangents = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    (gradient,) = torch.autograd.grad(
        [composed[name] for name in SHAPES], leaf, list(cotangents.values())
    )
    expected_gradient = torch.zeros(3, len(SHAPES), dtype=torch.float64)
    bound = torch.zeros_like(expected_gradient)
    for b, name in enumerate(SHAPES):
        present = [i for i in range(3) if RANKS[name][i]]
        deltas = [rounded(vectors[i].deltas[name], stored) for i in present]
        expected = float64_sum(base[name], [exact(delta) for delta in deltas], columns[present, b])
        allowed = composed_error(base[name], expected, deltas, columns[present, b])
        assert composed[name].dtype == dtype
        assert ((composed[name].double() - expected).abs() <= allowed).all(), name
        assert (expected - base[name].double()).abs().max() > 100 * EPS
        for i, delta in zip(present, deltas, strict=True):
            grad = cotangents[name]
            expected_gradient[i, b] = (grad.double() * exact(delta)).sum()
            bound[i, b] = gradient_error(grad, delta, sum(RANKS[name]))
    if not per_block:
        # The sum over blocks rounds besides.
        bound = bound.sum(1) + len(SHAPES) * EPS / 2 * expected_gradient.abs().sum(1)
        expected_gradient = expected_gradient.sum(1)
    assert ((gradient.double() - expected_gradient).abs() <= bound + 1e-30).all()
    assert gradient.abs().max() > 1e-2


def test_combine_adds_factors_without_the_base() -> None:
    base = {name: tensor + 1e8 for name, tensor in make_base().items()}
    vectors = make_vectors()
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32")
    coef = torch.randn(3, len(SHAPES))
    combined = bank.combine(coef)
    assert list(combined) == list(SHAPES)
    for b, (name, ranks) in enumerate(RANKS.items()):
        present = [i for i in range(3) if ranks[i]]
        deltas = [vectors[i].deltas[name] for i in present]
        zero = torch.zeros(SHAPES[name])
        expected = float64_sum(zero, [exact(delta) for delta in deltas], coef[present, b])
        allowed = composed_error(zero, expected, deltas, coef[present, b])
        assert ((combined[name].double() - expected).abs() <= allowed).all(), name
        assert expected.abs().max() > 1e-3
    factorwise = factorwise_bank(Net(), net_vectors())
    with pytest.raises(ValueError, match="lora='product'"):
        factorwise.combine(torch.zeros(2, len(factorwise.blocks)))


def test_zero_coefficients_give_the_base() -> None:
    base, _, bank = make_bank(dtype=torch.bfloat16)
    composed = bank.compose(torch.zeros(3))
    assert all(same_bits(composed[name], base[name]) for name in base)
    assert all(same_bits(bank.base[name], base[name]) for name in base)


def test_second_derivatives() -> None:
    """Of ``|composed|^2 / 2``: ``<delta_i, delta_j>``, block by block."""
    _, vectors, bank = make_bank()
    coef = torch.randn(3, len(SHAPES), requires_grad=True)
    loss = sum((block**2).sum() / 2 for block in bank.compose(coef).values())
    (gradient,) = torch.autograd.grad(loss, coef, create_graph=True)
    direction = torch.randn_like(coef)
    (second,) = torch.autograd.grad(gradient, coef, direction)
    for b, name in enumerate(SHAPES):
        deltas = [vector.deltas.get(name) for vector in vectors]
        for i, mine in enumerate(deltas):
            terms = [
                (float(direction[j, b]) * (exact(mine) * exact(theirs)).sum().item())
                for j, theirs in enumerate(deltas)
                if mine is not None and theirs is not None
            ]
            scale = sum(
                float(direction[j, b].abs() * (magnitude(mine) * magnitude(theirs)).sum())
                for j, theirs in enumerate(deltas)
                if mine is not None and theirs is not None
            )
            # The composed direction is a product of R + 5 roundings, the gradient as above.
            shape = SHAPES[name]
            steps = 2 * sum(RANKS[name]) + shape[0] + torch.Size(shape[1:]).numel() + 9
            assert second[i, b].item() == pytest.approx(
                sum(terms), rel=0, abs=1.01 * steps * EPS / 2 * scale + 1e-30
            )
    assert second.abs().max() > 1e-2


def test_transforms_and_autocast() -> None:
    _, _, bank = make_bank()
    coef = torch.randn(4, 3, len(SHAPES))

    def loss(coef: Tensor) -> Tensor:
        return sum(block.square().sum() for block in bank.compose(coef).values())

    rows = torch.func.vmap(torch.func.grad(loss))(coef)
    for row, its in zip(rows, coef, strict=True):
        leaf = its.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(leaf), leaf)
        assert torch.equal(row, alone)
    plain = bank.compose(coef[0])
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank.compose(coef[0])
        leaf = coef[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert all(same_bits(cast[name], plain[name]) for name in plain)
    assert torch.equal(gradient, rows[0])


def test_compiled() -> None:
    base = {**make_base(), "dense": torch.randn(20)}
    vectors = make_vectors()
    vectors[0].deltas["dense"] = torch.randn(20)
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors)
    torch._dynamo.reset()
    compiled = torch.compile(bank.compose, fullgraph=True, backend="aot_eager")
    coef = torch.randn(3, len(bank.blocks), requires_grad=True)
    results = [function(coef) for function in (bank.compose, compiled)]
    assert all(torch.equal(results[0][block], results[1][block]) for block in bank.blocks)
    gradients = [
        torch.autograd.grad(sum(t.square().sum() for t in result.values()), coef)[0]
        for result in results
    ]
    assert torch.allclose(*gradients, rtol=1e-5)


def test_mixed_bank() -> None:
    """Dense blocks between low-rank ones, and bases of several dtypes, keep their columns."""
    base = {
        "one": torch.randn(7, 13), "two": torch.randn(31), "three": torch.randn(5, 3).bfloat16(),
        "four": torch.randn(4, 4), "idle": torch.randn(3, 3),
    }  # fmt: skip
    vectors = [
        ak.TaskVector(
            {
                "one": make_delta((7, 13), 2 + i),
                "two": torch.randn(31),
                "three": make_delta((5, 3), 1),
                "four": torch.randn(4, 4) if i else make_delta((4, 4), 2) * 0.0,
                "idle": ak.LowRank(torch.zeros(3, 2), torch.randn(2, 3)),
            },
            name=f"v{i}",
        )
        for i in range(2)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32")
    assert bank.blocks == ("one", "two", "three", "four")
    assert list(bank.constants) == ["idle"]
    kinds = {
        bank.blocks[j]: type(segment).__name__ for segment in bank.segments for j in segment.columns
    }
    assert kinds == {
        "one": "LowRankSegment", "two": "Segment", "three": "LowRankSegment", "four": "Segment",
    }  # fmt: skip
    coef = torch.randn(2, 4)
    composed = bank.compose(coef)
    dense = ak.TaskVectorBank.from_task_vectors(base, [v.dense() for v in vectors], codec="fp32")
    assert dense.blocks == bank.blocks
    for b, (name, expected) in enumerate(dense.compose(coef).items()):
        deltas = [v.deltas[name] for v in vectors]
        if kinds[name] == "Segment":
            assert same_bits(composed[name], expected)
        else:
            oracle = float64_sum(base[name], [exact(d) for d in deltas], coef[:, b])
            allowed = composed_error(base[name], oracle, deltas, coef[:, b])
            assert ((composed[name].double() - oracle).abs() <= allowed).all()
            assert not same_bits(composed[name], base[name])


def test_blocks_one_by_one() -> None:
    _, _, bank = make_bank("bf16", torch.bfloat16)
    (segment,) = bank.segments
    coef = torch.randn(3, len(SHAPES))
    whole, gradient = segment.compose(coef), segment.coef_grad(segment.base)
    views = segment.layout.split(whole)
    for k, part in enumerate(segment.blocks()):
        assert part.columns == (k,)
        assert part.base.data_ptr() == bank.base[bank.blocks[k]].data_ptr()
        assert same_bits(part.compose(coef[:, k]).view(views[k].shape), views[k])
        assert torch.equal(part.coef_grad(part.base)[:, 0], gradient[:, k])
    for wrong in ("nonsense", "cuda"):
        if wrong not in ak.backends() or ak.backends()[wrong] != "available":
            with pytest.raises((ValueError, ak.BackendUnavailableError)):
                segment.compose(coef, wrong)


def test_size_and_errors() -> None:
    _, vectors, bank = make_bank("bf16")
    shapes = {name: (shape[0], torch.Size(shape[1:]).numel()) for name, shape in SHAPES.items()}
    elements = sum(out * width for out, width in shapes.values())
    factors = sum(sum(RANKS[name]) * (out + width) for name, (out, width) in shapes.items())
    assert bank.nbytes == 4 * elements + 2 * factors
    assert bank.bits_per_weight == pytest.approx(16 * factors / (3 * elements))
    for b, name in enumerate(SHAPES):
        for i, vector in enumerate(vectors):
            delta = vector.deltas.get(name)
            expected = 0.0
            if delta is not None:
                near = exact(rounded(delta, torch.bfloat16))
                expected = float((near - exact(delta)).norm() / exact(delta).norm())
            assert bank.errors[i, b].item() == pytest.approx(expected, rel=1e-4)
    assert "6 blocks, codec='bf16'" in repr(bank)


@pytest.mark.parametrize("codec", ["int4", "sign", "auto:2"])
def test_packed_codecs_leave_factors_in_bf16(codec: str) -> None:
    base, vectors, reference = make_bank("bf16")
    base["dense"] = torch.randn(50, 40)
    vectors[1].deltas["dense"] = torch.randn(50, 40)
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=codec)
    assert bank.codecs[:-1] == ("bf16",) * len(SHAPES)
    assert bank.codecs[-1] in ("int4", "sign")
    coef = torch.randn(3, len(bank.blocks))
    composed, expected = bank.compose(coef), reference.compose(coef[:, :-1])
    assert all(same_bits(composed[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("way", ["save", "pack"])
@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("lora", ["product", "factorwise"])
def test_files(lora: Any, mmap: bool, way: str, tmp_path: Path) -> None:
    ranks = {"prime": (3, 3, 3), "conv": (2, 2, 0), "tiles": (4, 4, 4)}
    base = {**make_base(), "dense": torch.randn(33)}
    vectors = [v * (SCALES[0] / SCALES[i]) for i, v in enumerate(make_vectors(ranks))]
    vectors[1].deltas["dense"] = torch.randn(33)
    names = {f"v{i}": vector for i, vector in enumerate(vectors)}
    bank = ak.TaskVectorBank.from_task_vectors(base, names, lora=lora)
    path = tmp_path / "bank.safetensors"
    if way == "save":
        bank.save(path)
    else:
        ak.TaskVectorBank.pack(path, base, names, lora=lora)
    loaded = ak.TaskVectorBank.load(path, mmap=mmap)
    assert (loaded.blocks, loaded.weights) == (bank.blocks, bank.weights)
    assert loaded.fields == bank.fields
    assert torch.equal(loaded.errors, bank.errors)
    coef = torch.randn(3, len(bank.blocks))
    results = [which.state_dict(coef) for which in (bank, loaded)]
    assert results[0].keys() == results[1].keys() == base.keys()
    assert all(same_bits(results[0][name], results[1][name]) for name in base)
    moved = loaded.to("meta")
    assert (moved.nbytes, moved.weights) == (bank.nbytes, bank.weights)
    if lora == "product":
        data = bytearray(path.read_bytes())
        needle = bank.segments[1].factors.view(torch.uint8).numpy().tobytes()
        data[data.index(needle) + 5] ^= 1
        path.write_bytes(data)
        with pytest.raises(FileFormatError, match="checksum of the factors"):
            ak.TaskVectorBank.load(path, mmap=False)


def test_vectors_that_do_not_fit() -> None:
    base = {"a": torch.randn(4, 3), "b": torch.randn(3, 3)}
    pack = ak.TaskVectorBank.from_task_vectors
    factors = ak.TaskVector({"a": make_delta((4, 3), 2)}, name="lora")
    dense = ak.TaskVector({"a": torch.randn(4, 3)}, name="full")
    with pytest.raises(
        ValueError, match=r"'a' is low-rank in task vector 'lora', but dense in 'full': .*dense\(\)"
    ):
        pack(base, [dense, factors])
    assert pack(base, [dense, factors.dense()]).blocks == ("a",)
    reshaped = ak.TaskVector({"a": make_delta((3, 4), 2)}, name="t")
    with pytest.raises(ValueError, match=r"'t', block 'a' has shape \(3, 4\), expected \(4, 3\)"):
        pack(base, [reshaped])
    elsewhere = ak.TaskVector({"c": make_delta((3, 4), 2)}, name="t")
    with pytest.raises(ValueError, match="the base has no such parameter"):
        pack(base, [elsewhere])
    huge = ak.TaskVector({"a": ak.LowRank(torch.full((4, 1), 1e5), torch.ones(1, 3))}, name="t")
    with pytest.raises(ValueError, match="block 'a' is not finite when stored in fp16"):
        pack(base, [huge], codec="fp16")
    with pytest.raises(ValueError, match="unknown lora 'svd'"):
        pack(base, [factors], lora="svd")


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2048), (torch.bfloat16, 4096)])
def test_memory_is_that_of_the_block_and_its_gradient(dtype: torch.dtype, size: int) -> None:
    base = {"w": torch.ones(size, size, dtype=dtype)}
    vectors = {str(i): ak.TaskVector({"w": make_delta((size, size), 4)}) for i in range(20)}
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors)
    (block,) = bank.segments[0].blocks()
    coef = torch.zeros(20, requires_grad=True)
    with PeakMemory() as memory:
        composed = block.compose(coef)
        grad = torch.ones_like(composed)
        torch.autograd.grad(composed, coef, grad)
    assert memory.peak < 3 * base["w"].nbytes


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 7)
        self.second = nn.Linear(7, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).relu())


def net_vectors(rank: tuple[int, int] = (2, 2)) -> dict[str, ak.TaskVector]:
    return {
        f"v{i}": ak.TaskVector(
            {
                "first.weight": make_delta((7, 13), its, 0.5),
                "first.bias": torch.randn(7),
                "second.weight": make_delta((5, 7), its, 2.0),
            }
        )
        for i, its in enumerate(rank)
    }


@pytest.mark.parametrize("options", [{}, {"granularity": "partition", "partitions": 3, "seed": 4}])
@pytest.mark.parametrize("memory", ["whole", "recompute", "stream"])
def test_composed_model(memory: Any, options: dict[str, Any], tmp_path: Path) -> None:
    module, vectors = Net(), net_vectors((2, 3))
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors, codec="fp32")
    bank.save(tmp_path / "bank.safetensors")
    bank = ak.TaskVectorBank.load(tmp_path / "bank.safetensors")
    dense = ak.TaskVectorBank.from_task_vectors(
        module, {name: vector.dense() for name, vector in vectors.items()}, codec="fp32"
    )
    inputs, coef = torch.randn(4, 13), torch.randn(2, 3, *(3,) * bool(options))
    results = []
    for which, mode in ((bank, memory), (dense, "whole")):
        copy = Net()
        copy.load_state_dict(module.state_dict())
        model = ak.ComposedModel(copy, which, memory=mode, **options)
        with torch.no_grad():
            model.coef.copy_(coef)
        output = model(inputs)
        output.square().sum().backward()
        results.append((output.detach(), model.coef.grad))
    # Two layers of float32 rounding.
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-3)
    assert results[0][1].abs().median() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partitions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements of the products have the coefficients of their groups; several chunks of tiles."""
    monkeypatch.setattr("atlas_kernels.bank.low_rank_segment.CHUNK_TILES", 1)
    # Rows that are shorter and longer than a tile, and end at none.
    shapes = {**SHAPES, "rows": (3, 5000)}
    monkeypatch.setattr(f"{__name__}.SHAPES", shapes)
    base, vectors = make_base(dtype), make_vectors({**RANKS, "rows": (2, 1, 3)})
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32")
    (segment,) = bank.segments
    assert isinstance(segment, LowRankSegment)
    coef = torch.randn(3, len(shapes), 5, requires_grad=True)
    composed = bank.compose(coef, seed=6)
    cotangents = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    (gradient,) = torch.autograd.grad(
        [composed[name] for name in shapes], coef, list(cotangents.values())
    )
    factors = coef.detach().double()
    for b, (name, parts) in enumerate(zip(shapes, segment.blocks(), strict=True)):
        key = tile_keys([name], parts.layout, 6)
        group = group_of(slots(key, TILE).flatten(), 5)[: base[name].numel()].view(shapes[name])
        present = [i for i, vector in enumerate(vectors) if name in vector.deltas]
        deltas = [vectors[i].deltas[name] for i in present]
        expected = base[name].double() + sum(
            factors[i, b][group] * exact(delta) for i, delta in zip(present, deltas, strict=True)
        )
        # As if the largest of the coefficients were everywhere.
        largest = factors[present, b].abs().amax(1)
        allowed = composed_error(base[name], expected, deltas, largest)
        assert ((composed[name].double() - expected).abs() <= allowed).all(), name
        for i, delta in zip(present, deltas, strict=True):
            for k in range(5):
                grad = cotangents[name] * (group == k)
                dot = (grad.double() * exact(delta)).sum()
                bound = gradient_error(grad, delta, sum(its.rank for its in deltas))
                assert abs(gradient[i, b, k] - dot) <= bound + 1e-30
        # Block by block the same bits.
        alone = parts.compose(coef[:, b : b + 1], tile_key=key).view(shapes[name])
        assert same_bits(alone, composed[name])
        its = parts.coef_grad(cotangents[name].flatten(), tile_key=key, groups=5)
        assert torch.equal(its, gradient[:, b : b + 1])


# A coefficient for every factor.


def factorwise_bank(base: Any, vectors: Any) -> ak.TaskVectorBank:
    return ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32", lora="factorwise")


def initial(bank: ak.TaskVectorBank, block: str) -> Tensor:
    """A_0, from the bank's own files and nothing else: the factor at zero coefficients."""
    column = bank.blocks.index(f"{block}.lora_A")
    (segment,) = (s for s in bank.segments if column in s.columns)
    return segment.layout.split(segment.base)[segment.columns.index(column)]


def test_factorwise_adds_the_cross_terms_and_those_of_the_initial_factor() -> None:
    base = {"w": torch.randn(7, 13), "bias": torch.randn(9), "conv": torch.randn(6, 2, 3, 3)}
    vectors = [
        ak.TaskVector(
            {
                "w": make_delta((7, 13), 3, 0.5),
                "bias": torch.randn(9),
                "conv": make_delta((6, 2, 3, 3), 2, 2.0),
            },
            name=f"v{i}",
        )
        for i in range(3)
    ]
    bank = factorwise_bank(base, vectors)
    assert bank.blocks == ("w.lora_A", "w.lora_B", "bias", "conv.lora_A", "conv.lora_B")
    assert bank.weights == ("bias", "w", "conv")
    assert bank.base.keys() == {"bias", "w", "conv"}
    assert all(same_bits(bank.base[name], base[name]) for name in base)
    coef = torch.randn(3, 5)
    composed = bank.compose(coef)
    assert tuple(composed) == bank.weights
    linear = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32")
    product = linear.compose(
        torch.stack([coef[:, 0] * coef[:, 1], coef[:, 2], coef[:, 3] * coef[:, 4]], 1)
    )
    assert same_bits(composed["bias"], product["bias"])
    for name, (a, b) in {"w": (0, 1), "conv": (3, 4)}.items():
        deltas = [vector.deltas[name] for vector in vectors]
        extra = torch.zeros(deltas[0].shape, dtype=torch.float64)
        for i, mine in enumerate(deltas):
            start = ak.LowRank(mine.up, initial(bank, name), mine.scale)
            extra += coef[i, b].double() * exact(start)
            for j, theirs in enumerate(deltas):
                if i != j:
                    cross = ak.LowRank(mine.up, theirs.down, mine.scale)
                    extra += coef[i, b].double() * coef[j, a].double() * exact(cross)
        # Numbers below 50 through fewer than 20 roundings, twice.
        assert torch.allclose(composed[name].double() - product[name].double(), extra, atol=1e-4)
        assert extra.abs().max() > 0.1


def test_factorwise_gradients() -> None:
    base = {"w": torch.randn(7, 13)}
    vectors = [ak.TaskVector({"w": make_delta((7, 13), 3, 0.5)}, name=f"v{i}") for i in range(2)]
    bank = factorwise_bank(base, vectors)
    grad = torch.randn(7, 13)
    ups = torch.stack([vector.deltas["w"].up for vector in vectors]).double()
    downs = torch.stack([vector.deltas["w"].down for vector in vectors]).double()

    def oracle(coef: Tensor) -> Tensor:
        up = torch.einsum("n,nor->or", coef[:, 1], ups)
        down = initial(bank, "w").double() + torch.einsum("n,nri->ri", coef[:, 0], downs)
        return base["w"].double() + 0.5 * up @ down

    for coef in (torch.zeros(2, 2), torch.randn(2, 2)):
        leaf, double = coef.clone().requires_grad_(), coef.double().requires_grad_()
        ours = [bank.compose(leaf)["w"], oracle(double)]
        firsts = [
            torch.autograd.grad((weight * grad).sum() + (weight**2).sum(), its, create_graph=True)[
                0
            ]
            for weight, its in zip(ours, (leaf, double), strict=True)
        ]
        assert torch.allclose(firsts[0].double(), firsts[1], rtol=1e-4, atol=1e-4)
        seconds = [
            torch.autograd.grad((first**2).sum(), its)[0]
            for first, its in zip(firsts, (leaf, double), strict=True)
        ]
        assert torch.allclose(seconds[0].double(), seconds[1], rtol=1e-3, atol=1e-3)
        if not coef.count_nonzero():
            assert same_bits(ours[0].detach(), base["w"])
            assert firsts[0][:, 0].count_nonzero() == 0
            assert firsts[0][:, 1].abs().min() > 1e-3


def test_the_initial_factor_is_kaiming_uniform_and_depends_on_the_name_alone() -> None:
    base = {"w": torch.randn(70, 400), "v": torch.randn(70, 400)}
    vector = ak.TaskVector({k: make_delta((70, 400), 16) for k in base}, name="t")
    bank = factorwise_bank(base, [vector])
    first = initial(bank, "w")
    # Uniform in +- sqrt(6 / ((1 + 5) * in)) = 1 / 20, with a standard deviation of a sqrt(1/3) of
    # it; 6400 samples hit both within a few percent.
    assert 0.0499 < first.abs().max() <= 0.05
    assert first.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.03)
    assert not torch.equal(first, initial(bank, "v"))
    torch.manual_seed(5)
    alone = ak.TaskVectorBank.from_task_vectors(
        base, [vector], codec="fp32", lora="factorwise", include="w"
    )
    assert alone.blocks == ("w.lora_A", "w.lora_B")
    assert same_bits(initial(alone, "w"), first)


@pytest.mark.parametrize("change", [{"rank": 3}, {"scale": 1.0}])
def test_factorwise_takes_one_rank_and_scale(change: dict[str, Any]) -> None:
    plain = {"rank": 2, "scale": 0.5}
    base = {"w": torch.randn(7, 13)}
    vectors = {
        name: ak.TaskVector({"w": make_delta((7, 13), **{**plain, **its})})
        for name, its in (("a", {}), ("b", change))
    }
    with pytest.raises(
        ValueError, match=r"block 'w' has rank 2 and scale 0.5 in .* 'a', rank .*b'"
    ):
        factorwise_bank(base, vectors)
    assert ak.TaskVectorBank.from_task_vectors(base, vectors).blocks == ("w",)


def test_the_bank_s_weights_are_its_own() -> None:
    module = Net()
    for bank in (
        factorwise_bank(module, net_vectors()),
        ak.TaskVectorBank.from_task_vectors(module, net_vectors()),
    ):
        before = {name: value.clone() for name, value in bank.base.items()}
        nn.init.normal_(module.first.weight)
        assert all(same_bits(bank.base[name], value) for name, value in before.items())


def test_factorwise_fingerprints_are_of_the_base() -> None:
    vectors = net_vectors()
    banks = [factorwise_bank(module, vectors) for module in (Net(), Net())]
    names = banks[0].blocks
    digests = [dict(zip(names, bank.base_digests, strict=True)) for bank in banks]
    assert all(digests[0][name] != digests[1][name] for name in names)


def test_factors_have_partitions_of_their_own() -> None:
    base, vectors = {"w": torch.randn(7, 13)}, {"v": ak.TaskVector({"w": make_delta((7, 13), 3)})}
    bank = factorwise_bank(base, vectors)
    assert bank.blocks == ("w.lora_A", "w.lora_B")
    coef = torch.randn(1, 2, 5)
    down, up = initial(bank, "w").double(), torch.zeros(7, 3).double()
    for b, (name, factor) in enumerate(zip(bank.blocks, (down, up), strict=True)):
        layout = Layout.from_shapes([factor.shape])
        group = group_of(slots(tile_keys([name], layout, 0), factor.numel()), 5)
        delta = vectors["v"].deltas["w"]
        trained = delta.down if name.endswith("A") else delta.up
        factor += coef[0, b].double()[group.view(factor.shape)] * trained.double()
    expected = base["w"].double() + up @ down
    # Three products of two rounded factors each, of size one.
    assert torch.allclose(bank.compose(coef)["w"].double(), expected, rtol=1e-5, atol=1e-5)


def test_factorwise_model() -> None:
    module = Net()
    bank = factorwise_bank(module, net_vectors())
    base = {name: value.clone() for name, value in module.state_dict().items()}
    for memory in ("recompute", "stream"):
        with pytest.raises(ValueError, match=rf"memory='{memory}' .*use memory='whole'"):
            ak.ComposedModel(module, bank, memory=memory)
    model = ak.ComposedModel(module, bank)
    inputs = torch.randn(4, 13)
    start = Net()
    start.load_state_dict(base)
    assert torch.equal(model(inputs), start(inputs))
    with torch.no_grad():
        model.coef.copy_(torch.randn(model.coef.shape))
    composed = bank.compose(model.coef)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank.compose(model.coef)
    assert all(same_bits(cast[name], composed[name]) for name in composed)
    merged = model.merge()
    assert torch.equal(merged(inputs), model(inputs))
    assert not torch.equal(merged.first.weight, base["first.weight"])
    assert torch.equal(merged.second.bias, base["second.bias"])


def test_the_bound_would_show_a_missing_task_vector() -> None:
    base, vectors, bank = make_bank()
    coef = torch.randn(3, len(SHAPES))
    b = bank.blocks.index("tiles")
    deltas = [vector.deltas["tiles"] for vector in vectors]
    without = float64_sum(base["tiles"], [exact(delta) for delta in deltas[:2]], coef[:2, b])
    allowed = composed_error(base["tiles"], without, deltas, coef[:, b])
    difference = (bank.compose(coef)["tiles"].double() - without).abs()
    assert (difference > 100 * allowed).double().mean() > 0.9
