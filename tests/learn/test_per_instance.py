"""Coefficients predicted from images: where they start, what they follow, that they learn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import atlas_kernels as ak
from atlas_kernels.learn.per_instance import PER_INSTANCE, PerInstance
from atlas_kernels.learn.test_time import Entropy, adapt
from atlas_kernels.learn.trainer import Recipe
from atlas_kernels.tasks.clip.model import ImageClassifier


def make(vectors: int = 3, **options: Any) -> PerInstance:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
    base = module.state_dict()
    its = [
        ak.TaskVector.from_state_dicts(
            base, {k: v + torch.randn_like(v) for k, v in base.items()}, name=f"v{i}"
        )
        for i in range(vectors)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, its, codec="fp32")
    options = {"granularity": "task", **options}
    return PerInstance(ak.ComposedModel(module, bank, **options), width=6)


def randomise(model: PerInstance) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.predictor.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_it_starts_as_the_base_and_learns_a_linear_map_alone() -> None:
    model = make()
    inputs = torch.randn(7, 5)
    assert torch.equal(model(inputs), model.encoder.module(inputs))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["predictor.weight", "predictor.bias"]
    assert model.predictor.weight.shape == (3, 6)


def test_coefficients_are_the_mean_prediction_of_the_batch() -> None:
    model = make()
    randomise(model)
    inputs = torch.randn(7, 5)
    predictor = model.predictor
    features = model.encoder.module(inputs).detach()
    expected = torch.stack([predictor.weight @ f + predictor.bias for f in features]).mean(0)
    coef = model.coefficients(inputs)
    # Sums of six and seven terms of order 1: some float32 roundings.
    torch.testing.assert_close(coef, expected, rtol=1e-5, atol=1e-6)
    weights = {
        name: base + sum(c * delta for c, delta in zip(expected, deltas, strict=True))
        for name, base, deltas in dense(model)
    }
    composed = functional_call(copy.deepcopy(model.encoder.module), weights, (inputs,))
    torch.testing.assert_close(model(inputs), composed, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(inputs), model.encoder.module(inputs), atol=1e-2)


def dense(model: PerInstance) -> Any:
    """Name, base and the deltas of every block."""
    bank = model.encoder.bank
    base = bank.compose(torch.zeros(len(bank.names)))
    ones = torch.eye(len(bank.names))
    composed = [bank.compose(row) for row in ones]
    return [(name, value, [c[name] - value for c in composed]) for name, value in base.items()]


def test_a_batch_of_identical_images_equals_one_image() -> None:
    model = make()
    randomise(model)
    image = torch.randn(1, 5)
    one, many = model(image), model(image.repeat(9, 1))
    # The mean of nine equal numbers, and products of matrices with other numbers of rows.
    torch.testing.assert_close(many, one.expand(9, -1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(torch.cat([image, -image]))[:1], one, atol=1e-2)


def test_gradients_are_those_of_composing_anew_and_leave_the_features_alone() -> None:
    model = make()
    randomise(model)
    inputs, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 5, 0])
    parameters = list(model.predictor.parameters())
    gradients = torch.autograd.grad(cross_entropy(model(inputs), labels), parameters)
    features = model.encoder.module(inputs).detach()
    coef = model.predictor(features).mean(0)
    weights = {
        name: base + sum(c * delta for c, delta in zip(coef, deltas, strict=True))
        for name, base, deltas in dense(model)
    }
    loss = cross_entropy(
        functional_call(copy.deepcopy(model.encoder.module), weights, (inputs,)), labels
    )
    expected = torch.autograd.grad(loss, parameters)
    # Deltas are differences of float32 numbers, rounded once more than the bank's.
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-5)
    assert all(gradient.abs().min() > 1e-5 for gradient in gradients)


@pytest.mark.parametrize("options", [{"granularity": "block"}, {"memory": "recompute"}])
def test_other_encoders_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="granularity='task' and memory='whole'"):
        make(**options)


def test_the_published_recipe() -> None:
    assert (PER_INSTANCE.lr, PER_INSTANCE.warmup, PER_INSTANCE.weight_decay) == (1e-4, 500, 0.1)
    assert (PER_INSTANCE.schedule, PER_INSTANCE.preset) == ("cosine", "clean")


def test_entropy_adapts_the_predictor_on_an_embedded_task() -> None:
    pytest.importorskip("open_clip")
    from atlas_kernels.tasks.clip.model import zero_shot_head
    from atlas_kernels.tasks.embedded.image_task import embedded_task
    from atlas_kernels.tasks.embedded.model import load_model
    from atlas_kernels.tasks.embedded.vectors import load_task_vectors

    task = embedded_task("mnist-noise")
    clip = load_model()
    vectors = load_task_vectors(base=clip)
    visual = clip.get_submodule("visual")
    others = ("mnist-clean", "digits-noise", "fashion-noise", "animals-noise")
    bank = ak.TaskVectorBank.from_task_vectors(visual, [vectors[name] for name in others])
    head = zero_shot_head(clip, task.classnames, task.templates)
    encoder = PerInstance(ak.ComposedModel(visual, bank, granularity="task"), head.shape[1])
    model = ImageClassifier(encoder, head)
    part = task.test.subset(torch.arange(200))

    def accuracy() -> float:
        def correct(chosen: Tensor) -> int:
            return int((model(part.images.plain(chosen)).argmax(1) == part.labels[chosen]).sum())

        with torch.no_grad():
            model.eval()
            return sum(map(correct, torch.arange(200).split(40))) / 200

    start = accuracy()
    recipe = Recipe(epochs=3, lr=3e-4, warmup=2)
    learned = adapt(model, part.images, Entropy(), recipe, batch_size=40, progress=False)
    assert learned.history[-1]["loss"] < learned.history[1]["loss"]
    assert accuracy() > start + 0.02
