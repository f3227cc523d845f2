"""Few-shot accuracy against the bits in which task vectors are stored, on the demo's tasks.

    python -m bench.accuracy FOLDER [--codecs bf16 int4 ...] [--shots 16] [--seeds 3] [--epochs 5]

Learns coefficients per block (aTLAS) from the same shots with the same bank in every codec, and
prints mean test accuracies, differences to the first codec paired by target and seed, and relative
errors of the deltas. FOLDER keeps finished runs, so that an interrupted one goes on, and receives
accuracy.json and accuracy.png.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from atlas_kernels.bank import TaskVectorBank
from atlas_kernels.experiments import (
    Entry,
    Suite,
    checked,
    entry,
    read_suite,
    run_suite,
    standard_error,
    write_json,
)
from atlas_kernels.report import plots
from atlas_kernels.tasks.embedded import load_model, load_task_vectors

from . import arguments

CODECS = ("bf16", "int8", "int4", "int3", "int2", "sign", "auto:3", "auto:2")


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = arguments.learning("accuracy", __doc__)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--targets", nargs="+", default=list(targets()))
    args = parser.parse_args()
    suite = make_suite(args)
    records = run_suite(suite, args.folder)
    (experiment,) = suite.experiments
    start, learned = experiment.arms
    found = [entry(records, experiment, learned, codec, "test") for codec in args.codecs]
    rows = [
        {"codec": codec, **compared(its, found[0]), **stored(codec)}
        for codec, its in zip(args.codecs, found, strict=True)
    ]
    zero_shot = entry(records, experiment, start, None, "test").mean
    Console(width=100).print(table(rows, zero_shot, args.shots))
    plots.save(figure(rows, zero_shot, args.shots), args.folder / "accuracy.png")
    write_json(args.folder / "accuracy.json", {"zero_shot": zero_shot, "codecs": rows})


def targets() -> tuple[str, ...]:
    """The six of the full demo."""
    return read_suite("demo-full").experiments[0].targets or ()


def make_suite(args: argparse.Namespace) -> Suite:
    """Zero-shot, and learning per block with every codec."""
    zero_shot = {"label": "zero-shot", "fixed": True, "seeded": False}
    shared = {"method": "few-shot", "recipe": "ours", "shots": args.shots, "epochs": args.epochs}
    experiment = {
        "name": "codecs",
        "title": "Few-shot aTLAS by codec",
        "settings": shared,
        "arms": [{**zero_shot, "settings": {"how": "zero-shot"}}, {"label": "aTLAS"}],
        "axis": {"field": "codec", "values": args.codecs, "label": "codec"},
        "targets": args.targets,
        "seeds": list(range(args.seeds)),
    }
    fields = {"name": "codecs", "version": 1, "title": "Codecs", "experiments": [experiment]}
    return checked(Suite, fields, "bench.accuracy")


def stored(codec: str) -> dict[str, float]:
    """Bits per weight, and relative error over all deltas, of the bank of all task vectors."""
    vectors = load_task_vectors()
    bank = TaskVectorBank.from_task_vectors(
        load_model().get_submodule("visual"), vectors, codec=codec
    )
    squares = torch.tensor(
        [
            [float(vectors[name].deltas[block].double().square().sum()) for block in bank.blocks]
            for name in bank.names
        ]
    )
    error = (squares * bank.errors.square()).sum() / squares.sum()
    return {"bits": bank.bits_per_weight, "error": error.sqrt().item()}


def compared(its: Entry, reference: Entry) -> dict[str, Any]:
    """Mean accuracy, and the paired difference to the reference with its standard error."""
    differences = paired(its, reference)
    return {
        "accuracy": its.by_target,
        "mean": its.mean,
        "difference": statistics.mean(differences),
        "difference_error": standard_error(differences) or 0.0,
    }


def paired(its: Entry, reference: Entry) -> list[float]:
    """Differences by target and seed."""
    return [
        ours - theirs
        for target, scores in its.by_target.items()
        for ours, theirs in zip(scores, reference.by_target[target], strict=True)
    ]


def table(rows: list[dict[str, Any]], zero_shot: float, shots: int) -> Table:
    """Accuracy in per cent, differences in points."""
    made = Table(title=f"Few-shot aTLAS, k = {shots}, by codec of the bank")
    reference = rows[0]["codec"]
    for heading in ("codec", "bits", "error of deltas", "accuracy", f"difference to {reference}"):
        made.add_column(heading, justify="left" if heading == "codec" else "right")
    made.add_row("(zero-shot)", "", "", f"{zero_shot:.1%}", "")
    for row in rows:
        difference = f"{100 * row['difference']:+.1f} +- {100 * row['difference_error']:.1f}"
        made.add_row(
            row["codec"],
            f"{row['bits']:.3f}",
            f"{row['error']:.1%}",
            f"{row['mean']:.1%}",
            difference if row["codec"] != reference else "",
        )
    return made


def figure(rows: list[dict[str, Any]], zero_shot: float, shots: int) -> Figure:
    """Accuracy against bits per weight."""
    title = f"Few-shot aTLAS (k = {shots}) on packed task vectors"
    made = plots.new_figure(7.0, 4.2, title)
    axes = made.subplots()
    for row in rows:
        color = plots.ORANGE if row["codec"].startswith("auto") else plots.BLUE
        axes.errorbar(
            row["bits"],
            100 * row["mean"],
            yerr=100 * row["difference_error"] if row["difference_error"] else None,
            color=color,
            marker="o",
            capsize=3,
        )
        axes.annotate(
            row["codec"],
            (row["bits"], 100 * row["mean"]),
            # The budgets above their points, where those of the codecs are near.
            xytext=(0, 12 if row["codec"].startswith("auto") else -18),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )
    axes.axhline(100 * zero_shot, color=plots.GREY, linestyle="--")
    axes.annotate(
        "zero-shot",
        (1, 100 * zero_shot),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8.5,
        color=plots.GREY,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("bits per weight and task vector, scales included")
    axes.set_ylabel("mean test accuracy, %")
    axes.set_ylim(100 * zero_shot - 5, 100 * max(row["mean"] for row in rows) + 5)
    axes.spines[["top", "right"]].set_visible(False)
    return made


if __name__ == "__main__":
    main()
