"""Learning without gradients: the budget, the bounds, and an embedded task."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import atlas_kernels as ak
from atlas_kernels.learn.few_shot import sample_shots
from atlas_kernels.learn.gradient_free import learn_gradient_free, summed_cross_entropy
from atlas_kernels.tasks.clip.model import ImageClassifier
from atlas_kernels.tasks.images.images import Images, LabelledImages


def make_encoder(vectors: int = 3, granularity: Any = "task") -> ak.ComposedModel:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    base = module.state_dict()
    its = [
        ak.TaskVector.from_state_dicts(
            base, {k: v + torch.randn_like(v) for k, v in base.items()}, name=f"v{i}"
        )
        for i in range(vectors)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, its)
    return ak.ComposedModel(module, bank, granularity=granularity)


class Bowl:
    """A loss with its minimum at ``centre``; remembers where it was asked."""

    def __init__(self, encoder: ak.ComposedModel, centre: float) -> None:
        self.encoder, self.centre = encoder, centre
        self.seen: list[Tensor] = []

    def __call__(self) -> float:
        coef = self.encoder.coef.detach().clone()
        self.seen.append(coef)
        return float((coef - self.centre).square().sum())


@pytest.mark.parametrize("granularity", ["task", "block"])
@pytest.mark.parametrize("centre", [0.7, 4.0])
def test_the_best_of_fifty_within_the_bounds(granularity: str, centre: float) -> None:
    pytest.importorskip("nevergrad")
    encoder = make_encoder(granularity=granularity)
    loss = Bowl(encoder, centre)
    coef, value = learn_gradient_free(encoder, loss, progress=False)
    seen = loss.seen
    assert len(seen) == 50
    assert not seen[0].any()
    assert max(c.abs().max().item() for c in seen) <= 1.5
    losses = [float((c - centre).square().sum()) for c in seen]
    assert value == min(losses)
    assert torch.equal(coef, seen[losses.index(value)])
    assert torch.equal(encoder.coef, coef)
    # A bowl of three or six dimensions: most of the way from zero is gone, or up to the bounds.
    least = coef.numel() * (centre - min(centre, 1.5)) ** 2
    assert value - least < 0.25 * (losses[0] - least)


# With the published budget, and with one that is large for three coefficients.
@pytest.mark.parametrize("budget", [50, 500])
def test_a_seed_repeats_and_another_one_differs(budget: int) -> None:
    pytest.importorskip("nevergrad")
    encoder = make_encoder()
    runs = []
    for seed in (0, 0, 1):
        loss = Bowl(encoder, 0.7)
        learn_gradient_free(encoder, loss, budget=budget, seed=seed, progress=False)
        assert len(loss.seen) == budget
        runs.append(torch.stack(loss.seen))
    assert torch.equal(runs[0], runs[1])
    # Both begin at zero, and in the end both are at the centre.
    assert (runs[0] != runs[2])[1:50].any(1).all()


def test_what_does_not_help_leaves_the_base() -> None:
    pytest.importorskip("nevergrad")
    encoder = make_encoder()
    assert learn_gradient_free(encoder, Bowl(encoder, 0.0), budget=9, progress=False)[1] == 0
    assert not encoder.coef.any()
    constant = learn_gradient_free(encoder, lambda: 1.0, budget=9, progress=False)
    assert constant[1] == 1.0
    assert not constant[0].any()


def test_summed_cross_entropy_is_a_sum_over_plain_images() -> None:
    points = torch.randn(7, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = Images(7, lambda i: points[i], lambda i, _: points[i] * math.nan)
    model = nn.Dropout(0.5)
    total = summed_cross_entropy(model, LabelledImages(images, labels), batch_size=3)
    # Seven terms of order 1: some float32 roundings.
    assert total == pytest.approx(7 * cross_entropy(points.double(), labels).item(), rel=1e-6)


def test_bad_arguments_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder()
    for bad in ({"budget": 0}, {"bound": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            learn_gradient_free(encoder, lambda: 0.0, **bad)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nevergrad", None)
        with pytest.raises(ImportError, match=r"pip install 'atlas_kernels\[gradient-free\]'"):
            learn_gradient_free(encoder, lambda: 0.0)
    pytest.importorskip("nevergrad")
    with pytest.raises(FloatingPointError, match="NaN"):
        learn_gradient_free(encoder, lambda: math.nan, progress=False)


def test_few_shots_without_gradients_on_an_embedded_task() -> None:
    pytest.importorskip("nevergrad")
    pytest.importorskip("open_clip")
    from atlas_kernels.tasks.clip.model import zero_shot_head
    from atlas_kernels.tasks.embedded.image_task import embedded_task
    from atlas_kernels.tasks.embedded.model import load_model
    from atlas_kernels.tasks.embedded.vectors import load_task_vectors

    task = embedded_task("digits-inverted")
    clip = load_model()
    vectors = load_task_vectors(base=clip)
    visual = clip.get_submodule("visual")
    others = ("mnist-inverted", "fashion-inverted", "digits-clean", "animals-noise")
    bank = ak.TaskVectorBank.from_task_vectors(visual, [vectors[name] for name in others])
    encoder = ak.ComposedModel(visual, bank, granularity="task")
    head = zero_shot_head(clip, task.classnames, task.templates)
    model = ImageClassifier(encoder, head)
    shots = task.train.subset(sample_shots(task.train.labels, 8, seed=0))

    def accuracy() -> float:
        part = task.test
        with torch.no_grad():
            logits = model.eval()(part.images.plain(torch.arange(len(part))))
        return (logits.argmax(1) == part.labels).float().mean().item()

    start, start_loss = accuracy(), summed_cross_entropy(model, shots)
    _, loss = learn_gradient_free(
        encoder, lambda: summed_cross_entropy(model, shots), budget=25, progress=False
    )
    assert loss == summed_cross_entropy(model, shots)
    assert loss < 0.9 * start_loss
    assert accuracy() > start + 0.05
