"""Images on a disk: decoded when they are needed, plain or under augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SCALE = 0.5


class ImageReader:
    """Batches of the model's input, decoded by threads.

    Args:
        read: an index to the image, in any mode.
        size: (height, width) of the model's input.
        preprocess: an RGB image to float [3, height, width].
    """

    def __init__(
        self,
        read: Callable[[int], Image],
        size: tuple[int, int],
        preprocess: Callable[[Image], Tensor],
    ) -> None:
        self.read = read
        self.size = size
        self.preprocess = preprocess

    def plain(self, indices: Tensor) -> Tensor:
        """Images [b, 3, height, width] of these indices."""
        return self._stacked(lambda index: self.preprocess(self._rgb(index)), indices.tolist())

    def augmented(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """The same under a random resized crop and, with probability 1/2, mirrored.

        Area of a crop: uniform in [1/2, 1] of the image's; aspect ratio: log-uniform in [3/4, 4/3];
        bicubic. Source: aTLAS (arXiv 2407.02880), appendix D.
        """
        # Drawn before the threads begin: the result does not depend on their order.
        draws = torch.rand(len(indices), 5, generator=generator).tolist()
        return self._stacked(
            lambda index, draw: self.preprocess(random_crop(self._rgb(index), self.size, draw)),
            indices.tolist(),
            draws,
        )

    def _stacked(self, function: Callable[..., Tensor], *arguments: list[Any]) -> Tensor:
        with ThreadPoolExecutor() as pool:
            return torch.stack(list(pool.map(function, *arguments)))

    def _rgb(self, index: int) -> Image:
        return self.read(index).convert("RGB")


def open_image(path: str) -> Image:
    """The decoded image of a file; `ValueError`, with its path, if it is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image
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
