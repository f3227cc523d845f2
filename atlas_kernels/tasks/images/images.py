"""Images by index, wherever they lie: what every method that learns from images is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A set of images without labels.

    Attributes:
        count: how many.
        plain: indices int64 [b] to the model's input [b, 3, height, width], as in evaluation.
        augmented: the same under random augmentation, drawn from the generator alone.
    """

    count: int
    plain: Callable[[Tensor], Tensor]
    augmented: Callable[[Tensor, torch.Generator], Tensor]

    def __len__(self) -> int:
        return self.count

    def subset(self, indices: Tensor) -> Images:
        """The images at ``indices`` (int64 [n], repeats allowed) as a set of their own."""
        return Images(
            len(indices),
            lambda chosen: self.plain(indices[chosen]),
            lambda chosen, generator: self.augmented(indices[chosen], generator),
        )

    def to(self, device: torch.device | str) -> Images:
        """The same images, with the model's input on ``device``."""
        return Images(
            self.count,
            lambda chosen: self.plain(chosen).to(device),
            lambda chosen, generator: self.augmented(chosen, generator).to(device),
        )


@dataclass(frozen=True)
class LabelledImages:
    """Images with their labels.

    Attributes:
        images: n of them.
        labels: int64 [n], indices into the task's class names.
    """

    images: Images
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.images):
            raise ValueError(f"{len(self.images)} images have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> LabelledImages:
        """The examples at ``indices`` (int64 [n], repeats allowed)."""
        return LabelledImages(self.images.subset(indices), self.labels[indices])

    def to(self, device: torch.device | str) -> LabelledImages:
        """The same examples, with labels and the model's input on ``device``."""
        return LabelledImages(self.images.to(device), self.labels.to(device))
