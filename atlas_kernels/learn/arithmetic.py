"""Task arithmetic with learned coefficients: negation forgets one task, addition joins several.

Source: aTLAS (arXiv 2407.02880), sections 4.1 and 4.2, appendix B and C; the searched baselines are
those of task arithmetic (arXiv 2212.04089). The learned isotropic baseline is the same call with an
encoder of ``granularity="task"``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..models import ComposedModel
from ..tasks.clip import ImageClassifier
from .grid_search import GRID, isotropic, search
from .trainer import Batches, Learned, Recipe, learn

_PUBLISHED_NEGATION = {
    "cars": (20, 5e-3),
    "dtd": (20, 1e-2),
    "eurosat": (3, 5e-3),
    "gtsrb": (5, 5e-3),
    "mnist": (7, 3e-3),
    "resisc45": (10, 2e-3),
    "sun397": (10, 3e-3),
    "svhn": (2, 5e-3),
}

NEGATION = {
    task: Recipe(epochs=epochs, lr=lr, schedule="constant", preset="official")
    for task, (epochs, lr) in _PUBLISHED_NEGATION.items()
}
"""The published recipes of negation by target, tuned on ViT-B/32; batches of 64 + 64 images.

Source: aTLAS, appendix B.
"""

ADDITION = Recipe(epochs=20, lr=1e-3, schedule="constant", preset="official")
"""The published recipe of addition; batches of 16 images per task. Source: aTLAS, appendix C."""


@dataclass(frozen=True)
class JointTask:
    """One of the tasks that share a composed encoder.

    Attributes:
        head: [C, d], frozen, on the encoder's device (see `zero_shot_head`).
        batches: pairs of images and labels (int64) to learn from; the paper takes them from the
            validation images.
        evaluate: the accuracy of an image classifier in [0, 1], on validation images.
        finetuned: that accuracy of the task's own fine-tuned model, by which `add` divides; 1 for
            absolute accuracies.
    """

    head: Tensor
    batches: Batches
    evaluate: Callable[[nn.Module], float]
    finetuned: float = 1.0

    def __post_init__(self) -> None:
        if self.finetuned <= 0:
            raise ValueError(f"finetuned must be positive to divide by, got {self.finetuned}")


@dataclass(frozen=True)
class Penalty:
    """``weight * mean_j |(coef[1, j], ..., coef[N, j])|_order``, a regulariser of coefficients.

    The norm is over the N task vectors, the mean over the B blocks; coefficients (N,) count as one
    block. At zero its gradient is zero. Source: aTLAS, section 4.2.

    Attributes:
        order: 1 or 2.
        weight: the published one by default.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import Penalty
        >>> Penalty(order=1)(torch.tensor([[1.0, 0.0], [-2.0, 1.0]])).item()
        1.0
    """

    order: Literal[1, 2] = 1
    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.order not in (1, 2) or self.weight < 0:
            raise ValueError(f"order must be 1 or 2 and weight >= 0, got {self}")

    def __call__(self, coef: Tensor) -> Tensor:
        """The penalty of coefficients (N, B) or (N,), a scalar."""
        norms: Tensor = torch.linalg.vector_norm(coef, self.order, dim=0)
        return self.weight * norms.mean()


@dataclass(frozen=True)
class Outcome:
    """What negation or addition ended with. All accuracies are on validation.

    Attributes:
        coef: (N, B) or (N,), as the encoder holds them.
        accuracies: of the tasks, in the order of the arguments.
        zero_shot: of the tasks with the base.
        learned: the run behind it; None for a search.
    """

    coef: Tensor
    accuracies: tuple[float, ...]
    zero_shot: tuple[float, ...]
    learned: Learned | None = None

    @property
    def improved(self) -> bool:
        """Whether anything beat the base; if not, ``coef`` is zero."""
        return bool(self.coef.any())


def negate(
    encoder: ComposedModel,
    target: JointTask,
    control: JointTask,
    recipe: Recipe,
    *,
    threshold: float = 0.95,
    penalty: Penalty | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Outcome:
    """Learns to forget the target and to keep the control: ``min -CE(target) + CE(control)``.

    The result is the epoch with the lowest target accuracy, below zero-shot, among those whose
    control accuracy is at least ``threshold`` times zero-shot; the first epoch below that ends the
    run. If no epoch qualifies, the encoder is the base again (`Outcome.improved` is False).

    Args:
        encoder: composed of the target's task vector, or of several; starts from ``coef = 0`` and
            holds the result afterwards.
        target: what to forget.
        control: what to keep (in the paper ImageNet).
        recipe: one of `NEGATION`, for example.
        threshold: share of the control's zero-shot accuracy to keep, in [0, 1].
        penalty: added to the loss.
        resume: as for `learn`.
        progress: as for `learn`.

    Raises:
        ValueError: a threshold outside [0, 1].
        FloatingPointError: a loss is not finite.

    Source: aTLAS (arXiv 2407.02880), section 4.1 and appendix B.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> from atlas_kernels.learn import ImageBatches, JointTask, Recipe, accuracy, negate
        >>> module = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> _ = module.weight.copy_(torch.eye(2))
        >>> tuned = {"weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]])}
        >>> vector = ak.TaskVector.from_state_dicts(module.state_dict(), tuned, name="first")
        >>> bank = ak.TaskVectorBank.from_task_vectors(module, [vector])
        >>> encoder = ak.ComposedModel(module, bank)
        >>> def task(images, label):
        ...     labels = torch.full((len(images),), label)
        ...     batches = ImageBatches(images, labels, 2, lambda x, _: x, seed=0)
        ...     score = lambda model: accuracy(model, images, labels, lambda x: x)
        ...     return JointTask(torch.eye(2), batches, score)
        >>> first = task(torch.tensor([[1.0, 0.5], [1.0, 0.2]]), 0)
        >>> second = task(torch.tensor([[0.5, 1.0], [0.2, 1.0]]), 1)
        >>> recipe = Recipe(epochs=20, lr=0.02, schedule="constant")
        >>> negate(encoder, first, second, recipe, progress=False).accuracies
        (0.0, 1.0)
    """
    joint = _Joint(encoder, (target, control))
    return joint.learn(
        (-1, 1),
        joint.forgetting(threshold),
        recipe,
        penalty,
        resume=resume,
        progress=progress,
        description="negation",
    )


def search_negation(
    encoder: ComposedModel, target: JointTask, control: JointTask, *, threshold: float = 0.95
) -> Outcome:
    """The searched baseline of `negate`: ``base - a * sum_i tau_i``, a on `GRID`, the same choice.

    Raises:
        ValueError: a threshold outside [0, 1].

    Source: task arithmetic (arXiv 2212.04089), section 3.
    """
    joint = _Joint(encoder, (target, control))
    return joint.search([-value for value in GRID], joint.forgetting(threshold))


def add(
    encoder: ComposedModel,
    tasks: Sequence[JointTask],
    recipe: Recipe = ADDITION,
    *,
    penalty: Penalty | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Outcome:
    """Learns one encoder for all tasks: ``min sum_d CE_d``.

    The result is the epoch with the highest mean over tasks of ``accuracy / finetuned``, if above
    zero-shot; else the base (`Outcome.improved` is False). A step takes one batch of every task, in
    one forward pass; an epoch ends with the shortest batches.

    Args:
        encoder: composed of the tasks' vectors; starts from ``coef = 0`` and holds the result
            afterwards.
        tasks: at least one.
        recipe: learning rate, epochs and so on.
        penalty: added to the loss.
        resume: as for `learn`.
        progress: as for `learn`.

    Raises:
        ValueError: no tasks.
        FloatingPointError: a loss is not finite.

    Source: aTLAS (arXiv 2407.02880), section 4.2 and appendix C.

    Example (``digits`` and ``fashion`` are `JointTask`):
        ``add(encoder, [digits, fashion], penalty=Penalty(order=1))``
    """
    joint = _Joint(encoder, tasks)
    return joint.learn(
        [1] * len(tasks),
        joint.relative_accuracy,
        recipe,
        penalty,
        resume=resume,
        progress=progress,
        description="addition",
    )


def search_addition(encoder: ComposedModel, tasks: Sequence[JointTask]) -> Outcome:
    """The searched baseline of `add`: ``base + a * sum_i tau_i``, a on `GRID`, the same choice.

    Raises:
        ValueError: no tasks.

    Source: task arithmetic (arXiv 2212.04089), section 4.
    """
    joint = _Joint(encoder, tasks)
    return joint.search(GRID, joint.relative_accuracy)


def weights_only(module: nn.Module) -> list[str]:
    """Parameters of two and more dimensions: a bank's ``include`` for the weights-only variant.

    Biases and normalisation layers stay as in the base: two thirds of the coefficients of a ViT.
    Source: aTLAS, sections 4.1 and 4.2.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import weights_only
        >>> weights_only(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3)))
        ['0.weight']
    """
    parameters = module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in parameters if parameter.ndim >= 2]


class _Joint(nn.Module):
    """One encoder, from the base on, under the heads of several tasks."""

    def __init__(self, encoder: ComposedModel, tasks: Sequence[JointTask]) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("task arithmetic needs at least one task")
        self.encoder = encoder
        self.tasks = tuple(tasks)
        self.heads = nn.ModuleList(ImageClassifier(nn.Identity(), task.head) for task in tasks)
        with torch.no_grad():
            encoder.coef.zero_()
        self.zero_shot = self.accuracies()

    def forward(self, *images: Tensor) -> list[Tensor]:
        """Logits of each task's images, in one pass through the encoder."""
        features = self.encoder(torch.cat(images)).split([len(part) for part in images])
        return [head(part) for head, part in zip(self.heads, features, strict=True)]

    def accuracies(self) -> tuple[float, ...]:
        self.eval()
        return tuple(
            task.evaluate(nn.Sequential(self.encoder, head))
            for task, head in zip(self.tasks, self.heads, strict=True)
        )

    def relative_accuracy(self) -> float:
        pairs = zip(self.accuracies(), self.tasks, strict=True)
        return statistics.fmean(accuracy / task.finetuned for accuracy, task in pairs)

    def forgetting(self, threshold: float) -> Callable[[], float]:
        """The score of negation: minus target accuracy, or -inf below the control's threshold."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], got {threshold}")
        bar = threshold * self.zero_shot[1]

        def score() -> float:
            target, control = self.accuracies()
            return -target if control >= bar else float("-inf")

        return score

    def learn(
        self,
        signs: Sequence[int],
        score: Callable[[], float],
        recipe: Recipe,
        penalty: Penalty | None,
        **options: Any,
    ) -> Outcome:
        def objective(_: nn.Module, batch: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
            logits = self(*(images for images, _ in batch))
            losses = (cross_entropy(z, y) for z, (_, y) in zip(logits, batch, strict=True))
            loss = torch.stack([s * loss for s, loss in zip(signs, losses, strict=True)]).sum()
            return loss if penalty is None else loss + penalty(self.encoder.coef)

        batches = _JointBatches([task.batches for task in self.tasks])
        learned = learn(self, objective, batches, recipe, evaluate=lambda _: score(), **options)
        return self.outcome(learned)

    def search(self, factors: Sequence[float], score: Callable[[], float]) -> Outcome:
        search(self.encoder, isotropic(self.encoder.coef, factors), score)
        return self.outcome()

    def outcome(self, learned: Learned | None = None) -> Outcome:
        coef = self.encoder.coef.detach().clone()
        return Outcome(coef, self.accuracies(), self.zero_shot, learned)


class _JointBatches:
    """One batch of every task at a time."""

    def __init__(self, parts: Sequence[Batches]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return min(map(len, self.parts))

    def epoch(self, index: int) -> Iterator[tuple[Any, ...]]:
        """The batches of one epoch, as many as the shortest part has."""
        return zip(*(part.epoch(index) for part in self.parts), strict=False)
