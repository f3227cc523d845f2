"""``learn``: every method on embedded tasks, few-shot also on one's own model and images."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")

from PIL import Image

import atlas_kernels as ak
from atlas_kernels import cli
from atlas_kernels.experiments.config import FewShotRun
from atlas_kernels.experiments.setting import Setting
from atlas_kernels.files.state_dicts import read_state_dict
from atlas_kernels.files.tensors import read_tensors
from atlas_kernels.tasks.embedded.model import (
    build_embedded_model,
    embedded_model_config,
    load_embedded_model,
)

TASK = "digits-inverted"
SOURCES = ("digits-clean", "mnist-inverted", "fashion-noise")
QUICK = ("--task", TASK, "--shots", "2", "--epochs", "2", "--batch", "32", "--sources", *SOURCES)
COLORS = {"dark_red": (150, 20, 30), "blue": (20, 40, 200)}


def few_shot(*arguments: object) -> int:
    return cli.main(["learn", "few-shot", *map(str, arguments)])


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def repeatable(folder: Path) -> tuple:
    """Everything of a run but the time that it took."""
    its = results(folder)
    history = [{**entry, "seconds": 0} for entry in its["history"]]
    names = ("coefficients.safetensors", "merged.safetensors")
    tensors = [read_state_dict(folder / name) for name in names]
    return (
        history,
        its["metrics"],
        [{name: t.tolist() for name, t in each.items()} for each in tensors],
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learn") / "deep" / "out"
    assert few_shot(*QUICK, "-o", folder) == 0
    return folder


def test_embedded_task_end_to_end(finished) -> None:
    its = results(finished)
    assert sorted(path.name for path in finished.iterdir()) == [
        "coefficients.safetensors",
        "config.yaml",
        "history.png",
        "merged.safetensors",
        "results.json",
    ]
    assert (finished / "history.png").read_bytes().startswith(b"\x89PNG")
    assert TASK not in its["vectors"]
    assert its["vectors"] == list(SOURCES)
    assert (its["blocks"], len(its["history"])) == (56, 3)
    assert its["settings"]["run"]["target"] == TASK
    assert its["settings"]["run"]["codec"] == "bf16"
    assert "torch" in its["versions"]
    assert its["history"][0]["loss"] is None
    assert its["history"][2]["loss"] < its["history"][1]["loss"]
    zero_shot, learned = its["zero_shot"]["test"], its["metrics"]["test"]
    assert learned > zero_shot + 0.1
    # What was written scores what was reported: a new model from the merged file.
    from atlas_kernels.experiments.workspace import EmbeddedWorkspace
    from atlas_kernels.tasks.clip.model import ImageClassifier

    space = EmbeddedWorkspace()
    visual = space.encoder()
    setting = Setting(space, FewShotRun(target=TASK))
    assert setting.test(ImageClassifier(visual, space.head(TASK))) == zero_shot
    visual.load_state_dict(read_state_dict(finished / "merged.safetensors"))
    assert setting.test(ImageClassifier(visual, space.head(TASK))) == learned


def test_same_seed_same_bits_and_another_seed_others(finished, tmp_path) -> None:
    assert few_shot(*QUICK, "-o", tmp_path / "again") == 0
    assert repeatable(tmp_path / "again") == repeatable(finished)
    assert few_shot(*QUICK, "--seed", 1, "-o", tmp_path / "other") == 0
    assert repeatable(tmp_path / "other")[2] != repeatable(finished)[2]


def test_a_stored_config_does_it_again_and_options_replace_its_fields(finished, tmp_path) -> None:
    config = ("--config", finished / "config.yaml")
    assert few_shot(*config, "-o", tmp_path / "again") == 0
    assert repeatable(tmp_path / "again") == repeatable(finished)
    assert few_shot(*config, "--epochs", 1, "-o", tmp_path / "shorter") == 0
    assert len(results(tmp_path / "shorter")["history"]) == 2
    assert cli.main(["learn", "peft", *map(str, config), "-o", str(tmp_path / "other")]) == 2


def test_interrupted_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch, capsys) -> None:
    real, calls = Setting.validate, []

    def interrupted(self, model):
        calls.append(model)
        # The base, then the start, one epoch, and in the middle of the second.
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(Setting, "validate", interrupted)
    assert few_shot(*QUICK, "-o", tmp_path) == 130
    error = capsys.readouterr().err
    assert f"finished epochs are kept in {tmp_path}" in error
    assert "--resume" in error
    state = (tmp_path / "training.safetensors").read_bytes()
    for options, message in (
        ((), "holds an unfinished run: --resume goes on"),
        (("--resume", "--batch", 16), "another --batch (32 there, 16 here)"),
        (("--resume", "--codec", "int8"), "another --codec (bf16 there, int8 here)"),
    ):
        assert few_shot(*QUICK, *options, "-o", tmp_path) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "training.safetensors").read_bytes() == state
    assert few_shot(*QUICK, "--resume", "-o", tmp_path) == 0
    # Those four, the base again, and the interrupted epoch again.
    assert len(calls) == 6
    assert repeatable(tmp_path) == repeatable(finished)
    assert not (tmp_path / "training.safetensors").exists()


@pytest.mark.parametrize("memory", ["recompute", "stream"])
def test_memory_changes_nothing_but_rounding(memory: str, tmp_path) -> None:
    coefs, losses = [], []
    for mode in ("whole", memory):
        out = tmp_path / mode
        options = ("--memory", mode, "--granularity", "task", "--epochs", 1, "--codec", "int8")
        assert few_shot("--task", TASK, "--shots", 1, *options, "-o", out) == 0
        coefs.append(read_tensors(out / "coefficients.safetensors", "coefficients")[0]["coef"])
        losses.append(results(out)["history"][1]["loss"])
    assert coefs[0].shape == (23,)
    assert coefs[0].abs().max() > 0.01
    # AdamW divides by the gradient's size: rounding of 1e-6 may grow, but stays far below lr = 0.1.
    assert (coefs[0] - coefs[1]).abs().max() < 1e-3
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert (tmp_path / memory / "bank.safetensors").exists() == (memory == "stream")


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> SimpleNamespace:
    """A random CLIP model and fine-tuned ones, as banks, and two classes told apart by colour."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    base = build_embedded_model().state_dict()
    torch.save(base, folder / "base.pt")
    vectors, encoders = [], []
    visual = {name: t for name, t in base.items() if name.startswith("visual.")}
    for index in range(6):
        # Half as large as the weights: random directions, which only together tell colours apart.
        tuned = {
            name: t + 0.5 * (t.std() + 0.02) * torch.randn_like(t) for name, t in visual.items()
        }
        vectors.append(ak.TaskVector.from_state_dicts(base, {**base, **tuned}, name=f"v{index}"))
        plain = (
            {name.removeprefix("visual."): t for name, t in s.items()} for s in (visual, tuned)
        )
        encoders.append(ak.TaskVector.from_state_dicts(*plain, name=f"v{index}"))
    ak.TaskVectorBank.pack(folder / "full.safetensors", base, vectors, include="visual.*")
    encoder = {name.removeprefix("visual."): t for name, t in visual.items()}
    ak.TaskVectorBank.pack(folder / "encoder.safetensors", encoder, encoders)
    text = {**base, "text_projection": base["text_projection"] + 1}
    tuned_text = ak.TaskVector.from_state_dicts(base, {**text, **tuned}, name="text")
    ak.TaskVectorBank.pack(folder / "text.safetensors", base, [tuned_text])
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / "images" / "train" / name).mkdir(parents=True)
        for index in range(40):
            pixels = generator.normal(color, 25, (36, 44, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / "train" / name / f"{index}.png")
    return SimpleNamespace(folder=folder, base=base)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch) -> None:
    """An open_clip architecture that is small enough."""
    import open_clip

    real = open_clip.get_model_config
    monkeypatch.setattr(
        open_clip,
        "get_model_config",
        lambda name: embedded_model_config() if name == "tiny" else real(name),
    )


def of(own: SimpleNamespace, bank: str = "full") -> tuple[object, ...]:
    folder = own.folder
    files = ("--bank", folder / f"{bank}.safetensors", "--images", folder / "images")
    return (*files, "--model", "tiny", "--shots", 8, "--batch", 32)


def test_own_model_and_images(own, tmp_path, capsys) -> None:
    assert few_shot(*of(own), "--epochs", 4, "-o", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "full CLIP model" in printed
    assert "2 classes, 58 images to learn from, 6 for validation, 16 for test" in printed
    its = results(tmp_path)
    # A random model sees next to no colour; the two are as far apart as colours are.
    assert its["zero_shot"]["test"] <= 0.7
    assert its["metrics"]["test"] >= 0.9
    assert its["settings"]["source"]["template"] == ["a photo of a {}."]
    config = ("--config", tmp_path / "config.yaml", "--epochs", 0)
    assert few_shot(*config, "-o", tmp_path / "again") == 0
    assert results(tmp_path / "again")["zero_shot"] == its["zero_shot"]
    merged = read_state_dict(tmp_path / "merged.safetensors")
    assert merged.keys() == own.base.keys()
    for name, tensor in own.base.items():
        assert torch.equal(merged[name], tensor) != name.startswith("visual."), name
    bank = ak.TaskVectorBank.load(own.folder / "full.safetensors")
    from atlas_kernels.models.coefficients import read_coefficients

    expected = bank.state_dict(read_coefficients(tmp_path / "coefficients.safetensors", bank)[0])
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_bank_of_an_encoder_alone_and_a_text_checkpoint(own, tmp_path, capsys) -> None:
    options = ("--epochs", 1, "--template", "a {}", "--template", "a drawing of a {}")
    text = ("--text", own.folder / "base.pt")
    assert few_shot(*of(own, "encoder"), *text, *options, "-o", tmp_path / "encoder") == 0
    assert "an image encoder" in capsys.readouterr().out
    assert few_shot(*of(own), *options, "--memory", "stream", "-o", tmp_path / "full") == 0
    losses = [results(tmp_path / name)["history"][1]["loss"] for name in ("encoder", "full")]
    # The same model, but composed on use: sums in another order.
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    merged = read_state_dict(tmp_path / "encoder" / "merged.safetensors")
    build_embedded_model().visual.load_state_dict(merged)


def test_head_is_that_of_the_class_names(own, tmp_path, monkeypatch) -> None:
    seen = []

    def head(model, classnames, templates):
        seen.append((dict(model.state_dict()), classnames, templates))
        raise ValueError("enough")

    monkeypatch.setattr("atlas_kernels.experiments.workspace.zero_shot_head", head)
    assert few_shot(*of(own), "--template", "a {} thing", "-o", tmp_path) == 2
    state, classnames, templates = seen[0]
    assert classnames == ("blue", "dark red")
    assert templates == ("a {} thing",)
    assert all(torch.equal(state[name], tensor) for name, tensor in own.base.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "mnist-sideways"), "unknown task 'mnist-sideways': choose one of animals-"),
        (("--task", TASK, "--shots", 9999), "--shots is 9999, but class 'zero' has"),
        (("--shots", 0), "--shots: Input should be greater than or equal to 1, got 0"),
        (("--batch", -1), "--batch: Input should be greater than or equal to 1, got -1"),
        (("--partitions", 3), "granularity 'partition' and a number of partitions go together"),
        (("--epochs", -1), "--epochs: Input should be greater than or equal to 0, got -1"),
        (("--lr", 0), "--lr: Input should be greater than 0, got 0.0"),
        (("--codec", "int99"), "unknown codec 'int99'"),
        (("--memory", "none"), "--memory"),
        (("--template", "a {}"), "--template needs --bank and --images and --model as well"),
        (("--bank", "b"), "--bank needs --images and --model as well"),
        (("--model", "tiny"), "--model needs --bank and --images as well"),
        (("--bank", "b", "--checkpoints", "c"), "two ways to give a model: choose one"),
        (("OWN", "--task", TASK), "--task is digits-inverted, but the folders of --images are"),
        (("OWN", "--codec", "int8"), "a bank has its codec already"),
        (("OWN", "--images", "nowhere"), "nowhere: expected a folder with images in train/CLASS/"),
        (("OWN", "--shots", 33), "class 'blue' has 29 images to learn from"),
        (("OWN", "--bank", "none.safetensors"), "none.safetensors: no such file"),
        (("OWN", "--bank", "base.pt"), "base.pt: not a readable safetensors file"),
        (("OWN", "--bank", "encoder.safetensors"), "with --include 'visual.*', or name that"),
        (("OWN", "--bank", "text.safetensors"), "composes 'text_projection' too"),
        (("OWN", "--model", "tinny"), "open_clip has no architecture 'tinny'"),
        (("OWN", "--model", "RN50"), "does not fit RN50: 'visual.class_embedding'"),
        (("OWN", "--model", "ViT-B-16-SigLIP"), "another tower or tokenizer"),
        (("OWN", "--template", "a photo"), "a template must contain {} exactly once"),
        (("-o", "base.pt"), "base.pt is a file"),
        (("-o", "base.pt/deeper"), "base.pt is a file"),
    ],
)
def test_bad_input(own, tmp_path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(own.folder)
    if arguments[0] == "OWN":
        arguments = (*of(own), *arguments[1:])
    monkeypatch.setattr("atlas_kernels.experiments.perform", lambda _: pytest.fail("learned"))
    before = sorted(own.folder.rglob("*"))
    assert few_shot("-o", tmp_path / "out", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out
    assert not (tmp_path / "out").exists()
    assert sorted(own.folder.rglob("*")) == before


def test_first_block_that_does_not_fit_is_named(own, tmp_path, monkeypatch, capsys) -> None:
    import open_clip

    config = embedded_model_config()
    config["vision_cfg"]["patch_size"] = 4
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    assert few_shot(*of(own), "-o", tmp_path / "out") == 2
    expected = "'visual.positional_embedding' has shape (17, 96) in the file, (65, 96) in the"
    assert expected in capsys.readouterr().err


def test_no_epoch_beats_a_perfect_start(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Setting, "validate", lambda self, model: 1.0)
    assert few_shot(*QUICK, "--epochs", 1, "-o", tmp_path) == 0
    assert "no epoch is better" in capsys.readouterr().out
    coef = read_tensors(tmp_path / "coefficients.safetensors", "coefficients")[0]["coef"]
    assert not coef.any()
    merged = read_state_dict(tmp_path / "merged.safetensors")
    base = load_embedded_model().visual.state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("arguments", [("learn",), ("learn", "few-shot")])
def test_help(capsys, arguments) -> None:
    assert cli.main([*arguments, "--help"]) == 0
    assert "few-shot" in capsys.readouterr().out


def test_history_figure_shows_the_numbers() -> None:
    from atlas_kernels.report.plots import history_figure

    left, right = history_figure([2.0, 1.5], [0.25, 0.5, 0.375], 1, title="T").axes
    assert left.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.5]]
    curve, start, kept = right.lines
    assert curve.get_xydata().tolist() == [[0, 25.0], [1, 50.0], [2, 37.5]]
    assert start.get_ydata() == [25.0, 25.0]
    assert kept.get_xydata().tolist() == [[1, 50.0]]
