"""The data sets of the paper on the user's disk: where their files lie and what they show.

Nothing is ever downloaded. A data set lies in ``ROOT/NAME``, either as a folder per class or as its
authors' archive unpacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import words
from .folder import LAYOUT, PARTS, Listing, assemble, list_images, list_parts
from .task import ImageTask

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class ClassFolders:
    """An archive with a folder per class.

    torchvision's own readers of these follow the order of the file system, make folders in the
    user's, or need SciPy to open an image.

    Attributes:
        parts: the folder of each part.
        class_of: see `list_images`.
    """

    parts: Mapping[str, str]
    class_of: Callable[[tuple[str, ...]], str | None] = lambda path: path[0]

    @property
    def needed(self) -> tuple[str, ...]:
        """The files and folders that must be there."""
        return tuple(self.parts.values())

    def describe(self, folder: Path) -> str:
        """What is expected in the folder, for an error."""
        return f"the published archive, unpacked in {folder}"

    def listings(self, folder: Path) -> dict[str, Listing]:
        """The parts by name."""
        return {part: list_images(folder / its, self.class_of) for part, its in self.parts.items()}


@dataclass(frozen=True)
class Torchvision:
    """What a class of torchvision.datasets reads.

    Attributes:
        reader: the name of the class.
        parts: its arguments for each part.
        needed: the files and folders that must be there.
    """

    reader: str
    parts: Mapping[str, Mapping[str, Any]]
    needed: tuple[str, ...]

    def describe(self, folder: Path) -> str:
        """What is expected in the folder, for an error."""
        return f"what torchvision.datasets.{self.reader}(root={str(folder)!r}) reads"

    def listings(self, folder: Path) -> dict[str, Listing]:
        """The parts by name."""
        try:
            from torchvision import datasets

            return {
                part: _listed(getattr(datasets, self.reader)(root=str(folder), **arguments))
                for part, arguments in self.parts.items()
            }
        except ImportError as error:  # torchvision, or SciPy, which it needs for some
            raise ImportError(
                f"reading {folder} needs {error.name}, which is not installed: run"
                " pip install 'atlas_kernels[data]'"
            ) from error
        # Whatever a half-unpacked or damaged archive makes it stumble over.
        except Exception as error:
            raise ValueError(
                f"{folder}: torchvision.datasets.{self.reader} cannot read it ({error})"
            ) from error


@dataclass(frozen=True)
class DataSet:
    """One data set of the catalog.

    Attributes:
        templates: prompts, each with one ``{}`` for the class name.
        archive: its layout as published; None if only a folder per class is read.
        words: class names from what the files call the classes.
        folders: the folder of each part in the layout of a folder per class.
    """

    templates: tuple[str, ...]
    archive: ClassFolders | Torchvision | None = None
    words: Callable[[Sequence[str]], Sequence[str]] = words.plain
    folders: Mapping[str, str] = field(default_factory=lambda: PARTS)


def load_images(
    name: str, root: str | Path, size: tuple[int, int], preprocess: Callable[[Image], Tensor]
) -> ImageTask:
    """A data set of `CATALOG` in ``root/name``; no image is decoded yet.

    Read is ``root/name/{train,val,test}/{class}/*`` if there is a ``train``, else the published
    archive: what ``torchvision.datasets`` reads with ``root/name`` as its root, or the archive's
    own folders of classes. A validation part that a data set lacks is split off train, a tenth and
    at most 5000 images; for those without a test part (EuroSAT, SUN397, Caltech-101, Caltech-256),
    a fifth. ``root/name/classnames.txt``, one name per line, overrides the names of the classes.

    Args:
        name: such as "cars".
        root: the folder of all data sets.
        size: (height, width) of the model's input.
        preprocess: an RGB image to float [3, height, width]; see
            `atlas_kernels.tasks.clip.preprocess_for`.

    Raises:
        ImportError: torchvision, or SciPy (cars, svhn, flowers102), is needed and not installed.
        FileNotFoundError: the files are not there; it says which, and what is expected where.
        ValueError: an unknown name, or files that cannot be read.

    Example:
        ``load_images("eurosat", "/data", *preprocess_for(model))``
    """
    if name not in CATALOG:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(CATALOG)}")
    its, folder = CATALOG[name], Path(root) / name
    if (folder / its.folders["train"]).is_dir():
        listings = list_parts(folder, its.folders)
    else:
        if its.archive is None:
            raise FileNotFoundError(f"{name}: expected images in {folder}/{LAYOUT}")
        missing = [file for file in its.archive.needed if not (folder / file).exists()]
        if missing:
            raise FileNotFoundError(
                f"{name}: expected images in {folder}/{LAYOUT}; or"
                f" {its.archive.describe(folder)}, but there is no {', no '.join(missing)}"
            )
        listings = its.archive.listings(folder)
    return assemble(name, folder, listings, its.words, its.templates, size, preprocess)


def _listed(dataset: Any) -> Listing:
    """One part as torchvision holds it."""
    # It has no one name for the labels.
    held = [getattr(dataset, name) for name in _LABELS if hasattr(dataset, name)]
    labels = held[0] if held else [label for _, label in dataset._samples]
    every = torch.as_tensor(labels, dtype=torch.int64)
    classes = getattr(dataset, "classes", None) or range(int(every.max()) + 1)
    return Listing(tuple(map(str, classes)), every, lambda index: dataset[index][0])


_LABELS = ("targets", "labels", "_labels")

_SPLITS = {"train": {"split": "train"}, "test": {"split": "test"}}
_OWN_VALIDATION = {**_SPLITS, "validation": {"split": "val"}}
_FLAGS = {"train": {"train": True}, "test": {"train": False}}

_OBJECTS = ("a photo of a {}.", "a picture of a {}.", "an image that shows a {}.")
_SMALL = ("a photo of a {}.", "a blurry photo of a {}.", "a small picture of a {}.")

CATALOG: Mapping[str, DataSet] = {
    "cars": DataSet(
        ("a photo of a {}.", "a photo of a {}, a car.", "a picture of the car {}."),
        Torchvision(
            "StanfordCars",
            _SPLITS,
            (
                "stanford_cars/devkit",
                "stanford_cars/cars_train",
                "stanford_cars/cars_test",
                "stanford_cars/cars_test_annos_withlabels.mat",
            ),
        ),
    ),
    "dtd": DataSet(
        ("a photo of a {} texture.", "a photo of a {} pattern.", "a surface that is {}."),
        Torchvision("DTD", _OWN_VALIDATION, ("dtd/dtd/images", "dtd/dtd/labels")),
    ),
    "eurosat": DataSet(
        ("a satellite photo of {}.", "{}, seen from above.", "an aerial picture of {}."),
        ClassFolders({"train": "eurosat/2750"}),
        words.eurosat,
    ),
    "gtsrb": DataSet(
        ("a photo of the traffic sign: {}.", "a road sign that means: {}."),
        Torchvision(
            "GTSRB",
            _SPLITS,
            (
                "gtsrb/GTSRB/Training",
                "gtsrb/GTSRB/Final_Test/Images",
                "gtsrb/GT-final_test.csv",
            ),
        ),
        words.traffic_signs,
    ),
    "mnist": DataSet(
        ("a photo of the digit {}.", "the handwritten number {}."),
        Torchvision(
            "MNIST",
            _FLAGS,
            (
                "MNIST/raw/train-images-idx3-ubyte",
                "MNIST/raw/train-labels-idx1-ubyte",
                "MNIST/raw/t10k-images-idx3-ubyte",
                "MNIST/raw/t10k-labels-idx1-ubyte",
            ),
        ),
        words.first,
    ),
    "resisc45": DataSet(
        ("a satellite photo of a {}.", "an aerial picture of a {}.", "a {}, seen from above."),
    ),
    "sun397": DataSet(
        ("a photo of a {}.", "a photo of the scene: {}.", "a picture taken in a {}."),
        # Folders by first letter; some classes have two levels, such as a/apartment/indoor.
        ClassFolders({"train": "SUN397"}, lambda path: "/".join(path[1:-1])),
    ),
    "svhn": DataSet(
        ("a photo of the digit {}.", "the house number {}.", "a street number that shows a {}."),
        Torchvision("SVHN", _SPLITS, ("train_32x32.mat", "test_32x32.mat")),
    ),
    "cifar10": DataSet(_SMALL, Torchvision("CIFAR10", _FLAGS, ("cifar-10-batches-py",))),
    "cifar100": DataSet(_SMALL, Torchvision("CIFAR100", _FLAGS, ("cifar-100-python",))),
    "imagenet": DataSet(
        _OBJECTS,
        words=words.imagenet,
        # Nobody but its authors has the labels of its test part.
        folders={"train": "train", "test": "val"},
    ),
    "stl10": DataSet(_OBJECTS, Torchvision("STL10", _SPLITS, ("stl10_binary",))),
    "food101": DataSet(
        ("a photo of {}.", "a photo of {}, a dish.", "a plate of {}."),
        Torchvision("Food101", _SPLITS, ("food-101/meta", "food-101/images")),
    ),
    "caltech101": DataSet(
        _OBJECTS,
        ClassFolders(
            {"train": "caltech101/101_ObjectCategories"},
            lambda path: None if path[0] == "BACKGROUND_Google" else path[0],
        ),
    ),
    "caltech256": DataSet(
        _OBJECTS,
        ClassFolders(
            {"train": "caltech256/256_ObjectCategories"},
            lambda path: None if path[0] == "257.clutter" else path[0],
        ),
        words.caltech256,
    ),
    "fgvcaircraft": DataSet(
        ("a photo of a {}.", "a photo of a {}, an aircraft.", "a picture of the aircraft {}."),
        Torchvision("FGVCAircraft", _OWN_VALIDATION, ("fgvc-aircraft-2013b/data",)),
    ),
    "flowers102": DataSet(
        ("a photo of a {}.", "a photo of a {}, a flower.", "a {} in bloom."),
        Torchvision(
            "Flowers102",
            _OWN_VALIDATION,
            ("flowers-102/jpg", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        ),
    ),
    "oxfordiiitpet": DataSet(
        ("a photo of a {}.", "a photo of a {}, a pet.", "a picture of a {} at home."),
        Torchvision(
            "OxfordIIITPet",
            {"train": {"split": "trainval"}, "test": {"split": "test"}},
            ("oxford-iiit-pet/images", "oxford-iiit-pet/annotations"),
        ),
    ),
    "cub200": DataSet(
        ("a photo of a {}.", "a photo of a {}, a bird.", "a picture of the bird {}."),
        words=words.numbered,
    ),
    "pascalvoc": DataSet(_OBJECTS, words=words.pascalvoc),
    "country211": DataSet(
        ("a photo taken in {}.", "a picture from {}.", "a place in {}."),
        ClassFolders(
            {
                "train": "country211/train",
                "validation": "country211/valid",
                "test": "country211/test",
            }
        ),
        words.countries,
    ),
    "ucf101": DataSet(
        ("a photo of a person doing {}.", "a person during {}.", "a frame of a film of {}."),
        words=words.joined,
    ),
}
"""The paper's 22 data sets by name: its eight of task arithmetic first."""
