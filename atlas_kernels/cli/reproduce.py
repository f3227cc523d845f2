"""``reproduce``: the tables of the paper, and every method on the embedded tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .extras import need

app = App(
    name="reproduce",
    help_epilogue="examples: atlas-kernels reproduce embedded; atlas-kernels reproduce few-shot "
    "--checkpoints DIR --data DIR --only shots",
)


@app.default
def reproduce(
    name: str | None = None,
    /,
    *,
    checkpoints: Path | None = None,
    data: Path | None = None,
    model: str = "ViT-B-32",
    allow_pickle: Annotated[bool, Parameter(negative="")] = False,
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    processes: int | None = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
) -> dict[str, Any]:
    """Runs a suite; one report, as a page that opens offline.

    Args:
        name: Of a suite, or a suite's file; without it: what there is. Interrupted, the same
            command goes on.
        checkpoints: A folder with MODEL/ below it.
        data: The data sets.
        model: open_clip's name.
        allow_pickle: Read whole pickled modules (.pt) as well.
        only: Some of its experiments.
        processes: At a time; by default one per core.
        output: Where the files go; by default reproduce-NAME.
    """
    if name is None:
        return _list()
    from ..experiments import RESULTS, run_suite
    from ..report import PAGE, print_table, table, write_report

    need("demo", "reproducing")
    source = None
    if checkpoints and data:
        source = {
            "kind": "checkpoints",
            "model": model,
            "checkpoints": str(checkpoints),
            "data": str(data),
            "allow_pickle": allow_pickle,
        }
    elif checkpoints or data:
        raise ValueError("--checkpoints and --data go together")
    suite = _suite(name, source, only)
    folder = output or Path(f"reproduce-{suite.name}")
    records = run_suite(suite, folder, processes=processes)
    tables = {}
    for experiment in suite.experiments:
        its = table(records, experiment)
        if its.rows:
            numbers = len(its.columns) - 1
            print_table(its.columns, its.rows, title=experiment.title, numbers=numbers)
            tables[experiment.name] = [dict(zip(its.columns, row, strict=True)) for row in its.rows]
        for warning in its.warnings:
            print(warning)
    write_report(records, folder)
    print(f"Written to {folder}: {PAGE}, {RESULTS}, config.yaml. Open {folder / PAGE}.")
    return {"folder": folder, "page": folder / PAGE, "tables": tables}


def _suite(name: str, source: dict[str, Any] | None, only: tuple[str, ...]) -> Any:
    from ..experiments import load_suite

    suite = load_suite(name, source)
    if not only:
        return suite
    names = [experiment.name for experiment in suite.experiments]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"no experiment {unknown[0]!r} in {suite.name}: {', '.join(names)}")
    chosen = tuple(e for e in suite.experiments if e.name in only)
    return suite.model_copy(update={"experiments": chosen})


def _list() -> dict[str, Any]:
    from ..experiments import read_suite, suite_names
    from ..report import print_table

    suites = {name: read_suite(name).title for name in suite_names()}
    heading = "atlas-kernels reproduce NAME"
    print_table(("NAME", "what it runs"), list(suites.items()), title=heading)
    return suites
