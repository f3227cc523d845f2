"""Reading images: modes, the crop, and where randomness comes from."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from torchvision.transforms import functional as tv

from atlas_kernels.tasks.images.reader import ImageReader, open_image, random_crop


def noise(seed: int, height: int = 40, width: int = 40) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(64, 192, (height, width, 3), dtype=np.uint8))


def to_tensor(image: Image.Image) -> torch.Tensor:
    return tv.to_tensor(image)


def test_all_kinds_of_images_are_read_as_rgb(tmp_path) -> None:
    image = noise(0)
    paths = []
    for mode in ("RGB", "L", "P", "RGBA", "1"):
        paths.append(str(tmp_path / f"{mode}.png"))
        image.convert(mode).save(paths[-1])
    read = ImageReader(lambda index: open_image(paths[index]), (40, 40), to_tensor)
    batch = read.plain(torch.tensor([3, 1, 0, 4, 2]))
    # In the order asked for; RGB and opaque RGBA are the image itself.
    assert torch.equal(batch[0], to_tensor(image))
    assert torch.equal(batch[2], to_tensor(image))
    grey = to_tensor(image.convert("L"))
    assert torch.equal(batch[1], grey.expand(3, -1, -1))
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(paths[0]).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken\.png: not a readable image"):
        open_image(str(broken))


def test_crop_against_torchvision() -> None:
    image = noise(1)
    assert random_crop(image, (40, 40), (1.0, 0.5, 0.3, 0.7, 0.9)) == image
    mirrored = random_crop(image, (40, 40), (1.0, 0.5, 0.3, 0.7, 0.1))
    assert mirrored == image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # 0.5 + 0.5 * 0.125 = (30 / 40)^2: 30 of 40 pixels, 3 from the left and 7 from the top.
    crop = to_tensor(random_crop(image, (32, 37), (0.125, 0.5, 0.3, 0.7, 0.9)))
    bicubic = tv.InterpolationMode.BICUBIC
    expected = to_tensor(tv.resized_crop(image, 7, 3, 30, 30, [32, 37], bicubic))
    # A bicubic kernel reaches two pixels beyond the crop, which torchvision has cut off. Inside,
    # rows and columns may be resampled in either order: each rounds to 1/2 of 255 levels, and the
    # second pass adds up to 1.3 times (the sum of its absolute weights) what the first has rounded.
    inside = (slice(None), slice(3, -3), slice(3, -3))
    assert (crop[inside] - expected[inside]).abs().max() < 2.5 / 255


@pytest.mark.parametrize(("height", "width"), [(1, 1), (9, 300), (300, 9), (61, 47)])
def test_crops_stay_inside_and_keep_half_of_the_area(height: int, width: int) -> None:
    # Red is the row and green the column, as shares of 255: what is seen tells where it lies.
    rows = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    columns = np.linspace(0, 255, width)[None].repeat(height, 0)
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], 2).round().astype(np.uint8))
    generator = torch.Generator().manual_seed(0)
    for draw in torch.rand(40, 5, generator=generator).tolist():
        crop = np.asarray(random_crop(image, (16, 16), draw)).astype(float) / 255
        seen = (np.ptp(crop[..., 0]), np.ptp(crop[..., 1]))
        flips = crop[8, 0, 1] > crop[8, -1, 1]
        if min(height, width) > 40:
            # Half of the area, at most 4/3 from square: at least 1/2 of each side here; the
            # outermost of 16 samples lie half a sample inside, and bicubic weights blur a little.
            assert min(seen) > 0.5 * 14 / 16
            assert flips == (draw[4] < 0.5)
        assert crop[..., 2].max() == 0


def test_augmentation_depends_on_the_generator_alone() -> None:
    images = [noise(index, 5, 7) for index in range(24)]
    reader = ImageReader(lambda index: images[index], (8, 8), to_tensor)

    def batch(seed: int) -> torch.Tensor:
        return reader.augmented(torch.arange(24), torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))
    assert torch.equal(torch.get_rng_state(), state)
    # One image, many crops: each has draws of its own.
    same = reader.augmented(torch.zeros(24, dtype=torch.int64), torch.Generator().manual_seed(1))
    assert len({crop.numpy().tobytes() for crop in same}) > 20
