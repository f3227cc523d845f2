"""The first-order expansion: its value, its derivative, its linearity, and that it learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import same_bits
from tolerances import EPS
from torch import Tensor, nn
from torch.func import functional_call

import atlas_kernels as ak
from atlas_kernels.learn.arithmetic import JointTask, add, negate
from atlas_kernels.learn.few_shot import ImageBatches, accuracy, classify
from atlas_kernels.learn.trainer import Recipe, learn
from atlas_kernels.models.linearized import expand


class Net(nn.Module):
    """Tied weights, BatchNorm, dropout, attention, a frozen block; two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.attend = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.embed(tokens).unsqueeze(0)
        hidden = self.attend(hidden, hidden, hidden, need_weights=False)[0].squeeze(0)
        hidden = self.frozen(torch.tanh(self.hidden(hidden)))
        result: Tensor = scale * self.out(self.norm(hidden))
        return result


TOKENS = torch.arange(9)


def vision(**config: Any) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
    clip = open_clip.CLIP(8, {"image_size": 32, **config}, text)
    return clip.visual.eval()


# What makes the module, and its arguments.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "tied": (Net, (TOKENS,)),
    "ViT": (
        lambda: vision(layers=2, width=16, patch_size=16, head_width=8),
        (torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)),),
    ),
    "ResNet": (
        lambda: vision(layers=(1, 1, 1, 1), width=8, head_width=8),
        (torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)),),
    ),
}


def make_vectors(module: nn.Module, count: int = 3, size: float = 0.1) -> list[ak.TaskVector]:
    names = [name for name, _ in module.named_parameters() if not name.startswith("frozen")]
    return [
        ak.TaskVector(
            {name: size * torch.randn(module.get_parameter(name).shape) for name in names},
            name=f"v{i}",
        )
        for i in range(count)
    ]


def make_model(case: str = "tied", **kwargs: Any) -> tuple[nn.Module, ak.LinearizedModel]:
    """The original module, in eval mode, and a model on a copy of it."""
    module = CASES[case][0]()
    with torch.no_grad():
        # Some start at zero, and would hide what lies before them.
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.5, 2)
    # What requires gradients takes other paths through attention, with other last bits.
    module.eval().requires_grad_(False)
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module), codec="fp32")
    return module, ak.LinearizedModel(copy.deepcopy(module).train(), bank, **kwargs)


def randomise(model: ak.LinearizedModel) -> None:
    with torch.no_grad():
        model.coef.normal_()


@pytest.mark.parametrize("case", CASES)
def test_starts_as_the_base_bit_for_bit_in_either_mode(case: str) -> None:
    module, model = make_model(case)
    arguments = CASES[case][1]
    expected = module(*arguments)
    assert same_bits(model(*arguments), expected)
    for train in (True, False):
        assert same_bits(model.train(train)(*arguments), expected)
        assert model.training == train
        assert not model.module.training
    with torch.no_grad():
        assert same_bits(model(*arguments), module(*arguments))
    with torch.inference_mode():
        assert same_bits(model(*arguments), module(*arguments))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, model.module.get_buffer(name)), name


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_against_float64(case: str) -> None:
    """The change is f's derivative along the sum; its gradient in coef that of <R, f> along tau."""
    module, model = make_model(case)
    arguments = CASES[case][1]
    randomise(model)
    output = model(*arguments)
    cotangent = torch.randn(output.shape)
    (cotangent * output).sum().backward()
    assert model.coef.grad is not None

    double = copy.deepcopy(module).double().requires_grad_(True)
    base = {block: double.get_parameter(block) for block in model.bank.blocks}
    its = tuple(a.double() if a.is_floating_point() else a for a in arguments)
    weights = {name: change.double() for name, change in model.weights().items()}

    def moved(step: float) -> Tensor:
        with torch.no_grad():
            at = {block: base[block] + step * change for block, change in weights.items()}
            found: Tensor = functional_call(double, at, its)
        return found

    # Off by step^2 times a third derivative, and by roundings of 1e-16 / step.
    change = (moved(1e-5) - moved(-1e-5)) / 2e-5
    expected = double(*its)
    # Some tens of layers, of roundings of either sign.
    assert (output - expected - change).abs().max() < 100 * EPS * (change.abs().max() + 1)
    assert change.abs().max() > 0.1

    gradients = torch.autograd.grad((cotangent * expected).sum(), list(base.values()))
    for b, (block, gradient) in enumerate(zip(base, gradients, strict=True)):
        for i in range(len(model.bank.names)):
            unit = torch.zeros_like(model.coef)
            unit[i, b] = 1
            terms = gradient * model.bank.combine(unit)[block]
            # Float32 gradients are off by roundings relative to their largest element, or where
            # terms cancel (a key's bias changes nothing) to those of other blocks, near 1.
            allowed = 100 * EPS * (float(gradient.abs().max() * terms.numel() ** 0.5) + 0.1)
            assert abs(model.coef.grad[i, b] - terms.sum()) < allowed, (i, block)
    assert model.coef.grad.abs().max() > 0.1


@pytest.mark.parametrize("granularity", ["block", "task"])
def test_linear_in_coef(granularity: Any) -> None:
    module, model = make_model(granularity=granularity)
    start = module(TOKENS, scale=2.0)
    changes = []
    first, second = torch.randn_like(model.coef), torch.randn_like(model.coef)
    for coef in (first, second, 3 * first - 2 * second):
        with torch.no_grad():
            model.coef.copy_(coef)
            changes.append(model(TOKENS, scale=2.0) - start)
    # Sums of |3 a| + |2 b|, each with some tens of roundings, and those of g itself.
    size = 5 * max(change.abs().max() for change in changes) + start.abs().max()
    assert (changes[2] - 3 * changes[0] + 2 * changes[1]).abs().max() < 100 * EPS * size
    assert changes[0].abs().min() > 100 * EPS * size
    # Composition is not.
    composed = ak.ComposedModel(copy.deepcopy(module), model.bank, granularity=granularity).eval()
    with torch.no_grad():
        composed.coef.copy_(first)
        assert not torch.allclose(composed(TOKENS, scale=2.0) - start, changes[0], atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"granularity": "partition", "partitions": 3, "seed": 2}])
def test_equals_composition_where_the_module_is_linear_in_its_weights(
    options: dict[str, Any],
) -> None:
    module = nn.Linear(5, 4)
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module), codec="fp32")
    model, composed = (
        kind(copy.deepcopy(module), bank, **options)
        for kind in (ak.LinearizedModel, ak.ComposedModel)
    )
    inputs, results, gradients = torch.randn(7, 5), [], []
    coef = torch.randn_like(model.coef)
    for its in (model, composed):
        with torch.no_grad():
            its.coef.copy_(coef)
        results.append(its(inputs))
        results[-1].square().sum().backward()
        gradients.append(its.coef.grad)
    # Sums of 6 products of numbers below 10.
    assert torch.allclose(*results, rtol=0, atol=100 * EPS)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)
    assert (results[0] - module(inputs)).abs().max() > 0.1


def test_changes_far_below_the_base_s_last_digit_count() -> None:
    """Composed weights would round them away: 1 + 1e-9 is 1 in float32."""
    module = nn.Linear(4, 1, bias=False)
    nn.init.ones_(module.weight)
    (vector,) = make_vectors(module, 1, 1e-9)
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector], codec="fp32")
    model = ak.LinearizedModel(module, bank)
    nn.init.ones_(model.coef)
    inputs = torch.tensor([[1.0, -1, 1, -1]])
    expected = (inputs * vector.deltas["weight"]).sum()
    assert model(inputs).item() == pytest.approx(expected.item(), rel=1e-5)


def test_low_rank_task_vectors() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    low = ak.LowRank(torch.randn(4, 2), torch.randn(2, 5), 0.5)
    vector = ak.TaskVector({"0.weight": low, "2.weight": torch.randn(3, 4)}, name="v")
    inputs, results, gradients = torch.randn(7, 5), [], []
    for its in (vector, vector.dense()):
        bank = ak.TaskVectorBank.from_task_vectors(module, [its], codec="fp32")
        model = ak.LinearizedModel(copy.deepcopy(module), bank)
        nn.init.constant_(model.coef, 0.7)
        results.append(model(inputs))
        results[-1].square().sum().backward()
        gradients.append(model.coef.grad)
    assert torch.allclose(*results, rtol=1e-5, atol=1e-5)
    assert torch.allclose(*gradients, rtol=1e-4)
    factorwise = ak.TaskVectorBank.from_task_vectors(module, [vector], lora="factorwise")
    with pytest.raises(ValueError, match="lora='product'"):
        ak.LinearizedModel(module, factorwise)


def test_half_precision() -> None:
    """Tangents have the dtype of what they belong to."""
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).bfloat16()
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module), codec="fp32")
    model = ak.LinearizedModel(module, bank)
    randomise(model)
    inputs = torch.randn(7, 5)
    output = model(inputs.bfloat16())
    assert output.dtype == torch.bfloat16
    exact = expand(
        copy.deepcopy(module).float(),
        {name: change.float() for name, change in model.weights().items()},
        inputs.bfloat16().float(),
    )
    # Seven roundings or so, each of 2^-9, of numbers below 2.
    assert (output.float() - exact).abs().max() < 0.05
    assert (exact - module(inputs.bfloat16()).float()).abs().max() > 0.2


def test_coefficients_round_trip_and_there_is_no_merge(tmp_path: Path) -> None:
    module, model = make_model()
    randomise(model)
    model.save_coefficients(tmp_path / "c.safetensors")
    other = ak.LinearizedModel(copy.deepcopy(module), model.bank)
    other.load_coefficients(tmp_path / "c.safetensors")
    assert same_bits(other(TOKENS), model(TOKENS))
    with pytest.raises(TypeError, match="cannot be merged"):
        model.merge()


class Combined:
    """Counts how often a bank's deltas are combined."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        combine = ak.TaskVectorBank.combine

        def counted(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            self.count += 1
            return combine(*args, **kwargs)

        monkeypatch.setattr(ak.TaskVectorBank, "combine", counted)


def identity(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images


def make_encoder() -> ak.LinearizedModel:
    module = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5))
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module, 4, 1.0))
    return ak.LinearizedModel(module, bank)


def make_task(seed: int) -> JointTask:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(60, 7, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    head = torch.randn(3, 5, generator=generator)
    batches = ImageBatches(images, labels, 20, identity, seed=seed)
    return JointTask(head, batches, lambda model: accuracy(model, images, labels, identity))


def test_learns_as_any_composed_model_with_one_combination_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, task = make_encoder(), make_task(0)
    model = nn.Sequential(encoder, nn.Linear(5, 3, bias=False).requires_grad_(False))
    combined = Combined(monkeypatch)

    def twice(its: nn.Module, batch: Any) -> Tensor:
        return classify(its, batch) + classify(its, batch)

    recipe = Recipe(epochs=5, lr=0.1)
    learned = learn(model, twice, task.batches, recipe, evaluate=task.evaluate, progress=False)
    # Once for the start, and once after each of three steps per epoch; evaluations find it there.
    assert combined.count == 1 + 5 * 3
    assert learned.history[-1]["loss"] < 0.9 * learned.history[1]["loss"]
    assert learned.score > learned.history[0]["score"] + 0.05
    assert set(learned.parameters) == {"0.coef"}


def test_negation_and_addition_take_it() -> None:
    first, second = make_task(0), make_task(1)
    recipe = Recipe(epochs=5, lr=0.03, schedule="constant")
    outcome = negate(make_encoder(), first, second, recipe, progress=False)
    assert outcome.accuracies[0] < outcome.zero_shot[0]
    assert outcome.accuracies[1] >= 0.95 * outcome.zero_shot[1]
    outcome = add(make_encoder(), [first, second], recipe, progress=False)
    assert sum(outcome.accuracies) > sum(outcome.zero_shot)


def test_gradients_of_several_backward_passes_add_up() -> None:
    _, model = make_model()
    model.eval()
    randomise(model)
    other = TOKENS.flip(0) // 2
    model(TOKENS).square().mean().backward()
    model(other).square().mean().backward()
    assert model.coef.grad is not None
    expected, model.coef.grad = model.coef.grad, None
    with model.composed_once(accumulate=True):
        for tokens in (TOKENS, other):
            model(tokens).square().mean().backward()
    assert torch.allclose(model.coef.grad, expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().max() > 1e-3
