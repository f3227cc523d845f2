"""Adapters: their formulas, what learns, how long it is constant, and what is kept and saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

import atlas_kernels as ak
from atlas_kernels.learn import trainer
from atlas_kernels.learn.adapters import (
    TIP_FROZEN,
    TIP_JOINT,
    Adapted,
    LPPlusPlus,
    TipAdapter,
    load_adapter,
    lp_plus_plus,
    lp_rates,
    tip_adapter,
)
from atlas_kernels.learn.few_shot import features
from atlas_kernels.tasks.clip.model import ImageClassifier
from atlas_kernels.tasks.images.images import Images, LabelledImages

CLASSES, WIDTH = 4, 6


def make_head() -> Tensor:
    return 5 * normalize(torch.randn(CLASSES, WIDTH, generator=seeded(5)), dim=1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_images(per_class: int, seed: int) -> LabelledImages:
    """Noisy points around a centre per class, that the head knows badly; views add noise."""
    labels = torch.arange(CLASSES).repeat(per_class)
    centres = torch.randn(CLASSES, 5, generator=seeded(0))
    inputs = centres[labels] + 0.5 * torch.randn(len(labels), 5, generator=seeded(seed))
    images = Images(
        len(labels),
        lambda chosen: inputs[chosen],
        lambda chosen, g: inputs[chosen] + 0.1 * torch.randn(len(chosen), 5, generator=g),
    )
    return LabelledImages(images, labels)


def make_model(vectors: int = 3) -> ImageClassifier:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    base = module.state_dict()
    tasks = [
        ak.TaskVector.from_state_dicts(
            base, {k: v + 0.5 * torch.randn_like(v) for k, v in base.items()}, name=f"v{i}"
        )
        for i in range(vectors)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, tasks, codec="fp32")
    return ImageClassifier(ak.ComposedModel(module, bank), make_head())


SHOTS, VALIDATION = make_images(3, 1), make_images(20, 2)
JOINT, FROZEN = replace(TIP_JOINT, epochs=2), replace(TIP_FROZEN, epochs=2)


def coef_of(model: nn.Module) -> Tensor:
    return model.get_submodule("encoder").get_parameter("coef").detach().clone()


def score(model: nn.Module, part: LabelledImages = VALIDATION) -> float:
    with torch.no_grad():
        logits = model.eval()(part.images.plain(torch.arange(len(part))))
    return (logits.argmax(1) == part.labels).float().mean().item()


def test_features_are_of_unit_length_in_the_order_of_the_images() -> None:
    encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, WIDTH))
    images = make_images(3, 1).images
    found = features(encoder, images, batch_size=5)
    inputs = images.plain(torch.arange(len(images)))
    # Only the order of rows may differ from one batch of all: batches of another size are other
    # matrix products, whose five terms may be summed in another order.
    torch.testing.assert_close(found, normalize(encoder[1](inputs), dim=1), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    views = [features(encoder, images, seeded(s), batch_size=5) for s in (0, 0, 1)]
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert not torch.equal(views[0], found)
    with pytest.raises(ValueError, match="at least one image"):
        features(encoder, images.subset(torch.arange(0)))


def test_tip_adds_to_each_class_what_its_shots_say() -> None:
    head, labels = make_head(), torch.tensor([2, 0, 2])
    keys = normalize(torch.randn(3, WIDTH), dim=1)
    inputs = torch.randn(7, WIDTH) * 3
    logits = TipAdapter(head, keys, labels, alpha=1.5, beta=2.5)(inputs)
    for x, row in zip(inputs.double(), logits, strict=True):
        unit = x / x.norm()
        for c in range(CLASSES):
            expected = head[c].double() @ unit
            for key, label in zip(keys.double(), labels, strict=True):
                if label == c:
                    expected += 1.5 * math.exp(-2.5 * (1 - key @ unit))
            # Logits of at most 10, a few dozen float32 roundings of 6e-8 each, relative to that.
            assert row[c].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_shot_itself_adds_alpha_to_its_class() -> None:
    head = make_head()
    keys = torch.eye(WIDTH)[:2]
    labels = torch.tensor([3, 1])
    # So sharp that other shots say nothing: exp(-200) is below all roundings.
    adapter = TipAdapter(head, keys, labels, alpha=2.0, beta=200.0)
    added = (adapter(keys) - keys @ head.T).detach()
    expected = torch.zeros(2, CLASSES)
    expected[0, 3] = expected[1, 1] = 2.0
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)


def test_both_adapters_can_be_the_zero_shot_classifier() -> None:
    head = make_head()
    inputs = torch.randn(50, WIDTH)
    zero_shot = ImageClassifier(nn.Identity(), head)(inputs)
    off = TipAdapter(head, torch.randn(3, WIDTH), torch.tensor([0, 1, 1]), alpha=0.0)
    assert torch.equal(off(inputs), zero_shot)
    # Rows of the head are divided by their lengths and multiplied again: two roundings of each
    # term, and of the sum.
    torch.testing.assert_close(LPPlusPlus.zero_shot(head)(inputs), zero_shot, rtol=1e-5, atol=1e-5)


def test_an_adapter_of_some_classes_has_their_logits() -> None:
    head, rows = make_head(), torch.tensor([0, 2, 3])
    inputs = torch.randn(50, WIDTH)
    labels = torch.tensor([3, 1, 0, 3])  # No shot of class 2, one of a class that is left out.
    tip = TipAdapter(head, normalize(torch.randn(4, WIDTH), dim=1), labels, beta=3.0)
    lp = LPPlusPlus(
        head, torch.randn(CLASSES, WIDTH), torch.randn(CLASSES), torch.randn(CLASSES) + 9
    )
    for adapter in (tip, lp):
        part = adapter.for_classes(rows)
        # The same sums, but perhaps in another order; logits of at most 20.
        torch.testing.assert_close(part(inputs), adapter(inputs)[:, rows], rtol=1e-5, atol=1e-5)
        masked = adapter(inputs).index_fill(1, torch.tensor([1]), -torch.inf)
        assert torch.equal(rows[part(inputs).argmax(1)], masked.argmax(1))
    assert len(tip.for_classes(rows).keys) == 3


@pytest.mark.parametrize("joint", [True, False])
def test_tip_learns_everything_that_it_should_and_nothing_else(joint: bool) -> None:
    model = make_model()
    with torch.no_grad():  # What was learned before is where joint learning starts.
        model.encoder.coef.fill_(0.1)
    recipe = replace(JOINT if joint else FROZEN, epochs=1)
    # Twelve shots in batches of 12: as often as oversampling repeats them.
    adapted = tip_adapter(
        model, SHOTS, VALIDATION, recipe, joint=joint, batch_size=12, progress=False
    )
    assert adapted.improved
    assert adapted.learned.epoch == 1
    adapter = adapted.adapter
    keys = features(make_started().encoder, SHOTS.images, seeded(0))
    assert (adapter.keys - keys).abs().max() > 1e-4
    assert adapter.alpha.item() != 2.0
    assert adapter.beta.item() != 1.0
    assert bool((coef_of(model) != 0.1).all()) == joint
    assert torch.equal(model.head, make_head())


def make_started() -> ImageClassifier:
    model = make_model()
    with torch.no_grad():
        model.encoder.coef.fill_(0.1)
    return model


def test_the_first_joint_step_has_the_published_rates() -> None:
    """Adam's first step is the rate times the gradient's sign, apart from decay by rate * 0.01."""
    model = make_model()
    steps: list[dict[str, Tensor]] = []
    keys = features(model.encoder, SHOTS.images, seeded(0))

    def recorded(m: nn.Module, images: Tensor) -> None:
        steps.append({n: p.detach().clone() for n, p in m.named_parameters() if p.requires_grad})

    original = nn.Sequential.forward

    def forward(self: nn.Sequential, inputs: Tensor) -> Tensor:
        if hasattr(self, "adapter") and self.training:
            recorded(self, inputs)
        return original(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Sequential, "forward", forward)
        tip_adapter(model, SHOTS, VALIDATION, JOINT, batch_size=12, progress=False)
    assert torch.equal(steps[0]["adapter.keys"], keys)
    assert (steps[0]["adapter.alpha"].item(), steps[0]["adapter.beta"].item()) == (2.0, 1.0)
    rates = {"encoder.coef": 0.1, "adapter.alpha": 0.1, "adapter.beta": 0.1, "adapter.keys": 1e-3}
    assert set(steps[0]) == set(rates)
    for name, rate in rates.items():
        moved = steps[1][name] - steps[0][name] * (1 - 0.01 * rate)
        # eps = 1e-8 takes a share of 1e-8 / |g|, and most gradients exceed 1e-5; the difference
        # of values of order 1 is rounded by 1e-7.
        assert moved.abs().median().item() == pytest.approx(rate, rel=1e-3, abs=2e-7)
        assert moved.abs().max().item() <= rate * 1.001 + 2e-7


def test_the_cache_holds_each_shot_once_however_often_shots_repeat() -> None:
    for joint in (True, False):
        adapted = tip_adapter(
            make_model(),
            SHOTS,
            VALIDATION,
            replace(JOINT, epochs=0),
            joint=joint,
            batch_size=64,
            progress=False,
        )
        assert adapted.adapter.keys.shape == (len(SHOTS), WIDTH)
        assert torch.equal(adapted.adapter.labels, SHOTS.labels)


def test_frozen_learning_sees_another_view_of_each_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(), []
    original = TipAdapter.forward

    def forward(self: TipAdapter, inputs: Tensor) -> Tensor:
        if self.training:
            seen.append(inputs)
        return original(self, inputs)

    monkeypatch.setattr(TipAdapter, "forward", forward)
    tip_adapter(model, SHOTS, VALIDATION, FROZEN, joint=False, batch_size=12, progress=False)
    # ceil(12 * 11 / 12) = 11 batches in each of two epochs, of the same features.
    epochs = [torch.cat(seen[:11]), torch.cat(seen[11:])]
    assert len(epochs[0].unique(dim=0)) == 11 * len(SHOTS)
    assert torch.equal(*(epoch.sort(0).values for epoch in epochs))


@pytest.mark.parametrize("method", ["joint", "frozen", "lp++"])
def test_what_is_not_better_than_the_classifier_is_the_classifier(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_started()
    before = coef_of(model)
    inputs = VALIDATION.images.plain(torch.arange(len(VALIDATION)))
    expected = model(inputs).detach()
    # The classifier, the adapter's start, and two epochs: the first is the best of the run, but
    # ties keep the classifier.
    scores = iter([0.5, 0.1, 0.5, 0.4])
    monkeypatch.setattr("atlas_kernels.learn.adapters._accuracy", lambda *_: next(scores))
    if method == "lp++":
        adapted = lp_plus_plus(model, SHOTS, VALIDATION, epochs=2, progress=False)
    else:
        recipe = JOINT if method == "joint" else FROZEN
        adapted = tip_adapter(
            model, SHOTS, VALIDATION, recipe, joint=method == "joint", progress=False
        )
    assert adapted.learned.epoch == 1
    assert not adapted.improved
    assert adapted.start == adapted.score == 0.5
    assert torch.equal(coef_of(model), before)
    # As for the zero-shot classifier above.
    torch.testing.assert_close(adapted.model(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["joint", "frozen", "lp++"])
def test_adapters_help_and_the_kept_model_has_the_best_score(method: str) -> None:
    model = make_model()
    if method == "lp++":
        adapted = lp_plus_plus(model, SHOTS, VALIDATION, epochs=30, progress=False)
    else:
        recipe = replace(TIP_JOINT if method == "joint" else TIP_FROZEN, epochs=5)
        adapted = tip_adapter(
            model,
            SHOTS,
            VALIDATION,
            recipe,
            joint=method == "joint",
            batch_size=12,
            progress=False,
        )
    scores = [record["score"] for record in adapted.learned.history]
    assert adapted.improved
    assert adapted.score == max(scores) == scores[adapted.learned.epoch]
    assert adapted.score > adapted.start + 0.2
    # Accuracies are multiples of 1/80: equal but for the rounding of a mean.
    assert score(adapted.model) == pytest.approx(adapted.score, abs=1e-6)
    losses = [record["loss"] for record in adapted.learned.history[1:]]
    assert losses[-1] < losses[0]


def test_the_learned_coefficients_stay_with_frozen_adapters() -> None:
    model = make_started()
    for adapted in (
        tip_adapter(model, SHOTS, VALIDATION, FROZEN, joint=False, progress=False),
        lp_plus_plus(model, SHOTS, VALIDATION, epochs=10, progress=False),
    ):
        assert torch.equal(coef_of(model), torch.full((3, 4), 0.1))
        assert adapted.model.get_submodule("encoder") is model.encoder


def test_lp_starts_from_the_closed_forms() -> None:
    head = make_head()
    labels = torch.tensor([0, 2, 2, 3])  # Nothing of class 1.
    f = normalize(torch.randn(4, WIDTH), dim=1)
    adapter = LPPlusPlus.start(head, f, labels, seed=0)
    # Sums of at most two terms of order 1.
    sums = torch.stack([f[0], torch.zeros(WIDTH), f[1] + f[2], f[3]])
    torch.testing.assert_close(adapter.weight.detach(), sums, rtol=1e-6, atol=1e-6)
    t = (head / head.norm(dim=1, keepdim=True)).double()
    d = f.double()
    means = (d[0] @ t[0], (d[1] @ t[2] + d[2] @ t[2]) / 2, d[3] @ t[3])
    expected = 250 * sum(float(m) for m in means) / 3
    # 250 times sums of six products of order 1, 1e-6 each.
    assert adapter.alpha.tolist() == pytest.approx([expected] * CLASSES, abs=5e-4)
    # As nn.Linear draws it, from the seed alone.
    assert 0 < adapter.bias.abs().max() <= 1 / math.sqrt(WIDTH)
    assert torch.equal(adapter.bias, LPPlusPlus.start(head, f, labels, seed=0).bias)
    assert not torch.equal(adapter.bias, LPPlusPlus.start(head, f, labels, seed=1).bias)
    logits = adapter(f)
    expected_logits = d @ adapter.weight.double().T + adapter.bias + adapter.alpha * (d @ t.T)
    # Logits up to 250, rounded as above.
    torch.testing.assert_close(logits.double(), expected_logits, rtol=1e-5, atol=1e-3)


@given(st.integers(1, 40), st.integers(0, 9))
def test_lp_rates_are_the_closed_forms(count: int, seed: int) -> None:
    head = make_head()
    f = normalize(torch.randn(count, WIDTH, generator=seeded(seed)), dim=1)
    rate, alpha_rate = lp_rates(head, f)
    d, t = f.double(), normalize(head.double(), dim=1)
    largest = torch.linalg.svdvals(d)[0].item() ** 2
    # Both in float64, the head's rows as they are stored.
    assert rate == pytest.approx(4 * count / largest, rel=1e-10)
    sums = [sum(float(row @ c) ** 2 for row in d) for c in t]
    assert alpha_rate == pytest.approx(count / (4 * max(sums)), rel=1e-10)


def replayed_alphas(head: Tensor, f: Tensor, labels: Tensor, epochs: int) -> list[Tensor]:
    """LP++ written out: its alpha after every epoch."""
    adapter = LPPlusPlus.start(head, f, labels, 0)
    rate, alpha_rate = lp_rates(head, f)
    momentum = [torch.zeros_like(adapter.weight), torch.zeros_like(adapter.bias)]
    total = torch.zeros(CLASSES)
    alphas = []
    for epoch in range(1, epochs + 1):
        loss = cross_entropy(adapter(f), labels)
        *gradients, slope = torch.autograd.grad(loss, [adapter.weight, adapter.bias, adapter.alpha])
        total = total + slope
        with torch.no_grad():
            for i, parameter in enumerate((adapter.weight, adapter.bias)):
                momentum[i] = 0.9 * momentum[i] + gradients[i]
                parameter -= rate * momentum[i]
            if epoch % 10 == 0:
                adapter.alpha -= alpha_rate * total
        alphas.append(adapter.alpha.detach().clone())
    return alphas


def test_lp_steps_alpha_every_tenth_epoch_along_all_gradients_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Tensor]] = []

    def rising(adapter: nn.Module, *_: object) -> float:
        if isinstance(adapter, LPPlusPlus):
            seen.append({n: p.detach().clone() for n, p in adapter.named_parameters()})
        return float(len(seen))

    monkeypatch.setattr("atlas_kernels.learn.adapters._accuracy", rising)
    model = make_model()
    lp_plus_plus(model, SHOTS, VALIDATION, progress=False)
    assert len(seen) == 301  # The start, and every epoch.
    alphas = [state["alpha"] for state in seen]
    changes = [i for i in range(1, 301) if not torch.equal(alphas[i], alphas[i - 1])]
    assert changes == list(range(10, 301, 10))
    assert all(not torch.equal(seen[i]["weight"], seen[i - 1]["weight"]) for i in range(1, 301))
    assert all(not torch.equal(seen[i]["bias"], seen[i - 1]["bias"]) for i in range(1, 301))
    f = features(model.encoder, SHOTS.images, seeded(0))
    expected = replayed_alphas(make_head(), f, SHOTS.labels, 30)
    for ours, theirs in zip(alphas[1:31], expected, strict=True):
        # The same operations but for the momentum's, fused by the optimizer or not.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # Cleared gradients would have taken other steps from the second one on.
    first, second = (alphas[10 * i + 10] - alphas[10 * i] for i in (0, 1))
    assert (second - first).abs().max() > 0.1 * first.abs().max()


@pytest.mark.parametrize(
    "run",
    [
        lambda m: tip_adapter(m, SHOTS, VALIDATION, JOINT, batch_size=12, progress=False),
        lambda m: lp_plus_plus(m, SHOTS, VALIDATION, epochs=20, progress=False),
    ],
)
def test_saved_adapters_come_back_and_leave_the_coefficients_alone(
    run: Callable[[ImageClassifier], object], tmp_path: Path
) -> None:
    model = make_model()
    adapted = run(model)
    coef = coef_of(model)
    model.encoder.save_coefficients(tmp_path / "coefficients.safetensors")
    adapted.adapter.save(tmp_path / "adapter.safetensors")
    assert torch.equal(coef_of(model), coef)
    loaded = load_adapter(tmp_path / "adapter.safetensors")
    state = adapted.adapter.state_dict()
    assert type(loaded) is type(adapted.adapter)
    assert set(loaded.state_dict()) == set(state) > {"head", "alpha"}
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())
    other = make_model()
    other.encoder.load_coefficients(tmp_path / "coefficients.safetensors")
    inputs = VALIDATION.images.plain(torch.arange(len(VALIDATION)))
    again = nn.Sequential(other.encoder, loaded).eval()
    assert torch.equal(again(inputs), adapted.model(inputs))
    with pytest.raises(ak.FileFormatError, match="adapter"):
        load_adapter(tmp_path / "coefficients.safetensors")


@pytest.mark.parametrize("method", ["tip", "lp++"])
def test_runs_repeat_bit_for_bit_and_resume(method: str, tmp_path: Path) -> None:
    def run(resume: Path | None) -> tuple[Adapted, Tensor]:
        model = make_model()
        options = {"resume": resume, "progress": False}
        if method == "tip":
            recipe = replace(JOINT, epochs=3)
            adapted = tip_adapter(model, SHOTS, VALIDATION, recipe, batch_size=12, **options)
        else:
            adapted = lp_plus_plus(model, SHOTS, VALIDATION, epochs=25, **options)
        return adapted, coef_of(model)

    whole, whole_coef = run(None)
    original, file = trainer._Run.save, tmp_path / "run.safetensors"
    stop = 2 if method == "tip" else 14  # Between two steps of alpha.

    def save(self: trainer._Run) -> None:
        original(self)
        if self.epoch == stop:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer._Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(file)
    resumed, resumed_coef = run(file)
    assert torch.equal(resumed_coef, whole_coef)
    assert resumed.score == whole.score
    assert resumed.learned.epoch == whole.learned.epoch
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(value, resumed.adapter.state_dict()[name])
    for ours, theirs in zip(resumed.learned.history[1:], whole.learned.history[1:], strict=True):
        assert (ours["loss"], ours["score"]) == (theirs["loss"], theirs["score"])


def test_bad_arguments_are_refused() -> None:
    model = make_model()
    plain = ImageClassifier(model.encoder.merge().requires_grad_(False), model.head)
    with pytest.raises(ValueError, match="joint=False"):
        tip_adapter(plain, SHOTS, VALIDATION)
    wrong = LabelledImages(SHOTS.images, SHOTS.labels + 1)
    for run in (tip_adapter, lp_plus_plus):
        with pytest.raises(ValueError, match=r"\[0, 4\).*\[1, 4\]"):
            run(model, wrong, VALIDATION)
    with pytest.raises(ValueError, match="features of shape"):
        TipAdapter(make_head(), torch.zeros(2, WIDTH), torch.tensor([1]))
    with pytest.raises(ValueError, match="head of shape"):
        TipAdapter(torch.zeros(3), torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="bias has shape"):
        LPPlusPlus(make_head(), make_head(), torch.zeros(CLASSES, 1), torch.zeros(CLASSES))
