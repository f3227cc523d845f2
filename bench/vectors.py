"""Few-shot accuracy by the kind of task vectors: all weights, linearised, LoRA in both modes.

    python -m bench.vectors FOLDER [--targets NAME ...] [--sources NAME ...] [--shots 16]

Makes the linearised and LoRA vectors of the source tasks that FOLDER lacks, learns coefficients per
block (aTLAS) from the same shots with each kind, and prints mean test accuracies, differences to
all weights paired by target and seed, and the time of learning. FOLDER receives vectors.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from atlas_kernels.demo.processes import run_jobs
from rich.console import Console
from rich.table import Table

from atlas_kernels import ComposedModel, LinearizedModel, TaskVectorBank
from atlas_kernels.clip import ImageClassifier
from atlas_kernels.demo.assets import asset_folder
from atlas_kernels.demo.experiment import Cell, Grid, Problem, default_processes
from atlas_kernels.demo.vectors import Kind, make_vector
from atlas_kernels.learn import Recipe, classify, learn

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
# What is learned of what: the vectors' kind (None: those that ship), how LoRA is composed, a model.
KINDS: dict[str, tuple[Kind | None, Literal["product", "factorwise"], type[ComposedModel]]] = {
    "all weights": (None, "product", ComposedModel),
    "linearised": ("linear", "product", LinearizedModel),
    "LoRA, product": ("lora", "product", ComposedModel),
    "LoRA, factor-wise": ("lora", "factorwise", ComposedModel),
}


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.vectors", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--sources", nargs="+", default=list(SOURCES))
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    processes = default_processes()
    wanted = [(task, kind) for kind in ("linear", "lora") for task in args.sources]
    for task, kind in run_jobs(partial(made, folder=args.folder), wanted, processes):
        print(f"{kind} vector of {task} is there", flush=True)
    cells = [
        (name, target, seed)
        for name in KINDS
        for target in args.targets
        for seed in range(args.seeds)
    ]
    run = partial(learned, args=args)
    records = sorted(
        run_jobs(run, cells, processes), key=lambda record: list(KINDS).index(record["kind"])
    )
    Console(width=100).print(table(records, args.shots))
    (args.folder / "vectors.json").write_text(json.dumps(records, indent=1))


def made(job: tuple[str, Kind], folder: Path) -> tuple[str, Kind]:
    """The job, when its vector is in the folder."""
    make_vector(*job, folder)
    return job


def learned(cell: tuple[str, str, int], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracies on test before and after learning from a target's shots."""
    name, target, seed = cell
    kind, lora, model_class = KINDS[name]
    problem = Problem(Cell(target, "block", args.shots, seed), Grid(), asset_folder())
    sources = [task for task in args.sources if task != target]
    if kind is None:
        vectors = [vector for vector in problem.vectors if vector.name in sources]
    else:
        vectors = [make_vector(task, kind, args.folder) for task in sources]
    bank = TaskVectorBank.from_task_vectors(problem.visual, vectors, codec="bf16", lora=lora)
    model = ImageClassifier(model_class(problem.visual, bank), problem.head)
    zero_shot = problem.test(model)
    started = time.process_time()
    learn(
        model,
        classify,
        problem.batches(),
        Recipe(args.epochs, seed=seed),
        evaluate=problem.validate,
        progress=False,
    )
    return {
        "kind": name,
        "target": target,
        "seed": seed,
        "coefficients": len(bank.names) * len(bank.blocks),
        "bytes": bank.nbytes,
        "seconds": time.process_time() - started,
        "zero_shot": zero_shot,
        "accuracy": problem.test(model),
    }


def table(records: list[dict[str, Any]], shots: int) -> Table:
    """Accuracy in per cent, differences in points."""
    result = Table(title=f"Few-shot aTLAS, k = {shots}, by kind of task vectors")
    for heading in ("vectors", "coefficients", "accuracy", "difference", "learning, s", "bank, MB"):
        result.add_column(heading, justify="left" if heading == "vectors" else "right")
    start = statistics.mean(record["zero_shot"] for record in records)
    result.add_row("(zero-shot)", "", f"{start:.1%}", "", "", "")
    accuracy = {
        name: {(r["target"], r["seed"]): r["accuracy"] for r in records if r["kind"] == name}
        for name in KINDS
    }
    reference = accuracy[next(iter(KINDS))]
    for name, its in accuracy.items():
        mine = [record for record in records if record["kind"] == name]
        differences = [100 * (its[key] - reference[key]) for key in reference]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(its) > 1 else 0.0
        result.add_row(
            name,
            str(mine[0]["coefficients"]),
            f"{statistics.mean(its.values()):.1%}",
            f"{statistics.mean(differences):+.1f} +- {error:.1f}" if its is not reference else "",
            f"{statistics.mean(record['seconds'] for record in mine):.1f}",
            f"{mine[0]['bytes'] / 1e6:.1f}",
        )
    return result


if __name__ == "__main__":
    main()
