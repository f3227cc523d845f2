"""The demo's experiment: every method on every target task, cell by cell.

A cell is one method on one target, for few-shot methods at one number of shots and one seed. It is
a pure function of the settings and the assets, so that cells can run in any order and process, and
a finished one is never computed twice.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import ComposedModel, TaskVector, TaskVectorBank
from ..checkpoints import digest, write_atomically, write_tensors
from ..clip import ImageClassifier, zero_shot_head
from ..data import augment, load_task, preprocess
from ..experiments.processes import run_jobs
from ..experiments.results import standard_error, versions
from ..learn import (
    ImageBatches,
    Recipe,
    accuracy,
    classify,
    isotropic,
    learn,
    norm_matched,
    oversample,
    sample_shots,
    search,
    single_vector,
)
from ..memory import PeakMemory
from .assets import load_model, load_task_vectors, task_vector_names, vector_path

RESULTS = "results.json"
_FORMAT = 1

Vectors = Literal["none", "others", "strict", "random", "own"]
How = Literal["start", "isotropic", "single", "task", "block", "full"]


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: what the row is called.
        how: "start" evaluates only; "isotropic" and "single" search; "task" and "block" learn
            coefficients; "full" fine-tunes every weight of the image encoder.
        vectors: "others": all but the target's own; "strict": none of the target's image set;
            "random": "others" replaced by noise of the same norm, block by block.
    """

    label: str
    how: How
    vectors: Vectors

    @property
    def few_shot(self) -> bool:
        """Whether the result depends on the shots; searches see the validation images only."""
        return self.how in ("task", "block", "full")


METHODS = {
    "zero_shot": Method("zero-shot", "start", "none"),
    "isotropic": Method("searched: one factor for all", "isotropic", "others"),
    "single": Method("searched: best single vector", "single", "others"),
    "vector": Method("learned per vector", "task", "others"),
    "block": Method("learned per block (aTLAS)", "block", "others"),
    "full": Method("full fine-tuning", "full", "none"),
    "own": Method("own fine-tuned model (all images)", "start", "own"),
    "isotropic_strict": Method("searched: one factor for all", "isotropic", "strict"),
    "single_strict": Method("searched: best single vector", "single", "strict"),
    "vector_strict": Method("learned per vector", "task", "strict"),
    "block_strict": Method("learned per block (aTLAS)", "block", "strict"),
    "random": Method("learned per block, of random vectors", "block", "random"),
}

TARGETS = (
    "mnist-rotated",
    "fashion-inverted",
    "animals-rotated",
    "digits-inverted",
    "animals-noise",
    "fashion-flipped",
)


@dataclass(frozen=True)
class Grid:
    """What the experiment covers and how; two runs with equal grids share their finished cells.

    Attributes:
        targets, shots, seeds, methods: the cells.
        epochs, lr, weight_decay, batch_size: the few-shot recipe for coefficients.
        finetune_lrs: learning rates of full fine-tuning, the best on validation is reported.
        single_factors: what the search for the best single vector tries for every vector.
        codec: of the bank.
        checks_everywhere: strict variants and the random control at every number of shots, not
            just at the largest.
    """

    # One target of each kind of image: digits, clothes, animals.
    targets: tuple[str, ...] = TARGETS[:3]
    shots: tuple[int, ...] = (4, 16)
    seeds: tuple[int, ...] = (0,)
    methods: tuple[str, ...] = tuple(METHODS)
    # Half of the published recipe: with it the default run takes more than two minutes.
    epochs: int = 5
    lr: float = 0.1
    weight_decay: float = 0.1
    batch_size: int = 32
    # On the default targets 3e-4 alone gives .63 and .73 at k = 4 and 16, the best of 3e-4 and 1e-3
    # on validation .62 and .73.
    finetune_lrs: tuple[float, ...] = (3e-4,)
    single_factors: tuple[float, ...] = (0.5, 1.0)
    codec: str = "bf16"
    checks_everywhere: bool = False

    def cells(self) -> list[Cell]:
        """All cells, the long ones first: the last to end are short ones."""
        return [
            Cell(target, name, shots, seed)
            for few_shot in (True, False)
            for target in self.targets
            for name in self.methods
            if METHODS[name].few_shot == few_shot
            for shots in (self._shots(name) if few_shot else (None,))
            for seed in (self.seeds if few_shot else (None,))
        ]

    def _shots(self, method: str) -> list[int]:
        """Most first."""
        shots = sorted(self.shots, reverse=True)
        check = METHODS[method].vectors in ("strict", "random")
        return shots[:1] if check and not self.checks_everywhere else shots

    def keeps(self, cell: Cell) -> bool:
        """Whether a cell's coefficients and merged model are written: one cell per target."""
        chosen = ("block", max(self.shots), self.seeds[0])
        return (cell.method, cell.shots, cell.seed) == chosen


def full_grid(seed: int = 0) -> Grid:
    """Six targets, k = 1 to 16, three seeds, the published epochs, all checks, finer searches."""
    return Grid(
        targets=TARGETS,
        shots=(1, 2, 4, 8, 16),
        seeds=(seed, seed + 1, seed + 2),
        epochs=10,
        finetune_lrs=(3e-4, 1e-3),
        single_factors=(0.25, 0.5, 0.75, 1.0),
        checks_everywhere=True,
    )


@dataclass(frozen=True)
class Cell:
    """One method on one target; ``shots`` and ``seed`` are None where they do not matter."""

    target: str
    method: str
    shots: int | None = None
    seed: int | None = None


@dataclass
class Results:
    """The contents of ``results.json``, and the file."""

    path: Path
    settings: dict[str, Any]
    processes: int
    records: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    step_cost: dict[str, Any] | None = None

    @classmethod
    def open(cls, folder: Path, grid: Grid, assets: Path, processes: int) -> Results:
        """The finished cells of a folder, or none; the folder is made and proved to be writable.

        Raises:
            ValueError: the folder holds the results of other settings, or a file that is not ours.
            OSError: the folder cannot be made or written to.
        """
        settings = {"grid": _plain(asdict(grid)), "assets": fingerprint_assets(assets)}
        results = cls(folder / RESULTS, settings, processes)
        folder.mkdir(parents=True, exist_ok=True)
        if results.path.exists():
            results._read()
        results.write()
        return results

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        """Keeps a finished cell, in the file as well."""
        self.records[cell] = record
        self.write()

    def write(self) -> None:
        """Writes the file in one step."""
        grid = self.settings["grid"]
        contents = {
            "format": _FORMAT,
            "settings": self.settings,
            "versions": versions(),
            "processes": self.processes,
            "summary": summarize(self.records, grid["shots"], grid["methods"]),
            "step_cost": self.step_cost,
            "cells": [{**asdict(cell), **record} for cell, record in self.records.items()],
        }
        text = json.dumps(contents, indent=1)
        write_atomically(self.path, lambda name: Path(name).write_text(text, encoding="utf-8"))

    def _read(self) -> None:
        advice = f"choose another folder with --out, or delete {self.path}"
        try:
            contents = json.loads(self.path.read_text(encoding="utf-8"))
            cells, settings = contents["cells"], contents["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is not a results file of the demo: {advice}") from error
        if settings != self.settings or contents.get("format") != _FORMAT:
            raise ValueError(
                f"{self.path.parent} holds the results of other settings "
                f"({_difference(settings, self.settings)}): {advice}"
            )
        for record in cells:
            cell = Cell(*(record.pop(key) for key in ("target", "method", "shots", "seed")))
            self.records[cell] = record
        self.step_cost = contents.get("step_cost")


def run_grid(
    grid: Grid, folder: Path, results: Results, assets: Path, *, progress: bool = True
) -> None:
    """Runs the cells that ``results`` lacks; each is kept as soon as it is finished."""
    cells = grid.cells()
    missing = [
        cell
        for cell in cells
        if cell not in results.records
        or (grid.keeps(cell) and not all(path.is_file() for path in kept_files(folder, cell)))
    ]
    function = partial(run_cell, grid=grid, assets=assets, folder=folder)
    with tqdm(
        total=len(cells),
        initial=len(cells) - len(missing),
        desc="experiment",
        unit="cell",
        disable=not progress,
        leave=False,
    ) as bar:
        for cell, record in run_jobs(function, missing, results.processes):
            results.add(cell, record)
            bar.set_postfix_str(f"{cell.target}, {cell.method}")
            bar.update()


def kept_files(folder: Path, cell: Cell) -> tuple[Path, Path]:
    """Where a target's learned coefficients and merged image encoder are written."""
    return tuple(  # type: ignore[return-value]
        folder / f"{kind}-{cell.target}.safetensors" for kind in ("coefficients", "merged")
    )


class Problem:
    """A target task with the model and the task vectors that a method may use."""

    def __init__(self, cell: Cell, grid: Grid, assets: Path) -> None:
        self.cell = cell
        self.grid = grid
        self.method = METHODS[cell.method]
        self.task = load_task(cell.target)
        clip, vectors, self.head = _loaded(str(assets), cell.target)
        self.visual = copy.deepcopy(clip.get_submodule("visual"))
        self.vectors = [
            _noise_like(v) if self.method.vectors == "random" else v
            for name, v in vectors.items()
            if self._allowed(name)
        ]

    def _allowed(self, name: str) -> bool:
        kind = self.method.vectors
        if kind == "own":
            return name == self.task.name
        if kind == "strict":
            return load_task(name).dataset != self.task.dataset
        return kind != "none" and name != self.task.name

    def classifier(self) -> ImageClassifier:
        """The zero-shot classifier whose encoder the method learns, still as the base."""
        if not self.vectors:
            return ImageClassifier(self.visual, self.head)
        bank = TaskVectorBank.from_task_vectors(self.visual, self.vectors, codec=self.grid.codec)
        granularity: Literal["task", "block"] = "block" if self.method.how == "block" else "task"
        return ImageClassifier(ComposedModel(self.visual, bank, granularity=granularity), self.head)

    def batches(self) -> ImageBatches:
        """The shots of this cell, augmented."""
        train, seed = self.task.train, cast(int, self.cell.seed)
        shots = sample_shots(train.labels, cast(int, self.cell.shots), seed)
        return ImageBatches(
            train.images,
            train.labels,
            self.grid.batch_size,
            _augmented,
            seed,
            oversample(shots, self.grid.batch_size),
        )

    def validate(self, model: nn.Module) -> float:
        """Accuracy on the validation images, by which everything is chosen."""
        part = self.task.validation
        return accuracy(model, part.images, part.labels, preprocess)

    def test(self, model: nn.Module) -> float:
        """Accuracy on the test images, which nothing else sees."""
        part = self.task.test
        return accuracy(model, part.images, part.labels, preprocess)


def run_cell(cell: Cell, *, grid: Grid, assets: Path, folder: Path) -> tuple[Cell, dict[str, Any]]:
    """The cell and its record.

    The record: "accuracy" on test, "validation", "seconds" of learning or searching (on one
    thread, without loading and testing), "peak_bytes" of tensors in one step or one evaluation of a
    batch, "bank_bytes", "vectors" that were allowed, and what was learned.
    """
    problem = Problem(cell, grid, assets)
    model: nn.Module = problem.classifier()
    record: dict[str, Any] = {"vectors": [vector.name for vector in problem.vectors]}
    encoder = model.get_submodule("encoder")
    record["bank_bytes"] = encoder.bank.nbytes if isinstance(encoder, ComposedModel) else 0
    record["peak_bytes"] = _peak(problem, model)
    started = time.perf_counter()
    if problem.method.how == "full":
        model, learned = _finetuned(problem)
        record |= learned
    elif problem.method.few_shot:
        recipe = Recipe(grid.epochs, grid.lr, grid.weight_decay, seed=cast(int, cell.seed))
        record |= _learned(problem, model, recipe)
    elif isinstance(encoder, ComposedModel):
        record |= _searched(problem, model, encoder)
    record["seconds"] = round(time.perf_counter() - started, 3)
    record["validation"] = problem.validate(model)
    record["accuracy"] = problem.test(model)
    if grid.keeps(cell) and isinstance(encoder, ComposedModel):
        coefficients, merged = kept_files(folder, cell)
        encoder.save_coefficients(coefficients)
        write_tensors(merged, encoder.merge().state_dict())
    return cell, record


def summarize(
    records: dict[Cell, dict[str, Any]], shots: Sequence[int], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """One entry per method and number of shots: the mean over targets, and how sure it is.

    "se_targets" is the standard error over targets (of means over seeds), "se_seeds" that over
    seeds (of means over targets). "behind" is how far the method lies behind learning per block,
    strict methods behind the strict one, target by target: its mean, "behind_se" and the number of
    targets on which it does, "behind_count". Errors of fewer than two values are None.
    """
    summary = []
    for name in methods:
        for k in shots:
            scores = _scores(records, name, k)
            if not scores:
                continue
            reference = _scores(records, "block_strict" if name.endswith("strict") else "block", k)
            # Without own seeds (searches), the same score stands against every seed's.
            behind = [
                statistics.fmean(reference[target].values()) - statistics.fmean(values.values())
                for target, values in scores.items()
                if target in reference
            ]
            by_target = [statistics.fmean(values.values()) for values in scores.values()]
            seeds = set.intersection(*(set(values) for values in scores.values()))
            by_seed = [
                statistics.fmean(v[seed] for v in scores.values())
                for seed in sorted(seeds, key=str)
            ]
            own = [r for c, r in records.items() if c.method == name and c.shots in (k, None)]
            summary.append(
                {
                    "method": name,
                    "label": METHODS[name].label,
                    "vectors": METHODS[name].vectors,
                    "shots": k,
                    "targets": len(scores),
                    "accuracy": statistics.fmean(by_target),
                    "se_targets": standard_error(by_target),
                    "se_seeds": standard_error(by_seed),
                    "behind": statistics.fmean(behind) if behind else None,
                    "behind_se": standard_error(behind),
                    "behind_count": sum(value > 0 for value in behind),
                    "seconds": statistics.fmean(r["seconds"] for r in own),
                    "peak_bytes": max(r["peak_bytes"] for r in own),
                    "bank_bytes": max(r["bank_bytes"] for r in own),
                }
            )
    return summary


def fingerprint_assets(folder: Path) -> str:
    """A fingerprint of the model's and all vectors' files: another one, other results."""
    hasher = hashlib.blake2b(digest_size=16)
    names = task_vector_names(folder)
    if not names:
        raise FileNotFoundError(
            f"no model and task vectors in {folder}: make them with --from-scratch"
        )
    for path in [folder / "model.safetensors", *(vector_path(folder, name) for name in names)]:
        hasher.update(path.name.encode())
        hasher.update(path.read_bytes())
    return hasher.hexdigest()


def load_vectors(clip: nn.Module, assets: Path) -> dict[str, TaskVector]:
    """All task vectors of a folder of assets, bound to the image encoder of its model."""
    base = {
        name: digest(parameter)
        for name, parameter in clip.get_submodule("visual").named_parameters()
    }
    return {
        name: TaskVector({key: deltas[key] for key in base}, base=base, name=name)
        for name, deltas in load_task_vectors(folder=assets, base=clip).items()
    }


@lru_cache(maxsize=1)
def _assets(folder: str) -> tuple[nn.Module, dict[str, TaskVector]]:
    clip = load_model(folder)
    return clip, load_vectors(clip, Path(folder))


@lru_cache(maxsize=8)
def _loaded(folder: str, target: str) -> tuple[nn.Module, dict[str, TaskVector], Tensor]:
    clip, vectors = _assets(folder)
    task = load_task(target)
    return clip, vectors, zero_shot_head(clip, task.classnames, task.templates)


def _noise_like(vector: TaskVector) -> TaskVector:
    """The same for every run."""
    hasher = hashlib.blake2b(vector.name.encode(), digest_size=7)
    return norm_matched(vector, int.from_bytes(hasher.digest(), "big"))


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    return augment(preprocess(images), generator)


def _searched(problem: Problem, model: nn.Module, encoder: ComposedModel) -> dict[str, Any]:
    candidates = {
        # The target's own fine-tuned model: nothing to choose.
        "start": lambda: [torch.ones_like(encoder.coef)],
        "isotropic": lambda: isotropic(encoder.coef),
        "single": lambda: single_vector(encoder.coef, problem.grid.single_factors),
    }[problem.method.how]
    coef, _ = search(encoder, candidates(), lambda: problem.validate(model))
    return {"coef": dict(zip(encoder.bank.names, coef.tolist(), strict=True))}


def _learned(problem: Problem, model: nn.Module, recipe: Recipe) -> dict[str, Any]:
    learned = learn(
        model, classify, problem.batches(), recipe, evaluate=problem.validate, progress=False
    )
    return {
        "epoch": learned.epoch,
        "losses": [entry["loss"] for entry in learned.history[1:]],
        "validations": [entry["score"] for entry in learned.history],
    }


def _finetuned(problem: Problem) -> tuple[nn.Module, dict[str, Any]]:
    """Fine-tunes every weight with each learning rate; the best on validation."""
    best: tuple[float, nn.Module, dict[str, Any]] | None = None
    for lr in problem.grid.finetune_lrs:
        model = ImageClassifier(copy.deepcopy(problem.visual).requires_grad_(), problem.head)
        grid = problem.grid
        recipe = Recipe(grid.epochs, lr, grid.weight_decay, seed=cast(int, problem.cell.seed))
        record = {"lr": lr, **_learned(problem, model, recipe)}
        score = max(record["validations"])
        if best is None or score > best[0]:
            best = score, model, record
    if best is None:
        raise ValueError("full fine-tuning needs at least one learning rate")
    return best[1], best[2]


def _peak(problem: Problem, model: nn.Module) -> int:
    """Peak bytes of one learning step, or of the evaluation of one batch if nothing is learned."""
    if not problem.method.few_shot:
        images = preprocess(problem.task.validation.images[: problem.grid.batch_size])
        with PeakMemory() as memory, torch.no_grad():
            model.eval()(images)
        return memory.peak
    if problem.method.how == "full":
        model = ImageClassifier(copy.deepcopy(problem.visual).requires_grad_(), problem.head)
    batch = next(iter(problem.batches().epoch(0)))
    with PeakMemory() as memory:
        # The constant score is never better than the start's: the model comes back as it was.
        learn(
            model, classify, _TwoSteps(batch), Recipe(epochs=1), evaluate=_constant, progress=False
        )
    return memory.peak


class _TwoSteps:
    # Two: the optimizer's state exists from the first step on and counts in every later one.
    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.batch
        yield self.batch


def _constant(model: nn.Module) -> float:
    return 0.0


def _scores(
    records: dict[Cell, dict[str, Any]], method: str, shots: int
) -> dict[str, dict[int | None, float]]:
    """Test accuracy by target and seed."""
    scores: dict[str, dict[int | None, float]] = {}
    for cell, record in sorted(records.items(), key=lambda item: str(item[0])):
        if cell.method == method and cell.shots in (shots, None):
            scores.setdefault(cell.target, {})[cell.seed] = record["accuracy"]
    return scores


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    if theirs.get("assets") != ours["assets"]:
        return "another model or other task vectors"
    old, new = theirs.get("grid", {}), ours["grid"]
    keys = [key for key in new if old.get(key) != new[key]]
    return ", ".join(f"{key} {_short(old.get(key))} there, {_short(new[key])} here" for key in keys)


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
