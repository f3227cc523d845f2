"""``demo``: a suite of runs, and what the command makes of it, on a suite that takes seconds."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")

from atlas_kernels import cli
from atlas_kernels.cli import demo as command
from atlas_kernels.experiments import suite as suite_module
from atlas_kernels.experiments.config import Cell, Run, Suite, checked
from atlas_kernels.experiments.methods import perform
from atlas_kernels.experiments.published import read_suite
from atlas_kernels.experiments.results import Records
from atlas_kernels.experiments.setting import Result, Setting
from atlas_kernels.experiments.step_timing import step_cost
from atlas_kernels.experiments.suite import run_suite
from atlas_kernels.experiments.workspace import EmbeddedWorkspace
from atlas_kernels.files.state_dicts import read_state_dict
from atlas_kernels.files.tensors import read_tensors
from atlas_kernels.learn.few_shot import classify
from atlas_kernels.models.passes import Bucket
from atlas_kernels.report import demo as report
from atlas_kernels.report import plots
from atlas_kernels.tasks.clip.model import ImageClassifier
from atlas_kernels.tasks.embedded.model import build_embedded_model
from atlas_kernels.tasks.embedded.paths import WEIGHTS

TARGET = "digits-inverted"


def tiny(targets: tuple[str, ...] = (TARGET,), seeds: tuple[int, ...] = (0,)) -> Suite:
    """The demo's suite, with as little to do as can be."""
    fields = read_suite("demo").model_dump()
    for experiment in fields["experiments"]:
        experiment |= {"targets": targets, "seeds": seeds}
        experiment["axis"]["values"] = (1,)
        experiment["settings"]["epochs"] = 2
        for arm in experiment["arms"]:
            if "factors" in arm["settings"]:
                arm["settings"]["factors"] = (0.5,)
    return checked(Suite, fields, "tiny")


def quick(**settings: object) -> Suite:
    """Runs that learn nothing: what happens around them is what is tested."""
    fields = tiny().model_dump()
    (first, *_) = fields["experiments"]
    labels = ("zero-shot", "searched: one factor for all", "own fine-tuned model (all images)")
    first["arms"] = [arm for arm in first["arms"] if arm["label"] in labels]
    first["settings"] |= settings
    return checked(Suite, {**fields, "experiments": [first]}, "quick")


@pytest.fixture(scope="module")
def seen() -> dict[Run, tuple[str, ...]]:
    """The vectors that the runs of `finished` had."""
    return {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, seen) -> tuple[Path, dict]:
    """One whole run of the tiny suite: its folder and results.json."""

    def watched(setting: Setting) -> Result:
        result = perform(setting)
        seen[setting.run] = result.encoder.bank.names if result.encoder else ()
        return result

    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite_module, "perform", watched)
        command.run_demo(tiny(), folder, processes=1)
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def block() -> Setting:
    """The run whose coefficients are kept."""
    (cell,) = command.kept_cells(tiny())
    return Setting(EmbeddedWorkspace(), dict(tiny().runs())[cell], progress=False)


def test_results_hold_every_run_and_where_they_come_from(finished) -> None:
    folder, results = finished
    cells = [Cell(**run["cell"]) for run in results["runs"]]
    assert set(cells) == {cell for cell, _ in tiny().runs()}
    assert len(cells) == 12
    for run in results["runs"]:
        assert 0 <= run["metrics"]["test"] <= 1
        assert 0 <= run["learning_seconds"] <= run["seconds"]
        # A step holds at least the batch's pixels; nothing here comes near a gigabyte.
        assert 32 * 32 * 32 * 4 < run["metrics"]["peak_bytes"] < 1e9
    assert results["suite"]["experiments"][0]["targets"] == [TARGET]
    assert {"torch", "python", "atlas_kernels"} <= results["versions"].keys()
    cost = json.loads((folder / "step-cost.json").read_text())
    assert cost["vectors"] == 23
    assert cost["gradient_difference"] < 1e-3
    # bf16 beside float32, and padding: 0.2 % here.
    stored = [cost[name]["stored_bytes"] for name in ("fused", "loop")]
    assert stored[1] / stored[0] == pytest.approx(2, rel=0.01)
    for name in ("accuracy.png", "coefficients.png", "tasks.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_no_run_sees_vectors_it_must_not(finished, seen) -> None:
    others = {task for task in EmbeddedWorkspace().tasks if task != TARGET}
    for cell, run in tiny().runs():
        if cell.arm.startswith("own"):
            assert seen[run] == (TARGET,)
        elif cell.arm.startswith(("zero-shot", "full")):
            assert seen[run] == ()
        elif cell.experiment == "strict":
            assert set(seen[run]) == {task for task in others if not task.startswith("digits")}
        elif cell.experiment == "control":
            assert set(seen[run]) == {f"random-{task}" for task in others}
        else:
            assert set(seen[run]) == others


def test_both_suites_have_the_arms_that_the_report_knows() -> None:
    quick_arms, full_arms = (
        {
            (each.name, arm.label): {**each.settings, **arm.settings}
            for each in read_suite(name).experiments
            for arm in each.arms
        }
        for name in ("demo", "demo-full")
    )
    assert full_arms.keys() - quick_arms.keys() == {("held-out", "full fine-tuning, faster")}
    for place, settings in quick_arms.items():
        differ = {key for key, value in settings.items() if full_arms[place].get(key) != value}
        assert differ <= {"epochs", "factors"}
    assert report._LOOKS.keys() <= quick_arms.keys()
    assert report._SHORT.keys() <= {label for _, label in quick_arms}
    for name, targets in (("demo", 3), ("demo-full", 6)):
        kept = command.kept_cells(read_suite(name))
        assert len({cell.target for cell in kept}) == len(kept) == targets
        assert {cell.value for cell in kept} == {16}


def test_learning_moves_coefficients_and_lowers_the_training_loss(finished, block) -> None:
    encoder = block.compose()
    model = block.classifier(encoder)
    part = block.space.task(TARGET).train
    batch = part.images.plain(torch.arange(100)), part.labels[:100]
    with torch.no_grad():
        zero_shot = classify(model, batch).item()
        encoder.load_coefficients(finished[0] / f"coefficients-{TARGET}.safetensors")
        assert encoder.coef.abs().max() > 0.01
        assert classify(model, batch).item() < zero_shot


def test_merged_model_is_the_composed_one_in_open_clip(finished, block) -> None:
    folder, results = finished
    composed = block.compose().eval()
    composed.load_coefficients(folder / f"coefficients-{TARGET}.safetensors")
    visual = build_embedded_model().visual.eval()
    visual.load_state_dict(read_state_dict(folder / f"merged-{TARGET}.safetensors"))
    images = block.space.task(TARGET).test.images.plain(torch.arange(20))
    with torch.no_grad():
        assert torch.equal(visual(images), composed(images))
    (cell,) = command.kept_cells(tiny())
    (run,) = [run for run in results["runs"] if Cell(**run["cell"]) == cell]
    accuracy = block.test(ImageClassifier(visual, block.space.head(TARGET)))
    assert accuracy == pytest.approx(run["metrics"]["test"])


def test_second_run_computes_nothing_that_is_there(finished, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    calls = []
    real = suite_module.perform
    monkeypatch.setattr(suite_module, "perform", lambda s: (calls.append(s.run), real(s))[1])
    monkeypatch.setattr("atlas_kernels.experiments.step_cost", lambda *_: 1 / 0)
    command.run_demo(tiny(), folder, processes=1)
    assert not calls
    # What was learned is not in results.json: without it, its run is done again.
    merged = folder / f"merged-{TARGET}.safetensors"
    before = read_state_dict(finished[0] / merged.name)
    merged.unlink()
    command.run_demo(tiny(), folder, processes=1)
    assert len(calls) == 1
    again = read_state_dict(merged)
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_runs_do_not_depend_on_the_process(finished, tmp_path) -> None:
    (cell,) = command.kept_cells(tiny())
    first = tiny().experiments[0]
    arms = tuple(arm for arm in first.arms if arm.label in (cell.arm, "zero-shot"))
    pair = tiny().model_copy(update={"experiments": (first.model_copy(update={"arms": arms}),)})
    records = run_suite(pair, tmp_path, kept=[cell], processes=2, progress=False)
    expected = {Cell(**run["cell"]): run["metrics"] for run in finished[1]["runs"]}
    for each, record in records.done.items():
        assert record["metrics"] == expected[each]
    name = f"coefficients-{TARGET}.safetensors"
    here, there = (
        read_tensors(folder / name, "coefficients") for folder in (tmp_path, finished[0])
    )
    assert here[1] == there[1]
    assert torch.equal(here[0]["coef"], there[0]["coef"])


@pytest.fixture
def run(monkeypatch):
    """The command with another suite, in this process, without what comes after the runs."""
    monkeypatch.setattr(command, "_step_cost", lambda *_: None)
    monkeypatch.setattr(command, "kept_cells", lambda _: [None])
    monkeypatch.setattr("atlas_kernels.report.print_step_cost", lambda _: None)
    monkeypatch.setattr("atlas_kernels.report.print_results", lambda _: None)
    monkeypatch.setattr("atlas_kernels.report.write_pictures", lambda *_: [])
    monkeypatch.setattr(suite_module, "default_processes", lambda: 1)

    def run(folder: Path, *options: str, suite: Suite | None = None) -> int:
        chosen = suite or quick()
        monkeypatch.setattr("atlas_kernels.experiments.read_suite", lambda _: chosen)
        return cli.main(["demo", "--out", str(folder), *options])

    return run


def runs_in(folder: Path) -> list[str]:
    return [run["cell"]["arm"] for run in json.loads((folder / "results.json").read_text())["runs"]]


def test_interrupt_keeps_finished_runs(tmp_path, monkeypatch, run, capsys) -> None:
    real, calls = suite_module.perform, []

    def interrupted(setting):
        calls.append(setting.run.how)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(setting)

    monkeypatch.setattr(suite_module, "perform", interrupted)
    assert run(tmp_path) == 130
    error = capsys.readouterr().err
    assert f"2 of 3 runs are finished and kept in {tmp_path}; the same command goes on" in error
    assert "Traceback" not in error
    assert len(runs_in(tmp_path)) == 2
    assert run(tmp_path) == 0
    assert calls == ["zero-shot", "search", "own", "own"]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, run, capsys) -> None:
    assert run(tmp_path) == 0
    before = (tmp_path / "results.json").read_bytes()
    assert run(tmp_path, suite=quick(epochs=3)) == 2
    error = capsys.readouterr().err
    assert "(experiments.0.settings.epochs: 2 there, 3 here): choose another folder" in error
    assert run(tmp_path, "--seed", "1") == 2
    assert "(experiments.0.seeds.0: 0 there, 1 here)" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "results.json").write_text("{}")
    assert run(tmp_path) == 2
    assert "not a results file" in capsys.readouterr().err


def test_full_disk_keeps_finished_runs(tmp_path, monkeypatch, run, capsys) -> None:
    real, calls = suite_module.Records.write, []

    def full(records):
        calls.append(records)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(records)

    monkeypatch.setattr(suite_module.Records, "write", full)
    assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert "No space left on device; " in error
    assert "the same command goes on" in error
    assert len(runs_in(tmp_path)) == 1


def test_folder_that_cannot_be_made(tmp_path, run, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 2
    assert "expected the name of a folder" in capsys.readouterr().err
    assert run(tmp_path / "file" / "below") == 2
    assert "Not a directory" in capsys.readouterr().err


def test_missing_extra_is_told_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("atlas_kernels.cli.extras.find_spec", lambda name: None)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'atlas_kernels[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_from_scratch_runs_on_what_was_made(tmp_path, monkeypatch, run) -> None:
    def make(folder, seed):
        shutil.copytree(WEIGHTS, folder)
        assert seed == 5

    monkeypatch.setattr("atlas_kernels.experiments.make_assets", make)
    assert run(tmp_path, "--from-scratch", "--seed", "5") == 0
    suite = json.loads((tmp_path / "results.json").read_text())["suite"]
    assert suite["source"] == {"kind": "embedded", "assets": str(tmp_path / "assets")}
    assert suite["experiments"][0]["seeds"] == [5]


def test_differences_against_numbers_by_hand(tmp_path, capsys) -> None:
    targets = ("digits-inverted", "mnist-rotated")
    records = Records.open(tmp_path, tiny(targets, (0, 1)))
    atlas = dict(zip(pairs(targets), (0.6, 0.8, 0.5, 0.5), strict=True))
    for cell, _ in records.suite.runs():
        value = 0.3 if cell.target == targets[0] else 0.6
        if cell.arm == report.ATLAS:
            value = atlas[cell.target, cell.seed] - (0.1 if cell.experiment == "strict" else 0)
        metrics = {"test": value, "peak_bytes": 10**6}
        records.add(cell, {"metrics": metrics, "seconds": 1.0, "learning_seconds": 0.5})
    held_out, strict, control = records.suite.experiments
    start = held_out.arms[0]
    found = report._behind(records, held_out, start, 1)
    # aTLAS: .7 and .5 by target; the start .3 and .6.
    assert found == report.Behind(pytest.approx(0.15), pytest.approx(0.25), 1)
    assert report._behind(records, strict, strict.arms[0], 1).mean == pytest.approx(0.05)
    assert report._behind(records, control, control.arms[0], 1).mean == pytest.approx(0.15)
    # Learning per block itself: the strict one is behind the other, which is behind nothing.
    atlases = [next(a for a in e.arms if a.label == report.ATLAS) for e in (held_out, strict)]
    assert report._behind(records, held_out, atlases[0], 1) is None
    assert report._behind(records, strict, atlases[1], 1).mean == pytest.approx(0.1)
    report.print_results(records)
    lines = capsys.readouterr().out.splitlines()
    # Means by target .7 and .5, by seed .55 and .65: their distances are twice the errors.
    (scores, costs) = [line for line in lines if "per block (aTLAS)" in line][::2]
    assert "60.0 +- 10.0" in scores
    assert "5.0" in costs
    assert "0.5 s" in costs
    (row,) = [line for line in lines if "zero-shot" in line and "1 of 2" in line]
    assert "+15.0 +- 25.0" in row


def test_curves_that_lie_on_each_other_are_one() -> None:
    def curve(label: str, *y: float) -> plots.Curve:
        return plots.Curve(label, range(len(y)), y, [None] * len(y))

    apart, alike, shorter = curve("b", 0.3, 0.5), curve("c", 0.31, 0.39), curve("d", 0.3)
    merged = report._merged([curve("a", 0.3, 0.4), apart, alike, shorter])
    assert [its.label for its in merged] == ["a;\nc", "b", "d"]
    assert merged[0].y == (0.3, 0.4)


def pairs(targets: tuple[str, ...]) -> list[tuple[str, int]]:
    return [(target, seed) for target in targets for seed in (0, 1)]


def test_step_cost_refuses_steps_that_disagree(block, monkeypatch) -> None:
    real = Bucket.coef_grad
    monkeypatch.setattr(Bucket, "coef_grad", lambda bucket, grads: 1.1 * real(bucket, grads))
    few = block.run.model_copy(update={"sources": ("mnist-inverted", "digits-clean")})
    with pytest.raises(RuntimeError, match="disagree"):
        step_cost(Setting(block.space, few), repeats=2)


def test_peak_memory_of_a_run_is_that_of_its_kind_of_step(finished) -> None:
    peaks = {
        run["cell"]["arm"]: run["metrics"]["peak_bytes"]
        for run in finished[1]["runs"]
        if run["cell"]["experiment"] == "held-out"
    }
    # One evaluation keeps no activations for a backward pass; fine-tuning holds AdamW's two
    # moments of 477,120 weights and their gradients besides.
    assert peaks["zero-shot"] < peaks["searched: one factor for all"] < peaks[report.ATLAS]
    assert peaks["full fine-tuning"] - peaks[report.ATLAS] > 477_120 * 4
    assert math.isfinite(sum(peaks.values()))
