"""Few-shot runs: what learns, how, and what is measured besides."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..learn import (
    GRID,
    TIP_JOINT,
    Learned,
    classify,
    features,
    gradient_scores,
    isotropic,
    learn,
    learn_gradient_free,
    lp_plus_plus,
    norm_matched,
    random_basis,
    sample_shots,
    search,
    select_blocks,
    select_by_features,
    select_random,
    select_vectors,
    single_vector,
    summed_cross_entropy,
    tip_adapter,
    virtual_vectors,
)
from ..models import ComposedModel, PeakMemory
from ..tasks.clip import ImageClassifier
from ..tasks.images import LabelledImages
from ..vectors import TaskVector
from .config import FewShotRun
from .setting import Result, Setting


def few_shot(setting: Setting[FewShotRun]) -> Result:
    """Does what a `FewShotRun` says."""
    run = setting.run
    train = setting.space.task(setting.target).train
    few = train.subset(sample_shots(train.labels.cpu(), run.shots, run.seed))
    model = setting.classifier(_start(setting, few))
    peak = _peak_memory(setting, model, few) if run.peak_memory else None
    started = time.perf_counter()
    learned = _fit(setting, model, few)
    adapted = model if run.adapter == "none" else _adapted(setting, model, few)
    seconds = time.perf_counter() - started
    result = setting.result(model, learned)
    if adapted is not model:
        result.metrics |= setting.result(adapted).metrics
        result.model = adapted
    result.seconds = seconds
    if peak is not None:
        result.metrics["peak_bytes"] = peak
    if run.out_of_domain:
        result.metrics |= _shifted(setting, adapted)
    return result


def _start(setting: Setting[FewShotRun], few: LabelledImages) -> nn.Module:
    """The encoder before anything is learned."""
    run, space = setting.run, setting.space
    if run.how in ("zero-shot", "fine-tune"):
        return space.encoder().requires_grad_(run.how == "fine-tune")
    if run.how == "own":
        return setting.finetuned(space.vectors(run.vectors, [setting.target]))
    return setting.compose(_chosen(setting, few))


def _fit(
    setting: Setting[FewShotRun], model: ImageClassifier, few: LabelledImages
) -> Learned | None:
    """Learns, or searches, or leaves the model as it is."""
    run = setting.run
    if run.how in ("coefficients", "fine-tune"):
        return setting.learn(model, setting.repeated(few))
    if run.how in ("search", "single"):
        encoder = cast(ComposedModel, model.encoder)
        candidates = isotropic if run.how == "search" else single_vector
        grid = run.factors or GRID
        search(encoder, candidates(encoder.coef, grid), lambda: setting.validate(model))
    elif run.how == "gradient-free":
        learn_gradient_free(
            cast(ComposedModel, model.encoder),
            lambda: summed_cross_entropy(model, few),
            seed=run.seed,
            progress=setting.progress,
        )
    return None


def _adapted(
    setting: Setting[FewShotRun], model: ImageClassifier, few: LabelledImages
) -> nn.Module:
    run = setting.run
    validation = setting.space.task(setting.target).validation
    if run.adapter == "lp++":
        return lp_plus_plus(model, few, validation, seed=run.seed, progress=setting.progress).model
    joint = run.how == "coefficients"
    # As published: twice the epochs of the coefficients alone.
    epochs, accumulate = 2 * run.resolved("epochs"), run.resolved("accumulate")
    recipe = replace(TIP_JOINT, epochs=epochs, seed=run.seed, accumulate=accumulate)
    return tip_adapter(
        model,
        few,
        validation,
        recipe if joint else None,
        joint=joint,
        batch_size=run.resolved("batch"),
        progress=setting.progress,
    ).model


def _chosen(setting: Setting[FewShotRun], few: LabelledImages) -> dict[str, TaskVector]:
    """The vectors that learn: all, a budget of them, or noise in their place."""
    run = setting.run
    vectors = setting.vectors()
    if run.select != "all":
        vectors = _selected(setting, vectors, few)
    if run.bases == "matched":
        # Far apart, so that no two seeds share a vector.
        first = run.seed << 16
        noise = (norm_matched(vector, first + i) for i, vector in enumerate(vectors.values()))
        return {vector.name: vector for vector in noise}
    if run.bases == "random":
        base = dict(setting.space.encoder().named_parameters())
        return {vector.name: vector for vector in random_basis(base, len(vectors), run.seed)}
    return vectors


def _selected(
    setting: Setting[FewShotRun], vectors: Mapping[str, TaskVector], few: LabelledImages
) -> dict[str, TaskVector]:
    run, space = setting.run, setting.space
    budget, names = cast(int, run.budget), list(vectors)
    if run.select == "random":
        chosen = select_random(len(names), budget, run.seed)
    elif run.select == "features":
        base = space.encoder()
        theirs = [space.features(name) for name in names]
        chosen = select_by_features(features(base, few.images), theirs, budget)
    else:
        encoder = setting.compose(vectors)
        scores = gradient_scores(setting.classifier(encoder), encoder, setting.batches(few))
        if run.select == "block":
            blocks = encoder.bank.blocks
            table = select_blocks(scores, blocks, budget)
            virtual = virtual_vectors(list(vectors.values()), table, blocks)
            return {vector.name: vector for vector in virtual}
        chosen = select_vectors(scores, budget)
    return {names[i]: vectors[names[i]] for i in chosen.tolist()}


def _shifted(setting: Setting[FewShotRun], model: nn.Module) -> dict[str, Any]:
    """Accuracies under the images' other shifts, and their mean."""
    shifts = {
        other.name: setting.score(Rows(model, other.rows), other.test)
        for other in setting.space.out_of_domain(setting.target)
    }
    return {"shifts": shifts, "shifted": statistics.fmean(shifts.values())}


def _peak_memory(setting: Setting[FewShotRun], model: nn.Module, few: LabelledImages) -> int:
    """Peak bytes of a learning step; of evaluating a batch where nothing learns by gradients."""
    run = setting.run
    if run.how not in ("coefficients", "fine-tune"):
        images = setting.space.task(setting.target).validation.images
        batch = images.plain(torch.arange(min(len(images), run.resolved("batch"))))
        with PeakMemory() as memory, torch.no_grad():
            model.eval()(batch)
        return memory.peak
    first = next(iter(setting.repeated(few).epoch(0)))
    # The optimizer's state exists from the first step on and counts in every later one.
    two_steps = _Repeated(first, 2 * run.resolved("accumulate"))
    with PeakMemory() as memory:
        # No epoch is better than the start: the model comes back as it was.
        learn(
            model,
            classify,
            two_steps,
            replace(run.training(), epochs=1),
            evaluate=lambda _: 0.0,
            progress=False,
        )
    return memory.peak


class _Repeated:
    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.times)


class Rows(nn.Module):
    """The logits of some of a model's classes: as if all others had the logit -inf."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.model = model
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K] for K rows."""
        logits: Tensor = self.model(images)
        return logits[:, self.rows.to(logits.device)]
