"""Test-time adaptation: learning from the test images themselves, without labels.

Offline and transductive: all images are there from the start, and the result is the model after the
last epoch. No label is read anywhere, `Images` have none: nothing is chosen on validation either.

Source: aTLAS (arXiv 2407.02880), section 5.3 and appendix E.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize, one_hot, softmax

from ..tasks.images import Images
from .trainer import (
    AdamWStep,
    Batches,
    Learned,
    Objective,
    Recipe,
    Step,
    composed_once,
    learn,
    parameter_groups,
)

TEST_TIME = Recipe(epochs=10, lr=1e-2)
"""For coefficients. As published but for the learning rate, which was not: of 1e-3, 1e-2 and 1e-1
the best on the embedded tasks. For `layer_norms` take a tenth of it."""

TEST_TIME_SAR = Recipe(epochs=10, lr=0.1)
"""The same for `SAR`, which descends by SGD."""


class Adaptation(ABC):
    """A way to learn without labels: an objective with the batches and the step that it needs."""

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch of `batches`."""

    @abstractmethod
    def batches(self, model: nn.Module, images: Images, recipe: Recipe, size: int) -> Batches:
        """The images in batches of ``size``; order and augmentation follow ``recipe.seed``."""

    def step(
        self, parameters: dict[str, nn.Parameter], objective: Objective, recipe: Recipe
    ) -> Step:
        """What a batch does to the parameters."""
        return AdamWStep(parameters, objective, recipe)


def adapt(
    model: nn.Module,
    images: Images,
    adaptation: Adaptation,
    recipe: Recipe,
    *,
    batch_size: int = 128,
    resume: str | Path | None = None,
    progress: bool = True,
    description: str = "test-time adaptation",
) -> Learned:
    """Adapts every parameter of ``model`` that requires gradients to unlabelled images.

    With a `ComposedModel` inside an image classifier these are its coefficients; with a plain
    encoder, those of `layer_norms` or whatever else is left to learn.

    Args:
        model: images to logits [b, C]; adapted from where it stands, and holds the result.
        images: the images to be classified later.
        adaptation: `UFM`, `SimCLR`, `Entropy` or `SAR`.
        recipe: `TEST_TIME`, or `TEST_TIME_SAR` for SAR; its seed also draws order and augmentation.
        batch_size: images per step.
        resume: as for `learn`.
        progress: as for `learn`.
        description: as for `learn`.

    Raises:
        ValueError: no images, or not enough of them for the adaptation; and as `learn`.
        FloatingPointError: a loss is not finite.

    Example:
        >>> import torch
        >>> from atlas_kernels.tasks.images import Images
        >>> from atlas_kernels.learn import Entropy, Recipe, adapt
        >>> points = torch.tensor([[1.0, 0.2], [0.1, 1.0], [0.9, 0.4]])
        >>> images = Images(3, lambda chosen: points[chosen], lambda chosen, _: points[chosen])
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> learned = adapt(model, images, Entropy(), Recipe(epochs=9, lr=0.1), progress=False)
        >>> learned.history[-1]["loss"] < learned.history[1]["loss"]
        True
    """
    if not len(images):
        raise ValueError("test-time adaptation needs at least one image")
    return learn(
        model,
        adaptation,
        adaptation.batches(model, images, recipe, batch_size),
        recipe,
        evaluate=None,
        resume=resume,
        progress=progress,
        description=description,
        step=adaptation.step,
    )


@dataclass(frozen=True)
class UFM(Adaptation):
    """Unsupervised FixMatch: pseudo-labels, some of them trusted.

    When an epoch begins, the current model divides the images: of those predicted as class c, the k
    most confident are trusted to be of class c (see `trusted_images`). A batch of B is 3B/4 others,
    then B/4 trusted; an epoch is one shuffled pass over the others, its remainder dropped. With the
    logits z of the augmented and z' of the plain images, the latter without gradient,

        loss = sum w * CE(z, q) / sum w,   0 if all w are 0

    where trusted images have q = their class, w = 1, and the others q = softmax(z' / 2), which is
    sqrt(p) / sum sqrt(p) of p = softmax(z'), and w = 1 if max q > 0.9 + 0.1 * e / E in epoch
    e = 0 ... E - 1. (The paper calls this sharpening; it flattens.)

    Attributes:
        divisor: k = min(N // (C * divisor), limit). The published code has 10, the paper 1, which
            leaves only images of classes predicted too often, if N <= limit * C.
        limit: the most images trusted per class.

    Source: aTLAS (arXiv 2407.02880), section 5.3 and appendix E.
    """

    divisor: int = 1
    limit: int = 100

    def __post_init__(self) -> None:
        if self.divisor < 1 or self.limit < 1:
            raise ValueError(f"divisor and limit must be at least 1, got {self}")

    def batches(self, model: nn.Module, images: Images, recipe: Recipe, size: int) -> Batches:
        """Batches that follow the model, divided anew in every epoch."""
        return _DividedImages(self, model, images, recipe, size)

    def __call__(self, model: nn.Module, batch: _Divided) -> Tensor:
        """The loss of a batch."""
        # First: the composition that records gradients serves the other pass, too.
        logits = model(batch.strong)
        with torch.no_grad():
            guessed = softmax(model(batch.weak) / 2, dim=1)
            known = one_hot(batch.labels.to(logits.device), logits.shape[1])
            passes = guessed.amax(1) > batch.threshold
            weights = torch.cat([passes, passes.new_ones(len(known))]).to(logits.dtype)
        return masked_cross_entropy(logits, torch.cat([guessed, known]), weights)


@dataclass(frozen=True)
class SimCLR(Adaptation):
    """Contrast of logits: a plain and an augmented view of an image against those of other images.

    With unit vectors a, b of the class logits of both views and S = a b^T / temperature, the loss
    is the mean of -diag(log_softmax(S)).

    Source: aTLAS (arXiv 2407.02880), appendix E.
    """

    temperature: float = 0.2

    def batches(self, model: nn.Module, images: Images, recipe: Recipe, size: int) -> Batches:
        """Plain views [b, ...], then augmented ones, in one tensor [2b, ...]."""

        def views(chosen: Tensor, generator: torch.Generator) -> Tensor:
            return torch.cat([images.plain(chosen), images.augmented(chosen, generator)])

        return _Shuffled(len(images), size, recipe.seed, views)

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The loss of a batch."""
        plain, augmented = normalize(model(batch), dim=1).chunk(2)
        similarities = plain @ augmented.T / self.temperature
        return cross_entropy(similarities, torch.arange(len(plain), device=plain.device))


@dataclass(frozen=True)
class Entropy(Adaptation):
    """The mean entropy of the predictions. It may collapse: all images in one class."""

    def batches(self, model: nn.Module, images: Images, recipe: Recipe, size: int) -> Batches:
        """Plain views."""
        return _Shuffled(len(images), size, recipe.seed, lambda chosen, _: images.plain(chosen))

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return entropies(model(batch)).mean()


@dataclass(frozen=True)
class SAR(Adaptation):
    """Sharpness-aware and reliable entropy minimisation.

    A step: of the images whose entropy is below ``margin``, the gradient g of the mean entropy; at
    the parameters moved by ``radius * g / |g|``, that of those of them still below; SGD with
    momentum along this one from where the parameters were. A step that is left without images is
    skipped. Once the running mean of the (second) loss falls below ``floor``, parameters and
    momentum are those of the start again, and the mean begins anew. The history's loss is the mean
    entropy of all images.

    Everything in the recipe matters but its preset: gradients are not clipped, as published. SGD,
    unlike AdamW, is not indifferent to their scale: cut to the "official" norm of 2^-16 they would
    move nothing.

    Attributes:
        margin: in nats; 0.4 ln(1000) as published, which passes everything for C <= 15: see
            `for_classes`.
        radius, momentum, decay, floor: as above; ``decay`` is that of the running mean.

    Source: SAR (arXiv 2302.12400), as used in aTLAS (arXiv 2407.02880), appendix E.
    """

    margin: float = 0.4 * math.log(1000)
    radius: float = 0.05
    momentum: float = 0.9
    decay: float = 0.9
    floor: float = 0.2

    @classmethod
    def for_classes(cls, count: int) -> SAR:
        """With a margin of 0.4 ln(C), the same share of the largest entropy for any C."""
        return cls(margin=0.4 * math.log(count))

    def batches(self, model: nn.Module, images: Images, recipe: Recipe, size: int) -> Batches:
        """Plain views."""
        return Entropy().batches(model, images, recipe, size)

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """The entropy of every image [b]: the step chooses among them."""
        return entropies(model(batch))

    def step(
        self, parameters: dict[str, nn.Parameter], objective: Objective, recipe: Recipe
    ) -> Step:
        """As above."""
        return _SharpnessAwareStep(self, parameters, objective, recipe)


def layer_norms(encoder: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the LayerNorms, but of the last quarter of the residual blocks.

    For ViT-B/32 these are 30,720 parameters; the blocks left out are 9 to 11. This is the baseline:
    adapt them in place of coefficients.

    Args:
        encoder: an open_clip ViT, whose blocks are called ``resblocks.{i}``.

    Raises:
        ValueError: it has no LayerNorm.

    Source: aTLAS (arXiv 2407.02880), appendix E.

    Example (``encoder`` is an open_clip ViT):
        ``encoder.requires_grad_(False)``, then
        ``for parameter in layer_norms(encoder): parameter.requires_grad_()``
    """
    norms = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.LayerNorm)}
    if not norms:
        raise ValueError(f"{type(encoder).__name__} has no LayerNorm to adapt: expected a ViT")
    places = {
        name: int(found[1]) if (found := re.search(r"resblocks\.(\d+)\.", name)) else -1
        for name in norms
    }
    count = max(places.values()) + 1
    return [
        parameter
        for name, norm in norms.items()
        if places[name] < count - count // 4
        for parameter in norm.parameters()
    ]


def trusted_images(probabilities: Tensor, *, divisor: int = 1, limit: int = 100) -> list[Tensor]:
    """For each class c the k most confident of the n_c images that are predicted as c.

    k = min(N // (C * divisor), limit); min(k, n_c) images of class c, ties to the earlier.

    Args:
        probabilities: [N, C].
        divisor: as above.
        limit: as above.

    Returns:
        C tensors of indices, int64.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import trusted_images
        >>> trusted_images(torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]))
        [tensor([1, 3]), tensor([2])]
    """
    count, classes = probabilities.shape
    most = min(count // (classes * divisor), limit)
    confidence, predicted = probabilities.max(1)
    order = confidence.argsort(descending=True, stable=True)
    return [order[predicted[order] == label][:most] for label in range(classes)]


def masked_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """``sum w * CE(logits, targets) / sum w``, 0 if all weights are 0.

    logits: [b, C].  targets: probabilities [b, C].  weights: [b], each 0 or 1.
    """
    losses = -(targets * log_softmax(logits, dim=1)).sum(1)
    return (weights * losses).sum() / weights.sum().clamp(min=1)


def entropies(logits: Tensor) -> Tensor:
    """Of the softmax of logits [b, C], in nats: [b]."""
    logarithms = log_softmax(logits, dim=1)
    return -(logarithms.exp() * logarithms).sum(1)


@dataclass(frozen=True)
class _Divided:
    """A batch of UFM: u images that are not trusted, then t that are.

    Attributes:
        weak: plain views of the former.
        strong: augmented views of all u + t.
        labels: int64 [t].
        threshold: of the epoch.
    """

    weak: Tensor
    strong: Tensor
    labels: Tensor
    threshold: float


class _DividedImages:
    """The batches of UFM."""

    def __init__(
        self, ufm: UFM, model: nn.Module, images: Images, recipe: Recipe, size: int
    ) -> None:
        if size < 4 or size % 4:
            raise ValueError(f"UFM takes a quarter of a batch: 4, 8, ... images, got {size}")
        self.ufm = ufm
        self.model = model
        self.images = images
        self.recipe = recipe
        self.size = size
        self.others, self.trusted = 3 * size // 4, size // 4
        # Before the first epoch: at most.
        self.count = len(images) // self.others

    def __len__(self) -> int:
        return self.count

    def epoch(self, index: int) -> Iterator[_Divided]:
        """Divides the images by the current model; the batches of one epoch."""
        trusted, labels = self._trusted()
        other = torch.ones(len(self.images), dtype=torch.bool)
        other[trusted] = False
        self.count = int(other.sum()) // self.others
        if index == 0 and not self.count:
            raise ValueError(
                f"UFM trusts {len(trusted)} of {len(self.images)} images, which leaves too few for "
                f"a batch of {self.others} others: trust fewer with a larger divisor than "
                f"{self.ufm.divisor}, or take smaller batches"
            )
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + index)
        threshold = 0.9 + 0.1 * index / self.recipe.epochs
        order = other.nonzero().flatten()
        order = order[torch.randperm(len(order), generator=generator)]
        endless = _endless(len(trusted), generator)
        for chosen in order[: self.count * self.others].split(self.others):
            beside = torch.tensor(list(islice(endless, self.trusted)))
            every = torch.cat([chosen, trusted[beside]])
            yield _Divided(
                self.images.plain(chosen),
                self.images.augmented(every, generator),
                labels[beside],
                threshold,
            )

    def _trusted(self) -> tuple[Tensor, Tensor]:
        """Indices of the trusted images, and their classes."""
        everything = torch.arange(len(self.images))
        with _evaluating(self.model):
            parts = [self.model(self.images.plain(part)) for part in everything.split(self.size)]
        probabilities = softmax(torch.cat(parts).float(), dim=1).cpu()
        by_class = trusted_images(probabilities, divisor=self.ufm.divisor, limit=self.ufm.limit)
        trusted = torch.cat(by_class)
        if not len(trusted):
            raise ValueError(
                f"UFM trusts N // (C * divisor) images per class, which is none of "
                f"{len(self.images)} images with {len(by_class)} classes and a divisor of "
                f"{self.ufm.divisor}: a smaller divisor or more images are needed"
            )
        return trusted, probabilities.argmax(1)[trusted]


class _Shuffled:
    """All images, shuffled, in batches of any view of them."""

    def __init__(
        self,
        count: int,
        size: int,
        seed: int,
        views: Callable[[Tensor, torch.Generator], Any],
    ) -> None:
        self.count = count
        self.size = size
        self.seed = seed
        self.views = views

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def epoch(self, index: int) -> Iterator[Any]:
        """The batches of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        for chosen in torch.randperm(self.count, generator=generator).split(self.size):
            yield self.views(chosen, generator)


class _SharpnessAwareStep:
    """The step of SAR."""

    def __init__(
        self,
        sar: SAR,
        parameters: dict[str, nn.Parameter],
        objective: Objective,
        recipe: Recipe,
    ) -> None:
        self.sar = sar
        self.parameters = list(parameters.values())
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.objective = objective
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameter_groups(parameters, recipe),
            momentum=sar.momentum,
            weight_decay=recipe.weight_decay,
        )
        self.state: dict[str, Any] = {"mean": None}

    def __call__(self, model: nn.Module, batches: Sequence[Tensor]) -> float:
        """One step; the mean entropy before it."""
        values, kept = self._backward(model, batches)
        if kept.any():
            here = [parameter.detach().clone() for parameter in self.parameters]
            self._move()
            moved, kept = self._backward(model, batches, kept)
            self._place(here)
            if kept.any():
                self.optimizer.step()
                self._follow(moved[kept].mean().item())
        return values.mean().item()

    def _backward(
        self, model: nn.Module, batches: Sequence[Tensor], among: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Entropies, and which of them are below the margin; their mean's gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        values: list[Tensor] = []
        kept: list[Tensor] = []
        with composed_once(model, accumulate=len(batches) > 1):
            for batch in batches:
                its = self.objective(model, batch)
                below = its.detach() < self.sar.margin
                if among is not None:
                    below &= among[sum(map(len, kept)) :][: len(its)]
                if below.any():
                    its[below].sum().backward()
                values.append(its.detach())
                kept.append(below)
        chosen = torch.cat(kept)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= chosen.sum()
        return torch.cat(values), chosen

    @torch.no_grad()
    def _move(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
        # Where the gradient is zero, there is nowhere to go.
        factor = self.sar.radius / torch.linalg.vector_norm(torch.stack(norms)).clamp(min=1e-12)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.add_(factor * parameter.grad)

    @torch.no_grad()
    def _place(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def _follow(self, loss: float) -> None:
        mean = self.state["mean"]
        self.state["mean"] = mean = (
            loss if mean is None else self.sar.decay * mean + (1 - self.sar.decay) * loss
        )
        if mean < self.sar.floor:
            self._place(self.start)
            self.optimizer.state.clear()
            self.state["mean"] = None


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    """0 ... count - 1, shuffled, again and again."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and records no gradients; then each part is as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
