"""``learn``: coefficients from images, embedded ones or one's own."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..bank import TaskVectorBank
    from ..data import ImageTask, LabelledImages
    from ..learn import Batches, Learned, Recipe

STATE = "training.safetensors"
RESULTS = "results.json"
_BANK = "bank.safetensors"
_TASK = "mnist-rotated"
_TEMPLATE = "a photo of a {}."
_ENCODER = "visual."


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command, and the ways to learn below it."""
    text = "learn coefficients from images"
    parser = commands.add_parser("learn", help=text, description=f"{text[0].upper()}{text[1:]}.")
    methods = parser.add_subparsers(metavar="METHOD", required=True)
    few_shot = methods.add_parser(
        "few-shot",
        parents=[common],
        help="from a few labelled images per class",
        description="Learns coefficients from a few labelled images per class: of an embedded "
        "task, or of your own classes with your own bank. The epoch that is best on the "
        "validation images is kept. Runs on a GPU if your own bank meets one.",
    )
    few_shot.set_defaults(run=_few_shot)
    embedded = few_shot.add_argument_group("an embedded task, with all other tasks' vectors")
    embedded.add_argument("--task", metavar="NAME", help=f"such as fashion-noise ({_TASK})")
    embedded.add_argument("--codec", help="how deltas are stored (bf16)")
    own = few_shot.add_argument_group("your own, all three together")
    own.add_argument(
        "--bank",
        type=Path,
        help="made by atlas-kernels bank from full open_clip checkpoints with --include 'visual.*'",
    )
    own.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        help="DIR/train/CLASS/*.jpg, and val and test likewise; a part that is missing is split "
        "off train",
    )
    own.add_argument("--model", metavar="ARCH", help="open_clip's name, such as ViT-B-32")
    own.add_argument(
        "--template",
        action="append",
        help=f"a prompt with {{}} for the class; may be repeated ({_TEMPLATE!r})",
    )
    own.add_argument(
        "--text",
        metavar="CHECKPOINT",
        type=Path,
        help="the full base checkpoint, for a bank of an image encoder alone",
    )
    recipe = few_shot.add_argument_group("how")
    recipe.add_argument("--shots", type=int, default=16, help="images per class (%(default)s)")
    recipe.add_argument(
        "--granularity", choices=("block", "task"), default="block", help="default: %(default)s"
    )
    recipe.add_argument(
        "--memory",
        choices=("whole", "recompute", "stream"),
        default="whole",
        help="when blocks are composed (%(default)s)",
    )
    recipe.add_argument(
        "--preset",
        choices=("clean", "official"),
        default="clean",
        help="of the gradient's norm (%(default)s)",
    )
    recipe.add_argument("--epochs", type=int, default=10, help="default: %(default)s")
    recipe.add_argument("--lr", type=float, default=0.1, help="learning rate (%(default)s)")
    recipe.add_argument("--batch", type=int, default=32, help="images per step (%(default)s)")
    recipe.add_argument("--seed", type=int, default=0, help="of images and order (%(default)s)")
    few_shot.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    few_shot.add_argument(
        "-o", "--output", metavar="DIR", type=Path, required=True, help="where the files go"
    )


@dataclass(frozen=True)
class _Problem:
    """A task, and the model and bank to solve it with, wherever they come from."""

    name: str
    description: str
    encoder: nn.Module
    bank: TaskVectorBank
    head: Tensor
    batches: Batches
    validate: Callable[[nn.Module], float]
    test: Callable[[nn.Module], float]
    device: torch.device


def _few_shot(arguments: argparse.Namespace) -> None:
    from .info import missing

    lacking = missing("demo")
    if lacking:
        raise ImportError(
            f"learning needs {', '.join(lacking)}: run pip install 'atlas_kernels[demo]'"
        )
    from ..learn import Recipe

    _check_sources(arguments)
    recipe = Recipe(arguments.epochs, arguments.lr, preset=arguments.preset, seed=arguments.seed)
    folder: Path = arguments.output
    settings = _settings(arguments)
    _check_folder(folder)
    _check_state(folder, settings, arguments.resume)
    problem = _own(arguments) if arguments.bank else _embedded(arguments)
    print(problem.description)
    try:
        _learn(problem, recipe, folder, settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"finished epochs are kept in {folder}; the same command with --resume goes on"
        ) from None


def _learn(problem: _Problem, recipe: Recipe, folder: Path, settings: dict[str, Any]) -> None:
    from ..checkpoints import write_tensors
    from ..clip import ImageClassifier
    from ..composed import ComposedModel
    from ..demo.experiment import versions
    from ..learn import classify, learn

    encoder = ComposedModel(
        problem.encoder,
        problem.bank,
        granularity=settings["granularity"],
        memory=settings["memory"],
    )
    model = ImageClassifier(encoder, problem.head).to(problem.device)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"settings": settings, "versions": versions()}
    _write(folder / RESULTS, results)
    zero_shot = problem.test(model)
    learned = learn(
        model,
        classify,
        problem.batches,
        recipe,
        evaluate=problem.validate,
        resume=folder / STATE,
        description=problem.name,
    )
    test = problem.test(model)
    encoder.save_coefficients(folder / "coefficients.safetensors")
    merged = {**problem.bank.constants, **encoder.merge().state_dict()}
    write_tensors(folder / "merged.safetensors", merged)
    results |= {
        "vectors": problem.bank.names,
        "blocks": len(problem.bank.blocks),
        "device": str(problem.device),
        "test": {"zero_shot": zero_shot, "learned": test},
        "epoch": learned.epoch,
        # JSON has no NaN, which stands for the start's loss.
        "history": [
            {key: None if math.isnan(value) else value for key, value in entry.items()}
            for entry in learned.history
        ],
        "seconds": sum(entry["seconds"] for entry in learned.history),
    }
    _report(problem.name, settings["shots"], zero_shot, test, learned, folder)
    _write(folder / RESULTS, results)
    (folder / STATE).unlink(missing_ok=True)


def _report(
    name: str, shots: int, zero_shot: float, test: float, learned: Learned, folder: Path
) -> None:
    """The picture and the table."""
    from ..plots import history_figure, save
    from .output import print_table

    scores = [entry["score"] for entry in learned.history]
    losses = [entry["loss"] for entry in learned.history[1:]]
    title = (
        f"{name}, {shots} images per class: {100 * zero_shot:.1f} % becomes {100 * test:.1f} % "
        "on test"
    )
    picture = folder / "history.png"
    save(history_figure(losses, scores, learned.epoch, title=title), picture)
    kept = f"learned, epoch {learned.epoch}" if learned.improved else "learned: no epoch is better"
    print_table(
        ("accuracy, %", "validation", "test"),
        [
            ("zero-shot", f"{100 * scores[0]:.1f}", f"{100 * zero_shot:.1f}"),
            (kept, f"{100 * learned.score:.1f}", f"{100 * test:.1f}"),
        ],
        title=f"{name}, {shots} images per class",
        numbers=2,
    )
    print(
        f"Written to {folder}: coefficients.safetensors, merged.safetensors, {RESULTS}, "
        f"{picture.name}."
    )


def _check_sources(arguments: argparse.Namespace) -> None:
    """Either an embedded task or one's own files; fills in the defaults of what was chosen."""
    own = {name: getattr(arguments, name) for name in ("bank", "images", "model")}
    given = [name for name, value in own.items() if value is not None]
    if given and arguments.task:
        raise ValueError(f"--task is an embedded task, --{given[0]} is your own: choose one")
    absent = [f"--{name}" for name in own if name not in given]
    if given and absent:
        raise ValueError(f"--{given[0]} needs {' and '.join(absent)} as well")
    if given and arguments.codec:
        raise ValueError("--codec is for an embedded task: a bank has its codec already")
    for name in ("template", "text"):
        if not given and getattr(arguments, name):
            raise ValueError(f"--{name} is for your own --bank: an embedded task has its prompts")
    for name in ("shots", "batch"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected 1 or more")
    if given:
        arguments.template = arguments.template or [_TEMPLATE]
    else:
        arguments.task = arguments.task or _TASK
        arguments.codec = arguments.codec or "bf16"


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run depends on, as JSON has it."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("run", "resume", "output", "debug")
    }


def _check_folder(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot write to {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: no permission to write in {nearest}")


def _check_state(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """An unfinished run goes on with the same settings, or is kept."""
    if not (folder / STATE).exists():
        return
    advice = f"choose another folder, or delete {folder / STATE} to start anew"
    if not resume:
        raise ValueError(f"{folder} holds an unfinished run: --resume goes on, or {advice}")
    try:
        theirs = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / RESULTS} does not say what the run was: {advice}") from error
    differing = [name for name in settings if theirs.get(name) != settings[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds a run with another --{name} ({theirs.get(name)} there, "
            f"{settings[name]} here): {advice}"
        )


def _write(path: Path, contents: dict[str, Any]) -> None:
    from ..checkpoints import write_atomically

    text = json.dumps(contents, indent=1)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _check_shots(labels: Tensor, classnames: Sequence[str], shots: int) -> None:
    counts = labels.bincount(minlength=len(classnames)).tolist()
    for name, count in zip(classnames, counts, strict=True):
        if count < shots:
            raise ValueError(
                f"--shots is {shots}, but class {name!r} has {count} images to learn from"
            )


def _embedded(arguments: argparse.Namespace) -> _Problem:
    import torch

    from ..bank import TaskVectorBank
    from ..demo.assets import asset_folder
    from ..demo.experiment import Cell, Grid, Problem

    name, codec = arguments.task, arguments.codec
    cell = Cell(name, "block", arguments.shots, arguments.seed)
    its = Problem(cell, Grid(batch_size=arguments.batch), asset_folder())
    _check_shots(its.task.train.labels, its.task.classnames, arguments.shots)
    if arguments.memory == "stream":
        arguments.output.mkdir(parents=True, exist_ok=True)
        bank = TaskVectorBank.pack(arguments.output / _BANK, its.visual, its.vectors, codec=codec)
    else:
        bank = TaskVectorBank.from_task_vectors(its.visual, its.vectors, codec=codec)
    return _Problem(
        name,
        f"Embedded task {name}, and the vectors of the {len(bank.names)} other tasks",
        its.visual,
        bank,
        its.head,
        its.batches(),
        its.validate,
        its.test,
        torch.device("cpu"),
    )


def _own(arguments: argparse.Namespace) -> _Problem:
    import torch

    from ..bank import TaskVectorBank
    from ..clip import build_model, preprocess_for
    from ..data.folder import load_folder
    from ..learn import ImageBatches, accuracy, oversample, sample_shots

    clip = build_model(arguments.model)
    task = load_folder(arguments.images, *preprocess_for(clip), arguments.template)
    _check_shots(task.train.labels, task.classnames, arguments.shots)
    bank = TaskVectorBank.load(arguments.bank)
    encoder = _encoder(clip, bank, arguments)
    head = _head(clip, bank, task, arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shots = sample_shots(task.train.labels, arguments.shots, arguments.seed)
    batches = ImageBatches(
        torch.arange(len(task.train)),
        task.train.labels.to(device),
        arguments.batch,
        lambda indices, generator: task.train.images.augmented(indices, generator).to(device),
        arguments.seed,
        oversample(shots, arguments.batch),
    )

    def score(part: LabelledImages) -> Callable[[nn.Module], float]:
        return lambda model: accuracy(
            model,
            torch.arange(len(part)),
            part.labels.to(device),
            lambda indices: part.images.plain(indices).to(device),
            arguments.batch,
        )

    blocks = "an image encoder" if encoder is clip.get_submodule("visual") else "a full CLIP model"
    return _Problem(
        task.name,
        f"{bank!r}, packed from {blocks}; {len(task.classnames)} classes, "
        f"{len(task.train)} images to learn from, {len(task.validation)} for validation, "
        f"{len(task.test)} for test; on {device}",
        encoder,
        bank,
        head,
        batches,
        score(task.validation),
        score(task.test),
        device,
    )


def _encoder(clip: nn.Module, bank: TaskVectorBank, arguments: argparse.Namespace) -> nn.Module:
    """The image encoder with the bank's base, under the names that the bank uses."""
    from torch import nn

    encoder = clip.get_submodule("visual")
    if any(name.startswith(_ENCODER) for name in bank.weights):
        text = [name for name in bank.weights if not name.startswith(_ENCODER)]
        if text:
            raise ValueError(
                f"{arguments.bank} composes {text[0]!r} too, which is no part of the image "
                "encoder: pack it with --include 'visual.*'"
            )
        encoder = nn.Sequential()
        encoder.add_module("visual", clip.get_submodule("visual"))
    _fill(encoder, _base(bank), f"{arguments.bank} does not fit {arguments.model}", bank.weights)
    return encoder


def _head(
    clip: nn.Module, bank: TaskVectorBank, task: ImageTask, arguments: argparse.Namespace
) -> Tensor:
    """The zero-shot head of the classes; the text tower comes from files, never from a network."""
    from ..checkpoints import read_state_dict
    from ..clip import zero_shot_head

    source = arguments.text or arguments.bank
    tensors = read_state_dict(arguments.text) if arguments.text else _base(bank)
    lacking = [n for n in clip.state_dict() if not n.startswith(_ENCODER) and n not in tensors]
    if lacking:
        raise ValueError(
            f"{source} holds no text tower ({lacking[0]!r} is missing), of which the zero-shot "
            "head is made: pack the bank from the full CLIP checkpoint with --include 'visual.*', "
            "or name that checkpoint with --text"
        )
    tower = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ENCODER)}
    clip_tensors = {**clip.state_dict(), **tower}
    _fill(clip, clip_tensors, f"{source} does not fit {arguments.model}", tuple(tower))
    return zero_shot_head(clip, task.classnames, task.templates)


def _base(bank: TaskVectorBank) -> dict[str, Tensor]:
    base = {**bank.constants, **bank.base}
    return {**base, **{alias: base[block] for alias, block in bank.aliases.items()}}


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], problem: str, first: Sequence[str]
) -> None:
    """Copies a complete state into the module; the first name that does not fit is an error."""
    state = module.state_dict()
    for name in (*first, *state):
        here, there = tensors.get(name), state.get(name)
        if here is None or there is None:
            where = "the file" if here is None else "the architecture"
            raise ValueError(f"{problem}: {name!r} is not in {where}")
        if here.shape != there.shape:
            raise ValueError(
                f"{problem}: {name!r} has shape {tuple(here.shape)} in the file, "
                f"{tuple(there.shape)} in the architecture"
            )
    module.load_state_dict({name: tensors[name] for name in state})
