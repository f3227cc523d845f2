"""The demo's results in words and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import plots
from ..checkpoints import read_tensors
from ..data import SHIFTS, dataset_names, load_task
from ..demo.experiment import METHODS, Cell, Grid, Results, kept_files
from .output import print_table, size

# Rows of the table by group; the strict variant repeats the first one's methods.
_GROUPS = {
    "": ("zero_shot", "isotropic", "single", "vector", "block", "full", "own"),
    "strict: no vector of the target's images": (
        "isotropic_strict",
        "single_strict",
        "vector_strict",
        "block_strict",
    ),
    "control": ("random",),
}
_SHORT = {
    "zero_shot": "zero-shot",
    "isotropic": "one factor for all",
    "single": "best single vector",
    "vector": "per vector",
    "block": "per block (aTLAS)",
    "full": "full fine-tuning",
    "own": "own model, all images",
    "random": "random vectors",
}
_LOOKS = {
    "own": (plots.GREY, "_", ":"),
    "full": (plots.PURPLE, "D", "-"),
    "block": (plots.BLUE, "o", "-"),
    "block_strict": (plots.SKY, "o", "--"),
    "vector": (plots.ORANGE, "s", "-"),
    "single": (plots.GREEN, "^", "-"),
    "isotropic": (plots.RED, "v", "-"),
    "zero_shot": ("#000000", "x", ":"),
}


def print_results(results: Results, grid: Grid) -> None:
    """The tables: accuracy, differences and costs, and what a step costs."""
    summary = _by_method(results)
    shots = sorted(grid.shots)
    several = len(grid.seeds) > 1
    scores: list[tuple[str, ...]] = []
    costs: list[tuple[str, ...]] = []
    sections: list[int] = []
    for group, names in _GROUPS.items():
        present = [name for name in names if name in summary]
        if group and present:
            sections.append(len(scores) - 1)
            scores.append((f"{group}:", *[""] * len(shots)))
            costs.append((f"{group}:", *[""] * (5 if several else 4)))
        for name in present:
            label = ("  " if group else "") + METHODS[name].label
            entries = summary[name]
            last = entries[shots[-1]]
            by_shots = (_percent(entries.get(k), "accuracy", "se_targets") for k in shots)
            scores.append((label, *by_shots))
            reference = METHODS[name].how == "block" and METHODS[name].vectors != "random"
            costs.append(
                (
                    label,
                    "" if reference else _percent(last, "behind", "behind_se", "+"),
                    "" if reference else f"{last['behind_count']} of {last['targets']}",
                    *([_points(last["se_seeds"])] if several else []),
                    f"{last['seconds']:.1f} s",
                    size(last["peak_bytes"]),
                )
            )
    count, most = len(grid.targets), shots[-1]
    print_table(
        ("test accuracy, %; k images per class", *(f"k = {k}" for k in shots)),
        scores,
        title=f"Mean of {count} held-out target{'s' * (count > 1)} +- standard error over targets",
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
    print("Behind aTLAS: mean of the differences target by target, +- standard error over targets,")
    print("and on how many targets; strict methods against the strict aTLAS. Time: learning or")
    print(
        "searching on one thread. Peak memory: tensors of one learning step, or of evaluating one"
    )
    print("batch where nothing is learned.")
    cost = results.step_cost
    if cost:
        fused, loop = cost["fused"], cost["loop"]
        print_table(
            ("one learning step", "time", "quartiles", "peak memory", "stored vectors"),
            [
                (
                    name,
                    f"{1e3 * part['seconds']:.1f} ms",
                    " - ".join(f"{1e3 * value:.1f}" for value in part["quartiles"]),
                    size(part["peak_bytes"]),
                    size(part["stored_bytes"]),
                )
                for name, part in (("atlas_kernels", fused), ("plain Python loop", loop))
            ],
            title=f"{cost['vectors']} vectors, {cost['blocks']} blocks, batch {cost['batch']}, "
            f"{cost['threads']} thread{'s' * (cost['threads'] > 1)}, median of {cost['repeats']}",
            numbers=4,
        )


def write_pictures(results: Results, grid: Grid, out: Path) -> list[Path]:
    """Writes the pictures; returns their paths."""
    pictures = {
        "accuracy.png": _accuracy_picture(results, grid),
        "coefficients.png": _coefficient_picture(grid, out),
        "tasks.png": _task_picture(grid),
    }
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            plots.save(figure, out / name)
            paths.append(out / name)
    return paths


def _accuracy_picture(results: Results, grid: Grid) -> Any:
    summary = _by_method(results)
    shots = sorted(grid.shots)
    most = shots[-1]
    several = len(grid.seeds) > 1
    error = "se_seeds" if several else "se_targets"
    curves = [
        plots.Curve(
            _label(name),
            list(summary[name]),
            [entry["accuracy"] for entry in summary[name].values()],
            [entry[error] for entry in summary[name].values()],
            *look,
        )
        for name, look in _LOOKS.items()
        if name in summary
    ]
    comparisons = []
    for name in ("zero_shot", "isotropic", "single", "vector", "random", "full", "own"):
        for variant in (name, f"{name}_strict"):
            entry = summary.get(variant, {}).get(most)
            if entry is not None and entry["behind"] is not None:
                comparisons.append(
                    plots.Comparison(
                        _label(variant)
                        .replace("learned per block, ", "")
                        .replace("searched: ", ""),
                        entry["behind"],
                        entry["behind_se"],
                        _LOOKS.get(name, (plots.GREY,))[0],
                    )
                )
    title = "Task vectors combined block by block learn from few images"
    if {"block", "zero_shot"} <= summary.keys():
        ours, start = (summary[name][most]["accuracy"] for name in ("block", "zero_shot"))
        title = (
            f"{most} images per class and one coefficient per vector and block: "
            f"{100 * start:.0f} % becomes {100 * ours:.0f} %"
        )
    count = len(grid.targets)
    over = f"{len(grid.seeds)} seeds" if several else f"{count} targets"
    return plots.accuracy_figure(
        curves,
        comparisons,
        title=title,
        left_title=f"Mean of {count} target{'s' * (count > 1)} \u00b1 standard error over {over}",
        right_title=f"aTLAS minus each method at k = {most}\n(\u00b1 s.e. over targets, paired)",
    )


def _coefficient_picture(grid: Grid, out: Path) -> Any:
    target = grid.targets[0]
    cell = Cell(target, "block", max(grid.shots), grid.seeds[0])
    if not grid.keeps(cell) or "block" not in grid.methods:
        return None
    tensors, fields = read_tensors(kept_files(out, cell)[0], "coefficients", mmap=False)
    coef = tensors["coef"].numpy()
    order = sorted(range(len(fields["names"])), key=lambda row: str(fields["names"][row]))
    strongest = fields["names"][int(abs(coef).mean(1).argmax())]
    # Sorted: vectors of one image set stand together.
    return plots.coefficient_figure(
        coef[order],
        [fields["names"][row] for row in order],
        fields["blocks"],
        title=f"{target} draws most on {strongest}, in each block differently (k = {cell.shots})",
    )


def _task_picture(grid: Grid) -> Any:
    images = {}
    for name in (f"{dataset}-{shift}" for dataset in dataset_names() for shift in SHIFTS):
        split = load_task(name).test
        images[name] = split.images[:4].numpy()
    sets = len(dataset_names())
    return plots.contact_sheet(
        images,
        tuple(SHIFTS),
        dataset_names(),
        title=f"{len(images)} tasks: {sets} sets of real images under {len(SHIFTS)} shifts",
        marked=grid.targets,
        note="framed: the targets, each learned without its own task vector",
    )


def _by_method(results: Results) -> dict[str, dict[int, dict[str, Any]]]:
    from ..demo.experiment import summarize

    grid = results.settings["grid"]
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in summarize(results.records, grid["shots"], grid["methods"]):
        found.setdefault(entry["method"], {})[entry["shots"]] = entry
    return found


def _percent(entry: dict[str, Any] | None, value: str, error: str, sign: str = "") -> str:
    if entry is None or entry[value] is None:
        return ""
    text = f"{100 * entry[value]:{sign}.1f}"
    return text if entry[error] is None else f"{text} +- {100 * entry[error]:.1f}"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _label(name: str) -> str:
    strict = name.endswith("_strict")
    return _SHORT[name.removesuffix("_strict")] + (", strict" if strict else "")
