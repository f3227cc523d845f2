import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")

from atlas_kernels import cli
from atlas_kernels.checkpoints import read_state_dict
from atlas_kernels.cli import demo as command
from atlas_kernels.clip import build_embedded_model
from atlas_kernels.data import preprocess
from atlas_kernels.demo import assets as assets_module
from atlas_kernels.demo import experiment
from atlas_kernels.demo.experiment import METHODS, Cell, Grid, Problem, Results, summarize
from atlas_kernels.demo.step_cost import step_cost
from atlas_kernels.experiments.processes import run_jobs
from atlas_kernels.learn import classify
from atlas_kernels.memory import PeakMemory

TARGET = "digits-inverted"
GRID = Grid(targets=(TARGET,), shots=(1,), epochs=2, finetune_lrs=(1e-3,), single_factors=(0.5,))
# Cells of this one need no learning: what happens around them is what is tested.
QUICK = Grid(targets=(TARGET,), shots=(1,), methods=("zero_shot", "own", "isotropic"), epochs=1)
BLOCK = Cell(TARGET, "block", 1, 0)


@pytest.fixture(scope="module")
def assets() -> Path:
    return assets_module.asset_folder()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, assets) -> tuple[Path, dict]:
    """One whole run of a tiny grid: its folder and results.json."""
    folder = tmp_path_factory.mktemp("demo")
    command.run_demo(GRID, folder, assets, processes=1)
    return folder, json.loads((folder / "results.json").read_text())


def records(results: dict) -> dict[str, dict]:
    return {record["method"]: record for record in results["cells"]}


def test_results_hold_every_cell_and_where_they_come_from(finished) -> None:
    folder, results = finished
    assert set(records(results)) == set(METHODS)
    for record in results["cells"]:
        assert 0 <= record["accuracy"] <= 1
        assert record["seconds"] >= 0
        # A step holds at least the batch's pixels; nothing here comes near a gigabyte.
        assert 32 * 32 * 32 * 4 < record["peak_bytes"] < 1e9
    assert results["settings"]["grid"]["targets"] == [TARGET]
    assert results["settings"]["grid"]["seeds"] == [0]
    assert {"torch", "python", "atlas_kernels"} <= results["versions"].keys()
    assert {entry["method"] for entry in results["summary"]} == set(METHODS)
    cost = results["step_cost"]
    assert cost["vectors"] == 23
    assert cost["gradient_difference"] < 1e-3
    # bf16 beside float32, and padding: 0.2 % here.
    stored = [cost[name]["stored_bytes"] for name in ("fused", "loop")]
    assert stored[1] / stored[0] == pytest.approx(2, rel=0.01)
    for name in ("accuracy.png", "coefficients.png", "tasks.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_no_method_sees_vectors_it_must_not(finished) -> None:
    used = {name: record["vectors"] for name, record in records(finished[1]).items()}
    dataset = TARGET.split("-")[0]
    for name, method in METHODS.items():
        if method.vectors == "own":
            assert used[name] == [TARGET]
        elif method.vectors == "others":
            assert len(used[name]) == 23
            assert TARGET not in used[name]
        elif method.vectors == "strict":
            assert len(used[name]) == 18
            assert not any(vector.startswith(f"{dataset}-") for vector in used[name])
        elif method.vectors == "random":
            assert sorted(used[name]) == sorted(f"random-{v}" for v in used["block"])
        else:
            assert used[name] == []


def test_random_vectors_have_the_real_ones_norms(assets) -> None:
    real = Problem(BLOCK, GRID, assets).vectors
    noise = Problem(Cell(TARGET, "random", 1, 0), GRID, assets).vectors
    for a, b in zip(real, noise, strict=True):
        assert abs(a.cosine(b)) < 0.02  # 6 standard deviations of 1 / sqrt(477,120), and then some
        for name, delta in a.deltas.items():
            # float32 norms of up to 150,000 elements.
            assert b.deltas[name].norm().item() == pytest.approx(delta.norm().item(), rel=1e-4)


def test_learning_moves_coefficients_and_lowers_the_training_loss(finished, assets) -> None:
    problem = Problem(BLOCK, GRID, assets)
    model = problem.classifier()
    batch = next(iter(problem.batches().epoch(0)))
    with torch.no_grad():
        zero_shot = classify(model, batch).item()
        model.encoder.load_coefficients(finished[0] / f"coefficients-{TARGET}.safetensors")
        assert model.encoder.coef.abs().max() > 0.01
        assert classify(model, batch).item() < zero_shot


def test_merged_model_is_the_composed_one_in_open_clip(finished, assets) -> None:
    folder, results = finished
    problem = Problem(BLOCK, GRID, assets)
    composed = problem.classifier().encoder.eval()
    composed.load_coefficients(folder / f"coefficients-{TARGET}.safetensors")
    visual = build_embedded_model().visual.eval()
    visual.load_state_dict(read_state_dict(folder / f"merged-{TARGET}.safetensors"))
    images = preprocess(problem.task.test.images[:20])
    with torch.no_grad():
        assert torch.equal(visual(images), composed(images))
    composed_accuracy = problem.test(torch.nn.Sequential(visual, _Head(problem.head)))
    assert composed_accuracy == pytest.approx(records(results)["block"]["accuracy"])


class _Head(torch.nn.Module):
    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features @ self.head.T


def test_second_run_computes_nothing(finished, assets, monkeypatch) -> None:
    folder, before = finished
    monkeypatch.setattr(experiment, "run_cell", lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr("atlas_kernels.demo.step_cost.step_cost", lambda *_, **__: 1 / 0)
    command.run_demo(GRID, folder, assets, processes=1)
    assert json.loads((folder / "results.json").read_text())["cells"] == before["cells"]


@pytest.fixture
def run(monkeypatch, assets):
    """The command with the quick grid, in this process, without what comes after the cells."""
    monkeypatch.setattr(command, "_step_cost", lambda *_: {})
    monkeypatch.setattr("atlas_kernels.cli.report.write_pictures", lambda *_: [])

    def run(folder: Path, *options: str, grid: Grid = QUICK) -> int:
        monkeypatch.setattr(
            command, "run", lambda a: command.run_demo(grid, a.out, assets, processes=1)
        )
        return cli.main(["demo", "--out", str(folder), *options])

    return run


def test_interrupt_keeps_finished_cells(tmp_path, monkeypatch, run, capsys) -> None:
    real, calls = experiment.run_cell, []

    def interrupted(cell, **settings):
        calls.append(cell.method)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(cell, **settings)

    monkeypatch.setattr(experiment, "run_cell", interrupted)
    assert run(tmp_path) == 130
    error = capsys.readouterr().err
    assert "2 of 3 cells are finished" in error
    assert "Traceback" not in error
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 2
    assert run(tmp_path) == 0
    assert calls == ["zero_shot", "own", "isotropic", "isotropic"]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, run, capsys) -> None:
    assert run(tmp_path) == 0
    before = (tmp_path / "results.json").read_bytes()
    other = Grid(targets=(TARGET,), shots=(1,), methods=QUICK.methods, epochs=2)
    assert run(tmp_path, grid=other) == 2
    error = capsys.readouterr().err
    assert "epochs 1 there, 2 here" in error
    assert "--out" in error
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "results.json").write_text("{}")
    assert run(tmp_path) == 2
    assert "not a results file" in capsys.readouterr().err


def test_full_disk_keeps_finished_cells(tmp_path, monkeypatch, run, capsys) -> None:
    real, calls = experiment.write_atomically, []

    def full(path, write):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(path, write)

    monkeypatch.setattr(experiment, "write_atomically", full)
    assert run(tmp_path) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "run the same command again" in error
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 1


def test_folder_that_cannot_be_made(tmp_path, run, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file") == 2
    assert "expected the name of a folder" in capsys.readouterr().err
    assert run(tmp_path / "file" / "below") == 2
    assert "Not a directory" in capsys.readouterr().err


def test_missing_extra_is_told_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'atlas_kernels[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_real_interrupt_of_two_processes(tmp_path, assets) -> None:
    code = f"""
import sys
from pathlib import Path
from atlas_kernels import cli
from atlas_kernels.cli import demo
from atlas_kernels.demo.experiment import Grid
# One short cell, and two that would take hours.
grid = Grid(targets=({TARGET!r},), shots=(1,), methods=("own", "vector", "block"), epochs=10**5)
grid.__class__.cells = lambda self: sorted(old(self), key=lambda cell: cell.method != "own")
demo.run = lambda a: demo.run_demo(grid, a.out, Path({str(assets)!r}), processes=2)
sys.exit(cli.main(["demo", "--out", {str(tmp_path)!r}]))
""".replace("grid.__class__", "old = Grid.cells\nGrid", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    results = tmp_path / "results.json"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if results.exists() and json.loads(results.read_text())["cells"]:
            break
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    # To the whole group, as a terminal does.
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 of 3 cells" in error
    assert "Traceback" not in error
    # Nobody of the group is left; the standard library's own helper needs a moment.
    deadline = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_jobs_that_fail_in_two_processes() -> None:
    with pytest.raises(RuntimeError, match="ValueError: invalid literal"):
        list(run_jobs(int, ["1", "x"], 2))
    with pytest.raises(FileNotFoundError):
        list(run_jobs(os.stat, ["none", "none"], 2))
    with pytest.raises(RuntimeError, match=r"killed \(exit code 9\)"):
        list(run_jobs(os._exit, [9, 9], 2))


def test_cells_do_not_depend_on_the_process(finished, assets, tmp_path) -> None:
    results = Results.open(tmp_path, GRID, assets, processes=2)
    cells = [BLOCK, Cell(TARGET, "zero_shot")]
    function = partial(experiment.run_cell, grid=GRID, assets=assets, folder=tmp_path)
    for cell, record in run_jobs(function, cells, results.processes):
        expected = records(finished[1])[cell.method]
        for key in set(record) - {"seconds"}:
            assert record[key] == expected[key], key


def test_summary_against_numbers_by_hand() -> None:
    accuracy = {
        ("a", "block", 0): 0.6,
        ("a", "block", 1): 0.8,
        ("b", "block", 0): 0.5,
        ("b", "block", 1): 0.5,
        ("a", "zero_shot", None): 0.3,
        ("b", "zero_shot", None): 0.6,
    }
    found = {
        Cell(target, method, None if seed is None else 4, seed): {
            "accuracy": value, "seconds": 1.0, "peak_bytes": 1, "bank_bytes": 1,
        }
        for (target, method, seed), value in accuracy.items()
    }  # fmt: skip
    block, start = summarize(found, [4], ["block", "zero_shot"])
    assert block["accuracy"] == pytest.approx(0.6)
    # Targets .7 and .5, seeds .55 and .65: half their distance.
    assert block["se_targets"] == pytest.approx(0.1)
    assert block["se_seeds"] == pytest.approx(0.05)
    assert start["accuracy"] == pytest.approx(0.45)
    assert start["se_seeds"] is None
    assert start["behind"] == pytest.approx(0.15)
    assert start["behind_count"] == 1
    assert start["behind_se"] == pytest.approx(0.25)


def test_step_cost_refuses_steps_that_disagree(assets, monkeypatch) -> None:
    problem = Problem(BLOCK, GRID, assets)
    images, labels = next(iter(problem.batches().epoch(0)))
    arguments = (problem.visual, problem.vectors[:2], problem.head, images, labels)
    from atlas_kernels import TaskVectorBank

    real = TaskVectorBank.compose
    monkeypatch.setattr(
        TaskVectorBank, "compose", lambda bank, coef, **k: real(bank, 1.1 * coef, **k)
    )
    with pytest.raises(RuntimeError, match="disagree"):
        step_cost(*arguments, repeats=2)


def test_peak_memory_counts_storages_once_and_only_while_alive() -> None:
    outside = torch.ones(1000)
    with PeakMemory() as memory:
        view = outside[10:]
        assert (memory.live, memory.peak) == (0, 0)
        a = view + 1
        b = a.view(990, 1)
        assert memory.live == 990 * 4
        del a
        assert memory.live == 990 * 4
        b.add_(1)
        c = b.double()
        assert memory.live == memory.peak == 990 * 12
        del b, c
        assert memory.live == 0
        assert memory.peak == 990 * 12


def test_peak_memory_sees_the_backward_pass() -> None:
    weight = torch.ones(256, 256, requires_grad=True)
    with PeakMemory() as memory:
        weight.exp().sum().backward()
    # exp's result, the incoming gradient and their product.
    assert memory.peak >= 2 * weight.nbytes
    assert memory.live == weight.nbytes
