"""The schema of runs, experiments and suites: what it accepts, refuses, and makes of a table."""

import re
from pathlib import Path

import pytest
import yaml

from atlas_kernels.experiments.config import (
    METHODS,
    Checkpoints,
    Embedded,
    Experiment,
    FewShotRun,
    NegationRun,
    Own,
    Run,
    Single,
    Suite,
    TestTimeRun,
    checked,
    read_yaml,
    write_yaml,
)
from atlas_kernels.experiments.published import load_suite, read_suite, suite_names

EXPERIMENT = {
    "name": "e",
    "title": "E",
    "settings": {"method": "few-shot", "recipe": "ours"},
    "arms": [
        {"label": "start", "fixed": True, "seeded": False, "settings": {"how": "zero-shot"}},
        {"label": "learned", "settings": {"granularity": "task"}},
    ],
    "axis": {"field": "shots", "values": [1, 4], "label": "k"},
    "targets": ["a", "b"],
    "seeds": [0, 1, 2],
    "per_target": {"b": {"epochs": 7}},
    "per_model": {"RN50": {"batch": 9}},
}


def test_runs_are_the_product_of_arms_values_targets_and_seeds() -> None:
    experiment = checked(Experiment, EXPERIMENT, "here")
    runs = list(experiment.runs(None))
    assert [cell.arm for cell, _ in runs].count("start") == 2
    assert [cell.arm for cell, _ in runs].count("learned") == 2 * 2 * 3
    by_cell = {(c.arm, c.value, c.target, c.seed): run for c, run in runs}
    assert len(by_cell) == len(runs)
    run = by_cell["learned", 4.0, "b", 2]
    assert isinstance(run, FewShotRun)
    assert (run.shots, run.target, run.seed, run.granularity, run.epochs) == (4, "b", 2, "task", 7)
    assert by_cell["start", None, "a", None].how == "zero-shot"
    assert by_cell["learned", 1.0, "a", 0].training().epochs == 10
    assert {run.batch for _, run in experiment.runs("RN50")} == {9}


def test_published_recipes_are_the_default() -> None:
    few_shot, negation = FewShotRun(), NegationRun(lr=0.5)
    training = few_shot.training()
    assert (training.lr, training.epochs, training.preset) == (0.1, 10, "official")
    assert (training.weight_decay, training.schedule) == (0.1, "cosine")
    assert few_shot.resolved("batch") == 128
    assert (negation.training().lr, negation.training().schedule) == (0.5, "constant")
    assert FewShotRun(recipe="ours").resolved("batch") == 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "few-shot", "shots": 0}, "greater than or equal to 1, got 0"),
        ({"method": "few-shot", "shot": 4}, "shot: Extra inputs are not permitted"),
        ({"method": "sorcery"}, "sorcery"),
        ({"method": "few-shot", "granularity": "partition"}, "number of partitions go together"),
        ({"method": "few-shot", "partitions": 5}, "number of partitions go together"),
        ({"method": "few-shot", "select": "block"}, "select and a budget go together"),
        ({"method": "few-shot", "budget": 2}, "select and a budget go together"),
        ({"method": "few-shot", "vectors": "linear", "memory": "stream"}, "memory 'whole' only"),
        (
            {"method": "peft", "vectors": "linear", "granularity": "partition", "partitions": 2},
            "linear vectors have coefficients per block or per task",
        ),
        (
            {"method": "few-shot", "how": "search", "adapter": "tip"},
            "an adapter goes with coefficients or zero-shot, not 'search'",
        ),
        ({"method": "negation", "threshold": 2}, "less than or equal to 1, got 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(fields, message: str) -> None:
    with pytest.raises(ValueError, match="here: ") as error:
        checked(Single, {"run": fields}, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_run_as_a_whole_is_said_of_no_option() -> None:
    run = {"method": "few-shot", "select": "block"}
    with pytest.raises(ValueError, match=r"^learn few-shot: select and a budget go together"):
        checked(Single, {"run": run}, "learn few-shot", called=lambda name: f"--{name}")


def test_a_packed_bank_has_chosen_its_blocks() -> None:
    own = {"kind": "own", "bank": "b", "images": ["i"], "model": "m"}
    run = {"method": "few-shot", "weights_only": True}
    with pytest.raises(ValueError, match="weights_only chooses blocks while a bank is packed"):
        checked(Single, {"source": own, "run": run}, "here")
    assert checked(Single, {"source": own, "run": {**run, "weights_only": False}}, "here")


@pytest.mark.parametrize(
    "choice",
    [
        {"sources": ["cars"]},
        {"strict": True},
        {"select": "block", "budget": 2},
        {"bases": "matched"},
        {"how": "own"},
    ],
)
def test_a_packed_bank_has_chosen_its_vectors(choice) -> None:
    own = {"kind": "own", "bank": "b", "images": ["i"], "model": "m"}
    run = {"method": "few-shot", **choice}
    with pytest.raises(ValueError, match=f"here: .*{next(iter(choice))}.* one by one"):
        checked(Single, {"source": own, "run": run}, "here")
    assert checked(Single, {"run": run}, "here")


def test_a_wrong_run_is_found_when_the_experiment_is_read() -> None:
    wrong = {**EXPERIMENT, "axis": {"field": "shots", "values": [1, 0], "label": "k"}}
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        checked(Experiment, wrong, "here")
    unknown = {**EXPERIMENT, "published": [{"arm": "nobody", "means": [1]}]}
    with pytest.raises(ValueError, match="published numbers of 'nobody', which is no arm"):
        checked(Experiment, unknown, "here")


def test_yaml_comes_back_as_it_was(tmp_path) -> None:
    suite = checked(
        Suite, {"name": "s", "version": 1, "title": "S", "experiments": [EXPERIMENT]}, ""
    )
    write_yaml(tmp_path / "suite.yaml", suite)
    assert read_yaml(tmp_path / "suite.yaml", Suite) == suite
    own = Own(bank=Path("b"), images=(Path("i"), Path("j")), model="m")
    single = Single(source=own, run=FewShotRun(target="i", granularity="partition", partitions=3))
    write_yaml(tmp_path / "run.yaml", single)
    assert read_yaml(tmp_path / "run.yaml", Single) == single
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["run"]["partitions"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- 1", "holds no fields, expected those of a suite")],
)
def test_files_that_are_no_suites(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(path, Suite)


def test_the_papers_tables_are_there() -> None:
    names = suite_names()
    assert names[:3] == ("embedded", "demo", "demo-full")
    for name in names:
        suite = read_suite(name)
        assert suite.name == name
        runs: list[Run] = [run for _, run in suite.runs()]
        assert runs
        if isinstance(suite.source, Embedded):
            assert {run.recipe for run in runs if run.recipes["paper"]} == {"ours"}
        else:
            assert {run.recipe for run in runs} == {"paper"}
            assert all(experiment.published for experiment in suite.experiments)
    few_shot = read_suite("few-shot")
    assert len(few_shot.experiments[0].targets or ()) == 22


def test_headlines_that_contradict_their_rows() -> None:
    published = {
        (p.arm, p.model, p.metric): p for p in read_suite("negation").experiments[0].published
    }
    ours = published["aTLAS", "ViT-B-32", "test"]
    assert ours.means == (18.76,)
    # From the specification: the rows' own mean.
    assert ours.row_mean == pytest.approx(19.42, abs=0.01)
    assert published["search", "ViT-B-32", "test"].row_mean is None


def test_suites_and_their_sources() -> None:
    with pytest.raises(ValueError, match="no suite 'negatoin': did you mean negation"):
        load_suite("negatoin", None)
    with pytest.raises(ValueError, match="needs files: give --checkpoints DIR and --data DIR") as e:
        load_suite("negation", None)
    assert "ViT-B-32/TASK/finetuned.safetensors" in str(e.value)
    with pytest.raises(ValueError, match="runs on what comes with the package"):
        load_suite("embedded", {"checkpoints": "c"})
    suite = load_suite("few-shot", {"model": "RN50", "checkpoints": "c", "data": "d"})
    assert suite.model == "RN50"
    assert {run.epochs for _, run in suite.runs()} == {30}


@pytest.mark.parametrize("name", ["few-shot", "addition", "negation"])
def test_the_largest_model_takes_half_a_batch_twice(name: str) -> None:
    files = {"checkpoints": "c", "data": "d"}
    for suite in (
        load_suite(name, {"model": model, **files}) for model in ("ViT-B-16", "ViT-L-14")
    ):
        halves = 2 if suite.model == "ViT-L-14" else 1
        for _, run in suite.runs():
            assert run.resolved("batch") == run.recipes["paper"]["batch"] // halves
            assert run.resolved("accumulate") == halves


def test_sar_has_no_preset() -> None:
    assert TestTimeRun(objective="sar", lr=0.1).training().lr == 0.1
    with pytest.raises(ValueError, match="SAR has no preset"):
        TestTimeRun(objective="sar", preset="clean")


def test_every_field_is_in_the_docs() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "configs.md").read_text(encoding="utf-8")
    for schema in (Embedded, Own, Checkpoints, *METHODS.values()):
        for name, field in schema.model_fields.items():
            if name not in ("kind", "method"):
                assert f"| `{name}` |" in page, name
                assert not field.description or field.description in page, name
    for example in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        contents = yaml.safe_load(example)
        checked(Suite if "experiments" in contents else Single, contents, "docs")
