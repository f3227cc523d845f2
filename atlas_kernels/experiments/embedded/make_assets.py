"""Makes the embedded assets from the images alone: pre-train the base, fine-tune it on each task.

    python -m atlas_kernels.experiments.embedded.make_assets FOLDER

Finished stages (the base, each task vector) are files and are kept: a second call with the same
settings goes on where the first was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from tqdm.auto import tqdm

from ...files import describe, in_use
from ...learn import accuracy
from ...tasks.clip import ImageClassifier, tokenizer_for, zero_shot_head
from ...tasks.embedded import (
    MODEL_FILE,
    SHIFTS,
    Task,
    augment,
    build_embedded_model,
    dataset_names,
    fingerprint,
    load_embedded_model,
    load_task,
    preprocess,
    pretraining_split,
    save_embedded_model,
    save_task_vector,
    task_names,
    vector_path,
)


@dataclass(frozen=True)
class AssetRecipe:
    """How the assets are made; the defaults made those that ship. All stages use AdamW.

    Attributes:
        pretrain_steps: 30 passes over all pre-training images.
        pretrain_batch: images per step.
        pretrain_lr: highest learning rate of the cosine schedule.
        shifted: share of the pre-training images that are shown under a random shift. Without any,
            a shifted task starts near chance; with many, nothing is left to learn.
        finetune_steps: the same for all tasks, however many images they have.
        finetune_batch: images per step.
        finetune_lr: highest learning rate of the cosine schedule.
        weight_decay: decoupled, in all stages.
    """

    pretrain_steps: int = 630
    pretrain_batch: int = 256
    pretrain_lr: float = 1e-3
    shifted: float = 0.15
    finetune_steps: int = 128
    finetune_batch: int = 64
    finetune_lr: float = 3e-4
    weight_decay: float = 0.1


def make_assets(
    out: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    recipe: AssetRecipe | None = None,
    tasks: Sequence[str] | None = None,
) -> None:
    """Writes the base model and one task vector per task to a folder, as `load_model` reads it.

    Every stage that is there already and was made with the same seed and recipe is kept. Takes
    about eight minutes on two cores.

    Args:
        out: created if need be.
        seed: of initialisation, order, shifts and crops.
        progress: shows progress bars on standard error.
        recipe: by default the one that made the shipped assets.
        tasks: by default all of ``task_names()``.

    Raises:
        ValueError: an unknown task, or the folder holds a base of other settings or is in use.
    """
    recipe = recipe or AssetRecipe()
    chosen = task_names() if tasks is None else tuple(tasks)
    unknown = [name for name in chosen if name not in task_names()]
    if unknown:
        raise ValueError(f"unknown tasks {', '.join(unknown)}: choose of {', '.join(task_names())}")
    with in_use(out):
        _make(out, seed, progress, recipe, chosen)


def _make(out: Path, seed: int, progress: bool, recipe: AssetRecipe, tasks: Sequence[str]) -> None:
    settings = {"seed": seed, "recipe": asdict(recipe)}
    model_path = out / MODEL_FILE
    if not model_path.exists():
        state, token_ids = pretrain(recipe, seed, progress)
        save_embedded_model(model_path, state, token_ids, **settings)
    elif not _made_with(model_path, settings):
        raise ValueError(
            f"{model_path} was made with another seed or recipe:"
            " choose an empty folder, or remove it"
        )
    # The rounded weights of the file are the base, so that base plus delta is what was fine-tuned.
    model = load_embedded_model(model_path)
    base = fingerprint(model.get_submodule("visual"))
    bar = tqdm(tasks, desc="task vectors", disable=not progress)
    for name in bar:
        bar.set_postfix_str(name)
        path = vector_path(out, name)
        if not (path.exists() and _made_with(path, {**settings, "base": base})):
            delta, accuracies = finetune(model, load_task(name), recipe, seed)
            save_task_vector(path, delta, base, task=name, **settings, **accuracies)


def _made_with(path: Path, settings: dict[str, object]) -> bool:
    return settings.items() <= describe(path)[1].items()


def pretrain(recipe: AssetRecipe, seed: int, progress: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Trains both towers contrastively on all pre-training images.

    A step compares its images with one prompt of each class present, drawn from the class's
    templates: the usual loss would push apart the many images that share a prompt. The two sets of
    digits share their classes.

    Returns:
        The state dict of a model whose token table has only the rows of some tokens; their ids.
    """
    generator = torch.Generator().manual_seed(seed)
    images, classes, prompts = _pretraining_images()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tokenizer_for(build_embedded_model(1))
        tokens = tokenizer([text for texts in prompts for text in texts])
        # Sorted ids keep the end-of-text token the largest, by which the text tower finds it.
        token_ids, rows = tokens.unique(return_inverse=True)
        model = build_embedded_model(len(token_ids))
    templates = len(prompts[0])
    rows = rows.view(len(prompts), templates, -1)
    count = len(classes)
    steps = recipe.pretrain_steps
    optimizer = _optimizer(model, recipe.pretrain_lr, recipe.weight_decay)
    bar = tqdm(total=steps, desc="pre-training", disable=not progress)
    for step, batch in enumerate(_batches(count, recipe.pretrain_batch, steps, generator)):
        _set_lr(optimizer, recipe.pretrain_lr, step, steps)
        shifted = torch.rand(len(batch), generator=generator) < recipe.shifted
        shift = torch.randint(1, len(SHIFTS), (len(batch),), generator=generator) * shifted
        views = augment(preprocess(images[shift, batch]), generator)
        present, target = classes[batch].unique(return_inverse=True)
        drawn = torch.randint(templates, (len(present),), generator=generator)
        model_any = cast(Any, model)
        image_features = model_any.encode_image(views, normalize=True)
        text_features = model_any.encode_text(rows[present, drawn], normalize=True)
        logits = model_any.logit_scale.exp() * image_features @ text_features.T
        loss = contrastive_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model_any.logit_scale.clamp_(max=math.log(100))
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    bar.close()
    return model.state_dict(), token_ids


def contrastive_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Symmetric contrastive loss of images against distinct prompts, several images per prompt.

    The mean of two terms: the mean over images of -log softmax over prompts, and the mean over
    prompts of the mean over their images of -log softmax over images.

    Args:
        logits: [n, C].
        target: int64 [n], every prompt at least once.
    """
    to_text = cross_entropy(logits, target)
    positives = one_hot(target, logits.shape[1]).to(logits.dtype)
    to_image = -(logits.log_softmax(0) * positives / positives.sum(0)).sum(0).mean()
    return (to_text + to_image) / 2


def finetune(
    model: nn.Module, task: Task, recipe: AssetRecipe, seed: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Fine-tunes the image encoder on a task's train split under its frozen zero-shot head.

    Returns:
        Deltas by parameter name of ``model.visual``; test accuracies before and after.
    """
    generator = torch.Generator().manual_seed(seed)
    base = dict(model.get_submodule("visual").named_parameters())
    head = zero_shot_head(model, task.classnames, task.templates)
    encoder = copy.deepcopy(model.get_submodule("visual"))
    classifier = ImageClassifier(encoder, head)
    test = (task.test.images, task.test.labels, preprocess)
    before = accuracy(classifier, *test)
    optimizer = _optimizer(encoder, recipe.finetune_lr, recipe.weight_decay)
    images = preprocess(task.train.images)
    classifier.train()
    batches = _batches(len(task.train), recipe.finetune_batch, recipe.finetune_steps, generator)
    for step, batch in enumerate(batches):
        _set_lr(optimizer, recipe.finetune_lr, step, recipe.finetune_steps)
        loss = cross_entropy(
            classifier(augment(images[batch], generator)), task.train.labels[batch]
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
    after = accuracy(classifier, *test)
    delta = {name: (value - base[name]).detach() for name, value in encoder.named_parameters()}
    return delta, {"zero_shot_accuracy": before, "finetuned_accuracy": after}


def _pretraining_images() -> tuple[Tensor, Tensor, list[tuple[str, ...]]]:
    """uint8 images [shifts, n, 32, 32], int64 classes [n], and the prompts of every class.

    A class is a word and its templates, whichever sets it occurs in.
    """
    prompts: dict[tuple[str, ...], int] = {}
    images, classes = [], []
    for dataset in dataset_names():
        task = load_task(f"{dataset}-clean")
        texts = [tuple(t.format(name) for t in task.templates) for name in task.classnames]
        index = torch.tensor([prompts.setdefault(text, len(prompts)) for text in texts])
        images.append(torch.stack([pretraining_split(dataset, shift).images for shift in SHIFTS]))
        classes.append(index[pretraining_split(dataset).labels])
    return torch.cat(images, 1), torch.cat(classes), list(prompts)


def _batches(count: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` batches of indices, shuffled anew in every pass over ``count`` images."""
    done = 0
    while done < steps:
        for indices in torch.randperm(count, generator=generator).split(batch)[: steps - done]:
            yield indices
            done += 1


def _optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Cosine schedule behind a linear warm-up over the first tenth of the steps."""
    warmup = max(1, steps // 10)
    factor = min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def main(argv: list[str] | None = None) -> None:
    """Makes the assets in the given folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    make_assets(options.out, seed=options.seed)


if __name__ == "__main__":
    main()
