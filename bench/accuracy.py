"""Few-shot accuracy against the bits in which task vectors are stored, on the demo's tasks.

    python -m bench.accuracy FOLDER [--codecs bf16 int4 ...] [--shots 16] [--seeds 3] [--epochs 5]

Learns coefficients per block (aTLAS) from the same shots with the same bank in every codec, and
prints mean test accuracies, differences to bf16 paired by target and seed, and relative errors of
the deltas. FOLDER keeps finished cells, so that an interrupted run goes on, and receives
accuracy.json and accuracy.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from atlas_kernels import TaskVector, TaskVectorBank, plots
from atlas_kernels.clip import load_embedded_model
from atlas_kernels.demo.assets import asset_folder, load_task_vectors
from atlas_kernels.demo.experiment import (
    TARGETS,
    Grid,
    Results,
    run_grid,
)
from atlas_kernels.experiments.processes import default_processes

CODECS = ("bf16", "int8", "int4", "int3", "int2", "sign", "auto:3", "auto:2")
METHOD = "block"


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for codec in args.codecs:
        grid = Grid(
            targets=tuple(args.targets),
            shots=(args.shots,),
            seeds=tuple(range(args.seeds)),
            methods=("zero_shot", METHOD),
            epochs=args.epochs,
            codec=codec,
        )
        folder = args.folder / codec.replace(":", "-")
        results = Results.open(folder, grid, asset_folder(), default_processes())
        run_grid(grid, folder, results, asset_folder())
        records = {
            (cell.target, cell.seed): record["accuracy"]
            for cell, record in results.records.items()
            if cell.method == METHOD
        }
        start = [r["accuracy"] for cell, r in results.records.items() if cell.method == "zero_shot"]
        rows.append(
            {
                "codec": codec,
                "accuracy": records,
                "zero_shot": statistics.mean(start),
                **stored(codec),
            }
        )
    for row in rows:
        row |= compared(row["accuracy"], rows[0]["accuracy"])
    Console(width=100).print(table(rows, args.shots))
    plots.save(figure(rows, args.shots), args.folder / "accuracy.png")
    for row in rows:
        row["accuracy"] = [
            {"target": target, "seed": seed, "test": value}
            for (target, seed), value in row["accuracy"].items()
        ]
    (args.folder / "accuracy.json").write_text(json.dumps(rows, indent=1))


def stored(codec: str) -> dict[str, float]:
    """Bits per weight, and relative error over all deltas, of the bank of all task vectors."""
    vectors = load_task_vectors()
    base = load_embedded_model().get_submodule("visual").state_dict()
    bank = TaskVectorBank.from_task_vectors(
        base, {name: TaskVector(deltas) for name, deltas in vectors.items()}, codec=codec
    )
    squares = torch.tensor(
        [
            [float(vectors[name][block].double().square().sum()) for block in bank.blocks]
            for name in bank.names
        ]
    )
    error = (squares * bank.errors.square()).sum() / squares.sum()
    return {"bits": bank.bits_per_weight, "error": error.sqrt().item()}


def compared(
    accuracy: dict[tuple[str, int], float], reference: dict[tuple[str, int], float]
) -> dict[str, float]:
    """Mean accuracy, and the paired difference to the reference with its standard error."""
    differences = [accuracy[key] - reference[key] for key in reference]
    spread = statistics.stdev(differences) / len(differences) ** 0.5
    return {
        "mean": statistics.mean(accuracy.values()),
        "difference": statistics.mean(differences),
        "difference_error": spread,
    }


def table(rows: list[dict[str, Any]], shots: int) -> Table:
    """Accuracy in per cent, differences in points."""
    made = Table(title=f"Few-shot aTLAS, k = {shots}, by codec of the bank")
    for heading in ("codec", "bits", "error of deltas", "accuracy", "difference to bf16"):
        made.add_column(heading, justify="left" if heading == "codec" else "right")
    made.add_row("(zero-shot)", "", "", f"{rows[0]['zero_shot']:.1%}", "")
    for row in rows:
        difference = f"{100 * row['difference']:+.1f} +- {100 * row['difference_error']:.1f}"
        made.add_row(
            row["codec"],
            f"{row['bits']:.3f}",
            f"{row['error']:.1%}",
            f"{row['mean']:.1%}",
            difference if row["codec"] != "bf16" else "",
        )
    return made


def figure(rows: list[dict[str, Any]], shots: int) -> Figure:
    """Accuracy against bits per weight."""
    made = plots.new_figure(7.0, 4.2)
    axes = made.subplots()
    for row in rows:
        color = plots.ORANGE if row["codec"].startswith("auto") else plots.BLUE
        axes.errorbar(
            row["bits"],
            100 * row["mean"],
            yerr=100 * row["difference_error"] if row["codec"] != "bf16" else None,
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
    axes.axhline(100 * rows[0]["zero_shot"], color=plots.GREY, linestyle="--")
    axes.annotate(
        "zero-shot",
        (1, 100 * rows[0]["zero_shot"]),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8.5,
        color=plots.GREY,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlabel("bits per weight and task vector, scales included")
    axes.set_ylabel("mean test accuracy, %")
    axes.set_ylim(100 * rows[0]["zero_shot"] - 5, 100 * max(row["mean"] for row in rows) + 5)
    axes.spines[["top", "right"]].set_visible(False)
    made.suptitle(
        f"Few-shot aTLAS (k = {shots}) on packed task vectors", x=0.01, ha="left", fontweight="bold"
    )
    return made


if __name__ == "__main__":
    main()
