"""Making task vectors: fine-tuning under a frozen head, of all weights, of a tangent, or of LoRA.

Source: aTLAS (arXiv 2407.02880), appendix A; linearised models: section 5; LoRA (arXiv 2106.09685):
section 6.1 and appendix D.7.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bank import chosen, factor_names, multiply
from ..files import digest
from ..models import call_with, expand
from ..tasks.clip import ImageClassifier
from ..tasks.images import LabelledImages
from ..vectors import Delta, LowRank, TaskVector
from .few_shot import ImageBatches, classify
from .trainer import Recipe, learn

_PUBLISHED_EPOCHS = {
    "caltech101": 10,
    "caltech256": 8,
    "cars": 35,
    "cifar10": 5,
    "cifar100": 6,
    "country211": 15,
    "cub200": 20,
    "dtd": 76,
    "eurosat": 12,
    "fgvcaircraft": 60,
    "flowers102": 40,
    "food101": 15,
    "gtsrb": 11,
    "imagenet": 10,
    "mnist": 5,
    "oxfordiiitpet": 5,
    "pascalvoc": 10,
    "resisc45": 15,
    "stl10": 4,
    "sun397": 14,
    "svhn": 4,
    "ucf101": 20,
}

FINETUNING = {
    task: Recipe(epochs=epochs, lr=1e-5, warmup=500) for task, epochs in _PUBLISHED_EPOCHS.items()
}
"""The published recipes of fine-tuning by task, for all weights and for tangents; batches of 128.

Source: aTLAS, appendix A.
"""

LORA_FINETUNING = {task: replace(recipe, lr=1e-3) for task, recipe in FINETUNING.items()}
"""The same for LoRA. Source: aTLAS, section 6.1."""

LORA_TARGETS = ("*.in_proj_weight", "*.out_proj.weight", "*.c_fc.weight", "*.c_proj.weight")
"""Patterns of the weights that get factors: four in every layer of an open_clip transformer."""


class Tuning(nn.Module):
    """An encoder and what of it learns: one of the three below."""

    def task_vector(self, name: str = "") -> TaskVector:
        """What was learned so far, in float32, bound to the encoder that it started from."""
        raise NotImplementedError


class FullTuning(Tuning):
    """All weights of an encoder learn. Weight decay pulls them to 0, as in the paper.

    Args:
        encoder: where to start, any module; stays as it is.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self._start = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        """The encoder's features."""
        features: Tensor = self.encoder(images)
        return features

    def task_vector(self, name: str = "") -> TaskVector:
        """``weights - start``, buffers (BatchNorm statistics) apart."""
        state = {
            key: value.to(self._start[key]) for key, value in self.encoder.state_dict().items()
        }
        return TaskVector.from_state_dicts(self._start, state, torch.float32, name)


class _OnFrozen(Tuning):
    """A frozen encoder, always in eval mode, and something that learns besides."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> _OnFrozen:
        """Training mode is the model's, never the encoder's."""
        super().train(mode)
        self.encoder.eval()
        return self

    def _vector(self, deltas: dict[str, Delta], name: str) -> TaskVector:
        parameters = self.encoder.named_parameters(remove_duplicate=False)
        return TaskVector(deltas, base={key: digest(p) for key, p in parameters}, name=name)


class LinearTuning(_OnFrozen):
    """A tangent v of the weights learns: features ``f(x; theta_0) + J(x) @ v``, v = 0 at the start.

    Its task vectors are for `atlas_kernels.LinearizedModel`. Weight decay pulls v to 0.

    Args:
        encoder: the start, any module; stays as it is.

    Source: tangent task arithmetic (arXiv 2305.12827); aTLAS, equation 1.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__(encoder)
        # A module of tangents has the encoder's names, and ties its tied weights.
        self.tangent = copy.deepcopy(self.encoder).requires_grad_(True)
        for parameter in self.tangent.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """The expansion of the encoder's features."""
        return expand(self.encoder, dict(self.tangent.named_parameters()), images)

    def task_vector(self, name: str = "") -> TaskVector:
        """The tangent."""
        parameters = self.tangent.named_parameters()
        return self._vector(
            {key: v.detach().to(torch.float32, copy=True) for key, v in parameters}, name
        )


class LoraTuning(_OnFrozen):
    """Factors learn: weights ``W + alpha / rank * B @ A``, A Kaiming-uniform (a = sqrt 5), B zero.

    Args:
        encoder: the start, any module; stays as it is.
        rank: r: A is (r, in), B (out, r).
        alpha: the product's factor is ``alpha / rank``.
        targets: shell-style patterns of the weights that get factors.
        seed: of A.

    Raises:
        ValueError: no weight matches ``targets``, or one of fewer than two dimensions does; or a
            rank below 1.
    """

    def __init__(
        self,
        encoder: nn.Module,
        rank: int = 16,
        alpha: float = 32.0,
        targets: str | Sequence[str] = LORA_TARGETS,
        seed: int = 0,
    ) -> None:
        super().__init__(encoder)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        found = {key: p for key, p in self.encoder.named_parameters() if chosen(key, targets, None)}
        if not found:
            raise ValueError(
                f"no weight of the encoder matches {targets}: its parameters are "
                f"{', '.join(list(dict(self.encoder.named_parameters()))[:5])}, ..."
            )
        flat = [key for key, parameter in found.items() if parameter.ndim < 2]
        if flat:
            raise ValueError(
                f"only weights of two or more dimensions have factors, not {flat[0]!r}"
            )
        self.scales = dict.fromkeys(found, alpha / rank)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        for weight in found.values():
            down = torch.empty(rank, *weight.shape[1:])
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            self.down.append(down.to(weight.device))
            self.up.append(torch.zeros(len(weight), rank, device=weight.device))

    def forward(self, images: Tensor) -> Tensor:
        """The features of the encoder with the products added."""
        factors = {
            name: factor
            for key, *pair in zip(self.scales, self.down, self.up, strict=True)
            for name, factor in zip(factor_names(key), pair, strict=True)
        }
        weights = {key: self.encoder.get_parameter(key) for key in self.scales}
        composed = multiply(factors, weights, self.scales)
        features: Tensor = call_with(self.encoder, composed, (images,))
        return features

    def task_vector(self, name: str = "") -> TaskVector:
        """The factors (`LowRank`)."""
        deltas: dict[str, Delta] = {
            key: LowRank(up.detach().clone(), down.detach().clone(), scale)
            for (key, scale), down, up in zip(self.scales.items(), self.down, self.up, strict=True)
        }
        return self._vector(deltas, name)


def finetune(
    tuning: Tuning,
    head: Tensor,
    images: LabelledImages,
    recipe: Recipe,
    *,
    batch_size: int = 128,
    name: str = "",
    evaluate: Callable[[nn.Module], float] | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> TaskVector:
    """A task vector: cross-entropy on augmented images under the frozen head.

    Args:
        tuning: what learns, of which encoder.
        head: [C, d] (see `atlas_kernels.tasks.clip.zero_shot_head`).
        images: the training images.
        recipe: one of `FINETUNING` or `LORA_FINETUNING`, for example.
        batch_size: images per step.
        name: of the task vector.
        evaluate: as for `learn`: the best epoch is kept; by default the last.
        resume: as for `learn`.
        progress: as for `learn`.

    Returns:
        `Tuning.task_vector`.

    Raises:
        FloatingPointError: a loss is not finite.

    Example:
        >>> import torch
        >>> from atlas_kernels.tasks.images import Images, LabelledImages
        >>> from atlas_kernels.learn import LoraTuning, Recipe, finetune
        >>> pixels, labels = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> images = Images(4, lambda i: pixels[i], lambda i, generator: pixels[i])
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tuning = LoraTuning(encoder, rank=2, targets="0.weight")
        >>> vector = finetune(
        ...     tuning, torch.randn(2, 3), LabelledImages(images, labels), Recipe(1, 1e-3),
        ...     name="parity", progress=False,
        ... )
        >>> vector.name, vector.deltas["0.weight"].rank
        ('parity', 2)
    """
    batches = ImageBatches(
        torch.arange(len(images)), images.labels, batch_size, images.images.augmented, recipe.seed
    )
    learn(
        ImageClassifier(tuning, head),
        classify,
        batches,
        recipe,
        evaluate=evaluate,
        resume=resume,
        progress=progress,
        description=f"fine-tuning {name}".rstrip(),
    )
    return tuning.task_vector(name)
