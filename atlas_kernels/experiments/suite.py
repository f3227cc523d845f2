"""Running a suite: every run of every experiment, in processes, kept as soon as it is finished."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .config import AdditionRun, Cell, NegationRun, Run, Source, Suite, Vectors
from .methods import Setting, perform
from .processes import default_processes, run_jobs
from .results import Records
from .workspace import Workspace, open_workspace

VECTORS = "vectors"


def run_suite(
    suite: Suite, folder: Path, *, processes: int | None = None, progress: bool = True
) -> Records:
    """Runs what ``folder`` lacks; interrupted, the same call goes on.

    Args:
        suite: what to run.
        folder: gets ``results.json``, ``config.yaml`` and whatever vectors had to be made.
        processes: one thread each; one per core, at most eight, by default.
        progress: shows a progress bar on standard error.

    Raises:
        OSError, ValueError: files are missing or do not fit, or the folder is another suite's.
        RuntimeError: a run failed; the finished ones are kept.
    """
    records = Records.open(folder, suite)
    runs = list(suite.runs())
    missing = [(cell, run) for cell, run in runs if cell not in records.done]
    if missing:
        # Here, and not in every process at once: what is missing is said, and made, once.
        space = open_workspace(suite.source, folder / VECTORS)
        for kind in sorted({run.vectors for _, run in missing}):
            space.vectors(kind, sorted(_needed(space, kind, [run for _, run in missing])))
        _check_images(space, [run for _, run in missing])
    function = partial(run_cell, source=suite.source, cache_folder=folder / VECTORS)
    with tqdm(
        total=len(runs),
        initial=len(runs) - len(missing),
        desc=suite.name,
        unit="run",
        disable=not progress,
        leave=False,
    ) as bar:
        for cell, record in run_jobs(function, missing, processes or default_processes()):
            records.add(cell, record)
            bar.set_postfix_str(f"{cell.experiment}: {cell.arm}")
            bar.update()
    return records


def _needed(space: Workspace, kind: Vectors, runs: Sequence[Run]) -> set[str]:
    """The tasks whose vectors of a kind the runs may use."""
    names: set[str] = set()
    for run in runs:
        if run.vectors != kind:
            continue
        if isinstance(run, NegationRun) and run.target is not None:
            names.add(run.target)
        else:
            tasks = run.tasks if isinstance(run, AdditionRun) else run.sources
            names |= set(tasks or space.vector_names(kind))
    return names


def _check_images(space: Workspace, runs: Sequence[Run]) -> None:
    """Raises one FileNotFoundError for all tasks whose images are not there."""
    names = sorted({name for run in runs for name in run.tasks_needed})
    lacking = [problem for name in names if (problem := _missing_images(space, name))]
    if lacking:
        raise FileNotFoundError("\n".join(lacking))


def _missing_images(space: Workspace, name: str) -> str | None:
    try:
        space.task(name)
    except FileNotFoundError as error:
        return str(error)
    return None


def run_cell(
    job: tuple[Cell, Run], *, source: Source, cache_folder: Path
) -> tuple[Cell, dict[str, Any]]:
    """One run, and its record."""
    cell, run = job
    started = time.perf_counter()
    result = perform(Setting(_workspace(source, cache_folder), run, progress=False))
    return cell, {"metrics": result.metrics, "seconds": round(time.perf_counter() - started, 3)}


@cache
def _workspace(source: Source, cache_folder: Path) -> Workspace:
    return open_workspace(source, cache_folder)
