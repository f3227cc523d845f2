"""``demo``: the main job on the embedded default, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from .extras import need

if TYPE_CHECKING:
    from ..experiments import Cell, Suite

ASSETS = "assets"
STEP_COST = "step-cost.json"


app = App(name="demo", help_epilogue="example: atlas-kernels demo --out atlas-demo")


@app.default
def demo(
    *,
    out: Path = Path("atlas-demo"),
    full: Annotated[bool, Parameter(negative="")] = False,
    from_scratch: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Learns held-out tasks from a few images each, and compares what can be done.

    Args:
        out: Where results.json, pictures, the learned coefficients and merged models go. An
            interrupted run goes on there where it stopped.
        full: Six targets, k = 1 to 16, three seeds (an hour or so).
        from_scratch: First make the model and its task vectors from the images, in OUT/assets.
        seed: Of the labelled images that are drawn, and of --from-scratch.
    """
    need("demo", "the demo")
    from ..experiments import read_suite

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, expected the name of a folder")
    suite = read_suite("demo-full" if full else "demo")
    return run_demo(_adjusted(suite, out, seed, from_scratch), out)


def run_demo(suite: Suite, out: Path, *, processes: int | None = None) -> dict[str, Any]:
    """Runs a suite like the demo's, and writes all that the command promises."""
    from ..experiments import RESULTS, run_suite
    from ..report import print_results, print_step_cost, write_pictures

    kept = kept_cells(suite)
    records = run_suite(suite, out, kept=kept, processes=processes)
    cost = _step_cost(suite, kept[0], out / STEP_COST)
    pictures = write_pictures(records, kept, out)
    print_results(records)
    print_step_cost(cost)
    names = (RESULTS, STEP_COST, *(path.name for path in pictures))
    print(f"Written to {out}: {', '.join(names)},")
    print("and for every target the learned coefficients-*.safetensors and merged-*.safetensors.")
    results: dict[str, Any] = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    return {"folder": out, "files": names, "step_cost": cost, **results}


def kept_cells(suite: Suite) -> list[Cell]:
    """The runs whose coefficients and merged models are written: one per target."""
    from ..report import ATLAS

    first = suite.experiments[0]
    assert first.axis is not None
    chosen = (first.name, ATLAS, max(first.axis.values), first.seeds[0])
    cells = (cell for cell, _ in suite.runs())
    return [c for c in cells if (c.experiment, c.arm, c.value, c.seed) == chosen]


def _adjusted(suite: Suite, out: Path, seed: int, from_scratch: bool) -> Suite:
    """The suite with other seeds, and on assets that are made first."""
    experiments = tuple(
        each.model_copy(update={"seeds": tuple(seed + its for its in each.seeds)})
        for each in suite.experiments
    )
    suite = suite.model_copy(update={"experiments": experiments})
    if not from_scratch:
        return suite
    from ..experiments import Embedded, make_assets

    folder = out.resolve() / ASSETS
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
