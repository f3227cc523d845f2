"""Adapters: small heads on image features that add what a few labelled images say.

An adapter takes the place of the frozen head, ``nn.Sequential(encoder, adapter)``. It belongs to
one task, and is saved apart from the coefficients.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from ..files import parts_of, read_tensors, write_tensors
from ..tasks.clip import ImageClassifier
from ..tasks.images import Images, LabelledImages
from .few_shot import ImageBatches, accuracy, classify, features, oversample
from .trainer import Learned, Objective, Recipe, backward, learn

_KIND = "adapter"

_RATES = (("*keys", 1e-3),)

TIP_JOINT = Recipe(epochs=20, lr=0.1, weight_decay=0.01, lrs=_RATES)
"""Tip-Adapter-F together with coefficients; the published runs of ResNets take 60 epochs.

Rates and epochs: aTLAS (arXiv 2407.02880), appendix D.3; weight decay: its code.
"""

TIP_FROZEN = Recipe(epochs=300, lr=0.1, weight_decay=0.01, lrs=_RATES)
"""Tip-Adapter-F on frozen features. Source: as `TIP_JOINT`."""

_ALPHA_EVERY = 10


class Adapter(nn.Module):
    """What all adapters are: features [b, d] of any length to logits [b, C], in float32.

    Attributes:
        head: [C, d], the frozen zero-shot head.
    """

    head: Tensor
    method: str

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        if head.ndim != 2:
            raise ValueError(
                f"expected a head of shape [classes, features], got {tuple(head.shape)}"
            )
        self.register_buffer("head", head.detach().float().clone())

    def save(self, path: str | Path) -> None:
        """Writes the whole adapter, its head included (safetensors); `load_adapter` reads it."""
        write_tensors(path, self.state_dict(), _KIND, method=self.method)


class TipAdapter(Adapter):
    """Tip-Adapter-F: ``logits = z + alpha * exp(-beta * (1 - F f)).T Y``.

    f is the unit feature, ``z = head f`` the zero-shot logits, F the cache of keys, one per shot,
    and Y the one-hot labels of the shots: a class gains by each of its shots that the image is
    close to, alpha at most. With ``alpha = 0`` it is the zero-shot classifier.

    Args:
        head: [C, d], the frozen zero-shot head.
        keys: F, [N, d], unit features of the shots; they learn.
        labels: int64 [N] in [0, C).
        alpha: the weight of the cache; learns.
        beta: its sharpness; learns.

    Raises:
        ValueError: shapes or labels do not fit together.

    Source: Tip-Adapter (arXiv 2111.03930); aTLAS (arXiv 2407.02880), section 5.1.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import TipAdapter
        >>> adapter = TipAdapter(torch.eye(2), keys=torch.eye(2), labels=torch.tensor([0, 1]))
        >>> adapter(torch.tensor([[5.0, 0.0]]))[0, 0].item()
        3.0
    """

    method = "tip"
    labels: Tensor
    targets: Tensor

    def __init__(
        self,
        head: Tensor,
        keys: Tensor,
        labels: Tensor,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 1.0,
    ) -> None:
        super().__init__(head)
        _check_shots(head, keys, labels)
        self.keys = nn.Parameter(keys.detach().to(self.head, copy=True))
        self.alpha = nn.Parameter(self.head.new_tensor(float(alpha)))
        self.beta = nn.Parameter(self.head.new_tensor(float(beta)))
        labels = labels.to(self.head.device)
        self.register_buffer("labels", labels)
        self.register_buffer("targets", one_hot(labels, len(head)).float(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [b, C] of features [b, d]."""
        unit = normalize(features.float(), dim=-1)
        affinity = torch.exp(-self.beta * (1 - unit @ self.keys.T))
        return unit @ self.head.T + self.alpha * (affinity @ self.targets)

    def for_classes(self, rows: Tensor) -> TipAdapter:
        """The adapter of some of the classes: int64 [K], ascending rows of the head."""
        rows = rows.to(self.labels.device)
        kept = torch.isin(self.labels, rows)
        labels = torch.searchsorted(rows, self.labels[kept])
        scalars = self.alpha.detach(), self.beta.detach()
        return TipAdapter(self.head[rows], self.keys[kept], labels, *scalars)


class LPPlusPlus(Adapter):
    """LP++: ``logits = W f + b + alpha * (T f)``, one alpha per class.

    f is the unit feature, the rows of T are those of the head at unit length. With W and b zero,
    and alpha the lengths of the head's rows, it is the zero-shot classifier.

    Args:
        head: [C, d], the frozen zero-shot head.
        weight: W, [C, d]; learns.
        bias: b, [C]; learns.
        alpha: [C]; learns.

    Source: LP++ (arXiv 2404.02285); aTLAS (arXiv 2407.02880), section 5.1.
    """

    method = "lp++"

    def __init__(self, head: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor) -> None:
        super().__init__(head)
        for name, value, shape in (
            ("weight", weight, head.shape),
            ("bias", bias, head.shape[:1]),
            ("alpha", alpha, head.shape[:1]),
        ):
            if value.shape != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        self.weight, self.bias, self.alpha = (
            nn.Parameter(value.detach().to(self.head, copy=True)) for value in (weight, bias, alpha)
        )

    @classmethod
    def zero_shot(cls, head: Tensor) -> LPPlusPlus:
        """The adapter that is the zero-shot classifier."""
        norms = torch.linalg.vector_norm(head.float(), dim=1)
        return cls(head, torch.zeros_like(head), torch.zeros_like(norms), norms)

    @classmethod
    def start(cls, head: Tensor, features: Tensor, labels: Tensor, seed: int) -> LPPlusPlus:
        """The published start of learning, in closed form.

        W_c is the sum of the features of class c; alpha is 250 times the mean over classes of the
        mean of ``f_i . t_c`` within the class; b is drawn as a linear layer's, from ``seed``.

        Args:
            head: [C, d], the frozen zero-shot head.
            features: unit features [N, d] of the shots.
            labels: int64 [N] in [0, C).
            seed: of b.

        Raises:
            ValueError: shapes or labels do not fit together.
        """
        _check_shots(head, features, labels)
        targets = one_hot(labels, len(head)).to(features)
        own = (features * normalize(head.float(), dim=1)[labels]).sum(1)
        counts = targets.sum(0)
        means = (targets.T @ own)[counts > 0] / counts[counts > 0]
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(head.shape[1])
        bias = torch.empty(len(head)).uniform_(-bound, bound, generator=generator)
        alpha = (250 * means.mean()).expand(len(head))
        return cls(head, targets.T @ features, bias, alpha)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [b, C] of features [b, d]."""
        unit = normalize(features.float(), dim=-1)
        zero_shot = unit @ normalize(self.head, dim=1).T
        return unit @ self.weight.T + self.bias + self.alpha * zero_shot

    def for_classes(self, rows: Tensor) -> LPPlusPlus:
        """The adapter of some of the classes: int64 [K], ascending rows of the head."""
        parts = (self.head, self.weight, self.bias, self.alpha)
        return LPPlusPlus(*(part[rows.to(part.device)] for part in parts))


def load_adapter(path: str | Path) -> TipAdapter | LPPlusPlus:
    """What `Adapter.save` wrote, on the CPU.

    Raises:
        FileNotFoundError, FileFormatError: there is no such file, or it holds no adapter.
    """
    tensors, fields = read_tensors(path, _KIND, mmap=False)
    with parts_of(path):
        kinds = {kind.method: kind for kind in (TipAdapter, LPPlusPlus)}
        return kinds[fields["method"]](**tensors)


@dataclass(frozen=True)
class Adapted:
    """What learning an adapter ended with. Scores are accuracies on validation.

    Attributes:
        model: ``nn.Sequential(encoder, adapter)``, in eval mode. If no epoch beat the classifier
            without the adapter, it is that classifier: the encoder as it was before, and an adapter
            that adds nothing.
        start: the score of the classifier without the adapter.
        score: the score of ``model``.
        learned: the run behind it, the adapter's own start as its epoch 0.
    """

    model: nn.Sequential
    start: float
    score: float
    learned: Learned

    @property
    def adapter(self) -> TipAdapter | LPPlusPlus:
        """The adapter of ``model``, to be saved."""
        adapter = self.model.get_submodule("adapter")
        assert isinstance(adapter, TipAdapter | LPPlusPlus)
        return adapter

    @property
    def improved(self) -> bool:
        """Whether ``model`` is better than the classifier without the adapter."""
        return self.score > self.start


def tip_adapter(
    model: ImageClassifier,
    shots: LabelledImages,
    validation: LabelledImages,
    recipe: Recipe | None = None,
    *,
    joint: bool = True,
    batch_size: int = 128,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Adapted:
    """Learns a `TipAdapter`, together with the coefficients of the encoder or on its features.

    The cache holds the unit features of the shots, of one augmented view each. The start is the
    encoder as it is: its coefficients may be zero or already learned.

    Args:
        model: the classifier to adapt. What requires gradients in its encoder (the coefficients of
            a `ComposedModel`) learns with the adapter if ``joint``, and stays as it is otherwise.
        shots: the few labelled images, each once: repeats would fill the cache.
        validation: chooses the epoch.
        recipe: `TIP_JOINT` or `TIP_FROZEN` by default.
        joint: whether the encoder learns too. If not, its features are computed once: of the
            augmented views of an epoch, and of the plain validation images.
        batch_size: images per step.
        resume: as for `learn`.
        progress: as for `learn`.

    Raises:
        ValueError: ``joint``, and nothing in the encoder requires gradients; or labels or features
            do not fit the head.
        FloatingPointError: a loss is not finite.

    Source: aTLAS (arXiv 2407.02880), section 5.1 and appendix D.3.

    Example (a `ComposedModel` under a head; ``task`` is an `atlas_kernels.tasks.images.ImageTask`):
        ``shots = task.train.subset(sample_shots(task.train.labels, 4, seed=0))``
        ``adapted = tip_adapter(ImageClassifier(encoder, head), shots, task.validation)``
        ``adapted.adapter.save("adapter.safetensors")``
    """
    encoder, head = model.encoder, model.head
    _check_labels(head, shots.labels)
    coefficients = [p for p in encoder.parameters() if p.requires_grad]
    if joint and not coefficients:
        raise ValueError(
            "nothing in the encoder requires gradients, so nothing can learn jointly with the "
            "adapter: use joint=False, or an encoder that is a ComposedModel"
        )
    recipe = recipe or (TIP_JOINT if joint else TIP_FROZEN)
    shots, validation = (part.to(head.device) for part in (shots, validation))
    start = _accuracy(model, validation, batch_size)
    before = [p.detach().clone() for p in coefficients]
    generator = torch.Generator().manual_seed(recipe.seed)
    keys = features(encoder, shots.images, generator, batch_size)
    adapter = TipAdapter(head, keys, shots.labels)
    adapted = _with_adapter(encoder, adapter)
    train = shots.subset(oversample(torch.arange(len(shots)), batch_size * recipe.accumulate))
    learner: nn.Module = adapted
    if not joint:
        train = _frozen(encoder, train, batch_size, generator)
        validation = _frozen(encoder, validation, batch_size)
        learner = adapter
    learned = learn(
        learner,
        classify,
        _batches(train, batch_size, recipe.seed),
        recipe,
        evaluate=lambda candidate: _accuracy(candidate, validation, batch_size),
        resume=resume,
        progress=progress,
        description="Tip-Adapter",
    )
    if learned.score <= start:
        with torch.no_grad():
            for parameter, value in zip(coefficients, before, strict=True):
                parameter.copy_(value)
        adapted = _with_adapter(encoder, TipAdapter(head, keys, shots.labels, alpha=0.0))
    return Adapted(adapted.eval(), start, max(start, learned.score), learned)


def lp_plus_plus(
    model: ImageClassifier,
    shots: LabelledImages,
    validation: LabelledImages,
    *,
    epochs: int = 300,
    seed: int = 0,
    batch_size: int = 500,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Adapted:
    """Learns an `LPPlusPlus` adapter on the encoder's features, which stay as they are.

    W and b take a step of SGD with momentum 0.9 per epoch, on all shots, with the rate
    ``4 N / lambda_max(F.T F)``. Every tenth epoch alpha takes one with the rate
    ``N / (4 max_c sum_i (f_i . t_c)^2)``, along its gradient summed over all epochs so far (the
    published method never clears it).

    Args:
        model: the classifier to adapt; nothing in it changes.
        shots: the few labelled images, each once; one augmented view of each is used.
        validation: chooses the epoch.
        epochs: steps.
        seed: of the augmented views and of the start.
        batch_size: images at a time, when features are computed.
        resume: as for `learn`.
        progress: as for `learn`.

    Raises:
        ValueError: labels or features do not fit the head.
        FloatingPointError: the loss is not finite.

    Source: LP++ (arXiv 2404.02285); aTLAS (arXiv 2407.02880), section 5.1 and its code.

    Example (as for `tip_adapter`):
        ``adapted = lp_plus_plus(ImageClassifier(encoder, head), shots, task.validation)``
    """
    encoder, head = model.encoder, model.head
    _check_labels(head, shots.labels)
    shots, validation = (part.to(head.device) for part in (shots, validation))
    start = _accuracy(model, validation, batch_size)
    generator = torch.Generator().manual_seed(seed)
    shots = _frozen(encoder, shots, batch_size, generator)
    validation = _frozen(encoder, validation, batch_size)
    support = shots.images.plain(torch.arange(len(shots)))
    adapter = LPPlusPlus.start(head, support, shots.labels, seed)
    rate, alpha_rate = lp_rates(head, support)
    learned = learn(
        adapter,
        classify,
        _batches(shots, len(shots), seed),
        Recipe(epochs, rate, 0.0, "constant", seed=seed, lrs=(("alpha", alpha_rate),)),
        evaluate=lambda candidate: _accuracy(candidate, validation, batch_size),
        resume=resume,
        progress=progress,
        description="LP++",
        step=_LPStep,
    )
    if learned.score <= start:
        adapter = LPPlusPlus.zero_shot(head)
    return Adapted(
        _with_adapter(encoder, adapter).eval(), start, max(start, learned.score), learned
    )


def lp_rates(head: Tensor, features: Tensor) -> tuple[float, float]:
    """The learning rates of LP++ for W and b, and for alpha.

    ``4 N / lambda_max(F.T F)`` and ``N / (4 max_c sum_i (f_i . t_c)^2)`` of unit features F [N, d]
    and the unit rows t_c of the head [C, d]. Source: LP++ (arXiv 2404.02285).
    """
    count, features = len(features), features.double()
    largest = torch.linalg.eigvalsh(features.T @ features)[-1].item()
    squares = (features @ normalize(head.double(), dim=1).T).square().sum(0)
    return 4 * count / largest, count / (4 * squares.max().item())


class _LPStep:
    """SGD of W and b; every tenth time alpha moves too, along the sum of all its gradients."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], objective: Objective, recipe: Recipe
    ) -> None:
        self.objective = objective
        linear, alpha = [parameters["weight"], parameters["bias"]], [parameters["alpha"]]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [
                {"params": linear, "initial_lr": recipe.lr, "momentum": 0.9},
                # Momentum 1 is the sum.
                {"params": alpha, "initial_lr": dict(recipe.lrs)["alpha"], "momentum": 1.0},
            ],
            recipe.lr,
        )
        self.state: dict[str, Any] = {"steps": 0}

    def __call__(self, model: nn.Module, batches: Sequence[Any]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        value = backward(model, self.objective, batches)
        if math.isfinite(value):
            self.state["steps"] += 1
            if self.state["steps"] % _ALPHA_EVERY:
                self.optimizer.param_groups[1]["lr"] = 0.0
            self.optimizer.step()
        return value


def _with_adapter(encoder: nn.Module, adapter: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(encoder=encoder, adapter=adapter))


def _frozen(
    encoder: nn.Module,
    images: LabelledImages,
    batch_size: int,
    generator: torch.Generator | None = None,
) -> LabelledImages:
    """Features in place of the images, for which an adapter alone is the model."""
    computed = features(encoder, images.images, generator, batch_size)
    held = Images(
        len(computed), lambda chosen: computed[chosen], lambda chosen, _: computed[chosen]
    )
    return LabelledImages(held, images.labels)


def _batches(part: LabelledImages, batch_size: int, seed: int) -> ImageBatches:
    indices = torch.arange(len(part))
    return ImageBatches(indices, part.labels, batch_size, part.images.augmented, seed)


def _accuracy(model: nn.Module, part: LabelledImages, batch_size: int) -> float:
    return accuracy(model, torch.arange(len(part)), part.labels, part.images.plain, batch_size)


def _check_shots(head: Tensor, features: Tensor, labels: Tensor) -> None:
    if features.shape != (len(labels), head.shape[1]):
        raise ValueError(
            f"{len(labels)} labels and a head of width {head.shape[1]} need features of shape "
            f"{(len(labels), head.shape[1])}, got {tuple(features.shape)}"
        )
    _check_labels(head, labels)


def _check_labels(head: Tensor, labels: Tensor) -> None:
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(head):
        raise ValueError(
            f"labels must be in [0, {len(head)}), the classes of the head, but lie in "
            f"[{int(labels.min())}, {int(labels.max())}]"
        )
