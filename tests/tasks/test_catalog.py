"""The paper's data sets on a disk, in small: layouts, parts, labels and names."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from PIL import Image

from atlas_kernels.tasks.images.catalog import CATALOG, load_images

SIZE = (4, 4)


def color(index: int) -> tuple[int, int, int]:
    return 10 * index + 5, 50, 90


def write(path: Path, index: int) -> None:
    """An image that shows its label, exactly (BMP) or nearly so (JPEG)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), color(index)).save(path)


def shown(image: Image.Image) -> torch.Tensor:
    """Which label an image shows, as a picture."""
    value = round((image.getpixel((0, 0))[0] - 5) / 10)
    return torch.full((3, *SIZE), float(value))


def pixels(count: int) -> np.ndarray:
    """Images [count, 3, 32, 32] of the labels 0, 1, 0, 1, ..."""
    colors = np.array([color(index % 2) for index in range(count)], dtype=np.uint8)
    return colors[:, :, None, None].repeat(32, 2).repeat(32, 3)


def write_matrices(path: Path, contents: dict[str, np.ndarray]) -> None:
    pytest.importorskip("scipy.io").savemat(path, contents)


def cars(folder: Path) -> None:
    base = folder / "stanford_cars"
    for part in ("train", "test"):
        for index in range(20):
            write(base / f"cars_{part}" / f"{index:05}.jpg", index % 2)
    rows = [(f"{i:05}.jpg", i % 2 + 1) for i in range(20)]
    annotations = {"annotations": np.array(rows, [("fname", object), ("class", np.uint8)])}
    (base / "devkit").mkdir()
    names = {"class_names": np.array(["AM Hummer", "Acura RL"], object)}
    write_matrices(base / "devkit/cars_meta.mat", names)
    write_matrices(base / "devkit/cars_train_annos.mat", annotations)
    write_matrices(base / "cars_test_annos_withlabels.mat", annotations)


def dtd(folder: Path) -> None:
    for part in ("train", "val", "test"):
        lines = []
        for index in range(20):
            name = ("banded", "polka-dotted")[index % 2]
            write(folder / "dtd/dtd/images" / name / f"{part}{index}.jpg", index % 2)
            lines.append(f"{name}/{part}{index}.jpg\n")
        labels = folder / "dtd/dtd/labels" / f"{part}1.txt"
        labels.parent.mkdir(exist_ok=True)
        labels.write_text("".join(lines))


def class_folders(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for label, name in enumerate(names):
            for index in range(50):
                write(folder / name / f"sun_{index}.jpg", label)

    return make


def gtsrb(folder: Path) -> None:
    rows = ["Filename;Width;ClassId"]
    for index in range(20):
        write(folder / "gtsrb/GTSRB/Training" / f"{index % 2:05}" / f"{index}.ppm", index % 2)
        write(folder / "gtsrb/GTSRB/Final_Test/Images" / f"{index:05}.ppm", index % 2)
        rows.append(f"{index:05}.ppm;6;{index % 2}")
    (folder / "gtsrb/GT-final_test.csv").write_text("\n".join(rows))


def mnist(folder: Path) -> None:
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = b"".join(number.to_bytes(4, "big") for number in (2051, 20, 32, 32))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels(20)[:, 0].tobytes())
        header = b"".join(number.to_bytes(4, "big") for number in (2049, 20))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes([0, 1] * 10))


def svhn(folder: Path) -> None:
    folder.mkdir(parents=True)
    # In the files the digit zero is called 10.
    contents = {"X": pixels(20).transpose(2, 3, 1, 0), "y": np.array([[10], [1]] * 10)}
    for part in ("train", "test"):
        write_matrices(folder / f"{part}_32x32.mat", contents)


def cifar(folder: Path, name: str, files: dict[str, int], meta: str, names: str, key: str) -> None:
    (folder / name).mkdir(parents=True)
    for file, count in files.items():
        batch = {"data": pixels(count).reshape(count, -1), key: [i % 2 for i in range(count)]}
        (folder / name / file).write_bytes(pickle.dumps(batch))
    (folder / name / meta).write_bytes(pickle.dumps({names: ["aquarium_fish", "cat"]}))


def cifar10(folder: Path) -> None:
    files = {f"data_batch_{index}": 4 for index in range(1, 6)} | {"test_batch": 20}
    cifar(folder, "cifar-10-batches-py", files, "batches.meta", "label_names", "labels")


def cifar100(folder: Path) -> None:
    files = {"train": 20, "test": 20}
    cifar(folder, "cifar-100-python", files, "meta", "fine_label_names", "fine_labels")


def stl10(folder: Path) -> None:
    base = folder / "stl10_binary"
    base.mkdir(parents=True)
    for part in ("train", "test"):
        images = pixels(20).repeat(3, 2).repeat(3, 3)
        (base / f"{part}_X.bin").write_bytes(images.tobytes())
        (base / f"{part}_y.bin").write_bytes(bytes([1, 2] * 10))
    (base / "class_names.txt").write_text("airplane\nbird\n")


def food101(folder: Path) -> None:
    (folder / "food-101/meta").mkdir(parents=True)
    names = ("apple_pie", "pho")
    for part in ("train", "test"):
        listed = {name: [f"{name}/{part}{index}" for index in range(10)] for name in names}
        for label, name in enumerate(names):
            for path in listed[name]:
                write(folder / "food-101/images" / f"{path}.jpg", label)
        (folder / "food-101/meta" / f"{part}.json").write_text(json.dumps(listed))


def fgvcaircraft(folder: Path) -> None:
    data = folder / "fgvc-aircraft-2013b/data"
    for part in ("train", "val", "test"):
        lines = []
        for index in range(20):
            write(data / "images" / f"{part}{index}.jpg", index % 2)
            lines.append(f"{part}{index} {('707-320', 'Il-76 of old')[index % 2]}\n")
        (data / f"images_variant_{part}.txt").write_text("".join(lines))
    (data / "variants.txt").write_text("707-320\nIl-76 of old\n")


def flowers102(folder: Path) -> None:
    base = folder / "flowers-102"
    for index in range(1, 61):
        write(base / "jpg" / f"image_{index:05}.jpg", index % 2)
    numbers = np.arange(1, 61)
    parts = {"trnid": numbers[:20], "valid": numbers[20:40], "tstid": numbers[40:]}
    write_matrices(base / "setid.mat", parts)
    write_matrices(base / "imagelabels.mat", {"labels": numbers % 2 + 1})


def oxfordiiitpet(folder: Path) -> None:
    base = folder / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part in ("trainval", "test"):
        lines = []
        for index in range(20):
            name = f"{('Abyssinian', 'basset_hound')[index % 2]}_{part}{index}"
            write(base / "images" / f"{name}.jpg", index % 2)
            lines.append(f"{name} {index % 2 + 1} {index % 2 + 1} 1\n")
        (base / "annotations" / f"{part}.txt").write_text("".join(lines))


def country211(folder: Path) -> None:
    for part in ("train", "valid", "test"):
        class_folders("AD", "ZW")(folder / "country211" / part)


# The files of a published layout, the names of its two classes, and how many images its parts have.
GIVEN, NO_VALIDATION, NEITHER = (20, 20, 20), (18, 2, 20), (72, 8, 20)
CAR_NAMES = ("AM Hummer", "Acura RL")
LAYOUTS = {
    "cars": (cars, CAR_NAMES, NO_VALIDATION),
    "dtd": (dtd, ("banded", "polka-dotted"), GIVEN),
    "eurosat": (
        class_folders("eurosat/2750/AnnualCrop", "eurosat/2750/SeaLake"),
        ("annual crop land", "lake or sea"),
        NEITHER,
    ),
    "gtsrb": (gtsrb, ("speed limit of 20 km/h", "speed limit of 30 km/h"), NO_VALIDATION),
    "mnist": (mnist, tuple("0123456789"), NO_VALIDATION),
    "sun397": (
        class_folders("SUN397/a/abbey", "SUN397/a/apartment_building/outdoor"),
        ("abbey", "apartment building outdoor"),
        NEITHER,
    ),
    "svhn": (svhn, ("0", "1"), NO_VALIDATION),
    "cifar10": (cifar10, ("aquarium fish", "cat"), NO_VALIDATION),
    "cifar100": (cifar100, ("aquarium fish", "cat"), NO_VALIDATION),
    "stl10": (stl10, ("airplane", "bird"), NO_VALIDATION),
    "food101": (food101, ("apple pie", "pho"), NO_VALIDATION),
    "caltech101": (
        class_folders(
            *(f"caltech101/101_ObjectCategories/{name}" for name in ("Faces_easy", "crab")),
            "caltech101/101_ObjectCategories/BACKGROUND_Google",
        ),
        ("Faces easy", "crab"),
        NEITHER,
    ),
    "caltech256": (
        class_folders(
            *(
                f"caltech256/256_ObjectCategories/{name}"
                for name in ("002.american-flag", "251.airplanes-101", "257.clutter")
            )
        ),
        ("american flag", "airplanes"),
        NEITHER,
    ),
    "fgvcaircraft": (fgvcaircraft, ("707-320", "Il-76 of old"), GIVEN),
    "flowers102": (flowers102, ("pink primrose", "hard-leaved pocket orchid"), GIVEN),
    "oxfordiiitpet": (oxfordiiitpet, ("Abyssinian", "Basset Hound"), NO_VALIDATION),
    "country211": (country211, ("Andorra", "Zimbabwe"), (100, 100, 100)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_layout(name: str, tmp_path, monkeypatch) -> None:
    make, classnames, counts = LAYOUTS[name]
    make(tmp_path / name)
    for module in ("cifar", "stl10", "svhn", "flowers102"):
        # Their files are known by a checksum, which ours do not have.
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    task = load_images(name, tmp_path, SIZE, shown)
    # MNIST and the flowers have all their names whatever the files hold.
    assert task.classnames[: len(classnames)] == classnames
    assert len(task.classnames) == {"flowers102": 102}.get(name, len(classnames))
    parts = (task.train, task.validation, task.test)
    assert tuple(map(len, parts)) == counts
    for part in parts:
        read = part.images.plain(torch.arange(len(part)))[:, 0, 0, 0]
        assert read.tolist() == part.labels.tolist()
        assert part.labels.unique().tolist() == [0, 1]
    # Another archive in the same place is not looked at once there is a folder per class.
    for label, folder in enumerate(("one", "two")):
        for index in range(10):
            write(tmp_path / name / "train" / folder / f"{index}.bmp", label)
    assert len(load_images(name, tmp_path, SIZE, shown).train) == 20 - 4 - 2


@pytest.mark.parametrize("name", ["resisc45", "cub200", "pascalvoc", "ucf101", "gtsrb"])
def test_folder_per_class(name: str, tmp_path) -> None:
    folders, classnames = {
        "resisc45": (("airport", "baseball_diamond"), ("airport", "baseball diamond")),
        "cub200": (
            ("001.Black_footed_Albatross", "002.Laysan_Albatross"),
            ("Black footed Albatross", "Laysan Albatross"),
        ),
        "pascalvoc": (("bird", "tvmonitor"), ("bird", "tv monitor")),
        "ucf101": (("ApplyEyeMakeup", "YoYo"), ("Apply Eye Makeup", "Yo Yo")),
        "gtsrb": (("00014", "00017"), ("stop", "no entry")),
    }[name]
    for part in ("train", "test"):
        class_folders(*folders)(tmp_path / name / part)
    task = load_images(name, tmp_path, SIZE, shown)
    assert task.classnames == classnames
    assert [len(part) for part in (task.train, task.validation, task.test)] == [90, 10, 100]


def test_imagenet_is_tested_on_what_is_called_val(tmp_path) -> None:
    pytest.importorskip("open_clip")
    ids = [f"n{index:08}" for index in range(1000)]
    for part, count in (("train", 2), ("val", 1)):
        for name in ids:
            (tmp_path / "imagenet" / part / name).mkdir(parents=True)
            for index in range(count):
                # Nothing is decoded.
                (tmp_path / "imagenet" / part / name / f"{part}{index}.JPEG").touch()
    task = load_images("imagenet", tmp_path, SIZE, shown)
    assert (task.classnames[0], task.classnames[-1]) == ("tench", "toilet paper")
    assert (len(task.train), len(task.validation), len(task.test)) == (1000, 1000, 1000)
    assert task.test.labels.tolist() == list(range(1000))
    with pytest.raises(ValueError, match=r"val0\.JPEG: not a readable image"):
        task.test.images.plain(torch.tensor([0]))
    (tmp_path / "imagenet/train/n00000000").rename(tmp_path / "imagenet/train/tench")
    (tmp_path / "imagenet/val/n00000000").rename(tmp_path / "imagenet/val/tench")
    with pytest.raises(ValueError, match=r"expected the 1000 WordNet ids .*classnames\.txt"):
        load_images("imagenet", tmp_path, SIZE, shown)


def test_what_is_missing_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown data set 'Cars': choose one of cars, dtd,"):
        load_images("Cars", tmp_path, SIZE, shown)
    with pytest.raises(FileNotFoundError, match=r"expected images in .*/ucf101/train/CLASS/"):
        load_images("ucf101", tmp_path, SIZE, shown)
    for name, entry in CATALOG.items():
        if entry.archive is not None:
            missing = ", no ".join(entry.archive.needed)
            with pytest.raises(FileNotFoundError, match=f"but there is no {missing}$"):
                load_images(name, tmp_path, SIZE, shown)
    dtd(tmp_path / "dtd")
    (tmp_path / "dtd/dtd/dtd/labels/val1.txt").unlink()
    with pytest.raises(ValueError, match=r"datasets\.DTD cannot read it .*val1\.txt"):
        load_images("dtd", tmp_path, SIZE, shown)
    # Looking for files makes none.
    assert [path.name for path in tmp_path.iterdir()] == ["dtd"]


def test_without_scipy(tmp_path, monkeypatch) -> None:
    svhn(tmp_path / "svhn")
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    with pytest.raises(ImportError, match=r"needs scipy.* run pip install 'atlas_kernels\[data\]'"):
        load_images("svhn", tmp_path, SIZE, shown)


def test_every_template_has_one_place_for_the_name() -> None:
    assert len(CATALOG) == 22
    for entry in CATALOG.values():
        assert len(set(entry.templates)) >= 2
        assert all(template.count("{}") == 1 for template in entry.templates)


def test_the_documented_layouts_are_those_that_are_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(CATALOG)
    for line, entry in zip(lines, CATALOG.values(), strict=True):
        if entry.archive is None:
            assert "a folder per class only" in line
            continue
        parts = {"validation", "test"} & entry.archive.parts.keys()
        told = [word.strip() for word in line.split("|")[3].split(",")]
        expected = ["own" if part in parts else "split off" for part in ("validation", "test")]
        assert told == expected, line
        for needed in entry.archive.needed:
            pieces = needed.replace("-", "/").split("/")
            assert all(piece in line for piece in pieces), (line, needed)
