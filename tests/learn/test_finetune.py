"""Making task vectors: what learns, what is kept, and that the models composed of it agree."""

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

import atlas_kernels as ak
from atlas_kernels.learn import finetune
from atlas_kernels.learn.few_shot import classify
from atlas_kernels.learn.finetuning import (
    FINETUNING,
    LORA_FINETUNING,
    FullTuning,
    LinearTuning,
    LoraTuning,
    Tuning,
)
from atlas_kernels.learn.trainer import Recipe
from atlas_kernels.tasks.clip.model import ImageClassifier, image_encoder
from atlas_kernels.tasks.embedded.model import build_embedded_model
from atlas_kernels.tasks.images.catalog import CATALOG
from atlas_kernels.tasks.images.images import Images, LabelledImages

RECIPE = Recipe(epochs=3, lr=0.02, schedule="constant")


class Encoder(nn.Module):
    """A convolution, BatchNorm and two layers, all with names to match."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.conv(images)).relu().flatten(1)
        result: Tensor = self.head(hidden)
        return result


TARGETS = ("conv.weight", "head.*.weight")
TUNINGS: dict[str, Callable[[nn.Module], Tuning]] = {
    "full": FullTuning,
    "linear": LinearTuning,
    "lora": lambda encoder: LoraTuning(encoder, rank=2, alpha=3.0, targets=TARGETS),
}


def make_images(count: int = 60) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 1, 4, 4, generator=generator)
    labels = (pixels.flatten(1) @ torch.randn(16, 3, generator=generator)).argmax(1)
    images = Images(count, lambda i: pixels[i], lambda i, generator: pixels[i])
    return LabelledImages(images, labels)


def make_encoder() -> nn.Module:
    encoder = Encoder()
    for buffer in encoder.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return encoder.eval()


HEAD = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
IMAGES = make_images()
INPUTS = IMAGES.images.plain(torch.arange(7))


def tuned(kind: str, encoder: nn.Module, recipe: Recipe = RECIPE, **options: Any) -> Any:
    """What learned, and its task vector."""
    tuning = TUNINGS[kind](encoder)
    options = {"batch_size": 16, "name": kind, "progress": False, **options}
    return tuning, finetune(tuning, HEAD, IMAGES, recipe, **options)


def loss(encoder: nn.Module) -> Tensor:
    return classify(ImageClassifier(encoder, 10 * HEAD), (INPUTS, IMAGES.labels[:7]))


@pytest.mark.parametrize("kind", TUNINGS)
def test_starts_as_the_encoder_and_leaves_it_alone(kind: str) -> None:
    encoder = make_encoder()
    before = copy.deepcopy(encoder.state_dict())
    tuning = TUNINGS[kind](encoder).eval()
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    assert same_bits(tuning(INPUTS), frozen(INPUTS))
    start = tuning.task_vector()
    assert not any(start.changes(name) for name in start.deltas)
    _, vector = tuned(kind, encoder)
    assert all(vector.changes(name) for name in vector.deltas)
    assert not encoder.training
    for name, tensor in encoder.state_dict().items():
        assert same_bits(tensor, before[name]), name


@pytest.mark.parametrize("kind", TUNINGS)
def test_learns_and_its_task_vector_is_the_model_that_learned(kind: str) -> None:
    encoder = make_encoder()
    tuning, vector = tuned(kind, encoder)
    assert vector.name == kind
    assert vector.base == TUNINGS["full"](encoder).task_vector().base
    # A bank refuses the vector of another base.
    bank = ak.TaskVectorBank.from_task_vectors(encoder, [vector], codec="fp32")
    assert bank.blocks == tuple(vector.deltas)
    model = {"linear": ak.LinearizedModel}.get(kind, ak.ComposedModel)(copy.deepcopy(encoder), bank)
    nn.init.ones_(model.coef)
    for name, delta in vector.statistics.items():
        model.module.get_buffer(name).add_(delta)
    # Full: theta_0 + (theta - theta_0) rounds twice; the others differ in the order of sums.
    assert torch.allclose(model.eval()(INPUTS), tuning(INPUTS), rtol=0, atol=1000 * EPS)
    assert loss(tuning) < 0.8 * loss(encoder)
    with pytest.raises(ValueError, match="another"):
        ak.TaskVectorBank.from_task_vectors(make_encoder(), [vector])


def test_statistics_move_in_full_fine_tuning_only() -> None:
    encoder = make_encoder()
    for kind in TUNINGS:
        tuning, vector = tuned(kind, encoder)
        assert bool(vector.statistics) == (kind == "full")
        moved = not torch.equal(tuning.encoder.norm.running_mean, encoder.norm.running_mean)
        assert moved == (kind == "full")


def test_a_tangent_starts_with_the_gradient_of_the_weights() -> None:
    encoder = make_encoder()
    full, linear = FullTuning(encoder).eval(), LinearTuning(encoder)
    for tuning in (full, linear):
        loss(tuning).backward()
    for name, parameter in full.encoder.named_parameters():
        gradient = linear.tangent.get_parameter(name).grad
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6), name
        assert gradient.abs().max() > 1e-4
    assert all(p.grad is None for p in linear.encoder.parameters())


def test_factors_start_as_published_and_alone_learn() -> None:
    encoder = make_encoder()
    tuning = LoraTuning(encoder, rank=2, alpha=3.0, targets=TARGETS, seed=5)
    learning = {name for name, p in tuning.named_parameters() if p.requires_grad}
    assert learning == {f"{side}.{i}" for side in ("down", "up") for i in range(3)}
    shapes = [(4, 1, 3, 3), (8, 16), (5, 8)]
    for down, up, shape in zip(tuning.down, tuning.up, shapes, strict=True):
        assert (down.shape, up.shape) == ((2, *shape[1:]), (shape[0], 2))
        # Kaiming with a = sqrt 5 is uniform within 1 / sqrt(fan in).
        bound = down[0].numel() ** -0.5
        assert 0.7 * bound < down.abs().max() <= bound
        assert not up.any()
    loss(tuning).backward()
    assert not any(down.grad.any() for down in tuning.down)
    assert all(up.grad.abs().max() > 1e-4 for up in tuning.up)
    again, other = (LoraTuning(encoder, 2, 3.0, TARGETS, seed) for seed in (5, 6))
    assert all(map(same_bits, tuning.down, again.down))
    assert not any(map(torch.equal, tuning.down, other.down))


def test_factors_are_composed_and_saved_as_such(tmp_path: Path) -> None:
    encoder = make_encoder()
    _, vector = tuned("lora", encoder)
    assert all(
        isinstance(delta, ak.LowRank) and (delta.rank, delta.scale) == (2, 1.5)
        for delta in vector.deltas.values()
    )
    assert set(vector.deltas) == {"conv.weight", "head.0.weight", "head.2.weight"}
    vector.save(tmp_path / "v.safetensors")
    loaded = ak.TaskVector.load(tmp_path / "v.safetensors")
    assert loaded.base == vector.base
    for name, delta in vector.deltas.items():
        assert same_bits(loaded.deltas[name].up, delta.up)
        assert same_bits(loaded.deltas[name].down, delta.down)


def test_the_best_epoch_is_kept_if_there_are_scores() -> None:
    encoder = make_encoder()
    first = tuned("lora", encoder, Recipe(1, 0.02, schedule="constant"))[1]
    scores = iter([0.0, 0.5, 0.2, 0.1])
    best = tuned("lora", encoder, evaluate=lambda _: next(scores))[1]
    last = tuned("lora", encoder)[1]
    for name, delta in first.deltas.items():
        assert same_bits(best.deltas[name].up, delta.up)
        assert not torch.equal(last.deltas[name].up, delta.up)


def test_augmented_images_in_an_order_that_the_seed_decides() -> None:
    encoder, drawn = make_encoder(), []

    def augmented(indices: Tensor, generator: torch.Generator) -> Tensor:
        drawn.append(len(indices))
        noise = torch.randn(len(indices), 1, 4, 4, generator=generator)
        return IMAGES.images.plain(indices) + 0.1 * noise

    def plain(indices: Tensor) -> Tensor:
        raise AssertionError("plain images are for evaluation")

    images = LabelledImages(Images(len(IMAGES), plain, augmented), IMAGES.labels)
    ups = []
    for seed in (0, 0, 1):
        tuning = TUNINGS["lora"](encoder)
        recipe = Recipe(epochs=1, lr=0.02, seed=seed)
        vector = finetune(tuning, HEAD, images, recipe, batch_size=16, progress=False)
        ups.append(vector.deltas["head.0.weight"].up)
    assert drawn == [16, 16, 16, 12] * 3
    assert same_bits(ups[0], ups[1])
    assert not torch.allclose(ups[0], ups[2], rtol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": "mlp.*"}, r"no weight .* matches mlp"),
        ({"targets": "head.0.*"}, "not 'head.0.bias'"),
        ({"rank": 0}, "rank must be at least 1"),
    ],
)
def test_factors_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraTuning(make_encoder(), **{"targets": TARGETS, **change})


def test_published_recipes() -> None:
    assert set(FINETUNING) == set(LORA_FINETUNING) == set(CATALOG)
    assert FINETUNING["cars"] == Recipe(35, 1e-5, 0.1, "cosine", warmup=500)
    assert LORA_FINETUNING["dtd"] == Recipe(76, 1e-3, 0.1, "cosine", warmup=500)


# open_clip's encoders.


@pytest.mark.parametrize(
    ("rank", "targets", "weights", "count"),
    [
        (4, None, 48, 589_824),
        (16, None, 48, 2_359_296),
        (64, None, 48, 9_437_184),
        (16, "*.attn.*weight", 24, 12 * 16 * (4 * 768 + 2 * 768)),
        (16, "*.mlp.*weight", 24, 12 * 16 * 2 * 5 * 768),
    ],
)
def test_published_counts(rank: int, targets: str | None, weights: int, count: int) -> None:
    pytest.importorskip("open_clip")
    with torch.device("meta"):
        encoder = image_encoder("ViT-B-32")
    options = {} if targets is None else {"targets": targets}
    tuning = LoraTuning(encoder, rank, **options)
    learning = [p for p in tuning.parameters() if p.requires_grad]
    # Two factors each: 96 in all, of which 21 task vectors make 2016 coefficients, or 1008.
    assert len(learning) == 2 * weights
    assert sum(p.numel() for p in learning) == count


@pytest.mark.parametrize("lora", ["product", "factorwise"])
def test_composed_on_an_open_clip_encoder(lora: Any) -> None:
    """Four weights of a layer: as products equal to dense vectors; as factors to the formula."""
    pytest.importorskip("open_clip")
    encoder = build_embedded_model(8).get_submodule("visual").eval().requires_grad_(False)
    vectors = []
    for seed in range(2):
        tuning = LoraTuning(encoder, rank=3, seed=seed)
        for up in tuning.up:
            nn.init.normal_(up, std=0.1)
        vectors.append(tuning.task_vector(f"v{seed}"))
    bank = ak.TaskVectorBank.from_task_vectors(encoder, vectors, codec="fp32", lora=lora)
    assert len(bank.blocks) == (16 if lora == "product" else 32)
    model = ak.ComposedModel(copy.deepcopy(encoder), bank).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert same_bits(model(images), encoder(images))
    start = model(images)
    start.square().sum().backward()
    gradients = dict(zip(bank.blocks, model.coef.grad.T, strict=True))
    for block, gradient in gradients.items():
        assert bool(gradient.any()) != block.endswith(".lora_A"), block

    with torch.no_grad():
        model.coef.normal_(std=0.5)
    coef = dict(zip(bank.blocks, model.coef.detach().T, strict=True))
    initial = bank_factors(bank)
    weights = {}
    for name in vectors[0].deltas:
        deltas = [vector.deltas[name] for vector in vectors]
        if lora == "product":
            change = sum(c * d.dense() for c, d in zip(coef[name], deltas, strict=True))
        else:
            up = sum(c * d.up for c, d in zip(coef[f"{name}.lora_B"], deltas, strict=True))
            down = initial[f"{name}.lora_A"] + sum(
                c * d.down for c, d in zip(coef[f"{name}.lora_A"], deltas, strict=True)
            )
            change = deltas[0].scale * up @ down
        weights[name] = encoder.get_parameter(name) + change
    expected = torch.func.functional_call(encoder, weights, (images,))
    # Float32 through four layers, of features of length 10 or so.
    assert torch.allclose(model(images), expected, rtol=0, atol=1e-3)
    assert (expected - start).abs().max() > 0.1


def test_factors_of_a_layer_in_two_places() -> None:
    layer = nn.Linear(3, 3)
    encoder = nn.Sequential(nn.Sequential(layer), nn.Tanh(), nn.Sequential(layer))
    tuning = LoraTuning(encoder, rank=2, alpha=2.0, targets="*.weight")
    nn.init.normal_(tuning.up[0])
    images = torch.randn(4, 3)
    tuned = copy.deepcopy(layer)
    with torch.no_grad():
        tuned.weight += tuning.up[0] @ tuning.down[0]
    expected = tuned(tuned(images).tanh())
    # Twice: the first time must leave the encoder as it was.
    for _ in range(2):
        assert torch.allclose(tuning(images), expected, atol=1e-6)
        assert same_bits(tuning.encoder(images), encoder(images))


def bank_factors(bank: ak.TaskVectorBank) -> dict[str, Tensor]:
    """What factors are at zero coefficients: A_0 and zero."""
    return {
        bank.blocks[column]: view
        for segment in bank.segments
        for column, view in zip(segment.columns, segment.layout.split(segment.base), strict=True)
    }
