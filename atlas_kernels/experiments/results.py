"""The finished runs of a suite: the file that keeps them, and what they come to on average."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .config import Arm, Cell, Experiment, Suite, write_yaml

RESULTS = "results.json"
CONFIG = "config.yaml"
_FORMAT = 1


@dataclass
class Records:
    """The finished runs of a suite, and the file that keeps them.

    Attributes:
        path: ``results.json``.
        suite: what was asked for.
        done: each run's "metrics"; "seconds" of all of it; and, where a method tells them apart,
            "learning_seconds" without loading and testing.
    """

    path: Path
    suite: Suite
    done: dict[Cell, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, suite: Suite) -> Records:
        """The finished runs of a folder, or none; the folder is made and proved to be writable.

        Raises:
            ValueError: the folder holds the results of another suite, or a file that is not ours.
            OSError: the folder cannot be made or written to.
        """
        folder.mkdir(parents=True, exist_ok=True)
        records = cls(folder / RESULTS, suite)
        if records.path.exists():
            records._read()
        records.write()
        write_yaml(folder / CONFIG, suite)
        return records

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        """Keeps a finished run, in the file as well."""
        self.done[cell] = record
        self.write()

    def write(self) -> None:
        """Writes the file in one step."""
        write_json(
            self.path,
            {
                "format": _FORMAT,
                "suite": self.suite.model_dump(mode="json"),
                "versions": versions(),
                "runs": [
                    {"cell": cell.model_dump(), **record} for cell, record in self.done.items()
                ],
            },
        )

    def _read(self) -> None:
        advice = f"choose another folder, or delete {self.path}"
        try:
            contents = json.loads(self.path.read_text(encoding="utf-8"))
            suite, runs = contents["suite"], contents["runs"]
            done = {Cell(**record.pop("cell")): record for record in runs}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a results file of a suite: {advice}") from error
        ours = self.suite.model_dump(mode="json")
        if suite != ours or contents.get("format") != _FORMAT:
            what = _difference(suite, ours)
            raise ValueError(f"{self.path} holds the results of other settings{what}: {advice}")
        self.done = done


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    Attributes:
        mean: over targets of the means over seeds.
        error: standard error over seeds of the means over targets; in an experiment with one seed
            over targets. None for fewer than two values.
        by_target: the values of all seeds.
    """

    mean: float
    error: float | None
    by_target: dict[str | None, tuple[float, ...]]


def entry(
    records: Records, experiment: Experiment, arm: Arm, value: float | str | None, metric: str
) -> Entry | None:
    """What an arm reached at a value of the axis; None if it did not run or has no such metric."""
    wanted = None if arm.fixed else value
    scores: dict[str | None, dict[int | None, float]] = {}
    for cell, record in records.done.items():
        here = (cell.experiment, cell.arm, cell.value) == (experiment.name, arm.label, wanted)
        found = _metric(record["metrics"], metric) if here else None
        if found is not None:
            scores.setdefault(cell.target, {})[cell.seed] = found
    if not scores:
        return None
    by_target = {target: tuple(seeds.values()) for target, seeds in scores.items()}
    means = [statistics.fmean(values) for values in by_target.values()]
    if len(experiment.seeds) == 1:
        return Entry(statistics.fmean(means), standard_error(means), by_target)
    common = set.intersection(*(set(seeds) for seeds in scores.values()))
    by_seed = [statistics.fmean(s[seed] for s in scores.values()) for seed in common]
    return Entry(statistics.fmean(means), standard_error(by_seed), by_target)


def _difference(theirs: Any, ours: Any, where: str = "") -> str:
    """The first setting that differs, in words; nothing if none does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        pairs = {key: (theirs.get(key), ours.get(key)) for key in {**theirs, **ours}}
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = dict(enumerate(zip(theirs, ours, strict=True)))
    else:
        return "" if theirs == ours else f" ({where}: {theirs} there, {ours} here)"
    found = (_difference(*pair, f"{where}.{key}".strip(".")) for key, pair in pairs.items())
    return next(filter(None, found), "")


def _metric(metrics: Any, name: str) -> float | None:
    """A number by its name; ``outer.inner`` looks into a dictionary."""
    for part in name.split(".", 1):
        metrics = metrics.get(part) if isinstance(metrics, dict) else None
    return metrics if isinstance(metrics, float) else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def versions() -> dict[str, str]:
    """Of the packages that results depend on."""
    from .. import __version__

    packages = ("torch", "open_clip_torch", "numpy", "safetensors")
    return {
        "atlas_kernels": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Writes JSON in one step; NaN becomes null."""
    text = json.dumps(_without_nan(contents), indent=1)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(its) for key, its in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(its) for its in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
