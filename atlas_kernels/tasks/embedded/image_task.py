"""The embedded tasks as every method is given them."""

from __future__ import annotations

from ..images import Images, ImageTask, LabelledImages
from .tasks import Split, augment, load_task, preprocess


def embedded_task(name: str) -> ImageTask:
    """The embedded task of this name (see `load_task`) as the embedded model takes it.

    Plain images are `preprocess`, augmented ones ``augment(preprocess(.))``: a random resized crop
    without a flip, which would change a digit.

    Raises:
        ValueError: there is no such task; the known ones are listed.

    Example:
        >>> import torch
        >>> from atlas_kernels.tasks.embedded import embedded_task
        >>> task = embedded_task("fashion-inverted")
        >>> task.test.images.plain(torch.arange(4)).shape
        torch.Size([4, 3, 32, 32])
    """
    task = load_task(name)
    parts = (_in_memory(part) for part in (task.train, task.validation, task.test))
    return ImageTask(name, task.classnames, task.templates, *parts)


def _in_memory(split: Split) -> LabelledImages:
    pixels = split.images
    images = Images(
        len(split),
        lambda indices: preprocess(pixels[indices]),
        lambda indices, generator: augment(preprocess(pixels[indices]), generator),
    )
    return LabelledImages(images, split.labels)
