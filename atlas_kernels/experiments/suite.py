"""Running a suite: every run of every experiment, in processes, kept as soon as it is finished."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ..files import in_use
from .config import AdditionRun, Cell, NegationRun, Run, Source, Suite, Vectors
from .files import write_models
from .methods import perform
from .processes import default_processes, run_jobs
from .results import Records
from .setting import Setting
from .workspace import Workspace, open_workspace

VECTORS = "vectors"


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    kept: Collection[Cell] = (),
    processes: int | None = None,
    progress: bool = True,
) -> Records:
    """Runs what ``folder`` lacks; interrupted, the same call goes on.

    Args:
        suite: what to run.
        folder: gets ``results.json``, ``config.yaml`` and whatever vectors had to be made.
        kept: runs that learn coefficients, one per target: ``folder`` gets those, and the merged
            model, as well (`kept_file`).
        processes: one thread each; one per core, at most eight, by default.
        progress: shows a progress bar on standard error.

    Raises:
        OSError, ValueError: files are missing or do not fit, or the folder is another suite's, or
            another process works in it.
        RuntimeError: a run failed; the finished ones are kept.
    """
    with in_use(folder):
        return _run_suite(suite, folder, kept, processes, progress)


def _run_suite(
    suite: Suite, folder: Path, kept: Collection[Cell], processes: int | None, progress: bool
) -> Records:
    records = Records.open(folder, suite)
    runs = list(suite.runs())
    missing = [
        (cell, run)
        for cell, run in runs
        if cell not in records.done or (cell in kept and not _is_kept(folder, cell))
    ]
    # What does not depend on the axis is short: last, it leaves no process without work for long.
    missing.sort(key=lambda item: item[0].value is None)
    function = partial(run_cell, source=suite.source, folder=folder, kept=kept)
    with (
        _going_on(records, len(runs)),
        tqdm(
            total=len(runs),
            initial=len(runs) - len(missing),
            desc=suite.name,
            unit="run",
            disable=not progress,
            leave=False,
        ) as bar,
    ):
        if missing:
            _prepare(open_workspace(suite.source, folder / VECTORS), [run for _, run in missing])
        for cell, record in run_jobs(function, missing, processes or default_processes()):
            records.add(cell, record)
            bar.set_postfix_str(f"{cell.experiment}: {cell.arm}")
            bar.update()
    return records


def kept_file(folder: Path, kind: Literal["coefficients", "merged"], cell: Cell) -> Path:
    """Where the coefficients, or the merged model, of a kept run are."""
    return folder / f"{kind}{_suffix(cell)}.safetensors"


def _suffix(cell: Cell) -> str:
    return f"-{cell.target}"


def _is_kept(folder: Path, cell: Cell) -> bool:
    return all(kept_file(folder, kind, cell).is_file() for kind in ("coefficients", "merged"))


@contextmanager
def _going_on(records: Records, total: int) -> Iterator[None]:
    """Whatever stops the runs says what is finished, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        hint = (
            f"{len(records.done)} of {total} runs are finished and kept in {records.path.parent}; "
            "the same command goes on"
        )
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(hint) from None
        if isinstance(error, OSError):
            # Without a number it is ours, and says what to do already.
            if error.errno is None:
                raise
            raise OSError(error.errno, f"{error.strerror or error}; {hint}") from error
        raise RuntimeError(f"{error}; {hint}") from error


def _prepare(space: Workspace, runs: Sequence[Run]) -> None:
    """Here, and not in every process at once: what is missing is said, and made, once."""
    for kind in sorted({run.vectors for run in runs}):
        space.vectors(kind, sorted(_needed(space, kind, runs)))
    _check_images(space, runs)


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
    job: tuple[Cell, Run], *, source: Source, folder: Path, kept: Collection[Cell]
) -> tuple[Cell, dict[str, Any]]:
    """One run, and its record."""
    cell, run = job
    started = time.perf_counter()
    result = perform(Setting(_workspace(source, folder / VECTORS), run, progress=False))
    record: dict[str, Any] = {"metrics": result.metrics}
    if result.seconds is not None:
        record["learning_seconds"] = round(result.seconds, 3)
    if cell in kept:
        write_models(result, folder, _suffix(cell))
    record["seconds"] = round(time.perf_counter() - started, 3)
    return cell, record


@cache
def _workspace(source: Source, cache_folder: Path) -> Workspace:
    return open_workspace(source, cache_folder)
