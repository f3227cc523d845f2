"""``demo``: the main job on the embedded default, end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..experiments import Cell, Suite

ASSETS = "assets"
STEP_COST = "step-cost.json"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "demo",
        parents=[common],
        help="learn compositions on real images that come with the package",
        description="Turns a small CLIP model and its task vectors into better models of held-out "
        "tasks, from a few labelled images each, and compares what can be done with them. Writes "
        "results.json, pictures, the learned coefficients and merged models. An interrupted run "
        "goes on where it stopped.",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("atlas-demo"), help="default: ./%(default)s"
    )
    parser.add_argument(
        "--full", action="store_true", help="six targets, k = 1 to 16, three seeds (an hour or so)"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="first make the model and its task vectors from the images, in DIR/assets",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the labelled images that are drawn, and of --from-scratch (default: 0)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Makes the assets if asked to, runs the suite, and reports it."""
    from .info import missing

    lacking = missing("demo")
    if lacking:
        raise ImportError(
            f"the demo needs {', '.join(lacking)}: run pip install 'atlas_kernels[demo]'"
        )
    from ..experiments import read_suite

    out: Path = arguments.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected the name of a folder")
    suite = read_suite("demo-full" if arguments.full else "demo")
    run_demo(_adjusted(suite, arguments), out)


def run_demo(suite: Suite, out: Path, *, processes: int | None = None) -> None:
    """Runs a suite like the demo's, and writes all that the command promises."""
    from ..experiments import RESULTS, run_suite
    from ..report import print_results, print_step_cost, write_pictures

    kept = kept_cells(suite)
    records = run_suite(suite, out, kept=kept, processes=processes)
    cost = _step_cost(suite, kept[0], out / STEP_COST)
    pictures = write_pictures(records, kept[0], out)
    print_results(records)
    print_step_cost(cost)
    names = ", ".join((RESULTS, STEP_COST, *(path.name for path in pictures)))
    print(f"Written to {out}: {names},")
    print("and for every target the learned coefficients-*.safetensors and merged-*.safetensors.")


def kept_cells(suite: Suite) -> list[Cell]:
    """The runs whose coefficients and merged models are written: one per target."""
    from ..report import ATLAS

    first = suite.experiments[0]
    assert first.axis is not None
    chosen = (first.name, ATLAS, max(first.axis.values), first.seeds[0])
    cells = (cell for cell, _ in suite.runs())
    return [c for c in cells if (c.experiment, c.arm, c.value, c.seed) == chosen]


def _adjusted(suite: Suite, arguments: argparse.Namespace) -> Suite:
    """The suite with other seeds, and on assets that are made first."""
    seed = arguments.seed
    experiments = tuple(
        each.model_copy(update={"seeds": tuple(seed + its for its in each.seeds)})
        for each in suite.experiments
    )
    suite = suite.model_copy(update={"experiments": experiments})
    if not arguments.from_scratch:
        return suite
    from ..experiments import Embedded, make_assets

    folder = arguments.out.resolve() / ASSETS
    try:
        make_assets(folder, seed=seed)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"finished assets are kept in {folder}; the same command goes on"
        ) from None
    return suite.model_copy(update={"source": Embedded(assets=folder)})


def _step_cost(suite: Suite, cell: Cell, path: Path) -> dict[str, Any]:
    """What a learning step of a run costs; measured once, with nothing else going on."""
    from ..experiments import Setting, one_thread, open_workspace, step_cost, write_json

    if not path.exists():
        setting = Setting(open_workspace(suite.source), dict(suite.runs())[cell])
        with one_thread():
            write_json(path, step_cost(setting))
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return contents
