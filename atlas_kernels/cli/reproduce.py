"""``reproduce``: the tables of the paper, and every method on the embedded tasks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    text = "run a table of the paper, or every method on the embedded tasks"
    parser = commands.add_parser(
        "reproduce",
        parents=[common],
        help=text,
        description=f"{text[0].upper()}{text[1:]}; one report, as a page that opens offline. "
        "Without a name: what there is. Interrupted, the same command goes on.",
    )
    parser.set_defaults(run=_reproduce)
    parser.add_argument("name", metavar="NAME", nargs="?", help="of a suite, or a suite's file")
    parser.add_argument("--checkpoints", metavar="DIR", type=Path, help="with MODEL/ below it")
    parser.add_argument("--data", metavar="DIR", type=Path, help="the data sets")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip's name (%(default)s)")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read whole pickled modules (.pt) as well"
    )
    parser.add_argument("--only", metavar="EXPERIMENT", nargs="+", help="some of its experiments")
    parser.add_argument("--processes", type=int, help="at a time (one per core)")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="where the files go (reproduce-NAME)"
    )


def _reproduce(arguments: argparse.Namespace) -> None:
    from ..experiments import suite_names

    if arguments.name is None:
        _list(suite_names())
        return
    from ..experiments import RESULTS, run_suite
    from ..report import PAGE, print_table, table, write_report
    from .info import missing

    lacking = missing("demo")
    if lacking:
        raise ImportError(
            f"reproducing needs {', '.join(lacking)}: run pip install 'atlas_kernels[demo]'"
        )
    suite = _suite(arguments)
    folder = arguments.output or Path(f"reproduce-{suite.name}")
    records = run_suite(suite, folder, processes=arguments.processes)
    for experiment in suite.experiments:
        its = table(records, experiment)
        if its.rows:
            numbers = len(its.columns) - 1
            print_table(its.columns, its.rows, title=experiment.title, numbers=numbers)
        for warning in its.warnings:
            print(warning)
    write_report(records, folder)
    print(f"Written to {folder}: {PAGE}, {RESULTS}, config.yaml. Open {folder / PAGE}.")


def _suite(arguments: argparse.Namespace) -> Any:
    from ..experiments import load_suite

    files = arguments.checkpoints, arguments.data
    source = None
    if all(files):
        source = {
            "kind": "checkpoints",
            "model": arguments.model,
            "checkpoints": str(arguments.checkpoints),
            "data": str(arguments.data),
            "allow_pickle": arguments.allow_pickle,
        }
    elif any(files):
        raise ValueError("--checkpoints and --data go together")
    suite = load_suite(arguments.name, source)
    if arguments.only:
        names = [experiment.name for experiment in suite.experiments]
        unknown = [name for name in arguments.only if name not in names]
        if unknown:
            raise ValueError(f"no experiment {unknown[0]!r} in {suite.name}: {', '.join(names)}")
        chosen = tuple(e for e in suite.experiments if e.name in arguments.only)
        suite = suite.model_copy(update={"experiments": chosen})
    return suite


def _list(names: tuple[str, ...]) -> None:
    from ..experiments import read_suite
    from ..report import print_table

    rows = [(name, read_suite(name).title) for name in names]
    print_table(("NAME", "what it runs"), rows, title="atlas-kernels reproduce NAME")
