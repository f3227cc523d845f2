"""Test-time adaptation: objectives, their batches and steps, and the embedded tasks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.learn.test_time import (
    SAR,
    UFM,
    Adaptation,
    Entropy,
    SimCLR,
    _Divided,
    adapt,
    layer_norms,
    trusted_images,
)
from atlas_kernels.learn.trainer import Learned, Recipe
from atlas_kernels.tasks.clip.model import ImageClassifier, image_encoder
from atlas_kernels.tasks.embedded.model import build_embedded_model
from atlas_kernels.tasks.images.images import Images

CLASSES, WIDTH = 5, 7


def make_images(count: int = 96) -> Images:
    """Points in clusters; augmentation is noise."""
    generator = torch.Generator().manual_seed(5)
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=generator)
    points = centres.repeat(count // CLASSES + 1, 1)[:count]
    points = points + torch.randn(count, WIDTH, generator=generator)

    def augmented(chosen: Tensor, generator: torch.Generator) -> Tensor:
        return points[chosen] + 0.3 * torch.randn(len(chosen), WIDTH, generator=generator)

    return Images(count, lambda chosen: points[chosen], augmented)


def make_model(granularity: str = "block") -> ak.ComposedModel:
    torch.manual_seed(2)
    module = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, 9), nn.Tanh(), nn.Linear(9, CLASSES))
    base = module.state_dict()
    vectors = [
        ak.TaskVector.from_state_dicts(
            base, {k: v + torch.randn_like(v) for k, v in base.items()}, name=f"v{i}"
        )
        for i in range(3)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors, codec="fp32")
    return ak.ComposedModel(module, bank, granularity=granularity)


EVERY = [UFM(divisor=4), SimCLR(), Entropy(), SAR()]


def run(adaptation: Adaptation, model: nn.Module | None = None, **options: Any) -> Learned:
    recipe = Recipe(epochs=3, lr=0.02, seed=options.pop("seed", 0))
    model = make_model() if model is None else model
    options = {"batch_size": 16, "progress": False, **options}
    return adapt(model, make_images(), adaptation, recipe, **options)


def test_images_without_labels_have_none() -> None:
    assert {field.name for field in fields(Images)} == {"count", "plain", "augmented"}


@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99)
)
def test_the_most_confident_of_every_predicted_class_are_trusted(
    count: int, classes: int, divisor: int, limit: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Coarse: with ties.
    logits = torch.randint(4, (count, classes), generator=generator).float()
    probabilities = logits.softmax(1)
    trusted = trusted_images(probabilities, divisor=divisor, limit=limit)
    most = min(count // (classes * divisor), limit)
    confidence, predicted = probabilities.max(1)
    assert len(trusted) == classes
    for label, chosen in enumerate(trusted):
        members = [i for i in range(count) if predicted[i] == label]
        assert len(chosen) == min(most, len(members))
        best = sorted(members, key=lambda i: (-confidence[i].item(), i))[:most]
        assert chosen.tolist() == best


class Table(nn.Module):
    """A model whose logits are its inputs, moved by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, 1:] + self.shift


def numbered(count: int) -> tuple[Images, Tensor]:
    """Images that are their own index and logits; minus the index if augmented."""
    logits = torch.randn(count, CLASSES, generator=torch.Generator().manual_seed(1))
    table = torch.cat([torch.arange(count).unsqueeze(1), logits], dim=1)
    sign = torch.tensor([-1.0, *[1.0] * CLASSES])
    return Images(count, lambda i: table[i], lambda i, _: sign * table[i]), logits


@pytest.mark.parametrize("divisor", [1, 2, 6])
def test_ufm_divides_the_images_anew_in_every_epoch(divisor: int) -> None:
    images, logits = numbered(203)
    model = Table()
    size, recipe = 16, Recipe(epochs=10)
    batches = UFM(divisor).batches(model, images, recipe, size)
    for epoch in (0, 3, 9):
        with torch.no_grad():
            model.shift.copy_(torch.linspace(0, epoch / 3, CLASSES))
        model.train()
        trusted = trusted_images((logits + model.shift).softmax(1), divisor=divisor)
        label_of = {i: c for c, members in enumerate(trusted) for i in members.tolist()}
        found = list(batches.epoch(epoch))
        assert model.training
        assert len(found) == len(batches) == (203 - len(label_of)) // 12
        others: list[int] = []
        times = dict.fromkeys(label_of, 0)
        for batch in found:
            weak, strong = batch.weak[:, 0].int().tolist(), (-batch.strong[:, 0]).int().tolist()
            assert (len(weak), len(strong), len(batch.labels)) == (12, 16, 4)
            assert strong[:12] == weak
            others += weak
            for i, label in zip(strong[12:], batch.labels.tolist(), strict=True):
                assert label == label_of[i]
                times[i] += 1
            assert batch.threshold == pytest.approx(0.9 + 0.01 * epoch)
        assert len(set(others)) == len(others)
        assert not set(others) & set(label_of)
        # Shuffled endlessly: none comes again before all have come.
        assert max(times.values()) - min(times.values()) <= 1
        again = list(batches.epoch(epoch))
        for one, other in zip(found, again, strict=True):
            assert torch.equal(one.strong, other.strong)
        assert others != sorted(others)


def test_trusted_images_are_no_more_than_a_hundred_per_class() -> None:
    images, _ = numbered(900)
    batches = UFM().batches(Table(), images, Recipe(), 8)
    found = list(batches.epoch(0))
    assert len(batches) == len(found) == (900 - CLASSES * 100) // 6


def reference_ufm(weak: Tensor, strong: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """As the paper writes it, in float64, row by row."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i, row in enumerate(strong.double()):
        losses = -row.log_softmax(0)
        if i < len(weak):
            root = weak[i].detach().double().softmax(0) ** 0.5
            target = root / root.sum()
            if target.max() > threshold:
                total, count = total + (target * losses).sum(), count + 1
        else:
            total, count = total + losses[labels[i - len(weak)]], count + 1
    return total / max(count, 1)


@pytest.mark.parametrize("trusted", [0, 4])
@pytest.mark.parametrize("scale", [0.0, 8.0])
def test_ufm_is_the_masked_loss_of_the_paper(trusted: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weak = torch.cat([torch.zeros(12, 1), scale * torch.randn(12, CLASSES, generator=generator)], 1)
    strong = torch.randn(12 + trusted, CLASSES + 1, generator=generator)
    labels = torch.randint(CLASSES, (trusted,), generator=generator)
    model = Table()
    loss = UFM()(model, _Divided(weak, strong, labels, 0.9))
    gradient = torch.autograd.grad(loss, model.shift)[0]
    shift = torch.zeros(CLASSES, requires_grad=True)
    expected = reference_ufm(weak[:, 1:] + shift, strong[:, 1:] + shift, labels, 0.9)
    # Sixteen rows of five classes: some ten float32 roundings of numbers of order 1.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    if scale or trusted:
        assert loss > 0.1
        theirs = torch.autograd.grad(expected, shift)[0]
        torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-6)
    else:
        # No guess is sure enough, and none is trusted.
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize(
    ("classes", "others", "top"), [(10, 9, 0.998630), (100, 99, 0.999875), (10, 1, 81 / 82)]
)
def test_how_sure_a_guess_must_be(classes: int, others: int, top: float) -> None:
    """sqrt(p) / sum sqrt(p) passes 0.9 where p passes ``top``, the rest spread over ``others``."""
    for p, passes in ((top - 1e-5, False), (top + 1e-5, True)):
        weak = torch.full((1, classes), -math.inf)
        weak[0, 0] = math.log(p)
        weak[0, 1 : 1 + others] = math.log((1 - p) / others)
        model = nn.Linear(classes, classes, bias=False)
        nn.init.eye_(model.weight)
        strong = torch.arange(float(classes)).unsqueeze(0)
        # The model turns infinities into NaN.
        weak = weak.clamp(min=-1e4)
        batch = _Divided(weak, strong, torch.empty(0, dtype=torch.int64), 0.9)
        assert (UFM()(model, batch).item() > 0) == passes


def test_simclr_contrasts_each_view_with_all_others() -> None:
    generator = torch.Generator().manual_seed(4)
    plain, augmented = torch.randn(2, 6, CLASSES, generator=generator)
    total = 0.0
    for i in range(6):
        a = plain[i].double()
        cosines = [a @ b.double() / (a.norm() * b.double().norm()) for b in augmented]
        scores = torch.stack(cosines) / 0.2
        total += (scores.logsumexp(0) - scores[i]).item()
    loss = SimCLR()(nn.Identity(), torch.cat([plain, augmented]))
    # Logits of at most 5 in a softmax of six: some float32 roundings of 5 * 6e-8.
    assert loss.item() == pytest.approx(total / 6, rel=3e-6)


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0], [1e4, 0.0], [math.log(3.0), 0.0]])
    exact = (math.log(2) + 0 + 0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 3
    assert Entropy()(nn.Identity(), logits).item() == pytest.approx(exact, rel=1e-6)


def reference_sar(
    sar: SAR, weight: Tensor, batches: list[Tensor], lr: float, decay: float
) -> tuple[Tensor, list[str]]:
    """SAR of a linear model in float64, and what happened at every step."""

    def entropy(w: Tensor, x: Tensor) -> Tensor:
        logarithms = (x @ w.T).log_softmax(1)
        return -(logarithms.exp() * logarithms).sum(1)

    start, velocity, mean, events = weight.clone(), None, None, []
    for x in batches:
        w = weight.clone().requires_grad_()
        first = entropy(w, x)
        kept = first < sar.margin
        if not kept.any():
            events.append("skipped")
            continue
        g = torch.autograd.grad(first[kept].mean(), w)[0]
        moved = (weight + sar.radius * g / g.norm()).requires_grad_()
        second = entropy(moved, x)
        kept = kept & (second < sar.margin)
        if not kept.any():
            events.append("skipped after moving")
            continue
        loss = second[kept].mean()
        g = torch.autograd.grad(loss, moved)[0] + decay * weight
        velocity = g if velocity is None else sar.momentum * velocity + g
        weight = weight - lr * velocity
        mean = loss.item() if mean is None else sar.decay * mean + (1 - sar.decay) * loss.item()
        events.append("filtered" if not (first < sar.margin).all() else "step")
        if mean < sar.floor:
            weight, velocity, mean = start.clone(), None, None
            events.append("reset")
    return weight, events


@pytest.mark.parametrize(
    ("sar", "scale", "accumulate", "expected"),
    [
        (SAR(), 1.0, 1, {"step"}),
        (SAR(margin=0.9, floor=0.5), 2.0, 1, {"step", "filtered", "reset"}),
        (SAR(margin=0.9, floor=0.5), 2.0, 3, {"filtered", "reset"}),
        (
            SAR(margin=0.7, floor=0.0, radius=2.0),
            1.0,
            1,
            {"filtered", "skipped", "skipped after moving"},
        ),
        (SAR(margin=0.7, floor=0.0, radius=2.0), 1.0, 2, {"filtered"}),
        (SAR(margin=0.0), 1.0, 2, {"skipped"}),
    ],
)
def test_sar_follows_its_definition(
    sar: SAR, scale: float, accumulate: int, expected: set[str]
) -> None:
    generator = torch.Generator().manual_seed(6)
    points = scale * torch.randn(40, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
    images = Images(40, lambda chosen: points[chosen], lambda chosen, _: points[chosen])
    recipe = Recipe(6, 0.1, 0.2, schedule="constant", accumulate=accumulate)
    batches: list[Tensor] = []
    for epoch in range(6):
        every = list(sar.batches(model, images, recipe, 7).epoch(epoch))
        # What is added up, however unequal, is one batch.
        batches += [torch.cat(every[i : i + accumulate]) for i in range(0, 6, accumulate)]
    adapt(model, images, sar, recipe, batch_size=7, progress=False)
    reference, events = reference_sar(sar, weight, batches, 0.1, 0.2)
    assert expected <= set(events)
    # Float64 on both sides: rounding alone differs, over 36 steps.
    torch.testing.assert_close(model.weight.detach(), reference, rtol=1e-9, atol=1e-11)


def test_sar_skips_a_step_that_is_left_without_images_after_moving() -> None:
    # At the start exactly below the margin; anything that moves towards more entropy is above.
    points = torch.tensor([[2.0, 0.0]])
    margin = Entropy()(nn.Identity(), points).item() + 1e-4
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    images = Images(1, lambda chosen: points[chosen], lambda chosen, _: points[chosen])
    adapt(model, images, SAR(margin=margin, radius=0.5), Recipe(epochs=2), progress=False)
    assert torch.equal(model.weight.detach(), torch.eye(2))
    adapt(model, images, SAR(margin=1.0, radius=0.5), Recipe(epochs=2), progress=False)
    assert not torch.equal(model.weight.detach(), torch.eye(2))


def test_sars_published_margin_passes_everything_of_fifteen_classes() -> None:
    assert math.log(15) < SAR().margin < math.log(16)
    assert SAR.for_classes(1000) == SAR()
    assert SAR.for_classes(10).margin == pytest.approx(0.4 * math.log(10))


@pytest.mark.parametrize("adaptation", EVERY, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("granularity", ["block", "task"])
def test_every_adaptation_lowers_its_loss(adaptation: Adaptation, granularity: str) -> None:
    model = make_model(granularity)
    learned = run(adaptation, model)
    assert learned.epoch == 3
    assert math.isnan(learned.score)
    assert learned.history[-1]["loss"] < learned.history[1]["loss"]
    assert (model.coef.abs() > 1e-3).all()
    assert torch.equal(model.coef, learned.parameters["coef"])


# The last resets once, within the last epoch: the running mean must go on from the one before.
@pytest.mark.parametrize("adaptation", [*EVERY, SAR(floor=1.475)], ids=lambda a: type(a).__name__)
def test_runs_repeat_and_resume_bit_for_bit(adaptation: Adaptation, tmp_path: Path) -> None:
    whole = run(adaptation).parameters["coef"]
    assert torch.equal(run(adaptation).parameters["coef"], whole)
    assert not torch.equal(run(adaptation, seed=1).parameters["coef"], whole)
    file = tmp_path / "run.safetensors"
    passes = 0

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, inputs: Tensor) -> Tensor:
            nonlocal passes
            passes += 1
            if len(inputs) and passes == stop:
                raise KeyboardInterrupt
            return self.inner(inputs)

    stop = 0
    run(adaptation, Interrupted())
    # In the last epoch, whose passes are about a third of all.
    stop, passes = passes - 2, 0
    with pytest.raises(KeyboardInterrupt):
        run(adaptation, Interrupted(), resume=file)
    stop, passes = 0, 0
    resumed = run(adaptation, Interrupted(), resume=file)
    assert torch.equal(resumed.parameters["inner.coef"], whole)


@pytest.mark.parametrize(
    ("adaptation", "places"),
    # SAR computes gradients at two places.
    [(UFM(divisor=4), 1), (SimCLR(), 1), (Entropy(), 1), (SAR(), 2)],
    ids=["UFM", "SimCLR", "Entropy", "SAR"],
)
def test_a_step_composes_once(
    adaptation: Adaptation,
    places: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """UFM's two views share a composition, and its predictions find that of the next step."""
    compositions = 0
    compose = ak.TaskVectorBank.compose

    def counted(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        nonlocal compositions
        compositions += 1
        return compose(*arguments, **options)

    steps = 0
    step = type(adaptation).step

    def stepped(self: Adaptation, *arguments: Any) -> Any:
        its = step(self, *arguments)

        class Counting:
            optimizer, state = its.optimizer, its.state

            def __call__(self, *arguments: Any) -> float:
                nonlocal steps
                steps += 1
                return its(*arguments)

        return Counting()

    monkeypatch.setattr(type(adaptation), "step", stepped)
    monkeypatch.setattr(ak.TaskVectorBank, "compose", counted)
    run(adaptation)
    assert steps >= 6
    assert compositions == places * steps


def test_layer_norms_of_the_published_baseline() -> None:
    pytest.importorskip("open_clip")
    with torch.device("meta"):
        encoder = image_encoder("ViT-B-32")
    chosen = {id(parameter) for parameter in layer_norms(encoder)}
    names = [name for name, parameter in encoder.named_parameters() if id(parameter) in chosen]
    assert sum(encoder.get_parameter(name).numel() for name in names) == 30_720
    assert {"ln_pre.weight", "ln_post.bias", "transformer.resblocks.8.ln_2.bias"} <= set(names)
    assert not any(f"resblocks.{i}." in name for name in names for i in (9, 10, 11))
    assert all("ln_" in name for name in names)


def test_layer_norms_of_another_depth_and_none() -> None:
    pytest.importorskip("open_clip")
    encoder = build_embedded_model().get_submodule("visual")
    # Four blocks of which one is left out, and two norms outside: weight and bias of 96 each.
    assert sum(p.numel() for p in layer_norms(encoder)) == (3 * 2 + 2) * 2 * 96
    with pytest.raises(ValueError, match="no LayerNorm"):
        layer_norms(nn.Sequential(nn.Linear(2, 2)))


def test_bad_arguments_are_refused() -> None:
    nothing = Images(0, lambda i: i, lambda i, _: i)
    with pytest.raises(ValueError, match="at least one image"):
        adapt(make_model(), nothing, Entropy(), Recipe(), progress=False)
    for size in (2, 18):
        with pytest.raises(ValueError, match="quarter"):
            run(UFM(), batch_size=size)
    with pytest.raises(ValueError, match="larger divisor"):
        run(UFM(), batch_size=64)
    with pytest.raises(ValueError, match="smaller divisor"):
        run(UFM(divisor=20))
    for bad in ({"divisor": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            UFM(**bad)


@pytest.fixture(scope="module")
def noisy() -> tuple[Callable[..., nn.Module], Any]:
    """Digits in noise: a classifier, composed of other tasks' vectors or plain, and the images."""
    pytest.importorskip("open_clip")
    from atlas_kernels.tasks.clip.model import zero_shot_head
    from atlas_kernels.tasks.embedded.image_task import embedded_task
    from atlas_kernels.tasks.embedded.model import load_model
    from atlas_kernels.tasks.embedded.vectors import load_task_vectors

    task = embedded_task("mnist-noise")
    clip = load_model()
    vectors = load_task_vectors(base=clip)
    others = ("mnist-clean", "digits-noise", "fashion-noise", "animals-noise")
    head = zero_shot_head(clip, task.classnames, task.templates)

    def classifier(composed: bool = True) -> nn.Module:
        visual = copy.deepcopy(clip.get_submodule("visual"))
        if composed:
            bank = ak.TaskVectorBank.from_task_vectors(visual, [vectors[name] for name in others])
            return ImageClassifier(ak.ComposedModel(visual, bank), head)
        visual.requires_grad_(False)
        for parameter in layer_norms(visual):
            parameter.requires_grad_()
        return ImageClassifier(visual, head)

    return classifier, task.test.subset(torch.arange(200))


def accuracy(model: nn.Module, examples: Any) -> float:
    with torch.no_grad():
        logits = model.eval()(examples.images.plain(torch.arange(len(examples))))
    return (logits.argmax(1) == examples.labels).float().mean().item()


@pytest.mark.parametrize(
    ("adaptation", "lr", "composed"),
    [
        (UFM(divisor=10), 0.03, True),
        (SimCLR(), 1e-2, True),
        (Entropy(), 1e-2, True),
        (SAR(), 0.1, True),
        (Entropy(), 1e-3, False),
    ],
    ids=["UFM", "SimCLR", "Entropy", "SAR", "LayerNorms"],
)
def test_adaptation_helps_on_an_embedded_task(
    adaptation: Adaptation, lr: float, composed: bool, noisy: tuple[Any, Any]
) -> None:
    classifier, examples = noisy
    model = classifier(composed)
    start = accuracy(model, examples)
    learned = adapt(
        model,
        examples.images,
        adaptation,
        Recipe(epochs=3, lr=lr),
        batch_size=32,
        progress=False,
    )
    if not isinstance(adaptation, UFM):  # Whose targets and mask are another every epoch.
        assert learned.history[-1]["loss"] < learned.history[1]["loss"]
    assert accuracy(model, examples) > start + 0.02
