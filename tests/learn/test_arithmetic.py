"""Task negation and addition: objectives, selection rules, baselines, and the embedded tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import atlas_kernels as ak
from atlas_kernels.learn.arithmetic import (
    ADDITION,
    NEGATION,
    JointTask,
    Penalty,
    add,
    negate,
    search_addition,
    search_negation,
    weights_only,
)
from atlas_kernels.learn.few_shot import ImageBatches, accuracy
from atlas_kernels.learn.grid_search import GRID
from atlas_kernels.learn.trainer import Recipe
from atlas_kernels.tasks.clip.model import ImageClassifier, image_encoder

RECIPE = Recipe(epochs=4, lr=0.05, schedule="constant")
CLASSES, WIDTH = 3, 5


def identity(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return images


def make_encoder(vectors: int = 2, granularity: str = "block") -> ak.ComposedModel:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, WIDTH))
    base = module.state_dict()
    tasks = [
        ak.TaskVector.from_state_dicts(
            base, {k: v + torch.randn_like(v) for k, v in base.items()}, name=f"v{i}"
        )
        for i in range(vectors)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, tasks, codec="fp32")
    return ak.ComposedModel(module, bank, granularity=granularity)


def make_tasks(
    sizes: Sequence[int], evaluate: Sequence[Callable[[nn.Module], float]] | None = None
) -> list[JointTask]:
    tasks = []
    for i, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        images = torch.randn(size, 7, generator=generator)
        labels = torch.randint(CLASSES, (size,), generator=generator)
        head = torch.randn(CLASSES, WIDTH, generator=generator)

        def measured(model: nn.Module, x: Tensor = images, y: Tensor = labels) -> float:
            return accuracy(model, x, y, identity)

        batches = ImageBatches(images, labels, 13, identity, seed=i)
        tasks.append(JointTask(head, batches, evaluate[i] if evaluate else measured))
    return tasks


class Script:
    """Accuracies as written down, and the coefficients that each of them was given for.

    The first is the zero-shot one; it stands for the start of the run, too.
    """

    def __init__(self, encoder: ak.ComposedModel, scores: Iterable[float]) -> None:
        zero_shot, *later = scores
        self.scores = iter([zero_shot, zero_shot, *later])
        self.encoder = encoder
        self.seen: list[Tensor] = []

    def __call__(self, model: nn.Module) -> float:
        self.seen.append(self.encoder.coef.detach().clone())
        # What is left over is asked for once, of the result.
        return next(self.scores, math.nan)


def scripted(
    encoder: ak.ComposedModel, *scores: Sequence[float]
) -> tuple[list[JointTask], list[Script]]:
    scripts = [Script(encoder, values) for values in scores]
    return make_tasks([13] * len(scores), scripts), scripts


def negate_by(target: Sequence[float], control: Sequence[float]) -> tuple[int, int]:
    """The epoch kept, and the number of epochs run, for histories of zero-shot and all epochs."""
    encoder = make_encoder(1)
    tasks, scripts = scripted(encoder, target, control)
    recipe = Recipe(epochs=len(target) - 1, lr=0.05, schedule="constant")
    outcome = negate(encoder, *tasks, recipe, progress=False)
    learned = outcome.learned
    assert learned is not None
    # Seen: zero-shot, the start, the epochs, the result.
    assert torch.equal(outcome.coef, scripts[0].seen[1 + learned.epoch])
    assert torch.equal(outcome.coef, encoder.coef)
    assert outcome.improved == (learned.epoch > 0)
    assert outcome.zero_shot == (target[0], control[0])
    return learned.epoch, len(learned.history) - 1


def test_negation_keeps_the_lowest_target_whose_control_holds() -> None:
    # 0.95 * 1.0 is exact: the threshold itself qualifies, and ties keep the earlier epoch.
    assert negate_by([0.8, 0.5, 0.3, 0.3, 0.6], [1.0, 1.0, 0.95, 1.0, 1.0]) == (2, 4)


def test_negation_ends_where_the_control_falls() -> None:
    assert negate_by([0.8, 0.5, 0.1, 0.2], [1.0, 1.0, 0.9499, 1.0]) == (1, 2)


def test_negation_without_a_feasible_or_better_epoch_is_the_base() -> None:
    assert negate_by([0.8, 0.1, 0.1], [1.0, 0.5, 1.0]) == (0, 1)
    assert negate_by([0.8, 0.8, 0.9], [1.0, 1.0, 1.0]) == (0, 2)


def test_searched_negation_goes_backwards_on_the_grid_by_the_same_rule() -> None:
    encoder = make_encoder(2)
    target = [0.9, *(0.9 - 0.01 * i for i in range(1, 21))]
    control = [0.8] * 8 + [0.1] * 13
    tasks, _ = scripted(encoder, target, control)
    outcome = search_negation(encoder, *tasks)
    assert torch.equal(outcome.coef, torch.full_like(outcome.coef, -GRID[7]))
    assert outcome.learned is None


def test_addition_weighs_accuracies_by_the_fine_tuned_ones() -> None:
    encoder = make_encoder(2)
    # Absolute means prefer epoch 1 (0.55), relative ones epoch 2 (0.8 and 0.75 against 0.6).
    tasks, scripts = scripted(encoder, [0.2, 0.9, 0.7, 0.7], [0.1, 0.2, 0.3, 0.2])
    weighed = [
        JointTask(task.head, task.batches, task.evaluate, finetuned)
        for task, finetuned in zip(tasks, (1.0, 0.4), strict=True)
    ]
    outcome = add(encoder, weighed, Recipe(epochs=3, lr=0.05), progress=False)
    assert outcome.learned is not None
    assert outcome.learned.epoch == 2
    assert outcome.learned.score == pytest.approx((0.7 / 1.0 + 0.3 / 0.4) / 2)
    assert torch.equal(outcome.coef, scripts[0].seen[3])


def test_searched_addition_goes_forwards_on_the_grid() -> None:
    encoder = make_encoder(3, "task")
    tasks, _ = scripted(encoder, [0.1] * 5 + [0.9] * 16, [0.5] * 21)
    assert search_addition(encoder, tasks).coef.tolist() == pytest.approx([GRID[5]] * 3)


@pytest.mark.parametrize("granularity", ["block", "task"])
@pytest.mark.parametrize("penalty", [None, Penalty(1), Penalty(2, weight=2.0)])
def test_one_step_follows_the_sum_of_the_tasks_gradients(
    granularity: str, penalty: Penalty | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass of all tasks has the gradient of the tasks apart, signs included."""
    for signs, run in (
        ((-1, 1), lambda e, t, r: negate(e, *t, r, penalty=penalty, progress=False)),
        ((1, 1, 1), lambda e, t, r: add(e, t, r, penalty=penalty, progress=False)),
    ):
        tasks = make_tasks([13] * len(signs))
        encoder = make_encoder(2, granularity)
        expected = torch.zeros_like(encoder.coef)
        for sign, task in zip(signs, tasks, strict=True):
            images, labels = next(iter(task.batches.epoch(0)))
            loss = cross_entropy(ImageClassifier(encoder, task.head)(images), labels)
            expected += sign * torch.autograd.grad(loss, encoder.coef)[0]
        seen: list[Tensor] = []
        monkeypatch.setattr(
            "atlas_kernels.learn.trainer.scale_gradients",
            lambda parameters, _, seen=seen: seen.extend(p.grad.clone() for p in parameters),
        )
        run(encoder, tasks, Recipe(epochs=1))
        # At zero the penalty's gradient is zero. Sums of 13 images in another order: some tens of
        # float32 roundings, relative to gradients of order 1.
        torch.testing.assert_close(seen, [expected], rtol=1e-4, atol=1e-5)
        assert expected.abs().min() > 1e-4


def test_a_step_composes_once_and_an_epoch_ends_with_the_smallest_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = make_encoder(2)
    tasks = make_tasks([40, 14, 27])  # 4, 2 and 3 batches of at most 13.
    compositions = 0
    compose = ak.TaskVectorBank.compose

    def counted(bank: ak.TaskVectorBank, coef: Tensor, **options: Any) -> dict[str, Tensor]:
        nonlocal compositions
        compositions += 1
        return compose(bank, coef, **options)

    monkeypatch.setattr(ak.TaskVectorBank, "compose", counted)
    add(encoder, tasks, Recipe(epochs=3), progress=False)
    # For zero-shot (which is the start as well) and after each of three epochs' two steps; scores
    # find it there. The result may be that of an earlier epoch.
    assert 1 + 3 * 2 <= compositions <= 1 + 3 * 2 + 2


def test_runs_start_from_the_base_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    encoder = make_encoder()
    tasks = make_tasks([40, 27])
    first = add(encoder, tasks, RECIPE, progress=False)
    assert first.improved
    again = add(encoder, tasks, RECIPE, progress=False)
    file = tmp_path / "run.safetensors"
    saved = add(make_encoder(), tasks, RECIPE, resume=file, progress=False)
    resumed = add(make_encoder(), tasks, RECIPE, resume=file, progress=False)
    for other in (again, saved, resumed):
        assert torch.equal(first.coef, other.coef)
        assert first.accuracies == other.accuracies
        assert first.zero_shot == other.zero_shot


def test_penalties_shrink_coefficients() -> None:
    # Ever rising accuracies: the last epoch is kept.
    rising = map(float, range(99))
    tasks = make_tasks([40, 27], [lambda _: next(rising)] * 2)
    norms = []
    for penalty in (None, Penalty(1), Penalty(2)):
        coef = add(make_encoder(), tasks, RECIPE, penalty=penalty, progress=False).coef
        norms.append(coef.abs().sum().item())
    assert max(norms[1:]) < 0.9 * norms[0]


@given(st.integers(1, 5), st.integers(0, 4), st.sampled_from([1, 2]), st.floats(0, 3, width=32))
def test_penalty_is_the_mean_norm_over_vectors(n: int, b: int, order: int, weight: float) -> None:
    coef = torch.randn((n, b) if b else (n,))
    columns = coef.double().reshape(n, -1).T
    norms = [sum(abs(x) ** order for x in column) ** (1 / order) for column in columns.tolist()]
    expected = weight * math.fsum(norms) / len(norms)
    # At most five squares, sums and a root, all positive: ten float32 roundings of 6e-8.
    assert Penalty(order, weight)(coef).item() == pytest.approx(expected, rel=1e-6, abs=1e-30)
    zero = torch.zeros_like(coef, requires_grad=True)
    assert not torch.autograd.grad(Penalty(order, weight)(zero), zero)[0].any()


def test_weights_only_composes_matrices_alone() -> None:
    module = make_encoder().module
    names = weights_only(module)
    assert names == ["0.weight", "2.weight"]
    tuned = {key: value + 1 for key, value in module.state_dict().items()}
    vector = ak.TaskVector.from_state_dicts(module.state_dict(), tuned, name="v")
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector], include=names)
    assert bank.blocks == tuple(names)
    state = bank.state_dict(torch.ones(1, 2))
    assert torch.equal(state["0.bias"], module.state_dict()["0.bias"])
    assert not torch.equal(state["0.weight"], module.state_dict()["0.weight"])


def test_weights_only_leaves_a_third_of_a_vision_transformers_blocks() -> None:
    pytest.importorskip("open_clip")
    with torch.device("meta"):
        encoder = image_encoder("ViT-B-32")
    # As published: 50 matrices and one convolution of 152 blocks.
    assert (len(weights_only(encoder)), len(list(encoder.parameters()))) == (51, 152)


def test_published_steps() -> None:
    """The presets are constant in lr, and normalise gradients as the published runs did."""
    for recipe in (ADDITION, *NEGATION.values()):
        assert (recipe.schedule, recipe.preset, recipe.weight_decay) == (
            "constant",
            "official",
            0.1,
        )
    assert len(NEGATION) == 8


def test_bad_arguments_are_refused() -> None:
    encoder, tasks = make_encoder(), make_tasks([13, 13])
    with pytest.raises(ValueError, match="at least one task"):
        add(encoder, [])
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            negate(encoder, *tasks, RECIPE, threshold=threshold)
    with pytest.raises(ValueError, match="finetuned"):
        JointTask(tasks[0].head, tasks[0].batches, tasks[0].evaluate, 0.0)
    for bad in ({"order": 3}, {"weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Penalty(**bad)


def embedded(*names: str, granularity: str = "block") -> tuple[ak.ComposedModel, list[JointTask]]:
    """An encoder composed of the embedded tasks' own vectors, and the tasks."""
    pytest.importorskip("open_clip")
    from atlas_kernels.tasks.clip.model import zero_shot_head
    from atlas_kernels.tasks.embedded.model import load_model
    from atlas_kernels.tasks.embedded.tasks import augment, load_task, preprocess
    from atlas_kernels.tasks.embedded.vectors import load_task_vectors

    clip = load_model()
    vectors = load_task_vectors(base=clip)
    visual = clip.get_submodule("visual")
    bank = ak.TaskVectorBank.from_task_vectors(visual, [vectors[name] for name in names])
    encoder = ak.ComposedModel(visual, bank, granularity=granularity)
    tasks = []
    for i, name in enumerate(names):
        task = load_task(name)
        part = task.validation
        head = zero_shot_head(clip, task.classnames, task.templates)

        def evaluate(model: nn.Module, part=part) -> float:
            return accuracy(model, part.images, part.labels, preprocess)

        batches = ImageBatches(
            part.images, part.labels, 50, lambda x, g: augment(preprocess(x), g), seed=0
        )
        # Coefficient 1 for the task's own vector makes the fine-tuned model.
        with torch.no_grad():
            encoder.coef.zero_()[i] = 1
        finetuned = evaluate(ImageClassifier(encoder, head))
        tasks.append(JointTask(head, batches, evaluate, finetuned))
    return encoder, tasks


@pytest.mark.parametrize("granularity", ["block", "task"])
def test_negation_forgets_an_embedded_task_and_keeps_the_control(granularity: str) -> None:
    encoder, (target, control) = embedded(
        "fashion-flipped", "animals-clean", granularity=granularity
    )
    outcome = negate(encoder, target, control, RECIPE, progress=False)
    assert outcome.improved
    assert outcome.accuracies[0] < outcome.zero_shot[0] - 0.1
    assert outcome.accuracies[1] >= 0.95 * outcome.zero_shot[1]
    assert outcome.learned is not None
    losses = [record["loss"] for record in outcome.learned.history[1:]]
    assert losses[-1] < losses[0]


def test_addition_serves_two_embedded_tasks_with_one_encoder() -> None:
    encoder, tasks = embedded("mnist-rotated", "fashion-inverted")
    outcome = add(encoder, tasks, RECIPE, progress=False)
    assert outcome.learned is not None
    start = sum(a / t.finetuned for a, t in zip(outcome.zero_shot, tasks, strict=True)) / 2
    assert outcome.learned.score > start + 0.2
    losses = [record["loss"] for record in outcome.learned.history[1:]]
    assert losses[-1] < 0.8 * losses[0]
    assert (encoder.coef.abs() > 1e-3).float().mean() > 0.9
