from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from strategies import float32_sum, same_bits
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.files.tensors import digest, write_tensors

BASE = {
    "z.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),
    "a.bias": torch.tensor(0.5),
    "m.empty": torch.zeros(0, 2),
}


def make_vector(seed: int, dtype: torch.dtype = torch.float32, name: str = "") -> ak.TaskVector:
    generator = torch.Generator().manual_seed(seed)
    tuned = {key: t + torch.randn(t.shape, generator=generator) for key, t in BASE.items()}
    return ak.TaskVector.from_state_dicts(BASE, tuned, dtype, name)


def dense(vector: ak.TaskVector) -> Tensor:
    return torch.cat([delta.double().flatten() for delta in vector.deltas.values()])


def test_differences_are_taken_in_float32_and_rounded_once() -> None:
    base = {"w": torch.tensor([256.0, 1.0], dtype=torch.bfloat16)}
    tuned = {"w": torch.tensor([256.5, 1.001])}
    vector = ak.TaskVector.from_state_dicts(base, tuned)
    assert vector.deltas["w"].dtype == torch.bfloat16
    # In bfloat16 both differences would be lost: its steps are 2 at 256 and 2^-7 at 1.
    assert same_bits(vector.deltas["w"], torch.tensor([0.5, 1.001 - 1], dtype=torch.bfloat16))


def test_order_is_the_base_s() -> None:
    tuned = dict(reversed([(key, t + 1) for key, t in BASE.items()]))
    assert list(ak.TaskVector.from_state_dicts(BASE, tuned).deltas) == list(BASE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_laws(dtype: torch.dtype) -> None:
    a, b = make_vector(1, dtype), make_vector(2, dtype)
    rounding = torch.finfo(dtype).eps

    def near(left: ak.TaskVector, right: Tensor) -> bool:
        assert all(delta.dtype == dtype for delta in left.deltas.values())
        return bool(((dense(left) - right).abs() <= 2 * rounding * right.abs().max()).all())

    assert near(a + b, dense(a) + dense(b))
    assert near(a - b, dense(a) - dense(b))
    assert near(a * 0.3, 0.3 * dense(a))
    assert near(0.3 * a, 0.3 * dense(a))
    assert torch.equal(dense(-a), -dense(a))
    assert torch.equal(dense(a + b), dense(b + a))
    assert torch.equal(dense(a - b), -dense(b - a))
    assert dense(a - a).count_nonzero() == 0
    assert torch.equal(dense(a * 2), dense(a + a))
    assert torch.equal(dense(a * -1), dense(-a))


def test_metrics_in_float64() -> None:
    a, b = make_vector(1, torch.bfloat16), make_vector(2)
    dot = float(dense(a) @ dense(b))
    assert a.dot(b) == pytest.approx(dot, rel=1e-14)
    assert a.norm() == pytest.approx(float(dense(a).norm()), rel=1e-14)
    assert a.cosine(b) == pytest.approx(dot / float(dense(a).norm() * dense(b).norm()), rel=1e-14)
    assert a.cosine(a) == pytest.approx(1, rel=1e-14)
    assert a.cosine(-a) == pytest.approx(-1, rel=1e-14)
    assert a.cosine(a * 0) == 0.0
    # A float32 sum of these ends at 2^24: adding 1 to it changes nothing.
    ones = ak.TaskVector({"w": torch.ones(2**24 + 8)})
    assert ones.dot(ones) == 2**24 + 8


def test_small_float16_vectors_have_a_norm() -> None:
    """Squares of 1e-5 are below the smallest float16."""
    vector = ak.TaskVector({"w": (torch.randn(10_000) * 1e-5).half()})
    assert vector.norm() == pytest.approx(float(dense(vector).norm()), rel=1e-12)
    assert 0.9e-3 < vector.norm() < 1.1e-3
    assert vector.cosine(vector) == pytest.approx(1)


def test_mixed_dtypes_promote() -> None:
    total = make_vector(1, torch.bfloat16) + make_vector(2, torch.float16)
    assert {delta.dtype for delta in total.deltas.values()} == {torch.float32}


def test_operands_stay_as_they_were() -> None:
    a, b = make_vector(1), make_vector(2)
    before = dense(a), dense(b)
    a + b, a - b, a * 2, -a, a.dot(b)
    assert torch.equal(dense(a), before[0])
    assert torch.equal(dense(b), before[1])


def batch_norm_states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    base = {key: value.clone() for key, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5)
    module(torch.randn(8, 3))
    return base, module.state_dict()


def test_buffers_are_apart_and_integers_left_out() -> None:
    base, tuned = batch_norm_states()
    vector = ak.TaskVector.from_state_dicts(base, tuned, torch.float32)
    assert list(vector.deltas) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(vector.statistics) == ["1.running_mean", "1.running_var"]
    assert tuned["1.num_batches_tracked"] == 1
    difference = tuned["1.running_mean"] - base["1.running_mean"]
    assert torch.equal(vector.statistics["1.running_mean"], difference)
    applied = vector.apply_to(base)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert applied[name] is base[name]
    doubled = vector + vector
    assert torch.equal(doubled.statistics["1.running_mean"], 2 * difference)
    assert vector.norm() == pytest.approx(float(dense(vector).norm()))
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module.load_state_dict(base)
    assert torch.equal(vector.apply_to(module)[1].running_mean, base["1.running_mean"])


def test_state_dicts_that_do_not_match_are_listed_in_full() -> None:
    base = {"a": torch.ones(2), "b": torch.ones(2, 3), "c": torch.ones(1), "n": torch.tensor(1)}
    tuned = {"a": torch.ones(2), "b": torch.ones(3, 2), "x": torch.ones(1), "n": torch.tensor(2)}
    with pytest.raises(ValueError, match="do not match") as raised:
        ak.TaskVector.from_state_dicts(base, tuned)
    message = str(raised.value)
    for part in (
        "missing in the fine-tuned model: c",
        "not in the pre-trained model: x",
        "b: shape (3, 2), expected (2, 3)",
    ):
        assert part in message
    assert len(message.splitlines()) == 4
    # A tensor that became an integer one is named, not silently left out.
    with pytest.raises(ValueError, match=r"a: torch\.float32 in one model, torch\.int"):
        ak.TaskVector.from_state_dicts({"a": torch.ones(2)}, {"a": torch.ones(2).int()})


def test_long_lists_are_cut() -> None:
    base = {f"block.{i}": torch.ones(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"(?s)block\.19\n.*and 30 more"):
        ak.TaskVector.from_state_dicts(base, {})


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(torch.inf, torch.float32), (torch.nan, torch.bfloat16), (1e5, torch.float16)],
)
def test_non_finite_differences_are_refused(value: float, dtype: torch.dtype) -> None:
    base = {"good": torch.zeros(2), "bad.weight": torch.zeros(3)}
    tuned = {"good": torch.ones(2), "bad.weight": torch.tensor([0.0, value, 0.0])}
    with pytest.raises(ValueError, match=rf"finite.*\n.*bad\.weight \({dtype}\)"):
        ak.TaskVector.from_state_dicts(base, tuned, dtype)


def test_vectors_that_do_not_match() -> None:
    a = make_vector(1)
    fewer = ak.TaskVector({key: a.deltas[key] for key in ("z.weight", "a.bias")}, {}, a.base)
    reshaped = ak.TaskVector({**a.deltas, "z.weight": torch.ones(3, 4)}, {}, a.base)
    operations = (
        lambda x: a + x, lambda x: a - x, a.dot, a.cosine, lambda x: x + a,
    )  # fmt: skip
    for operation in operations:
        with pytest.raises(ValueError, match=r"only in one of the two: m\.empty"):
            operation(fewer)
        with pytest.raises(ValueError, match=r"z\.weight: shapes .*\(3, 4\)"):
            operation(reshaped)
    foreign = ak.TaskVector(a.deltas, {}, {**a.base, "a.bias": "0"})
    with pytest.raises(ValueError, match="different pre-trained models"):
        a + foreign
    assert torch.equal(dense(a + ak.TaskVector(a.deltas)), 2 * dense(a))


def test_apply_to_a_state_dict() -> None:
    vector = make_vector(1, torch.bfloat16)
    target = {**BASE, "other": torch.ones(2)}
    before = {key: value.clone() for key, value in target.items()}
    per_block = torch.tensor([0.5, -2.0, 1.0])
    for coef, factors in ((0.3, torch.full((3,), 0.3)), (per_block, per_block)):
        applied = vector.apply_to(target, coef)
        assert list(applied) == list(target)
        for j, key in enumerate(vector.deltas):
            expected = float32_sum(BASE[key], [vector.deltas[key]], factors[j : j + 1])
            assert torch.equal(applied[key], expected)
        assert applied["other"] is target["other"]
    assert all(torch.equal(target[key], value) for key, value in before.items())
    with pytest.raises(ValueError, match="coef"):
        vector.apply_to(target, torch.ones(2))


def test_apply_to_reaches_the_finetuned_model() -> None:
    base, tuned = batch_norm_states()
    vector = ak.TaskVector.from_state_dicts(base, tuned, torch.float32)
    applied = vector.apply_to(base)
    for key in vector.deltas:
        # Two roundings: of the difference and of the sum.
        assert torch.allclose(applied[key], tuned[key], rtol=3e-7, atol=1e-7)
    assert torch.equal(applied["0.weight"], base["0.weight"] + vector.deltas["0.weight"])


def test_apply_to_a_module_with_tied_weights() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    base = {key: value.clone() for key, value in module.state_dict().items()}
    vector = ak.TaskVector({key: torch.ones_like(value) for key, value in base.items()})
    applied = vector.apply_to(module, 0.5)
    assert applied is not module
    assert applied[1].weight is applied[0].weight
    for key, value in applied.state_dict().items():
        assert torch.equal(value, base[key] + 0.5)
    assert all(torch.equal(value, base[key]) for key, value in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in applied.parameters())


def test_apply_to_what_it_does_not_fit() -> None:
    vector = make_vector(1)
    target = {"z.weight": torch.zeros(3, 4), "m.empty": torch.zeros(0, 2)}
    with pytest.raises(ValueError, match="does not fit") as raised:
        vector.apply_to(target)
    assert "missing: a.bias" in str(raised.value)
    assert "z.weight: shape (3, 4), expected (4, 3)" in str(raised.value)
    with pytest.raises(ValueError, match=r"missing: z\.weight"):
        vector.apply_to(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = batch_norm_states()
    # Element sizes that safetensors would sort by, against the model's order.
    base = {"late.weight": torch.ones(2, dtype=torch.bfloat16), **base}
    tuned = {"late.weight": torch.zeros(2), **tuned}
    vector = ak.TaskVector.from_state_dicts(base, tuned, dtype, name="flèche bleue")
    vector.deltas["0.bias"] = vector.deltas["0.bias"].float()
    path = tmp_path / "v.safetensors"
    vector.save(path)
    loaded = ak.TaskVector.load(path)
    assert list(loaded.deltas) == list(vector.deltas)
    assert list(loaded.statistics) == list(vector.statistics)
    for mine, theirs in ((vector.deltas, loaded.deltas), (vector.statistics, loaded.statistics)):
        assert all(same_bits(mine[key], theirs[key]) for key in mine)
    assert (loaded.name, loaded.base) == (vector.name, vector.base)
    assert loaded.base["0.weight"] == digest(base["0.weight"])
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "atlas_kernels.task_vector"


def test_a_vector_without_a_name_or_base_takes_the_file_s(tmp_path: Path) -> None:
    ak.TaskVector({"b": torch.ones(1), "a": torch.ones(2)}).save(tmp_path / "cars.safetensors")
    loaded = ak.TaskVector.load(tmp_path / "cars.safetensors")
    assert (loaded.name, loaded.base) == ("cars", {})
    # Its order is its own, not the file's or that of the base's fingerprint.
    assert list(loaded.deltas) == ["b", "a"]


def test_loading_something_else(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    ak.TaskVector({"w": torch.tensor([1.0, torch.nan])}).save(path)
    with pytest.raises(ValueError, match=r"finite.*\n.*w"):
        ak.TaskVector.load(path)
    make_vector(1).save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match=r"v\.safetensors: not a readable"):
        ak.TaskVector.load(path)


def test_fingerprints_tell_dtype_shape_and_bits_apart() -> None:
    ones = torch.ones(2, 3)
    different = [
        ones, ones.t().contiguous(), ones.bfloat16(), ones.half(), torch.zeros(2, 3),
        -torch.zeros(2, 3), torch.ones(6), torch.zeros(0), torch.zeros(0, 2),
        torch.tensor(1.0), torch.ones(1),
    ]  # fmt: skip
    assert len({digest(tensor) for tensor in different}) == len(different)
    wide = torch.arange(12.0).view(3, 4)
    assert digest(wide.t()) == digest(wide.t().contiguous())
    assert digest(wide[:, ::2]) == digest(wide[:, ::2].clone())
    # Contiguous by definition, with a stride of 2.
    assert digest(torch.arange(2.0)[::2]) == digest(torch.zeros(1))
    assert digest(nn.Parameter(ones)) == digest(ones)


def test_a_file_that_lacks_a_block(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    write_tensors(path, {"delta.a": torch.ones(1)}, "task_vector", name="", base={}, blocks=["b"])
    with pytest.raises(FileFormatError, match=r"v\.safetensors: .*damaged.*'b'"):
        ak.TaskVector.load(path)
