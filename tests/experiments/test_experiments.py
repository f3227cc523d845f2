"""Runs of every method on the embedded tasks, suites of them, and ``reproduce``."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")

from atlas_kernels import cli
from atlas_kernels.experiments import suite as suite_module
from atlas_kernels.experiments.config import (
    AdditionRun,
    CosineRun,
    Embedded,
    FewShotRun,
    NegationRun,
    PeftRun,
    PerInstanceRun,
    Suite,
    TestTimeRun,
    checked,
)
from atlas_kernels.experiments.few_shot import Rows
from atlas_kernels.experiments.methods import perform
from atlas_kernels.experiments.results import Records
from atlas_kernels.experiments.setting import Result, Setting
from atlas_kernels.experiments.suite import run_suite
from atlas_kernels.experiments.workspace import EmbeddedWorkspace, open_workspace
from atlas_kernels.models.linearized import LinearizedModel
from atlas_kernels.tasks.clip.model import ImageClassifier
from atlas_kernels.tasks.embedded.model import load_embedded_model, save_embedded_model
from atlas_kernels.tasks.embedded.paths import WEIGHTS

TASK = "digits-inverted"
SOURCES = ("digits-clean", "mnist-inverted", "fashion-noise")
QUICK = {"target": TASK, "recipe": "ours", "epochs": 2, "shots": 2, "sources": SOURCES}
ZERO_SHOT = 0.24


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> EmbeddedWorkspace:
    return EmbeddedWorkspace(tmp_path_factory.mktemp("vectors"))


def result_of(space, run, folder: Path | None = None) -> Result:
    return perform(Setting(space, run, folder, progress=False))


def test_zero_shot_is_the_base_and_learning_beats_it(space) -> None:
    start = result_of(space, FewShotRun(**QUICK, how="zero-shot"))
    assert start.encoder is None
    assert start.metrics["test"] == pytest.approx(ZERO_SHOT, abs=0.02)
    learned = result_of(space, FewShotRun(**QUICK))
    assert learned.metrics["test"] > start.metrics["test"] + 0.1
    assert learned.encoder is not None
    # Every coefficient has a gradient.
    assert learned.encoder.bank.names == SOURCES
    assert learned.encoder.coef.shape == (3, 56)
    assert (learned.encoder.coef != 0).all()


def test_the_targets_own_vector_is_left_out_and_strictly_its_images(space) -> None:
    run = FewShotRun(target=TASK)
    assert set(space.tasks) - set(Setting(space, run).vectors()) == {TASK}
    names = Setting(space, run.model_copy(update={"strict": True})).vectors()
    assert len(names) == 18
    assert not [name for name in names if name.startswith("digits")]


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"select": "random", "budget": 2}, 2),
        ({"select": "features", "budget": 1}, 1),
        ({"select": "whole", "budget": 2}, 2),
        ({"select": "block", "budget": 2}, 2),
        ({"select": "block", "budget": 2, "bases": "matched"}, 2),
        ({"select": "random", "budget": 1, "bases": "random"}, 1),
    ],
)
def test_vectors_that_learn(space, fields, count: int) -> None:
    run = FewShotRun(**{**QUICK, "epochs": 0}, **fields)
    result = result_of(space, run)
    assert result.encoder is not None
    names = result.encoder.bank.names
    assert len(names) == count
    if run.select == "features":
        # Inverted digits look most like the other set of inverted digits.
        assert names == ("mnist-inverted",)
    if run.select == "block" and run.bases == "vectors":
        assert names == ("rank-1", "rank-2")
    if run.bases != "vectors":
        assert all(name.startswith("random-") for name in names)


def test_no_two_seeds_share_noise(space) -> None:
    drawn = []
    for seed in (0, 1):
        fields = {"bases": "matched", "select": "random", "budget": 3, "codec": "fp32"}
        run = FewShotRun(**{**QUICK, "epochs": 0, "seed": seed}, **fields)
        encoder = result_of(space, run).encoder
        assert encoder is not None
        composed = [encoder.bank.compose(row) for row in torch.eye(3)]
        name = encoder.bank.blocks[0]
        drawn += [(its[name] - encoder.bank.base[name]).flatten() for its in composed]
    directions = torch.nn.functional.normalize(torch.stack(drawn), dim=1)
    # Of hundreds of independent elements; those of a vector met again would have 1.
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.5


@pytest.mark.parametrize("select", [{}, {"select": "block", "budget": 2}])
def test_weights_alone_learn(space, select) -> None:
    run = FewShotRun(**{**QUICK, "epochs": 0}, **select, weights_only=True)
    encoder = result_of(space, run).encoder
    assert encoder is not None
    names = {name for name, p in space.encoder().named_parameters() if p.ndim >= 2}
    assert set(encoder.bank.blocks) == names


def test_adapters_and_shifts(space) -> None:
    run = FewShotRun(**QUICK, how="zero-shot", adapter="lp++", out_of_domain=True)
    result = result_of(space, run)
    assert result.model is not None
    assert result.metrics["test"] > ZERO_SHOT + 0.02
    shifts = result.metrics["shifts"]
    assert len(shifts) == 5
    assert result.metrics["shifted"] == pytest.approx(sum(shifts.values()) / 5)
    expected = Setting(space, run).score(result.model, space.task("digits-clean").test)
    assert shifts["digits-clean"] == expected


def test_rows_of_a_head_are_as_good_as_masking_the_others() -> None:
    model = torch.nn.Linear(3, 5)
    rows = torch.tensor([1, 3])
    images = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    masked = torch.full((20, 5), -math.inf)
    masked[:, rows] = model(images)[:, rows]
    assert torch.equal(rows[Rows(model, rows)(images).argmax(1)], masked.argmax(1))


def test_searches_and_the_targets_own_model(space) -> None:
    own = result_of(space, FewShotRun(**QUICK, how="own"))
    assert own.encoder is not None
    assert own.encoder.bank.names == (TASK,)
    assert (own.encoder.coef == 1).all()
    # The model that was fine-tuned on all images of the task.
    assert own.metrics["test"] > 0.8
    run = FewShotRun(**QUICK, granularity="task", how="search", factors=(2.0,))
    search = result_of(space, run).encoder
    assert search is not None
    assert search.coef.tolist() == [2.0] * 3
    single = result_of(space, run.model_copy(update={"how": "single", "factors": (0.25,)})).encoder
    assert single is not None
    # The base, or one vector.
    assert sorted(single.coef.tolist()) in ([0.0] * 3, [0.0, 0.0, 0.25])


def test_costs_are_measured_and_change_nothing(space) -> None:
    run = FewShotRun(**{**QUICK, "epochs": 1})
    plain = result_of(space, run)
    assert plain.seconds is not None
    assert plain.seconds > 0
    measured = result_of(space, run.model_copy(update={"peak_memory": True})).metrics
    # Coefficients, gradients and AdamW's moments at least; nothing here comes near a gigabyte.
    assert 4 * 4 * 168 < measured.pop("peak_bytes") < 1e9
    assert measured == plain.metrics


def test_other_assets_in_place_of_those_that_ship(space, tmp_path) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "assets")
    model = load_embedded_model()
    with torch.no_grad():
        model.visual.proj += 1
    ids = model.known_tokens.nonzero().flatten()
    state = {**model.state_dict(), "token_embedding.weight": model.token_embedding.weight[ids]}
    save_embedded_model(tmp_path / "assets" / "model.safetensors", state, ids)
    other = open_workspace(Embedded(assets=tmp_path / "assets"))
    difference = other.encoder().proj - space.encoder().proj
    assert torch.allclose(difference, torch.ones_like(difference), atol=1e-3)
    # Vectors of the model that ships do not belong to this one.
    with pytest.raises(ValueError, match="another base model"):
        other.vectors("standard", [TASK])


def test_partitions_and_percent(space) -> None:
    fields = {"target": TASK, "recipe": "ours", "epochs": 1, "percent": 5, "sources": SOURCES}
    plain = result_of(space, PeftRun(**fields))
    groups = result_of(space, PeftRun(**fields, granularity="partition", partitions=3))
    assert plain.encoder is not None
    assert groups.encoder is not None
    assert groups.encoder.coef.shape == (*plain.encoder.coef.shape, 3)
    assert groups.metrics["parameters"] == 3 * plain.metrics["parameters"]
    # Groups differ from each other: their gradients did.
    assert (groups.encoder.coef.std(2) > 0).any()
    lora = result_of(space, PeftRun(**fields, how="lora", lr=3e-3, rank=2))
    assert lora.metrics["parameters"] == 4 * 2 * (96 + 288 + 96 + 96 + 96 + 384 + 384 + 96)


def test_test_time_sees_no_labels(space, monkeypatch) -> None:
    setting = Setting(space, TestTimeRun(target="mnist-noise", recipe="ours", epochs=1, divisor=10))
    seen = []

    def spy(model, images, *arguments, **options):
        seen.append(images)
        raise KeyboardInterrupt

    monkeypatch.setattr("atlas_kernels.experiments.methods.adapt", spy)
    with pytest.raises(KeyboardInterrupt):
        perform(setting)
    assert not hasattr(seen[0], "labels")
    assert len(seen[0]) == len(space.task("mnist-noise").test)


def test_layer_norms_alone_learn(space) -> None:
    run = TestTimeRun(
        target="mnist-noise",
        recipe="ours",
        how="layer-norms",
        objective="entropy",
        epochs=1,
        lr=1e-3,
    )
    result = result_of(space, run)
    assert isinstance(result.model, ImageClassifier)
    start = space.encoder().state_dict()
    moved = {n for n, t in result.model.encoder.state_dict().items() if not t.equal(start[n])}
    assert moved
    assert all("ln_" in name for name in moved)
    assert (
        result.metrics["test"]
        > result_of(space, run.model_copy(update={"epochs": 0})).metrics["test"]
    )


def test_addition_and_negation(space) -> None:
    tasks = ("mnist-rotated", "fashion-noise")
    shared = {"recipe": "ours", "epochs": 2}
    start = result_of(space, AdditionRun(tasks=tasks, how="zero-shot")).metrics
    added = result_of(space, AdditionRun(tasks=tasks, **shared, disentanglement=True)).metrics
    assert added["test"] > start["test"] + 0.1
    relative = [added["tasks"][n] / added["finetuned"][n] for n in tasks]
    assert added["relative"] == pytest.approx(sum(relative) / 2)
    matrix = torch.tensor(added["matrix"])
    assert (matrix.diagonal() == 0).all()
    assert added["disentanglement"] == pytest.approx((matrix[0, 1] + matrix[1, 0]).item() / 2)
    weights = result_of(space, AdditionRun(tasks=tasks, weights_only=True, recipe="ours", epochs=0))
    assert weights.encoder is not None
    assert all(len(shape) >= 2 for shape in weights.encoder.bank.shapes)
    run = NegationRun(
        target="mnist-clean", control="fashion-clean", recipe="ours", epochs=2, lr=0.03
    )
    forgotten = result_of(space, run).metrics
    before = result_of(space, run.model_copy(update={"how": "zero-shot"})).metrics
    assert forgotten["test"] < before["test"]
    assert forgotten["kept"] >= 0.95 * 0.75


def test_per_instance_and_cosines(space) -> None:
    run = PerInstanceRun(target="mnist-noise", recipe="ours", epochs=1, warmup=0)
    result = result_of(space, run)
    start = result_of(space, run.model_copy(update={"epochs": 0}))
    # The loss is the entropy of unlabelled images: learning moves the predictions.
    assert result.metrics["test"] != start.metrics["test"]
    cosine = result_of(space, CosineRun()).metrics
    assert len(cosine["names"]) == len(cosine["matrix"]) == 24
    diagonal = torch.tensor(cosine["matrix"]).diagonal()
    assert torch.allclose(diagonal, torch.ones_like(diagonal))


def test_lora_and_linear_vectors_are_made_once_and_kept(tmp_path, monkeypatch) -> None:
    made = []
    import atlas_kernels.experiments.embedded.make_vectors as vectors

    real = vectors.finetune
    quick = {kind: vectors.Recipe(epochs=1, lr=r.lr) for kind, r in vectors.RECIPES.items()}
    monkeypatch.setattr(vectors, "RECIPES", quick)
    monkeypatch.setattr(vectors, "finetune", lambda *a, **k: (made.append(a), real(*a, **k))[1])
    monkeypatch.setattr("atlas_kernels.experiments.workspace.default_processes", lambda: 1)
    space = EmbeddedWorkspace(tmp_path)
    fields = {**QUICK, "epochs": 1, "sources": ("digits-clean", "digits-noise")}
    run = FewShotRun(**fields, vectors="linear")
    result = result_of(space, run)
    assert isinstance(result.encoder, LinearizedModel)
    assert len(made) == 2
    product = result_of(space, run.model_copy(update={"vectors": "lora-product"}))
    factors = result_of(space, run.model_copy(update={"vectors": "lora-factorwise"}))
    assert len(made) == 4
    assert product.encoder is not None
    assert factors.encoder is not None
    assert 2 * len(product.encoder.bank.blocks) == len(factors.encoder.bank.blocks)
    with pytest.raises(ValueError, match="linear vectors of the embedded tasks have to be made"):
        EmbeddedWorkspace().vectors("linear", [TASK])
    with pytest.raises(ValueError, match="no task vector of 'digits'"):
        space.vectors("linear", ["digits"])


TINY = {
    "name": "tiny",
    "version": 1,
    "title": "Tiny",
    "experiments": [
        {
            "name": "few-shot",
            "title": "Few-shot",
            "settings": {
                "method": "few-shot",
                "recipe": "ours",
                "epochs": 1,
                "sources": ["digits-clean", "mnist-inverted"],
            },
            "arms": [
                {
                    "label": "start",
                    "fixed": True,
                    "seeded": False,
                    "settings": {"how": "zero-shot"},
                },
                {"label": "per vector", "settings": {"granularity": "task"}},
            ],
            "axis": {"field": "shots", "values": [1, 2], "label": "k"},
            "targets": [TASK],
            "picture": "lines",
        },
        {
            "name": "cosine",
            "title": "Cosine",
            "settings": {"method": "cosine"},
            "arms": [{"label": "cosine", "seeded": False}],
            "picture": "none",
            "metric": "cosine",
        },
    ],
}


def metrics(records: Records) -> dict:
    return {cell: record["metrics"] for cell, record in records.done.items()}


def test_an_interrupted_suite_goes_on_to_the_same_numbers(tmp_path, monkeypatch) -> None:
    suite = checked(Suite, TINY, "")
    whole = run_suite(suite, tmp_path / "whole", processes=1, progress=False)
    assert len(whole.done) == 4
    real, calls = suite_module.perform, []

    def interrupted(setting):
        calls.append(setting.run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(setting)

    monkeypatch.setattr(suite_module, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, tmp_path / "cut", processes=1, progress=False)
    kept = json.loads((tmp_path / "cut" / "results.json").read_text())["runs"]
    assert len(kept) == 2
    again = run_suite(suite, tmp_path / "cut", processes=1, progress=False)
    # Only what was missing: the third, and the one after it.
    assert len(calls) == 5
    assert metrics(again) == metrics(whole)


def test_reproduce_a_file_of_ones_own(tmp_path, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    out = tmp_path / "out"
    arguments = ["reproduce", str(tmp_path / "tiny.yaml"), "-o", str(out), "--processes", "1"]
    assert cli.main([*arguments, "--only", "few-shot"]) == 0
    printed = capsys.readouterr().out
    assert "k = 1" in printed
    assert "per vector" in printed
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 1
    assert cli.main(arguments) == 2
    assert "holds the results of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such",), "no suite 'no-such'"),
        (("negation",), "needs files: give --checkpoints DIR and --data DIR"),
        (("negation", "--data", "d"), "--checkpoints and --data go together"),
        (("embedded", "--only", "x"), "no experiment 'x' in embedded: negation, addition"),
        (("negation", "--data", "d", "--checkpoints", "c"), "no c/ViT-B-32/base.safetensors"),
    ],
)
def test_what_reproduce_refuses(tmp_path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_reproduce_lists_what_there_is(capsys) -> None:
    assert cli.main(["reproduce"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("embedded") < printed.index("addition") < printed.index("test-time")


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path, capsys) -> None:
    """Two would overwrite each other's finished runs."""
    from atlas_kernels.files import in_use

    learn = ("learn", "few-shot", "--task", "digits-inverted", "--shots", "1", "--epochs", "0")
    with in_use(tmp_path):
        held = sorted(tmp_path.iterdir())
        for command in (("reproduce", "embedded"), learn):
            assert cli.main([*command, "-o", str(tmp_path)]) == 2
            error = capsys.readouterr().err
            assert f"{tmp_path} is in use by another run: wait for it to end" in error
        assert cli.main(["demo", "--out", str(tmp_path)]) == 2
        assert sorted(tmp_path.iterdir()) == held
    assert list(tmp_path.iterdir()) == []
