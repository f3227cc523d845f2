"""The demo's results in words and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments import Arm, Cell, Entry, Experiment, Records, entry, kept_file, standard_error
from ..models import Coefficients
from ..tasks.embedded import SHIFTS, dataset_names, load_task
from . import plots
from .terminal import print_table, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATLAS = "learned per block (aTLAS)"
"""The arm that the others are compared with, and whose coefficients are kept."""

_SHORT = {
    "searched: one factor for all": "one factor for all",
    "searched: best single vector": "best single vector",
    "learned per vector": "per vector",
    ATLAS: "per block (aTLAS)",
    "own fine-tuned model (all images)": "own model, all images",
    "learned per block, of random vectors": "random vectors",
}
# Accuracies that a picture cannot tell apart.
_ALIKE = 0.015
# Of the curves, by experiment and arm; the last is drawn on top.
_LOOKS = {
    ("held-out", "own fine-tuned model (all images)"): (plots.GREY, "_", ":"),
    ("held-out", "full fine-tuning"): (plots.PURPLE, "D", "-"),
    ("held-out", ATLAS): (plots.BLUE, "o", "-"),
    ("strict", ATLAS): (plots.BLUE, "*", "--"),
    ("control", "learned per block, of random vectors"): (plots.SKY, "P", "-"),
    ("held-out", "learned per vector"): (plots.ORANGE, "s", "-"),
    ("held-out", "searched: best single vector"): (plots.GREEN, "^", "-"),
    ("held-out", "searched: one factor for all"): (plots.RED, "v", "-"),
    ("held-out", "zero-shot"): ("#000000", "x", ":"),
}


@dataclass(frozen=True)
class Behind:
    """How far an arm lies behind learning per block, target by target.

    Attributes:
        mean: of the differences.
        error: their standard error over targets; None for fewer than two.
        count: on how many targets it does.
    """

    mean: float
    error: float | None
    count: int


def print_results(records: Records) -> None:
    """Two tables: accuracies; differences and costs."""
    first, shots = records.suite.experiments[0], _shots(records)
    most, several = shots[-1], len(first.seeds) > 1
    scores: list[tuple[str, ...]] = []
    costs: list[tuple[str, ...]] = []
    sections: list[int] = []
    for experiment, arm in _arms(records):
        inner = experiment is not first
        if inner and arm is experiment.arms[0]:
            sections.append(len(scores) - 1)
            scores.append((f"{experiment.title}:", *[""] * len(shots)))
            costs.append((f"{experiment.title}:", *[""] * (5 if several else 4)))
        label = ("  " if inner else "") + arm.label
        found = [entry(records, experiment, arm, k, "test") for k in shots]
        scores.append(
            (label, *(_percent(its.mean, _over_targets(its)) if its else "" for its in found))
        )
        last, behind = found[-1], _behind(records, experiment, arm, most)
        assert last is not None
        its = list(_records(records, experiment, arm, most))
        costs.append(
            (
                label,
                _percent(behind.mean, behind.error, "+") if behind else "",
                f"{behind.count} of {len(last.by_target)}" if behind else "",
                *([_percent(last.error)] if several else []),
                f"{statistics.fmean(record['learning_seconds'] for record in its):.1f} s",
                size(max(record["metrics"]["peak_bytes"] for record in its)),
            )
        )
    print_table(
        ("test accuracy, %; k images per class", *(f"k = {k}" for k in shots)),
        scores,
        title=f"Mean of {_targets(first)} +- standard error over targets",
        numbers=len(shots),
        sections=sections,
    )
    print_table(
        (
            f"k = {most}",
            "behind aTLAS",
            "targets",
            *(["s.e. over seeds"] if several else []),
            "time",
            "peak memory",
        ),
        costs,
        title="Differences to learning per block, in points, and costs",
        numbers=5 if several else 4,
        sections=sections,
    )
    print(
        "Behind aTLAS: mean of the differences target by target, +- standard error over targets,\n"
        "and on how many targets; strict methods against the strict aTLAS. Time: learning or\n"
        "searching on one thread. Peak memory: tensors of one learning step, or of evaluating one\n"
        "batch where nothing is learned."
    )


def print_step_cost(cost: dict[str, Any]) -> None:
    """The table of what `step_cost` measured."""
    names = {"fused": "atlas_kernels", "loop": "plain Python loop"}
    print_table(
        ("one learning step", "time", "quartiles", "peak memory", "stored vectors"),
        [
            (
                name,
                f"{1e3 * cost[key]['seconds']:.1f} ms",
                " - ".join(f"{1e3 * value:.1f}" for value in cost[key]["quartiles"]),
                size(cost[key]["peak_bytes"]),
                size(cost[key]["stored_bytes"]),
            )
            for key, name in names.items()
        ],
        title=f"{cost['vectors']} vectors, {cost['blocks']} blocks, batch {cost['batch']}, "
        f"{cost['threads']} thread{'s' * (cost['threads'] > 1)}, median of {cost['repeats']}",
        numbers=4,
    )


def write_pictures(records: Records, kept: Sequence[Cell], out: Path) -> list[Path]:
    """Writes the pictures, that of the coefficients of the kept runs; returns their paths."""
    pictures = {
        "accuracy.png": _accuracy_picture(records),
        "coefficients.png": _coefficient_picture(kept, out),
        "tasks.png": _task_picture(records.suite.experiments[0].targets or ()),
    }
    for name, figure in pictures.items():
        plots.save(figure, out / name)
    return [out / name for name in pictures]


def _accuracy_picture(records: Records) -> Figure:
    first, shots = records.suite.experiments[0], _shots(records)
    most, several = shots[-1], len(first.seeds) > 1
    arms = {(experiment.name, arm.label): (experiment, arm) for experiment, arm in _arms(records)}
    curves = []
    for key, look in _LOOKS.items():
        found = [(k, entry(records, *arms[key], k, "test")) for k in shots if key in arms]
        points = [(k, its) for k, its in found if its]
        if points:
            curves.append(
                plots.Curve(
                    _label(*arms[key]),
                    [k for k, _ in points],
                    [its.mean for _, its in points],
                    [its.error for _, its in points],
                    *look,
                )
            )
    comparisons = [
        plots.Comparison(
            _label(experiment, arm),
            behind.mean,
            behind.error,
            _LOOKS[experiment.name, arm.label][0],
        )
        for experiment, arm in _arms(records)
        if (experiment.name, arm.label) in _LOOKS
        and (behind := _behind(records, experiment, arm, most))
    ]
    title = "Task vectors combined block by block learn from few images"
    ours, start = (
        entry(records, *arms[first.name, label], most, "test")
        if (first.name, label) in arms
        else None
        for label in (ATLAS, "zero-shot")
    )
    if ours and start:
        title = (
            f"{most} images per class and one coefficient per vector and block: "
            f"{100 * start.mean:.0f} % becomes {100 * ours.mean:.0f} %"
        )
    over = f"{len(first.seeds)} seeds" if several else "targets"
    return plots.accuracy_figure(
        _merged(curves),
        comparisons,
        title=title,
        left_title=f"Mean of {_targets(first)} \u00b1 standard error over {over}",
        right_title=f"aTLAS minus each method at k = {most}\n(\u00b1 s.e. over targets, paired)",
    )


def _merged(curves: Sequence[plots.Curve]) -> list[plots.Curve]:
    """One curve for those that lie on each other: the first of them, with all their labels."""
    merged: list[plots.Curve] = []
    for curve in curves:
        for k, other in enumerate(merged):
            near = other.x == curve.x and all(
                abs(a - b) < _ALIKE for a, b in zip(other.y, curve.y, strict=True)
            )
            if near:
                merged[k] = replace(other, label=f"{other.label};\n{curve.label}")
                break
        else:
            merged.append(curve)
    return merged


def _coefficient_picture(cells: Sequence[Cell], out: Path) -> Figure:
    maps: dict[str, Any] = {}
    blocks: Sequence[str] = ()
    strongest = []
    for cell in cells:
        kept = Coefficients.load(kept_file(out, "coefficients", cell))
        coef, names, blocks = kept.values.numpy(), kept.names, kept.blocks
        # Sorted: vectors of one image set stand together.
        order = sorted(range(len(names)), key=lambda row: str(names[row]))
        maps[str(cell.target)] = coef[order], [names[row] for row in order]
        strongest.append(f"{cell.target} draws most on {names[int(abs(coef).mean(1).argmax())]}")
    return plots.coefficient_figure(
        maps,
        blocks,
        title=f"{strongest[0]}, in each block differently (k = {cells[0].value:g})",
    )


def _task_picture(targets: Sequence[str]) -> Figure:
    names = [f"{dataset}-{shift}" for dataset in dataset_names() for shift in SHIFTS]
    sets = len(dataset_names())
    return plots.contact_sheet(
        {name: load_task(name).test.images[:4].numpy() for name in names},
        tuple(SHIFTS),
        dataset_names(),
        title=f"{len(names)} tasks: {sets} sets of real images under {len(SHIFTS)} shifts",
        marked=targets,
        note="framed: the targets, each learned without its own task vector",
    )


def _behind(records: Records, experiment: Experiment, arm: Arm, k: int) -> Behind | None:
    """None for what the others are compared with, in an experiment of its own or in the first."""
    if arm.label == ATLAS:
        return None
    first = records.suite.experiments[0]
    reference, atlas = next(
        (each, its) for each in (experiment, first) for its in each.arms if its.label == ATLAS
    )
    ours = entry(records, reference, atlas, k, "test")
    theirs = entry(records, experiment, arm, k, "test")
    if ours is None or theirs is None:
        return None
    # Without own seeds (searches), the same score stands against every seed's.
    differences = [
        statistics.fmean(ours.by_target[target]) - statistics.fmean(scores)
        for target, scores in theirs.by_target.items()
    ]
    return Behind(
        statistics.fmean(differences),
        standard_error(differences),
        sum(difference > 0 for difference in differences),
    )


def _arms(records: Records) -> Iterator[tuple[Experiment, Arm]]:
    for experiment in records.suite.experiments:
        for arm in experiment.arms:
            yield experiment, arm


def _records(
    records: Records, experiment: Experiment, arm: Arm, k: int
) -> Iterator[dict[str, Any]]:
    for cell, record in records.done.items():
        here = (cell.experiment, cell.arm) == (experiment.name, arm.label)
        if here and cell.value in (k, None):
            yield record


def _shots(records: Records) -> list[int]:
    axis = records.suite.experiments[0].axis
    assert axis is not None
    return sorted(int(value) for value in axis.values)


def _over_targets(found: Entry) -> float | None:
    return standard_error([statistics.fmean(scores) for scores in found.by_target.values()])


def _percent(value: float | None, error: float | None = None, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{100 * value:{sign}.1f}"
    return text if error is None else f"{text} +- {100 * error:.1f}"


def _targets(experiment: Experiment) -> str:
    count = len(experiment.targets or ())
    return f"{count} held-out target{'s' * (count > 1)}"


def _label(experiment: Experiment, arm: Arm) -> str:
    short = _SHORT.get(arm.label, arm.label)
    return f"{short}, strict" if experiment.name == "strict" else short
