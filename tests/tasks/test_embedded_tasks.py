import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from atlas_kernels.experiments.embedded.make_images import read_pickled_array, split
from atlas_kernels.tasks.embedded.tasks import (
    SHIFTS,
    Split,
    augment,
    dataset_names,
    load_task,
    preprocess,
    pretraining_split,
    task_names,
)


def contents(part: Split) -> list[bytes]:
    return [image.numpy().tobytes() for image in part.images]


@pytest.mark.parametrize("dataset", dataset_names())
def test_no_image_is_in_two_parts_nor_twice_in_one(dataset: str) -> None:
    task = load_task(f"{dataset}-clean")
    parts = [pretraining_split(dataset), task.train, task.validation, task.test]
    repeated = [
        c for c in Counter(image for part in parts for image in contents(part)).values() if c > 1
    ]
    assert not repeated


@pytest.mark.parametrize("name", task_names())
def test_task_has_what_it_promises(name: str) -> None:
    task = load_task(name)
    assert name == f"{task.dataset}-{task.shift}"
    assert len(set(task.classnames)) == 10
    assert all(template.count("{}") == 1 for template in task.templates)
    for part in (task.train, task.validation, task.test):
        assert part.images.dtype == torch.uint8
        assert part.images.shape[1:] == (32, 32)
        assert part.labels.dtype == torch.int64
        assert len(part.labels) == len(part.images)
        # Balanced, the first images too: a prefix is a fair small sample.
        assert part.labels.bincount(minlength=10).unique().numel() == 1
        assert sorted(part.labels[:10].tolist()) == list(range(10))
    assert min(task.train.labels.bincount()) >= 16


@pytest.mark.parametrize("dataset", dataset_names())
def test_shifts_are_what_their_names_say(dataset: str) -> None:
    clean = load_task(f"{dataset}-clean").test.images.int()
    shifted = {shift: load_task(f"{dataset}-{shift}").test.images.int() for shift in SHIFTS}
    assert torch.equal(shifted["inverted"], 255 - clean)
    # Upside down and counter-clockwise, pixel by pixel on purpose.
    for y, x in [(0, 0), (3, 17), (16, 5), (31, 30)]:
        assert torch.equal(shifted["flipped"][:, y, x], clean[:, 31 - y, x])
        assert torch.equal(shifted["rotated"][:, y, x], clean[:, x, 31 - y])
    assert torch.equal(shifted["contrast"], clean // 2 + 64)
    # Where neither end of the range cuts it off, the noise has its stated deviation of 80; clipped
    # to 0..255 around a mid-grey pixel, that of 80 is 71.
    grey = (clean > 110) & (clean < 145)
    assert 60 < (shifted["noise"] - clean)[grey].float().std() < 82


def test_noise_is_the_same_every_time_and_differs_between_parts() -> None:
    first, second = load_task("mnist-noise"), load_task("mnist-noise")
    assert torch.equal(first.train.images, second.train.images)
    clean = load_task("mnist-clean")
    black_train = (clean.train.images[:200] == 0) & (clean.test.images[:200] == 0)
    assert not torch.equal(
        first.train.images[:200][black_train], first.test.images[:200][black_train]
    )


def test_a_caller_may_write_to_what_it_got() -> None:
    before = load_task("digits-clean").test.images.clone()
    load_task("digits-clean").test.images.zero_()
    assert torch.equal(load_task("digits-clean").test.images, before)


@pytest.mark.parametrize("name", ["fashion", "fashion-", "cars-clean", "fashion-blurred", ""])
def test_unknown_task_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="fashion-inverted"):
        load_task(name)


def test_unknown_pretraining_images_are_refused() -> None:
    with pytest.raises(ValueError, match="animals"):
        pretraining_split("cars")
    with pytest.raises(ValueError, match="inverted"):
        pretraining_split("animals", "blurred")


def test_preprocess_against_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    batch = preprocess(images)
    expected = (images.double() / 255 - 0.5) / 0.5
    assert batch.shape == (1, 3, 16, 16)
    for channel in range(3):
        # Two roundings of values up to 2.
        assert (batch[:, channel].double() - expected).abs().max() <= 2**-22


@pytest.mark.parametrize("bad", [torch.zeros(2, 32, 32), torch.zeros(2, 3, 32, 32).byte()])
def test_preprocess_refuses_other_images(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8 images"):
        preprocess(bad)


def test_augment_is_a_crop_of_the_stated_area_inside_the_image() -> None:
    # On an image whose pixels are their own coordinates a crop shows where it was cut.
    axis = (torch.arange(32) + 0.5) / 32
    image = torch.stack([axis.expand(32, 32), axis.unsqueeze(1).expand(32, 32)])
    crops = augment(image.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert crops.shape == (4000, 2, 32, 32)
    middle = crops[:, :, 8:25, 8:25]  # away from the border, where sampling is clamped
    width = (middle[:, 0, 0, 16] - middle[:, 0, 0, 0]) * 2
    height = (middle[:, 1, 16, 0] - middle[:, 1, 0, 0]) * 2
    area = width * height
    assert area.min() >= 0.5 * 0.95
    assert area.max() <= 1 + 1e-4
    # Uniform in [0.5, 1] but for the largest and longest crops, which are cut back.
    assert abs(area.mean() - 0.74) < 0.02
    # Never mirrored, never outside.
    assert (width > 0).all()
    assert (height > 0).all()
    assert crops.min() >= axis[0] - 1e-6
    assert crops.max() <= axis[-1] + 1e-6
    # Each image has a crop of its own.
    assert len(set(area.tolist())) > 3900


def test_augment_is_reproducible_and_keeps_the_dtype() -> None:
    batch = preprocess(load_task("animals-clean").train.images[:8])
    first, second = (augment(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(batch, torch.Generator().manual_seed(4)))
    assert augment(batch.double(), torch.Generator().manual_seed(3)).dtype == torch.float64
    assert augment(batch[:0]).shape == (0, 3, 32, 32)


def test_images_are_read_from_an_array_pickle_only(tmp_path) -> None:
    import gzip

    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    for harmful in (Evil(), ["not an array"]):
        path = tmp_path / "harmful.gz"
        path.write_bytes(gzip.compress(pickle.dumps(harmful)))
        with pytest.raises(pickle.UnpicklingError):
            read_pickled_array(path)


def test_split_removes_repeated_images_before_it_cuts() -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, 4, 4), dtype=np.uint8)
    images = np.concatenate([images, images[:20]])
    labels = np.concatenate([np.arange(60) % 2, np.arange(20) % 2])
    parts = split(images, labels, {"train": 20, "test": 10}, seed=0)
    seen = np.concatenate([parts["train_images"], parts["test_images"]]).reshape(60, -1)
    assert len(np.unique(seen, axis=0)) == 60
    with pytest.raises(ValueError, match="31 distinct images per class needed, 30 found"):
        split(images, labels, {"train": 20, "test": 11}, seed=0)
