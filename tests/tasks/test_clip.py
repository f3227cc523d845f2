import builtins
import math

import pytest
import torch
from torch import nn

pytest.importorskip("open_clip")

from atlas_kernels.tasks.clip.model import (
    ImageClassifier,
    preprocess_for,
    tokenizer_for,
    zero_shot_head,
)
from atlas_kernels.tasks.embedded.model import (
    build_embedded_model,
    load_embedded_model,
    save_embedded_model,
)
from atlas_kernels.tasks.embedded.tasks import dataset_names, load_task


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_embedded_model()


def test_embedded_model_is_open_clips_with_the_stated_size(model: nn.Module) -> None:
    import open_clip

    assert isinstance(model, open_clip.CLIP)
    assert not model.training
    parameters = dict(model.visual.named_parameters())
    # 56 blocks: class and position, projection, patches, two outer norms, 12 in each of 4 layers.
    assert len(parameters) == 56
    assert sum(p.numel() for p in parameters.values()) == 477_120
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def test_head_against_a_plain_loop(model: nn.Module) -> None:
    classnames, templates = ("bear", "zebra", "dog"), ("a picture of a {}", "the shape of a {}")
    tokenizer = tokenizer_for(model)
    head = zero_shot_head(model, classnames, templates)
    for name, row in zip(classnames, head, strict=True):
        mean = torch.zeros(96)
        for template in templates:
            with torch.no_grad():
                feature = model.encode_text(tokenizer([template.format(name)]))[0]
            mean += feature / feature.norm() / len(templates)
        expected = model.logit_scale.exp() * mean / mean.norm()
        # fp32 text towers of width 64 on a batch of 6 or of 1: rounding only, on values below 100.
        assert (row - expected).abs().max() < 1e-3
    assert not head.requires_grad
    # Rows are as long as the temperature says, whatever the templates.
    assert torch.allclose(head.norm(dim=1), model.logit_scale.exp().expand(3), rtol=1e-5)


def test_head_leaves_the_mode_of_the_model_alone(model: nn.Module) -> None:
    model.train()
    try:
        in_training = zero_shot_head(model, ["bear"], ["a picture of a {}"])
        assert model.training
    finally:
        model.eval()
    assert torch.equal(in_training, zero_shot_head(model, ["bear"], ["a picture of a {}"]))


def test_all_prompts_of_the_embedded_tasks_are_known(model: nn.Module) -> None:
    for name in dataset_names():
        task = load_task(f"{name}-clean")  # all shifts share the words
        head = zero_shot_head(model, task.classnames, task.templates)
        assert head.shape == (10, 96)
        assert head.isfinite().all()
        # No two classes share a row: each has a direction of its own.
        cosine = nn.functional.normalize(head, dim=1) @ nn.functional.normalize(head, dim=1).T
        assert (cosine - torch.eye(10)).max() < 0.99


def test_words_never_seen_are_refused(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match="never seen some words of the prompt 'a photo of a truck'"
    ):
        zero_shot_head(model, ["truck"], ["a photo of a {}"])


@pytest.mark.parametrize(
    ("classnames", "templates", "message"),
    [
        ([], ["a {}"], "at least one class name"),
        (["bear"], [], "at least one class name"),
        (["bear"], ["a bear"], "exactly once, unlike 'a bear'"),
        (["bear"], ["a {} {}"], "exactly once"),
    ],
)
def test_bad_prompts_are_refused(model: nn.Module, classnames, templates, message) -> None:
    with pytest.raises(ValueError, match=message):
        zero_shot_head(model, classnames, templates)


def test_classifier_against_the_formula() -> None:
    encoder = nn.Linear(5, 4)
    head = torch.randn(3, 4)
    classifier = ImageClassifier(encoder, head)
    images = torch.randn(7, 5)
    logits = classifier(images)
    features = encoder(images).double()
    expected = (features / features.norm(dim=1, keepdim=True)) @ head.double().T
    assert (logits - expected).abs().max() < 1e-5
    # The head is no parameter, and not the caller's tensor.
    assert {name for name, _ in classifier.named_parameters()} == {"encoder.weight", "encoder.bias"}
    head.zero_()
    assert torch.equal(classifier(images), logits)
    with pytest.raises(ValueError, match=r"\[classes, features\]"):
        ImageClassifier(encoder, torch.zeros(4))


def test_works_with_another_open_clip_model() -> None:
    import open_clip

    torch.manual_seed(0)
    other = open_clip.CLIP(
        embed_dim=24,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={"context_length": 77, "width": 16, "heads": 2, "layers": 1},
    )
    head = zero_shot_head(other, ["truck", "aeroplane"], ["a blurry photo of a {}."])
    assert head.shape == (2, 24)
    images = torch.randn(3, 3, 32, 32)
    logits = ImageClassifier(other.visual, head)(images)
    with torch.no_grad():
        features = other.encode_image(images, normalize=True)
    assert torch.allclose(logits, features @ head.T, atol=1e-4)


def test_file_keeps_the_model_and_only_its_tokens(tmp_path) -> None:
    torch.manual_seed(0)
    token_ids = torch.tensor([0, 320, 1929, 49406, 49407])
    small = build_embedded_model(len(token_ids)).eval()
    path = tmp_path / "model.safetensors"
    save_embedded_model(path, small.state_dict(), token_ids)
    assert path.stat().st_size < 1_300_000
    large = load_embedded_model(path)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    tokens[0, :4] = torch.tensor([49406, 320, 1929, 49407])
    rows = torch.zeros_like(tokens)
    rows[0, :4] = torch.tensor([3, 1, 2, 4])
    images = torch.randn(2, 3, 32, 32)
    # Half precision keeps weights to 2^-11: a few layers move unit features by less than 1 %.
    with torch.no_grad():
        for a, b in [
            (large.encode_text(tokens, normalize=True), small.encode_text(rows, normalize=True)),
            (
                large.encode_image(images, normalize=True),
                small.encode_image(images, normalize=True),
            ),
        ]:
            assert (a - b).norm(dim=1).max() < 0.01
    # Rows that were not stored are zero: nothing invented stands in for a word.
    table = large.token_embedding.weight
    assert table.abs().sum(1).nonzero().flatten().tolist() == token_ids.tolist()
    assert "known_tokens" not in large.state_dict()


def test_bad_model_files_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_embedded_model(tmp_path / "nothing.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match="embedded_model"):
        load_embedded_model(other)
    with pytest.raises(ValueError, match="expected 3 token ids"):
        save_embedded_model(other, build_embedded_model(3).state_dict(), torch.arange(2))


def test_missing_open_clip_is_explained(monkeypatch) -> None:
    real = builtins.__import__

    def without_open_clip(name, *args, **kwargs):
        if name == "open_clip":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_open_clip)
    with pytest.raises(ImportError, match=r"pip install 'atlas_kernels\[clip\]'"):
        build_embedded_model()


def test_temperature_is_within_clips_bounds(model: nn.Module) -> None:
    assert 1 < model.logit_scale.exp().item() <= 100 * (1 + 1e-3)
    assert math.isfinite(model.logit_scale.item())


def test_preprocess_is_what_the_model_was_trained_with() -> None:
    from PIL import Image

    size, preprocess = preprocess_for(build_embedded_model(vocab_size=8))
    assert size == (32, 32)
    red = preprocess(Image.new("RGB", (90, 50), (255, 0, 0)))
    assert red.shape == (3, 32, 32)
    # OpenAI's means and deviations of the three channels.
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
    assert red[:, 4, 9].tolist() == pytest.approx(expected, abs=1e-6)
