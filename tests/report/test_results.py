"""The finished runs of a suite, their table and their page, on numbers that are made up."""

import json
import math
import re

import pytest

pytest.importorskip("matplotlib")

from atlas_kernels.experiments.config import Cell, Suite, checked
from atlas_kernels.experiments.results import Records, entry, standard_error, write_json
from atlas_kernels.report.page import figures, table, write_report

SUITE = {
    "name": "s",
    "version": 1,
    "title": "S <b>",
    "source": {"kind": "checkpoints", "model": "ViT-B-32"},
    "experiments": [
        {
            "name": "e",
            "title": "E",
            "settings": {"method": "few-shot"},
            "arms": [
                {
                    "label": "start",
                    "fixed": True,
                    "seeded": False,
                    "settings": {"how": "zero-shot"},
                },
                {"label": "learned"},
            ],
            "axis": {"field": "shots", "values": [1, 4], "label": "k"},
            "targets": ["a", "b"],
            "seeds": [0, 1],
            "picture": "lines",
            "published": [
                {"arm": "learned", "means": [50, 60]},
                {"arm": "learned", "model": "RN50", "means": [1, 2]},
            ],
        },
        {
            "name": "n",
            "title": "N",
            "settings": {"method": "negation", "control": "c"},
            "arms": [{"label": "aTLAS"}],
            "targets": ["a"],
            "seeds": [0, 1],
            "also": ["control"],
            "published": [{"arm": "aTLAS", "means": [18.76], "rows": {"x": 19.0, "y": 19.84}}],
        },
    ],
}
ACCURACIES = {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.6, ("b", 1): 0.9}


@pytest.fixture
def records(tmp_path) -> Records:
    records = Records.open(tmp_path, checked(Suite, SUITE, ""))
    for cell, _ in records.suite.runs():
        value = {1.0: 0.0, 4.0: 0.05}.get(cell.value, 0.0)
        accuracy = ACCURACIES[cell.target, cell.seed] if cell.seed is not None else 0.1
        metrics = {"test": accuracy + value, "control": 0.5}
        records.add(cell, {"metrics": metrics, "seconds": 2.0})
    return records


def test_means_and_errors(records) -> None:
    experiment = records.suite.experiments[0]
    start, learned = experiment.arms
    found = entry(records, experiment, learned, 1.0, "test")
    assert found is not None
    assert found.mean == pytest.approx((0.3 + 0.75) / 2)
    assert found.by_target == {"a": (0.2, 0.4), "b": (0.6, 0.9)}
    # Over seeds of the means over targets (0.4, 0.65).
    assert found.error == pytest.approx(0.25 / math.sqrt(2) / math.sqrt(2))
    # With one seed over targets (0.2, 0.6).
    single = experiment.model_copy(update={"seeds": (0,)})
    for cell in [cell for cell in records.done if cell.seed == 1]:
        del records.done[cell]
    found = entry(records, single, learned, 1.0, "test")
    assert found is not None
    assert found.error == pytest.approx(0.4 / math.sqrt(2) / math.sqrt(2))
    # An arm that does not depend on the axis stands in every column.
    for value in (1.0, 4.0):
        its = entry(records, experiment, start, value, "test")
        assert its is not None
        assert (its.mean, its.error) == (pytest.approx(0.1), None)
    assert entry(records, experiment, learned, 1.0, "nothing") is None
    assert standard_error([1.0]) is None


def test_nested_metrics_are_found_by_a_dotted_name(records) -> None:
    experiment = records.suite.experiments[1]
    cell = next(c for c, _ in records.suite.runs() if c.experiment == "n")
    records.add(cell, {"metrics": {"test": 0.5, "shifts": {"x": 0.25}}, "seconds": 0.0})
    found = entry(records, experiment, experiment.arms[0], None, "shifts.x")
    assert found is not None
    assert found.mean == 0.25


def test_table_with_the_papers_rows(records) -> None:
    few_shot, negation = (table(records, experiment) for experiment in records.suite.experiments)
    assert few_shot.columns == ("", "k = 1", "k = 4")
    assert few_shot.rows == (
        ("start", "10.0", "10.0"),
        ("learned", "52.5 +- 12.5", "57.5 +- 12.5"),
        ("published: learned", "50.0", "60.0"),
    )
    assert not few_shot.warnings
    # The paper's rows, not its headline; and a warning that says so.
    assert [row for row in negation.rows if row[0].startswith("published")] == [
        ("published: aTLAS", "19.4", "")
    ]
    assert "18.76 %, but the mean of its own 2 rows is 19.42 %" in negation.warnings[0]
    assert negation.columns == ("", "test, %", "control, %")
    assert negation.rows[0] == ("aTLAS", "30.0 +- 10.0", "50.0 +- 0.0")


def test_results_come_back_and_others_are_refused(records, tmp_path) -> None:
    again = Records.open(tmp_path, records.suite)
    assert again.done == records.done
    other = checked(Suite, {**SUITE, "version": 2}, "")
    before = records.path.read_bytes()
    with pytest.raises(
        ValueError, match=r"of other settings \(version: 1 there, 2 here\): choose another"
    ):
        Records.open(tmp_path, other)
    assert records.path.read_bytes() == before
    records.path.write_text("[]")
    with pytest.raises(ValueError, match="is not a results file of a suite"):
        Records.open(tmp_path, records.suite)


def test_page_opens_without_a_network(records, tmp_path) -> None:
    path = write_report(records, tmp_path)
    page = path.read_text(encoding="utf-8")
    # Nothing is fetched: pictures are inside, and there is no script, style sheet or link out.
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "S &lt;b&gt;" in page
    assert "52.5 ± 12.5" in page
    assert "the mean of its own 2 rows is 19.42" in page


def test_page_hides_nothing_of_a_name(records, tmp_path) -> None:
    suite = records.suite.model_copy(update={"title": "backwards \u202e\x1b", "about": "$a$"})
    page = write_report(Records(records.path, suite, records.done), tmp_path).read_text("utf-8")
    assert page.count("backwards \\u202e\\x1b") == 2
    assert "\u202e" not in page


def test_pictures_show_the_numbers(records) -> None:
    (figure,) = figures(records, records.suite.experiments[0])
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    drawn = next(its for label, its in lines.items() if "learned" in label)
    assert drawn == pytest.approx([52.5, 57.5])


def test_json_has_no_nan(tmp_path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.0], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.0], "b": {"c": None}}


def test_cells_are_keys() -> None:
    assert {Cell(experiment="e", arm="a"): 1}[Cell(experiment="e", arm="a")] == 1
