"""Out-of-domain tests: the classes of a task in images of another kind.

Source: aTLAS (arXiv 2407.02880), appendix D.4: learned on ImageNet, tested on -A, -R, -Sketch, -V2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .folder import list_images, readable
from .images import LabelledImages

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class OutOfDomain:
    """Images of another kind, of all or some of a task's classes.

    A head of the task, [C, d], serves as ``head[rows]``; so do an adapter's rows and the columns of
    its cached labels. That is the same as setting the logits of absent classes to -inf.

    Attributes:
        name: what the images are called.
        rows: int64 [K], ascending: the classes of the task that occur.
        test: the images; a label is an index into ``rows``.
    """

    name: str
    rows: Tensor
    test: LabelledImages


def load_out_of_domain(
    folder: str | Path,
    train: str | Path,
    size: tuple[int, int],
    preprocess: Callable[[Image], Tensor],
) -> OutOfDomain:
    """The images of ``folder/CLASS/*``, whose classes are some of ``train/CLASS``.

    A class folder is named as in ``train`` (ImageNet-A, -R and -Sketch: WordNet ids) or is the
    class's number in the order of the sorted names of ``train`` (ImageNet-V2: 0 to 999).

    Args:
        folder: such as ``/data/imagenet-a``.
        train: the folder of class folders that the task learns from, such as
            ``/data/imagenet/train``.
        size: as for `load_folder`.
        preprocess: as for `load_folder`.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a class that the task does not have, or one without images.

    Example:
        ``load_out_of_domain("/data/imagenet-a", "/data/imagenet/train", *preprocess_for(model))``
    """
    folder, train = Path(folder), Path(train)
    for path in (folder, train):
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: expected a folder with images in CLASS/*.jpg")
    known = sorted(path.name for path in train.iterdir() if path.is_dir())
    row = {name: index for index, name in enumerate(known)}
    # A name of the task's own stands for itself, even if it is a number.
    row = {str(index): index for index in range(len(known))} | row
    listing = list_images(folder)
    strangers = [name for name in listing.classes if name not in row]
    if strangers:
        raise ValueError(
            f"{folder}: {strangers[0]!r} is neither a class of {train} nor the number of one, "
            f"expected names such as {known[0]!r} or 0 to {len(known) - 1}"
        )
    rows = torch.tensor([row[name] for name in listing.classes])
    # As strings "10" comes before "2".
    order = rows.argsort()
    test = readable(listing, size, preprocess)
    labels = order.argsort()[test.labels]
    return OutOfDomain(folder.resolve().name, rows[order], LabelledImages(test.images, labels))
