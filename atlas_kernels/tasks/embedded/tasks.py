"""The embedded image tasks: four small real sets of images, each under six named shifts.

A task is called ``{dataset}-{shift}``, e.g. ``fashion-inverted``. Nothing is read before the first
call.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from .paths import IMAGES

IMAGE_SIZE = 32
PARTS = ("pretraining", "train", "validation", "test")

# A third of the range of brightness: hard, not hopeless (a fine-tuned model loses about 0.1).
NOISE_STD = 80.0

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_TEMPLATES = ("a picture of the digit {}", "the handwritten number {}", "a drawing of a {}")

# Both sets of digits share their words: what relates the two tasks is then in the images alone.
_DATASETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "animals": (
        ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"),
        ("a picture of a {}", "the shape of a {}", "a drawing of a {}, an animal"),
    ),
    "digits": (_DIGITS, _DIGIT_TEMPLATES),
    "fashion": (
        (
            "t-shirt",
            "pair of trousers",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        ("a picture of a {}", "a piece of clothing: a {}", "a product photo of a {}"),
    ),
    "mnist": (_DIGITS, _DIGIT_TEMPLATES),
}


def _noise(images: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE_STD * torch.randn(images.shape, generator=generator)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


# Each maps uint8 images [n, 32, 32] and a seed, which only the noise reads, to images like them.
SHIFTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "clean": lambda images, _: images,
    "inverted": lambda images, _: 255 - images,
    "rotated": lambda images, _: images.rot90(1, (1, 2)).contiguous(),
    "noise": _noise,
    "contrast": lambda images, _: images // 2 + 64,
    "flipped": lambda images, _: images.flip(1),
}
"""clean; inverted brightness; rotated by 90 degrees; Gaussian noise; half contrast; upside down."""


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [n, 32, 32].
        labels: int64 [n], indices into the task's class names.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """A set of images under one shift, with its class names and prompt templates.

    ``train``, ``validation`` and ``test`` are disjoint, and disjoint from the set's pre-training
    images; each is class-balanced, and so is each prefix of a multiple of the class count.
    """

    name: str
    dataset: str
    shift: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


def dataset_names() -> tuple[str, ...]:
    """The sets of images that travel with the package."""
    return tuple(_DATASETS)


def task_names() -> tuple[str, ...]:
    """All embedded tasks, by set and then by shift."""
    return tuple(f"{dataset}-{shift}" for dataset in _DATASETS for shift in SHIFTS)


def load_task(name: str) -> Task:
    """The embedded task of this name; `ValueError`, with the known ones, if there is none."""
    if name not in task_names():
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(task_names())}")
    dataset, shift = name.rsplit("-", 1)
    classnames, templates = _DATASETS[dataset]
    train, validation, test = (_shifted(dataset, part, shift) for part in PARTS[1:])
    return Task(name, dataset, shift, classnames, templates, train, validation, test)


def pretraining_split(dataset: str, shift: str = "clean") -> Split:
    """The images of a set that only the base model is trained on, under one shift.

    Raises:
        ValueError: an unknown set or shift.
    """
    if dataset not in _DATASETS or shift not in SHIFTS:
        raise ValueError(
            f"no pre-training images for {dataset!r}, {shift!r}: choose one of"
            f" {', '.join(_DATASETS)} and one of {', '.join(SHIFTS)}"
        )
    return _shifted(dataset, "pretraining", shift)


def preprocess(images: Tensor) -> Tensor:
    """Normalised float32 images [n, 3, h, w] from uint8 grey images [n, h, w].

    The value is (x / 255 - 0.5) / 0.5, the same in the three channels that open_clip's towers
    expect; these share their memory.

    Raises:
        ValueError: another dtype or number of dimensions.
    """
    if images.dtype != torch.uint8 or images.ndim != 3:
        raise ValueError(
            "expected uint8 images [n, height, width],"
            f" got {images.dtype} of shape {tuple(images.shape)}"
        )
    scaled = images.to(torch.float32).div_(127.5).sub_(1.0)
    return scaled.unsqueeze(1).expand(-1, 3, -1, -1)


def augment(
    batch: Tensor, generator: torch.Generator | None = None, *, min_scale: float = 0.5
) -> Tensor:
    """Random resized crop of every image on its own, in one pass; no flip: it would change a digit.

    Area of a crop: uniform in [min_scale, 1] of the image's; aspect ratio: log-uniform in
    [3/4, 4/3]; bilinear.

    Args:
        batch: float [n, c, h, w].
        generator: on the CPU, the only source of randomness; by default torch's global one.
        min_scale: smallest area.

    Returns:
        [n, c, h, w], dtype and device of ``batch``.
    """
    if not len(batch):
        return batch.clone()
    draw = torch.rand(4, len(batch), generator=generator)
    area = min_scale + (1 - min_scale) * draw[0]
    ratio = torch.exp((2 * draw[1] - 1) * np.log(4 / 3))
    # A crop larger than the image is cut back to it: sampling outside would invent pixels.
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(len(batch), 2, 3)
    theta[:, 0, 0] = width
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * (2 * draw[2] - 1)
    theta[:, 1, 2] = (1 - height) * (2 * draw[3] - 1)
    grid = affine_grid(theta.to(batch), list(batch.shape), align_corners=False)
    return grid_sample(batch, grid, padding_mode="border", align_corners=False)


@cache
def _part(dataset: str, part: str) -> Split:
    """One stored part at 32x32: 28x28 images are framed by zeros, 8x8 ones enlarged by 4."""
    with np.load(IMAGES / f"{dataset}.npz", allow_pickle=False) as arrays:
        images = torch.from_numpy(arrays[f"{part}_images"])
        labels = torch.from_numpy(arrays[f"{part}_labels"]).to(torch.int64)
    side = images.shape[-1]
    if side < IMAGE_SIZE // 2:
        # Exact in float32 (weights are multiples of 1/64), hence the same bytes everywhere.
        enlarged = interpolate(
            images.unsqueeze(1).float(),
            size=(IMAGE_SIZE, IMAGE_SIZE),
            mode="bilinear",
            align_corners=False,
        )
        images = enlarged.squeeze(1).round().to(torch.uint8)
    else:
        images = pad(images, [(IMAGE_SIZE - side) // 2] * 4)
    return Split(images, labels)


def _shifted(dataset: str, part: str, shift: str) -> Split:
    clean = _part(dataset, part)
    seed = zlib.crc32(f"{dataset} {part} {shift}".encode())
    # Never the cached tensors themselves: a caller may write to what it got.
    return Split(SHIFTS[shift](clean.images, seed).clone(), clean.labels.clone())
