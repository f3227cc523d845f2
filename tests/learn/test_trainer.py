"""The trainer's rules, the presets, few-shot sampling, and the search baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.learn import search
from atlas_kernels.learn.few_shot import ImageBatches, accuracy, classify, oversample, sample_shots
from atlas_kernels.learn.grid_search import isotropic, single_vector
from atlas_kernels.learn.trainer import (
    AdamWStep,
    Learned,
    Recipe,
    backward,
    cosine,
    learn,
    rate_factor,
    scale_gradients,
)


@dataclass
class Problem:
    """Three linearly separable classes, a linear model, and task vectors that can solve them."""

    model: ak.ComposedModel
    batches: ImageBatches
    evaluate: Callable[[nn.Module], float]


def identity(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images


def make_problem(granularity: str = "block", vectors: int = 6) -> Problem:
    torch.manual_seed(1)
    inputs, truth = torch.randn(300, 5), torch.randn(3, 5)
    labels = (inputs @ truth.T).argmax(1)
    module = nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 3))
    base = module.state_dict()
    tasks = []
    for i in range(vectors):
        tuned = {key: value + torch.randn_like(value) for key, value in base.items()}
        # Noisy pieces of the solution: no single one is enough.
        tuned["1.weight"] += truth * torch.rand(())
        tasks.append(ak.TaskVector.from_state_dicts(base, tuned, name=f"v{i}"))
    bank = ak.TaskVectorBank.from_task_vectors(module, tasks)
    return Problem(
        ak.ComposedModel(module, bank, granularity=granularity),
        ImageBatches(inputs[:200], labels[:200], 32, identity, seed=3),
        lambda model: accuracy(model, inputs[200:], labels[200:], identity),
    )


class Constant:
    """Batches that carry nothing."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def epoch(self, index: int) -> range:
        return range(self.steps)


class Scalars(nn.Module):
    """A model that is its parameters."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))


@pytest.mark.parametrize("granularity", ["block", "task"])
@pytest.mark.parametrize("preset", ["clean", "official"])
def test_learning_lowers_the_loss_and_raises_the_score(granularity: str, preset: str) -> None:
    problem = make_problem(granularity)
    recipe = Recipe(epochs=8, lr=0.05, preset=preset)
    start = problem.evaluate(problem.model)
    learned = learn(
        problem.model, classify, problem.batches, recipe, evaluate=problem.evaluate, progress=False
    )
    losses = [record["loss"] for record in learned.history[1:]]
    assert losses[-1] < 0.9 * losses[0]
    assert learned.improved
    assert learned.score > start + 0.1
    assert problem.evaluate(problem.model) == learned.score
    assert torch.equal(problem.model.coef, learned.parameters["coef"])
    assert not problem.model.training


def test_the_best_epoch_is_kept_and_ties_keep_the_earlier() -> None:
    problem = make_problem()
    scores = iter([0.2, 0.1, 0.5, 0.5, 0.3])
    seen: list[Tensor] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(problem.model.coef.detach().clone())
        return next(scores)

    learned = learn(
        problem.model,
        classify,
        problem.batches,
        Recipe(epochs=4),
        evaluate=evaluate,
        progress=False,
    )
    assert (learned.epoch, learned.score) == (2, 0.5)
    assert torch.equal(problem.model.coef, seen[2])
    assert not torch.equal(seen[2], seen[3])


def test_without_an_improvement_the_model_stays_the_base() -> None:
    problem = make_problem()
    scores = iter([0.5, 0.5, 0.4])
    learned = learn(
        problem.model,
        classify,
        problem.batches,
        Recipe(epochs=2),
        evaluate=lambda _: next(scores),
        progress=False,
    )
    assert not learned.improved
    assert not problem.model.coef.any()


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_an_interrupted_run_resumes_to_the_same_bits(stop_after: int, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4)
    whole = make_problem()
    expected = learn(
        whole.model, classify, whole.batches, recipe, evaluate=whole.evaluate, progress=False
    )
    first = make_problem()
    calls = 0

    def interrupted(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls > stop_after:
            raise KeyboardInterrupt
        return first.evaluate(model)

    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(
            first.model,
            classify,
            first.batches,
            recipe,
            evaluate=interrupted,
            resume=file,
            progress=False,
        )
    assert file.is_file() == (stop_after > 1)
    torch.manual_seed(99)  # The caller's random state must not matter.
    second = make_problem()
    resumed = learn(
        second.model,
        classify,
        second.batches,
        recipe,
        evaluate=second.evaluate,
        resume=file,
        progress=False,
    )
    assert torch.equal(resumed.parameters["coef"], expected.parameters["coef"])
    for ours, theirs in zip(resumed.history[1:], expected.history[1:], strict=True):
        assert (ours["loss"], ours["score"]) == (theirs["loss"], theirs["score"])


class Counting(AdamWStep):
    """The usual step with a memory: every third one is left out."""

    def __call__(self, model: nn.Module, batches: Sequence[Any]) -> float:
        self.state["count"] = self.state.get("count", 0) + 1
        return 1.0 if self.state["count"] % 3 == 0 else super().__call__(model, batches)


@pytest.mark.parametrize("step", [AdamWStep, Counting])
def test_without_scores_the_last_epoch_is_kept_and_runs_resume(step: Any, tmp_path: Path) -> None:
    """`stop_after` 0 is the whole run; the state of a step of one's own goes on with it."""
    file = tmp_path / "run.safetensors"

    def run(stop_after: int, resume: Path | None) -> Learned:
        problem, calls = make_problem(), 0

        def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop_after:
                raise KeyboardInterrupt
            return classify(model, batch)

        options = {"evaluate": None, "resume": resume, "progress": False, "step": step}
        learned = learn(problem.model, objective, problem.batches, Recipe(epochs=4), **options)
        assert torch.equal(problem.model.coef, learned.parameters["coef"])
        return learned

    whole = run(0, None)
    assert whole.epoch == 4
    assert math.isnan(whole.score)
    assert all(math.isnan(record["score"]) for record in whole.history)
    # Seven batches an epoch: within the third.
    with pytest.raises(KeyboardInterrupt):
        run(17 if step is AdamWStep else 12, file)
    resumed = run(0, file)
    assert len(resumed.history) == 5
    assert torch.equal(resumed.parameters["coef"], whole.parameters["coef"])
    assert resumed.history[-1]["loss"] == whole.history[-1]["loss"]


def test_batches_may_differ_in_number_from_epoch_to_epoch() -> None:
    """The cosine follows the share of the epoch; the loss is the mean over its own steps."""

    class Fewer(Constant):
        def __init__(self) -> None:
            super().__init__(9)

        def epoch(self, index: int) -> Iterator[int]:
            self.steps = 4 - 2 * index
            yield from range(self.steps)

    left: list[float] = []

    def objective(model: nn.Module, _: int) -> Tensor:
        left.append(model.values.item())
        return 0 * model.values.sum() + 3.0

    learned = learn(
        Scalars(1.0),
        objective,
        Fewer(),
        Recipe(epochs=2, lr=0.1, weight_decay=5.0),
        evaluate=None,
        progress=False,
    )
    assert [record["loss"] for record in learned.history[1:]] == [3.0, 3.0]
    left.append(learned.parameters["values"].item())
    shrunk = [b / a for a, b in pairwise(left)]
    progress = [0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 6 / 8]
    assert shrunk == pytest.approx([1 - 0.5 * cosine(t, 1) for t in progress], rel=1e-5)


@pytest.mark.parametrize("memory", ["whole", "recompute"])
@pytest.mark.parametrize(("size", "parts"), [(20, 1), (10, 2), (5, 4)])
def test_batches_that_are_added_up_have_the_gradient_of_one(
    memory: Any, size: int, parts: int
) -> None:
    model, batches = make_problem().model, make_problem().batches
    model = ak.ComposedModel(model.module, model.bank, memory=memory)
    with torch.no_grad():
        model.coef.copy_(torch.randn_like(model.coef))
    images, labels = batches.images[:20], batches.labels[:20]
    expected = classify(model.eval(), (images, labels))
    (gradient,) = torch.autograd.grad(expected, model.coef)
    pairs = list(zip(images.split(size), labels.split(size), strict=True))
    assert len(pairs) == parts
    value = backward(model, classify, pairs)
    # The same sums in another order, of at most 20 * 15 products and mean of 20.
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(model.coef.grad, gradient, rtol=1e-4, atol=1e-5)


def test_accumulating_runs_take_the_steps_of_larger_batches() -> None:
    """Of seven batches, the last one smaller, three make a step and the last one its own."""
    runs = []
    for size, accumulate in ((96, 1), (32, 3)):
        problem = make_problem()
        inputs = problem.batches
        batches = ImageBatches(inputs.images, inputs.labels, size, identity, seed=3)
        calls = 0

        def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            nonlocal calls
            calls += 1
            # Without dropout, which falls differently on smaller batches.
            return classify(model.eval(), batch)

        learned = learn(
            problem.model,
            objective,
            batches,
            Recipe(epochs=3, lr=0.05, accumulate=accumulate),
            evaluate=problem.evaluate,
            progress=False,
        )
        assert calls == 3 * len(batches)
        runs.append(learned)
    one, several = runs
    for ours, theirs in zip(several.history[1:], one.history[1:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    # AdamW divides by the gradient's size, so that the rounding of small ones grows.
    torch.testing.assert_close(
        several.parameters["coef"], one.parameters["coef"], rtol=1e-3, atol=1e-4
    )


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    recipe = Recipe(epochs=1)
    problem = make_problem()
    arguments = {"evaluate": problem.evaluate, "resume": file, "progress": False}
    learn(problem.model, classify, problem.batches, recipe, **arguments)
    with pytest.raises(ValueError, match="another run"):
        learn(problem.model, classify, problem.batches, replace(recipe, lr=0.2), **arguments)
    isotropic_model = make_problem("task").model
    with pytest.raises(ValueError, match="another run"):
        learn(isotropic_model, classify, problem.batches, recipe, **arguments)
    with pytest.raises(ValueError, match="another run"):
        learn(problem.model, classify, problem.batches, recipe, **{**arguments, "evaluate": None})


def test_one_composition_per_step_and_per_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    count = 0
    compose = ak.TaskVectorBank.compose

    def counted(*args: object, **kwargs: object) -> dict[str, Tensor]:
        nonlocal count
        count += 1
        return compose(*args, **kwargs)

    def twice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return classify(model, batch) + classify(model, batch)

    def evaluate_twice(model: nn.Module) -> float:
        return problem.evaluate(model) + problem.evaluate(model)

    monkeypatch.setattr(ak.TaskVectorBank, "compose", counted)
    epochs = 2
    learn(
        problem.model,
        twice,
        problem.batches,
        Recipe(epochs=epochs),
        evaluate=evaluate_twice,
        progress=False,
    )
    # Evaluations find what the step before or after them composes.
    assert count == epochs * len(problem.batches) + 1


def test_official_ignores_the_scale_of_the_loss() -> None:
    """While the gradient's norm exceeds 2^-16, a power of two in the loss changes no bit."""
    results = []
    for scale in (1.0, 1024.0):
        problem = make_problem()
        learned = learn(
            problem.model,
            lambda model, batch, scale=scale: scale * classify(model, batch),
            problem.batches,
            Recipe(epochs=2, preset="official"),
            evaluate=problem.evaluate,
            progress=False,
        )
        results.append(learned.parameters["coef"])
    assert torch.equal(*results)
    assert results[0].any()


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=5),
    st.sampled_from([1.0, 65536.0]),
)
def test_gradient_scaling(values: list[float], loss_scale: float) -> None:
    model = Scalars(*values)
    (model.values**2 / 2).sum().backward()
    gradient = torch.tensor(values, dtype=torch.float64)
    norm = gradient.norm().item()
    expected = gradient * min(1.0, 1 / (loss_scale * norm)) if norm else gradient
    scale_gradients([model.values], loss_scale)
    # Norm, reciprocal, two products: a handful of float32 roundings, relative.
    torch.testing.assert_close(model.values.grad.double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("steps", "factor"), [(100, 0.602), (500, 0.081), (1000, 0.0066)])
def test_weight_decay_under_cosine(steps: int, factor: float) -> None:
    """A coefficient without gradient shrinks as atlas.md 1.3 says: prod(1 - lr_t * wd)."""
    model = Scalars(1.0)
    rising = iter(range(100))
    learned = learn(
        model,
        lambda m, _: 0 * m.values.sum(),
        Constant(steps),
        Recipe(epochs=1, lr=0.1, weight_decay=0.1),
        evaluate=lambda _: float(next(rising)),
        progress=False,
    )
    exact = math.prod(1 - 0.1 * 0.1 * cosine(t, steps) for t in range(steps))
    assert learned.parameters["values"].item() == pytest.approx(exact, rel=1e-4)
    assert exact == pytest.approx(factor, rel=0.01)


def test_constant_schedule_keeps_the_rate() -> None:
    model = Scalars(1.0)
    rising = iter(range(100))
    learned = learn(
        model,
        lambda m, _: 0 * m.values.sum(),
        Constant(10),
        Recipe(epochs=1, lr=0.1, weight_decay=0.1, schedule="constant"),
        evaluate=lambda _: float(next(rising)),
        progress=False,
    )
    assert learned.parameters["values"].item() == pytest.approx(0.99**10, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # Two of four steps, then the whole cosine in what is left: cos(0), cos(pi / 2).
        ("cosine", [0.5, 1.0, 1.0, 0.5]),
        ("constant", [0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_warmup_precedes_the_schedule(schedule: Any, factors: list[float]) -> None:
    """What weight decay leaves of a coefficient without gradient tells the rate of each step."""
    model = Scalars(1.0)
    left: list[float] = []

    def objective(m: nn.Module, _: Any) -> Tensor:
        left.append(model.values.item())
        return 0 * model.values.sum()

    learn(
        model,
        objective,
        Constant(2),
        Recipe(epochs=2, lr=0.1, weight_decay=5.0, schedule=schedule, warmup=2),
        evaluate=lambda _: 0.0,
        progress=False,
    )
    shrunk = [b / a for a, b in pairwise(left)]
    assert shrunk == pytest.approx([1 - 0.1 * 5.0 * f for f in factors[:3]], rel=1e-5)
    assert rate_factor(Recipe(schedule=schedule, warmup=2), 3, 4) == pytest.approx(factors[3])
    # A run that ends within its warm-up.
    assert rate_factor(Recipe(schedule=schedule, warmup=8), 3, 4) == 0.5


class Named(nn.Module):
    """A model with parameters of several names."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("coef", "keys", "kinds"):
            self.register_parameter(name, nn.Parameter(torch.ones(2)))


def test_a_rate_of_its_own_follows_the_same_schedule(tmp_path: Path) -> None:
    """Weight decay alone moves the parameters, so what is left of them tells their rates."""
    recipe = Recipe(
        epochs=2, lr=0.2, weight_decay=0.5, lrs=(("k*s", 0.02), ("kinds", 7.0)), warmup=2
    )

    def run(**options: Any) -> dict[str, Tensor]:
        rising = iter(range(100))
        return learn(
            Named(),
            lambda m, _: 0 * sum(p.sum() for p in m.parameters()),
            Constant(3),
            recipe,
            evaluate=lambda _: float(next(rising)),
            progress=False,
            **options,
        ).parameters

    parameters = run()
    for name, rate in (("coef", 0.2), ("keys", 0.02), ("kinds", 0.02)):
        exact = math.prod(1 - rate * 0.5 * rate_factor(recipe, t, 6) for t in range(6))
        # Six products, each rounded by eps / 2 = 6e-8.
        assert parameters[name].tolist() == pytest.approx([exact] * 2, rel=1e-6)
    run(resume=tmp_path / "run.safetensors")
    resumed = run(resume=tmp_path / "run.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in parameters.items())


def test_rates_for_no_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'key'.*coef, keys, kinds"):
        learn(
            Named(),
            classify,
            Constant(1),
            Recipe(lrs=(("key", 0.1),)),
            evaluate=lambda _: 0.0,
            progress=False,
        )


class Normalised(nn.Module):
    """A BatchNorm and dropout in a model that is composed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(inputs)).relu()))


@pytest.mark.parametrize("memory", ["whole", "recompute"])
def test_running_statistics_stay_those_of_the_base(memory: Any) -> None:
    module = Normalised()
    module(torch.randn(64, 5))  # Statistics of some data.
    base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tuned = {key: value + torch.randn_like(value.float()) for key, value in base.items()}
    tuned["norm.num_batches_tracked"] = base["norm.num_batches_tracked"]
    vector = ak.TaskVector.from_state_dicts(base, tuned, name="v")
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector])
    model = nn.Sequential(ak.ComposedModel(module, bank, memory=memory), nn.BatchNorm1d(3))
    problem = make_problem()
    modes: list[tuple[bool, bool]] = []

    def objective(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        modes.append((module.norm.training, module.dropout.training))
        return classify(m, batch)

    scores = iter([0.0, 0.5, 0.9, 0.1])
    kept: list[Tensor] = []
    probe = torch.randn(9, 5)

    def evaluate(m: nn.Module) -> float:
        kept.append(model[0](probe))
        return next(scores)

    learned = learn(
        model, objective, problem.batches, Recipe(epochs=3), evaluate=evaluate, progress=False
    )
    assert set(modes) == {(False, True)}
    assert learned.epoch == 2
    # The model that was scored best is the one that is left, to the bit.
    assert torch.equal(model[0](probe), kept[2])
    assert not torch.equal(kept[2], kept[3])
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, base[name])
    # What is not composed is trained as usual.
    assert model[1].num_batches_tracked == 3 * len(problem.batches)


def test_bad_recipes_and_models_are_refused() -> None:
    changes = ({"epochs": -1}, {"lr": 0.0}, {"schedule": "linear"}, {"preset": "none"})
    for change in (*changes, {"warmup": -1}, {"accumulate": 0}, {"lrs": (("coef", 0.0),)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Recipe(**change)
    frozen = Scalars(1.0).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to learn"):
        learn(frozen, classify, Constant(1), Recipe(), evaluate=lambda _: 0.0, progress=False)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = Scalars(1.0)
    with pytest.raises(FloatingPointError, match="step 1 of epoch 1"):
        learn(
            model,
            lambda m, _: m.values.sum() / 0,
            Constant(1),
            Recipe(epochs=1),
            evaluate=lambda _: 0.0,
            progress=False,
        )


def test_randomness_in_the_model_is_seeded_and_leaves_the_caller_alone() -> None:
    results = []
    for noise in (0, 1):
        problem = make_problem()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        learned = learn(
            problem.model,
            classify,
            problem.batches,
            Recipe(epochs=1),
            evaluate=problem.evaluate,
            progress=False,
        )
        assert torch.equal(torch.get_rng_state(), before)
        results.append([record["loss"] for record in learned.history[1:]])
    assert results[0] == results[1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 6), st.integers(0, 5))
def test_shots(labels: list[int], shots: int, seed: int) -> None:
    targets = torch.tensor(labels)
    chosen = sample_shots(targets, shots, seed)
    assert torch.equal(chosen, sample_shots(targets, shots, seed))
    assert len(chosen.unique()) == len(chosen)
    for label in set(labels):
        assert int((targets[chosen] == label).sum()) == min(shots, labels.count(label))


def test_shots_depend_on_the_seed() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    assert not torch.equal(sample_shots(labels, 5, 0), sample_shots(labels, 5, 1))
    with pytest.raises(ValueError, match="at least 1"):
        sample_shots(labels, 0, 0)


@pytest.mark.parametrize(
    ("count", "batch", "repeats"), [(10, 128, 129), (160, 32, 3), (320, 32, 1), (319, 32, 2)]
)
def test_tiny_sets_are_repeated(count: int, batch: int, repeats: int) -> None:
    indices = torch.arange(count) + 7
    repeated = oversample(indices, batch)
    assert torch.equal(repeated.bincount(minlength=7)[7:], torch.full((count,), repeats))


def test_an_epoch_visits_every_index_once_in_an_order_of_its_own() -> None:
    labels = torch.arange(23)
    batches = ImageBatches(labels.float(), labels, 5, identity, seed=0)
    epochs = [torch.cat([y for _, y in batches.epoch(e)]) for e in (0, 1, 0)]
    assert len(batches) == len(list(batches.epoch(0))) == 5
    assert torch.equal(epochs[0].sort().values, labels)
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])
    other = ImageBatches(labels.float(), labels, 5, identity, seed=1)
    assert not torch.equal(torch.cat([y for _, y in other.epoch(0)]), epochs[0])
    chosen = ImageBatches(labels.float(), labels, 5, identity, 0, torch.tensor([3, 3, 9]))
    images, targets = next(iter(chosen.epoch(0)))
    assert sorted(targets.tolist()) == [3, 3, 9]
    assert torch.equal(images.long(), targets)


def test_accuracy_counts_the_last_partial_batch() -> None:
    logits = torch.eye(4)
    labels = torch.tensor([0, 1, 0, 3])
    assert accuracy(nn.Identity(), logits, labels, identity, batch_size=3) == 0.75
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(nn.Identity(), logits[:0], labels[:0], identity)


def test_search_keeps_the_first_best_candidate() -> None:
    problem = make_problem("task", vectors=2)
    model = problem.model
    assert [c.tolist() for c in isotropic(model.coef, (0.0, 0.5))] == [[0, 0], [0.5, 0.5]]
    candidates = list(single_vector(model.coef, (0.0, 0.5, 1.0)))
    assert [c.tolist() for c in candidates] == [[0, 0], [0.5, 0], [1, 0], [0, 0.5], [0, 1]]
    best, score = search(model, candidates, lambda: -abs(float(model.coef.detach().sum()) - 0.5))
    assert (best.tolist(), score) == ([0.5, 0], 0.0)
    assert torch.equal(model.coef, best)
    with pytest.raises(ValueError, match="at least one candidate"):
        search(model, [], lambda: 0.0)
