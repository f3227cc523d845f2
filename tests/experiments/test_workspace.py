"""Checkpoints and data sets on disk in the published layout, on small files of that layout."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

from PIL import Image
from safetensors.torch import save_file

from atlas_kernels import cli
from atlas_kernels.experiments.config import Checkpoints, FewShotRun, NegationRun
from atlas_kernels.experiments.methods import perform
from atlas_kernels.experiments.setting import Setting
from atlas_kernels.experiments.workspace import CheckpointWorkspace, open_workspace
from atlas_kernels.tasks.embedded.model import build_embedded_model, embedded_model_config

COLORS = {"dark_red": (150, 20, 30), "blue": (20, 40, 200)}


def images(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for part, count in (("train", 10), ("val", 4), ("test", 6)):
        for name, color in COLORS.items():
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.normal(color, 25, (36, 44, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> SimpleNamespace:
    """A random model, four "fine-tuned" ones in as many formats, and two data sets."""
    root = tmp_path_factory.mktemp("disk")
    torch.manual_seed(0)
    model = build_embedded_model()
    base = model.state_dict()
    folder = root / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    torch.save(base, folder / "base.pt")

    def tuned(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: t + 0.3 * (t.std() + 0.02) * torch.randn(t.shape, generator=generator)
            for name, t in base.items()
            if name.startswith("visual.") and t.is_floating_point()
        }

    for seed, (name, stem) in enumerate(
        (("cars", "finetuned"), ("dtd", "finetuned"), ("mnist", "linear_finetuned"))
    ):
        (folder / name).mkdir(exist_ok=True)
        state = {**base, **tuned(seed)}
        if name == "dtd":
            encoder = {k.removeprefix("visual."): t for k, t in state.items() if "visual." in k}
            save_file(encoder, folder / name / f"{stem}.safetensors")
        else:
            torch.save(state, folder / name / f"{stem}.pt")
    # As the published code saves it: the module itself.
    pickled = build_embedded_model()
    pickled.load_state_dict({**base, **tuned(9)})
    (folder / "eurosat").mkdir()
    torch.save(pickled, folder / "eurosat" / "finetuned.pt")
    for seed, name in enumerate(("eurosat", "resisc45", "imagenet")):
        images(root / "data" / name, seed)
    # Out of domain: one class of ImageNet's, by its folder's name.
    blue = root / "data" / "imagenet-r" / "blue"
    blue.mkdir(parents=True)
    Image.fromarray(np.full((32, 32, 3), COLORS["blue"], np.uint8)).save(blue / "0.png")
    return SimpleNamespace(root=root, base=base, tuned=tuned)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch) -> None:
    import open_clip

    real = open_clip.get_model_config
    monkeypatch.setattr(
        open_clip,
        "get_model_config",
        lambda name: embedded_model_config() if name == "tiny" else real(name),
    )


def source(disk: SimpleNamespace, **fields: object) -> Checkpoints:
    folders = {"checkpoints": disk.root / "checkpoints", "data": disk.root / "data"}
    return Checkpoints(model="tiny", **folders, **fields)


def test_vectors_of_every_format(disk) -> None:
    space = open_workspace(source(disk, allow_pickle=True))
    assert space.vector_names("standard") == ("cars", "dtd", "eurosat")
    assert space.vector_names("linear") == ("mnist",)
    vectors = space.vectors("standard", ["cars", "dtd", "eurosat"])
    for name, seed in (("cars", 0), ("dtd", 1), ("eurosat", 9)):
        for block, expected in disk.tuned(seed).items():
            delta = vectors[name].deltas[block.removeprefix("visual.")]
            difference = expected - disk.base[block]
            # Stored in bfloat16: half a unit of 8 bits.
            assert (delta.float() - difference).abs().max() <= difference.abs().max() * 2**-8
    with pytest.raises(FileNotFoundError, match=r"no lora-product fine-tuned checkpoint below"):
        space.vector_names("lora-product")
    with pytest.raises(FileNotFoundError, match=r"mnist: no standard fine-tuned checkpoint"):
        space.vectors("standard", ["mnist"])


def test_pickles_need_to_be_asked_for(disk) -> None:
    space = open_workspace(source(disk))
    with pytest.raises(ValueError, match=r"allow.pickle"):
        space.vectors("standard", ["eurosat"])


def test_learning_and_negation_from_disk(disk) -> None:
    space = open_workspace(source(disk, allow_pickle=True))
    run = FewShotRun(target="eurosat", shots=8, epochs=2, batch=16, recipe="ours")
    result = perform(Setting(space, run, progress=False))
    assert result.encoder is not None
    # Leave-one-out: eurosat has a vector of its own, which is not used.
    assert result.encoder.bank.names == ("cars", "dtd")
    assert (result.encoder.coef != 0).all()
    assert result.metrics["test"] >= 0.5
    negation = NegationRun(target="eurosat", control="resisc45", epochs=1, batch=4)
    forgotten = perform(Setting(space, negation, progress=False))
    assert forgotten.encoder is not None
    assert forgotten.encoder.bank.names == ("eurosat",)


def test_variants_out_of_domain(disk) -> None:
    space = open_workspace(source(disk))
    assert isinstance(space, CheckpointWorkspace)
    (other,) = space.out_of_domain("imagenet")
    assert other.name == "imagenet-r"
    assert other.rows.tolist() == [0]
    with pytest.raises(ValueError, match="no images of eurosat out of its domain"):
        space.out_of_domain("eurosat")


def test_reproduce_says_what_is_missing_and_runs_what_is_there(disk, tmp_path, capsys) -> None:
    suite = {
        "name": "small",
        "version": 1,
        "title": "Small",
        "source": {"kind": "checkpoints", "model": "tiny"},
        "experiments": [
            {
                "name": "few-shot",
                "title": "Few-shot",
                "settings": {"method": "few-shot", "shots": 2, "epochs": 1, "batch": 8},
                "arms": [{"label": "aTLAS", "settings": {"sources": ["cars", "dtd"]}}],
                "targets": ["resisc45", "cars"],
                "published": [{"arm": "aTLAS", "model": "tiny", "means": [72.5]}],
            }
        ],
    }
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(suite))
    files = ["--checkpoints", str(disk.root / "checkpoints"), "--model", "tiny"]
    out = ["-o", str(tmp_path / "out"), "--processes", "1"]
    assert cli.main(["reproduce", str(path), *files, "--data", str(tmp_path), *out]) == 2
    refused = capsys.readouterr().err
    # Both at once, and before anything is learned.
    for name in ("resisc45", "cars"):
        assert f"{name}: expected images in {tmp_path}/{name}/train" in refused
    assert not (tmp_path / "out" / "report.html").exists()
    path.write_text(json.dumps(suite).replace('"resisc45", "cars"', '"resisc45"'))
    data = ["--data", str(disk.root / "data")]
    assert cli.main(["reproduce", str(path), *files, *data, "-o", str(tmp_path / "there")]) == 0
    printed = capsys.readouterr().out
    assert "published: aTLAS" in printed
    assert "72.5" in printed
