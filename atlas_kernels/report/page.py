"""A suite's results as one HTML page that opens without a network, and as tables of text."""

from __future__ import annotations

import base64
import io
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from ..experiments import (
    Arm,
    Entry,
    Experiment,
    Published,
    Records,
    Suite,
    entry,
    standard_error,
    versions,
)
from ..files import printable, write_atomically
from . import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
# One after the other: neighbours differ in hue and in marker.
_LOOKS = (
    (plots.GREY, "x"),
    (plots.ORANGE, "s"),
    (plots.GREEN, "^"),
    (plots.SKY, "v"),
    (plots.BLUE, "o"),
    (plots.PURPLE, "D"),
    (plots.RED, "P"),
    ("#7a5c2e", "<"),
    ("#2f4f4f", ">"),
)
# Points by which a headline may differ from the mean of its own rows: both are rounded.
_ROUNDING = 0.1


@dataclass(frozen=True)
class Table:
    """An experiment's numbers as text.

    Attributes:
        columns: headings; the first is that of the arms.
        rows: one per arm and metric, then one per published arm.
        warnings: where the paper's headline is not the mean of its own rows.
        note: what the errors are.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]
    note: str


def table(records: Records, experiment: Experiment) -> Table:
    """Means in per cent, +- standard error, with the paper's numbers below.

    A column is a value of the axis, or a metric if there is no axis.
    """
    axis, metrics = experiment.axis, (experiment.metric, *experiment.also)
    mine = [p for p in experiment.published if p.model == (records.suite.model or "")]
    measured: list[tuple[str, list[Entry | None]]] = []
    published: list[tuple[str, ...]] = []
    if axis:
        columns = [f"{axis.label} = {_short(value)}" for value in axis.values]
        for arm, metric in itertools.product(experiment.arms, metrics):
            label = arm.label if len(metrics) == 1 else f"{arm.label}: {metric}"
            found = [entry(records, experiment, arm, value, metric) for value in axis.values]
            measured.append((label, found))
        for each in mine:
            label = each.arm if each.metric == experiment.metric else f"{each.arm}: {each.metric}"
            means = [*each.means, *[None] * (len(columns) - len(each.means))]
            published.append((f"published: {label}", *map(_number, means)))
    else:
        columns = [f"{metric}, %" for metric in metrics]
        for arm in experiment.arms:
            found = [entry(records, experiment, arm, None, metric) for metric in metrics]
            measured.append((arm.label, found))
            its = {each.metric: each.headline for each in mine if each.arm == arm.label}
            if its:
                numbers = (_number(its.get(metric)) for metric in metrics)
                published.append((f"published: {arm.label}", *numbers))
    present = [(label, found) for label, found in measured if any(found)]
    over = "seeds" if len(experiment.seeds) > 1 else "targets"
    note = f"Mean over targets, in %, +- standard error over {over}"
    counts = (
        _count(len(experiment.targets or (None,)), "target"),
        _count(len(experiment.seeds), "seed"),
    )
    return Table(
        ("", *columns),
        (*((label, *map(_percent, found)) for label, found in present), *published),
        tuple(_warnings(mine)),
        f"{note}. {counts[0]}, {counts[1]}.",
    )


def _warnings(published: list[Published]) -> Iterator[str]:
    for each in published:
        mean, headline = each.row_mean, each.means[0] if each.means else None
        if mean is not None and headline is not None and abs(mean - headline) > _ROUNDING:
            yield (
                f"The paper's headline for {each.arm} ({each.metric}) is {headline:.2f} %, but the "
                f"mean of its own {len(each.rows)} rows is {mean:.2f} %: compare with the rows."
            )


def write_report(records: Records, folder: Path) -> Path:
    """Writes ``report.html``: every experiment's question, table, picture and settings.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("atlas_kernels.report"), autoescape=True, finalize=_shown
    )
    suite = records.suite
    page = environment.get_template("report.html.j2").render(
        suite=suite,
        sections=[_section(records, experiment) for experiment in suite.experiments],
        versions=versions(),
        seconds=sum(record["seconds"] for record in records.done.values()),
        runs=len(records.done),
        config=_yaml(suite),
    )
    path = folder / PAGE
    write_atomically(path, lambda name: Path(name).write_text(page, encoding="utf-8"))
    return path


def _shown(value: Any) -> Any:
    """What a template inserts: text from files without what a page would hide."""
    return printable(value, keep="\n") if isinstance(value, str) else value


def _section(records: Records, experiment: Experiment) -> dict[str, Any]:
    its = [r for cell, r in records.done.items() if cell.experiment == experiment.name]
    return {
        "experiment": experiment,
        "table": table(records, experiment),
        "pictures": [_embedded(figure) for figure in figures(records, experiment)],
        "runs": len(its),
        "seconds": sum(record["seconds"] for record in its),
        "config": _yaml(experiment),
    }


def figures(records: Records, experiment: Experiment) -> Iterator[Figure]:
    """The pictures of an experiment; none if nothing was measured."""
    if experiment.picture == "lines" and experiment.axis:
        curves = list(_curves(records, experiment))
        if curves:
            yield plots.lines_figure(
                curves,
                title=experiment.title,
                xlabel=experiment.axis.label,
                ylabel=f"{experiment.metric} accuracy",
                log=min(float(value) for value in experiment.axis.values) > 0,
            )
    elif experiment.picture == "bars":
        groups, bars = _bars(records, experiment)
        if bars:
            yield plots.bars_figure(
                groups, bars, title=experiment.title, ylabel=f"{experiment.metric} accuracy"
            )
    yield from _matrices(records, experiment)


def _matrices(records: Records, experiment: Experiment) -> Iterator[Figure]:
    for cell, record in records.done.items():
        metrics = record["metrics"]
        first = cell.seed in (None, experiment.seeds[0])
        if cell.experiment == experiment.name and first and "matrix" in metrics:
            yield plots.matrix_figure(
                np.asarray(metrics["matrix"]),
                metrics["names"],
                title=f"{experiment.title}: {cell.arm}",
                label=experiment.matrix or experiment.metric,
            )


def _curves(records: Records, experiment: Experiment) -> Iterator[plots.Curve]:
    assert experiment.axis is not None
    for arm, (color, marker) in zip(experiment.arms, itertools.cycle(_LOOKS), strict=False):
        points = [
            (float(value), found)
            for value in experiment.axis.values
            if (found := entry(records, experiment, arm, value, experiment.metric))
        ]
        if points:
            yield plots.Curve(
                label=arm.label,
                x=[x for x, _ in points],
                y=[found.mean for _, found in points],
                error=[found.error for _, found in points],
                color=color,
                marker=marker,
                linestyle=":" if arm.fixed else "-",
            )


def _bars(records: Records, experiment: Experiment) -> tuple[list[str], list[plots.Bars]]:
    """Groups by value of the axis, or by target, or by metric; a series per arm."""
    columns: dict[str, Callable[[Arm], tuple[float, float | None] | None]] = {}
    if experiment.axis:
        for value in experiment.axis.values:
            columns[_short(value)] = partial(_point, records, experiment, value=value)
    elif experiment.targets:
        for target in experiment.targets:
            columns[target] = partial(_point, records, experiment, target=target)
        columns["mean"] = partial(_point, records, experiment)
    else:
        for metric in (experiment.metric, *experiment.also):
            columns[metric] = partial(_point, records, experiment, metric=metric)
    series = []
    for arm, (color, _) in zip(experiment.arms, itertools.cycle(_LOOKS), strict=False):
        points = [column(arm) for column in columns.values()]
        if any(points):
            series.append(
                plots.Bars(
                    arm.label,
                    [point[0] if point else None for point in points],
                    [point[1] if point else None for point in points],
                    color,
                )
            )
    return list(columns), series


def _point(
    records: Records,
    experiment: Experiment,
    arm: Arm,
    *,
    value: float | str | None = None,
    target: str | None = None,
    metric: str | None = None,
) -> tuple[float, float | None] | None:
    found = entry(records, experiment, arm, value, metric or experiment.metric)
    if found is None:
        return None
    if target is None:
        return found.mean, found.error
    values = found.by_target.get(target)
    return (statistics.fmean(values), standard_error(values)) if values else None


def _embedded(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _percent(found: Entry | None) -> str:
    if found is None:
        return ""
    error = "" if found.error is None else f" +- {100 * found.error:.1f}"
    return f"{100 * found.mean:.1f}{error}"


def _short(value: float | str | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _yaml(contents: Suite | Experiment) -> str:
    return yaml.safe_dump(contents.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
