"""Images of one's own: a folder per class, read when they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .images import Images, LabelledImages
from .reader import ImageReader, open_image
from .task import ImageTask
from .words import plain

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = ("a photo of a {}.",)
CLASSNAMES = "classnames.txt"
PARTS = {"train": "train", "validation": "val", "test": "test"}
LAYOUT = "train/CLASS/*.jpg, and likewise val and test"

# Without a folder of its own, a part is one image of so many of train, and no more than so many.
_SPLIT_OFF = {"test": (5, None), "validation": (10, 5000)}
_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """One part of a data set as it lies on the disk: nothing is decoded yet.

    Attributes:
        classes: as the files call them.
        labels: int64 [n], indices into ``classes``.
        read: an index to the image.
    """

    classes: tuple[str, ...]
    labels: Tensor
    read: Callable[[int], Image]


def load_folder(
    folder: str | Path,
    size: tuple[int, int],
    preprocess: Callable[[Image], Tensor],
    templates: Sequence[str] = TEMPLATES,
) -> ImageTask:
    """The task of ``folder/{train,val,test}/{class}/*``; no image is decoded yet.

    Without ``test`` a fifth of ``train`` is set apart for it, and without ``val`` a tenth (at most
    5000 images): the same share of every class, at least one image, and always the same ones.

    A class is called as its folder, ``_`` replaced by a space, or as its line of
    ``folder/classnames.txt`` says: one name per class, in the order of the sorted folders.

    Args:
        folder: of the images.
        size: (height, width) of the model's input.
        preprocess: an RGB image to float [3, height, width], such as
            ``open_clip.image_transform(size, is_train=False)``.
        templates: prompts, each with one ``{}`` for the class name.

    Raises:
        FileNotFoundError: there is no such folder, or no ``train`` in it.
        ValueError: a class without images, parts with different classes, or a wrong number of
            class names.
    """
    folder = Path(folder)
    listings = list_parts(folder, PARTS)
    return assemble(folder.resolve().name, folder, listings, plain, templates, size, preprocess)


def list_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, Listing]:
    """The parts that have a folder, by name; ``train`` must."""
    if not (folder / parts["train"]).is_dir():
        raise FileNotFoundError(f"{folder}: expected a folder with images in {LAYOUT}")
    return {
        part: list_images(folder / its) for part, its in parts.items() if (folder / its).is_dir()
    }


def list_images(
    folder: Path, class_of: Callable[[tuple[str, ...]], str | None] = lambda path: path[0]
) -> Listing:
    """All images in the folders of a folder, sorted by path; links are followed.

    ``class_of`` maps an image's path, relative to ``folder`` and in parts, to the name of its
    class, or None if it has none. Raises ValueError if a folder holds no image.
    """
    found: list[tuple[str, str]] = []
    filled = set()
    for place, _, names in os.walk(folder, followlinks=True):
        parents = Path(place).relative_to(folder).parts
        images = [n for n in names if n.lower().endswith(_ENDINGS) and not n.startswith(".")]
        if not parents or not images:
            continue
        filled.add(parents[0])
        for name in images:
            its = class_of((*parents, name))
            if its is not None:
                found.append((its, os.path.join(place, name)))
    hollow = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - filled)
    if hollow or not found:
        what = f"folder {hollow[0]!r} holds" if hollow else "its folders hold"
        raise ValueError(f"{folder}: {what} no image, expected {', '.join(_ENDINGS)}")
    found.sort()
    classes = tuple(sorted({name for name, _ in found}))
    row = {name: index for index, name in enumerate(classes)}
    paths = [path for _, path in found]
    labels = torch.tensor([row[name] for name, _ in found])
    return Listing(classes, labels, lambda index: open_image(paths[index]))


def assemble(
    name: str,
    folder: Path,
    listings: Mapping[str, Listing],
    words: Callable[[Sequence[str]], Sequence[str]],
    templates: Sequence[str],
    size: tuple[int, int],
    preprocess: Callable[[Image], Tensor],
) -> ImageTask:
    """The task of a folder's listings, of which at least ``train`` is there; see `load_folder`.

    ``words`` makes class names of ``Listing.classes``, unless ``folder/classnames.txt`` has them.
    """
    classes = listings["train"].classes
    for part, listing in listings.items():
        differing = sorted(set(classes) ^ set(listing.classes))
        if differing:
            raise ValueError(
                f"{folder}: class {differing[0]!r} is not in both train and {part}, expected the "
                "same classes in both"
            )
    parts = {part: readable(listing, size, preprocess) for part, listing in listings.items()}
    for part, (share, most) in _SPLIT_OFF.items():
        if part not in parts:
            count = len(parts["train"]) // share
            count = count if most is None else min(count, most)
            parts["train"], parts[part] = split_off(parts["train"], count)
    return ImageTask(
        name,
        _named(folder / CLASSNAMES, len(classes)) or tuple(words(classes)),
        tuple(templates),
        parts["train"],
        parts["validation"],
        parts["test"],
    )


def readable(
    listing: Listing, size: tuple[int, int], preprocess: Callable[[Image], Tensor]
) -> LabelledImages:
    """A listing as the model takes it."""
    reader = ImageReader(listing.read, size, preprocess)
    images = Images(len(listing.labels), reader.plain, reader.augmented)
    return LabelledImages(images, listing.labels)


def split_off(part: LabelledImages, count: int) -> tuple[LabelledImages, LabelledImages]:
    """What is left, and ``count`` images: of every class its share, at least one.

    Always the same ones; more than ``count`` if there are more classes.
    """
    shuffled = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    labels = part.labels[shuffled]
    sizes = labels.bincount()
    by_class = labels.argsort(stable=True)
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(part)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    # Each image's place among those of its class, from 0 to 1: the first places are shares of all.
    place = torch.where(rank == 0, 0.0, (rank + 0.5) / sizes[labels])
    order = shuffled[place.argsort(stable=True)]
    count = max(count, int((sizes > 0).sum()))
    return part.subset(order[count:].sort().values), part.subset(order[:count].sort().values)


def _named(path: Path, count: int) -> tuple[str, ...]:
    """The lines of a file of class names; () if there is none."""
    if not path.is_file():
        return ()
    names = tuple(path.read_text(encoding="utf-8").split("\n"))
    names = tuple(name.strip() for name in names if name.strip())
    if len(names) != count:
        raise ValueError(f"{path}: {len(names)} class names, but there are {count} classes")
    return names
