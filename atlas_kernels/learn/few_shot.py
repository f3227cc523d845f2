"""Few-shot recognition: the images, their order, and the objective."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from ..tasks.images import Images

Transform = Callable[[Tensor, torch.Generator], Tensor]


def sample_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices int64 of ``shots`` random examples per class, or all of a class that has fewer.

    labels: int64 [n].  The same seed gives the same examples.

    Example:
        >>> import torch
        >>> from atlas_kernels.learn import sample_shots
        >>> sample_shots(torch.tensor([0, 1, 0, 1, 0]), shots=1, seed=0).numel()
        2
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)


def oversample(indices: Tensor, batch_size: int) -> Tensor:
    """``indices``, repeated if they fill fewer than ten batches.

    N indices with N / B < 10 are repeated floor(10 * B / N) + 1 times (the published rule): tiny
    sets get enough steps per epoch. Source: aTLAS code, few-shot data loader.
    """
    count = len(indices)
    if count == 0 or count / batch_size >= 10:
        return indices
    return indices.repeat(10 * batch_size // count + 1)


class ImageBatches:
    """Shuffled batches (images, labels) of tensors in memory, by epoch (a `Batches`).

    Args:
        images: [n, ...], anything that ``transform`` takes.
        labels: int64 [n].
        batch_size: images per batch; the last batch of an epoch may be smaller.
        transform: (images [b, ...], generator) to the model's input; called once per batch.
        seed: of order and transform; epoch e depends on (seed, e) alone.
        indices: the examples to use, repeats included; all by default.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        transform: Transform,
        seed: int,
        indices: Tensor | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.transform = transform
        self.seed = seed
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        order = self.indices[torch.randperm(len(self.indices), generator=generator)]
        for chosen in order.split(self.batch_size):
            yield self.transform(self.images[chosen], generator), self.labels[chosen]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The supervised objective: mean cross-entropy of the model's logits."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    transform: Callable[[Tensor], Tensor],
    batch_size: int = 500,
) -> float:
    """The share of images whose largest logit is their label's, in [0, 1].

    ``transform`` maps images [b, ...] to the model's input. Without gradients, in eval mode.
    """
    if not len(labels):
        raise ValueError("accuracy needs at least one image")
    model.eval()
    correct = 0
    with torch.no_grad():
        for part, expected in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((model(transform(part)).argmax(1) == expected).sum())
    return correct / len(labels)


def features(
    encoder: nn.Module,
    images: Images,
    generator: torch.Generator | None = None,
    batch_size: int = 500,
) -> Tensor:
    """The features of all images in their order, float32 [n, d] of unit length.

    Without gradients, in eval mode; on the encoder's device.

    Args:
        encoder: images to features [b, d].
        images: at least one.
        generator: draws an augmented view of each image; without, images are plain.
        batch_size: images at a time.

    Example:
        >>> import torch
        >>> from atlas_kernels.tasks.images import Images
        >>> from atlas_kernels.learn import features
        >>> inputs = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> images = Images(2, lambda chosen: inputs[chosen], lambda chosen, _: inputs[chosen])
        >>> features(torch.nn.Identity(), images).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """
    if not len(images):
        raise ValueError("features need at least one image")
    encoder.eval()
    parts = []
    with torch.no_grad():
        for chosen in torch.arange(len(images)).split(batch_size):
            part = images.augmented(chosen, generator) if generator else images.plain(chosen)
            parts.append(normalize(encoder(part).float(), dim=-1))
    return torch.cat(parts)
