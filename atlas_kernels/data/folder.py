"""Images of one's own: a folder per class, read when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1
MIN_SCALE = 0.5


@dataclass(frozen=True)
class FolderTask:
    """The images of a folder, by index, with their labels.

    Attributes:
        classnames: the names of the class folders, ``_`` replaced by a space.
        paths: the files of all parts.
        labels: int64 [n], one per path, indices into ``classnames``.
        train, validation, test: int64, disjoint indices into ``paths``.
    """

    classnames: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Tensor
    train: Tensor
    validation: Tensor
    test: Tensor


def load_folder(folder: str | Path) -> FolderTask:
    """Lists ``folder/{train,val,test}/{class}/*``; no image is read.

    Without ``test``, a fifth of every class of ``train`` (at least one image) is set apart for it,
    and without ``val`` a tenth: always the same images.

    Raises:
        ImportError: torchvision is not installed.
        FileNotFoundError: there is no such folder, or no ``train`` in it.
        ValueError: a class without images, or parts with different classes.
    """
    folder = Path(folder)
    if not (folder / "train").is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with images in train/CLASS/")
    classes, paths, labels = _listed(folder / "train")
    parts = {"train": torch.arange(len(paths))}
    for part in ("val", "test"):
        if not (folder / part).is_dir():
            continue
        its_classes, its_paths, its_labels = _listed(folder / part)
        differing = sorted(set(classes) ^ set(its_classes))
        if differing:
            raise ValueError(
                f"{folder}: class {differing[0]!r} is not in both train and {part}, expected the "
                "same classes in both"
            )
        parts[part] = torch.arange(len(paths), len(paths) + len(its_paths))
        paths, labels = paths + its_paths, labels + its_labels
    every = torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    for part, share in (("test", TEST_SHARE), ("val", VALIDATION_SHARE)):
        if part not in parts:
            parts["train"], parts[part] = _divided(parts["train"], every, share, generator)
    names = tuple(name.replace("_", " ") for name in classes)
    return FolderTask(names, tuple(paths), every, parts["train"], parts["val"], parts["test"])


class ImageReader:
    """Batches of the model's input from image files, decoded by threads.

    Args:
        paths: of all images.
        size: (height, width) of the model's input.
        preprocess: an RGB image to float [3, height, width].
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: tuple[int, int],
        preprocess: Callable[[Image], Tensor],
    ) -> None:
        self.paths = paths
        self.size = size
        self.preprocess = preprocess

    def plain(self, indices: Tensor) -> Tensor:
        """Images [b, 3, height, width] of these indices."""
        return self._stacked(lambda index: self.preprocess(self._read(index)), indices.tolist())

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """The same under a random resized crop and, with probability 1/2, mirrored.

        Area of a crop: uniform in [1/2, 1] of the image's; aspect ratio: log-uniform in [3/4, 4/3];
        bicubic. Source: aTLAS (arXiv 2407.02880), appendix D.
        """
        # Drawn before the threads begin: the result does not depend on their order.
        draws = torch.rand(len(indices), 5, generator=generator).tolist()
        return self._stacked(
            lambda index, draw: self.preprocess(random_crop(self._read(index), self.size, draw)),
            indices.tolist(),
            draws,
        )

    def _stacked(self, function: Callable[..., Tensor], *arguments: list[Any]) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(function, *arguments)))

    def _read(self, index: int) -> Image:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a readable image ({error})") from error


def random_crop(image: Image, size: tuple[int, int], draw: Sequence[float]) -> Image:
    """A crop, enlarged or reduced to ``size`` (height, width), from five numbers in [0, 1).

    They choose area, aspect ratio, horizontal and vertical place, and whether it is mirrored.
    """
    from PIL import Image

    area = image.width * image.height * (MIN_SCALE + (1 - MIN_SCALE) * draw[0])
    ratio = (4 / 3) ** (2 * draw[1] - 1)
    # A crop larger than the image is cut back to it: there are no pixels outside.
    width = min((area * ratio) ** 0.5, image.width)
    height = min((area / ratio) ** 0.5, image.height)
    left, top = (image.width - width) * draw[2], (image.height - height) * draw[3]
    crop = image.resize(
        (size[1], size[0]), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
    )
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw[4] < 0.5 else crop


def _listed(folder: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, and the paths of all images with their labels; sorted."""
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise ImportError(
            "folders of images need torchvision, which is not installed: run"
            " pip install 'atlas_kernels[clip]'"
        ) from error
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        # It says which classes are empty, not where.
        raise ValueError(f"{folder}: {error}") from error
    paths, labels = zip(*found.samples, strict=True)
    return found.classes, list(paths), list(labels)


def _divided(
    indices: Tensor, labels: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What is left, and a share of every class, at least one."""
    left, taken = [], []
    for label in labels[indices].unique():
        members = indices[labels[indices] == label]
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(share * len(members)))
        taken.append(members[:count])
        left.append(members[count:])
    return torch.cat(left), torch.cat(taken)
