"""Folders of images: listing, splits and names."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image
from torchvision.transforms.functional import to_tensor

from atlas_kernels.tasks.images.folder import load_folder, split_off
from atlas_kernels.tasks.images.images import Images, LabelledImages


def fill(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    generator = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:03}.png")


def contents(images: Images) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.plain(torch.arange(len(images)))]


def test_every_image_is_in_one_part_with_its_folder_as_label(tmp_path) -> None:
    fill(tmp_path / "train", {"ice_bear": 20, "cat": 7}, seed=0)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    task = load_folder(tmp_path, (5, 7), to_tensor, ["a {}", "one {}"])
    assert (task.name, task.classnames) == (tmp_path.name, ("cat", "ice bear"))
    assert task.templates == ("a {}", "one {}")
    label = {
        to_tensor(Image.open(path)).numpy().tobytes(): int(path.parent.name == "ice_bear")
        for path in (tmp_path / "train").glob("*/*.png")
    }
    parts = (task.train, task.validation, task.test)
    seen = [content for part in parts for content in contents(part.images)]
    assert sorted(seen) == sorted(label)
    assert [label[content] for content in seen] == torch.cat([p.labels for p in parts]).tolist()
    # 27 // 5 = 5 for test in the ratio of 7 to 20, then 22 // 10 = 2 for validation, one of each.
    assert [part.labels.bincount().tolist() for part in parts] == [[5, 15], [1, 1], [1, 4]]
    # The same on every call.
    again = load_folder(tmp_path, (5, 7), to_tensor).test
    assert contents(again.images) == contents(task.test.images)


def test_a_part_that_is_split_off_is_a_fair_sample() -> None:
    sizes = [3, 50, 200, 747]
    labels = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    part = LabelledImages(Images(1000, lambda i: i, lambda i, _: i), labels)
    left, taken = split_off(part, 100)
    both = torch.cat([left.images.plain(torch.arange(900)), taken.images.plain(torch.arange(100))])
    assert sorted(both.tolist()) == list(range(1000))
    # A tenth of each; of 3 at least one.
    assert taken.labels.bincount().tolist() == [1, 5, 20, 74]
    # Not the first ones of their class, which may be frames of one film.
    first = taken.images.plain(torch.arange(100))[taken.labels == 3]
    assert not torch.equal(first, torch.arange(253, 253 + 74))
    # None without an image, however few are asked for.
    assert split_off(part, 1)[1].labels.tolist() == [0, 1, 2, 3]


def test_given_parts_are_taken_as_they_are(tmp_path) -> None:
    counts = {"train": 3, "val": 1, "test": 2}
    for seed, (part, count) in enumerate(counts.items()):
        fill(tmp_path / part, {"a": count, "b": 1}, seed=seed)
    task = load_folder(tmp_path, (5, 7), to_tensor)
    for name, part in (("train", task.train), ("val", task.validation), ("test", task.test)):
        files = sorted((tmp_path / name).glob("*/*.png"))
        expected = [to_tensor(Image.open(path)).numpy().tobytes() for path in files]
        assert contents(part.images) == expected
        assert part.labels.tolist() == [0] * counts[name] + [1]


def test_names_of_classes_from_a_file(tmp_path) -> None:
    fill(tmp_path / "train", {"n01": 20, "n02": 20})
    (tmp_path / "classnames.txt").write_text("tench\ngreat white shark\n", encoding="utf-8")
    assert load_folder(tmp_path, (5, 7), to_tensor).classnames == ("tench", "great white shark")
    (tmp_path / "classnames.txt").write_text("tench\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"classnames\.txt: 1 class names, .* 2 classes"):
        load_folder(tmp_path, (5, 7), to_tensor)


def test_links_to_folders_are_followed(tmp_path) -> None:
    fill(tmp_path / "elsewhere", {"a": 3, "b": 3})
    (tmp_path / "task" / "train").mkdir(parents=True)
    for name in "ab":
        (tmp_path / "task" / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert len(load_folder(tmp_path / "task", (5, 7), to_tensor).test) == 2


def test_bad_folders(tmp_path) -> None:
    def load(folder: Path) -> None:
        load_folder(folder, (5, 7), to_tensor)

    with pytest.raises(FileNotFoundError, match="expected a folder with images in train/CLASS/"):
        load(tmp_path / "none")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"train: its folders hold no image"):
        load(tmp_path)
    fill(tmp_path / "train", {"a": 1, "b": 1, "hollow": 0})
    with pytest.raises(ValueError, match=r"train: folder 'hollow' holds no image"):
        load(tmp_path)
    (tmp_path / "train" / "hollow").rmdir()
    fill(tmp_path / "val", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match="class 'b' is not in both train and val"):
        load(tmp_path)
