"""Few-shot accuracy by the kind of task vectors: all weights, linearised, LoRA in both modes.

    python -m bench.vectors FOLDER [--targets NAME ...] [--sources NAME ...] [--shots 16]

Makes the linearised and LoRA vectors of the source tasks that FOLDER lacks, learns coefficients per
block (aTLAS) from the same shots with each kind, and prints mean test accuracies, differences to
all weights paired by target and seed, and the time of learning. FOLDER keeps finished runs, so that
an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import statistics

from rich.console import Console
from rich.table import Table

from atlas_kernels.experiments import Records, Suite, checked, entry, run_suite, standard_error
from bench.accuracy import paired

from . import arguments

TARGETS = ("mnist-rotated", "fashion-inverted", "animals-noise")
SOURCES = (
    "digits-rotated",
    "mnist-flipped",
    "fashion-rotated",
    "mnist-noise",
    "animals-rotated",
    "digits-flipped",
    "mnist-clean",
    "fashion-clean",
)
ZERO_SHOT = "(zero-shot)"
KINDS = {
    "all weights": "standard",
    "linearised": "linear",
    "LoRA, product": "lora-product",
    "LoRA, factor-wise": "lora-factorwise",
}


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = arguments.learning("vectors", __doc__)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--sources", nargs="+", default=list(SOURCES))
    args = parser.parse_args()
    Console(width=100).print(table(run_suite(make_suite(args), args.folder), args.shots))


def make_suite(args: argparse.Namespace) -> Suite:
    """Zero-shot, and learning with every kind of vectors."""
    start = {"label": ZERO_SHOT, "seeded": False, "settings": {"how": "zero-shot"}}
    kinds = [{"label": label, "settings": {"vectors": kind}} for label, kind in KINDS.items()]
    experiment = {
        "name": "vectors",
        "title": "Few-shot aTLAS by kind of task vectors",
        "settings": {
            "method": "few-shot",
            "recipe": "ours",
            "shots": args.shots,
            "epochs": args.epochs,
            "sources": args.sources,
        },
        "arms": [start, *kinds],
        "targets": args.targets,
        "seeds": list(range(args.seeds)),
    }
    fields = {"name": "vectors", "version": 1, "title": "Kinds", "experiments": [experiment]}
    return checked(Suite, fields, "bench.vectors")


def table(records: Records, shots: int) -> Table:
    """Accuracy in per cent, differences in points."""
    result = Table(title=f"Few-shot aTLAS, k = {shots}, by kind of task vectors")
    for heading in ("vectors", "coefficients", "accuracy", "difference", "learning, s"):
        result.add_column(heading, justify="left" if heading == "vectors" else "right")
    (experiment,) = records.suite.experiments
    start, reference, *_ = (
        entry(records, experiment, arm, None, "test") for arm in experiment.arms
    )
    result.add_row(ZERO_SHOT, "", f"{start.mean:.1%}", "", "")
    for arm in experiment.arms[1:]:
        its = entry(records, experiment, arm, None, "test")
        mine = [record for cell, record in records.done.items() if cell.arm == arm.label]
        differences = [100 * difference for difference in paired(its, reference)]
        error = standard_error(differences) or 0.0
        result.add_row(
            arm.label,
            str(mine[0]["metrics"]["parameters"]),
            f"{its.mean:.1%}",
            f"{statistics.mean(differences):+.1f} +- {error:.1f}" if any(differences) else "",
            f"{statistics.mean(record['learning_seconds'] for record in mine):.1f}",
        )
    return result


if __name__ == "__main__":
    main()
