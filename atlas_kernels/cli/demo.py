"""``demo``: the main job on the embedded default, end to end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..demo.experiment import Grid


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
    """Runs the grid, then reports it."""
    from .info import missing

    lacking = missing("demo")
    if lacking:
        raise ImportError(
            f"the demo needs {', '.join(lacking)}: run pip install 'atlas_kernels[demo]'"
        )
    from ..demo import experiment
    from ..demo.assets import asset_folder

    seed, out = arguments.seed, arguments.out
    grid = experiment.full_grid(seed) if arguments.full else experiment.Grid(seeds=(seed,))
    run_demo(grid, out, None if arguments.from_scratch else asset_folder(), seed)


def run_demo(
    grid: Grid, out: Path, assets: Path | None, seed: int = 0, processes: int | None = None
) -> None:
    """The demo with any grid; ``assets=None`` makes them first, in ``out / "assets"``."""
    from ..demo import experiment
    from ..experiments.processes import default_processes
    from .report import print_results, write_pictures

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected the name of a folder")
    out.mkdir(parents=True, exist_ok=True)
    if assets is None:
        from ..demo.make_assets import make_assets

        assets = out / "assets"
        try:
            make_assets(assets, seed=seed)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_go_on(f"finished assets are kept in {assets}")) from None
    if processes is None:
        processes = default_processes()
    results = experiment.Results.open(out, grid, assets, processes)
    try:
        experiment.run_grid(grid, out, results, assets)
        if results.step_cost is None:
            results.step_cost = _step_cost(grid, assets)
            results.write()
        pictures = write_pictures(results, grid, out)
    except BaseException as error:
        cells = f"{len(results.records)} of {len(grid.cells())} cells"
        hint = _go_on(f"{cells} are finished and kept in {out}")
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(hint) from None
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}; {hint}") from error
        raise RuntimeError(f"{error}; {hint}") from error
    print_results(results, grid)
    files = [experiment.RESULTS, *(path.name for path in pictures)]
    print(f"Written to {out}: {', '.join(files)},")
    print("and for every target the learned coefficients-*.safetensors and merged-*.safetensors.")


def _go_on(done: str) -> str:
    return f"{done}; run the same command again to go on"


def _step_cost(grid: Grid, assets: Path) -> dict[str, Any]:
    from ..demo import experiment
    from ..demo.step_cost import step_cost
    from ..experiments.processes import one_thread

    cell = experiment.Cell(grid.targets[0], "block", min(grid.shots), grid.seeds[0])
    problem = experiment.Problem(cell, grid, assets)
    images, labels = next(iter(problem.batches().epoch(0)))
    with one_thread():
        return step_cost(
            problem.visual, problem.vectors, problem.head, images, labels, codec=grid.codec
        )
