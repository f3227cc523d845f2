"""Tests on images of another kind: which rows of the head, and which labels."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from atlas_kernels.tasks.embedded.image_task import embedded_task
from atlas_kernels.tasks.embedded.out_of_domain import embedded_out_of_domain
from atlas_kernels.tasks.embedded.tasks import load_task
from atlas_kernels.tasks.images.out_of_domain import load_out_of_domain

NAMES = [f"n{index:02}" for index in range(12)]


def fill(folder: Path, names: list[str], row: dict[str, int]) -> None:
    """Two images per class that show its row."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (4, 4), (row[name],) * 3).save(folder / name / f"{index}.png")


def shown(image: Image.Image) -> torch.Tensor:
    return torch.full((3, 4, 4), float(image.getpixel((0, 0))[0]))


@pytest.fixture
def train(tmp_path) -> Path:
    for name in NAMES:
        (tmp_path / "train" / name).mkdir(parents=True)
    return tmp_path / "train"


@pytest.mark.parametrize(
    ("folders", "rows"),
    [
        (["n07", "n02", "n11"], [2, 7, 11]),  # some of the classes, as in ImageNet-A
        ([str(index) for index in range(12)], list(range(12))),  # numbers, as in ImageNet-V2
        (["10", "n02", "9"], [2, 9, 10]),
    ],
)
def test_every_image_keeps_its_class(folders, rows, train, tmp_path) -> None:
    fill(tmp_path / "other", folders, {name: int(name.removeprefix("n")) for name in folders})
    other = load_out_of_domain(tmp_path / "other", train, (4, 4), shown)
    assert other.name == "other"
    assert other.rows.tolist() == rows
    read = other.test.images.plain(torch.arange(len(other.test)))[:, 0, 0, 0]
    assert other.rows[other.test.labels].tolist() == read.tolist()
    assert other.test.labels.bincount().tolist() == [2] * len(rows)


def test_names_of_the_task_come_before_numbers(tmp_path) -> None:
    for name in ("1", "10", "2"):
        (tmp_path / "train" / name).mkdir(parents=True)
    fill(tmp_path / "other", ["10", "2"], {"10": 1, "2": 2})
    other = load_out_of_domain(tmp_path / "other", tmp_path / "train", (4, 4), shown)
    assert other.rows.tolist() == [1, 2]
    assert other.test.labels.tolist() == [0, 0, 1, 1]


def test_rows_of_the_head_are_a_mask(train, tmp_path) -> None:
    fill(tmp_path / "other", ["n07", "n02", "n11"], {"n07": 7, "n02": 2, "n11": 11})
    other = load_out_of_domain(tmp_path / "other", train, (4, 4), shown)
    head, features = torch.randn(12, 5), torch.randn(200, 5)
    masked = torch.full((200, 12), -torch.inf)
    masked[:, [2, 7, 11]] = (features @ head.T)[:, [2, 7, 11]]
    few = features @ head[other.rows].T
    assert torch.equal(other.rows[few.argmax(1)], masked.argmax(1))
    # Probabilities too: sums of the same three terms.
    assert torch.allclose(few.softmax(1), masked.softmax(1)[:, other.rows], atol=1e-6)


def test_bad_folders(train, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: expected a folder with images in CLASS/"):
        load_out_of_domain(tmp_path / "nowhere", train, (4, 4), shown)
    fill(tmp_path / "other", ["n07", "12"], {"n07": 7, "12": 12})
    with pytest.raises(ValueError, match=r"'12' is neither .* such as 'n00' or 0 to 11"):
        load_out_of_domain(tmp_path / "other", train, (4, 4), shown)


def test_embedded_images_under_the_other_shifts() -> None:
    others = embedded_out_of_domain("digits-inverted")
    assert [other.name for other in others] == [
        f"digits-{shift}" for shift in ("clean", "rotated", "noise", "contrast", "flipped")
    ]
    task = embedded_task("digits-inverted")
    every = torch.arange(len(task.test))
    for other in others:
        assert other.rows.tolist() == list(range(10))
        assert torch.equal(other.test.labels, load_task(other.name).test.labels)
    # The same objects: inverted again they are the task's own, but for two roundings of at most 2.
    both = others[0].test.images.plain(every) + task.test.images.plain(every)
    assert both.abs().max() <= 2**-22
    with pytest.raises(ValueError, match="unknown task 'cars'"):
        embedded_out_of_domain("cars")
