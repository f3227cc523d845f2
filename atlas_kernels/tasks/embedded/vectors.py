"""The embedded model and its task vectors as files: int8, one per task.

A folder of assets holds ``model.safetensors`` (see `save_embedded_model`) and
``vector-{task}.safetensors``. A vector stores every tensor as int8 codes ``codes/{parameter}`` with
float32 scales ``scale/{parameter}``: one per row of a matrix (first axis), one per smaller tensor.
Its metadata carries the fingerprint of the base that it was taken from; another base is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import describe, digest, parts_of, read_tensors, write_tensors
from ...vectors import TaskVector
from .model import load_model
from .paths import WEIGHTS

_VECTOR_PREFIX = "vector-"
_KIND = "embedded_vector"
# Of files written before they were named after their tasks; those that ship are such.
_FORMER_KIND = "demo_vector"


def fingerprint(module: nn.Module) -> str:
    """A hexadecimal fingerprint (BLAKE2b, 128 bits) of a module's parameters and their names."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(module.named_parameters()):
        hasher.update(f"{name} {digest(parameter)}\n".encode())
    return hasher.hexdigest()


def quantize(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8, shaped like delta, and scales float32: |delta - codes * scale| <= scale / 2.

    scale = max |delta| / 127 per row (first axis), as [rows, 1, ...]; of all elements if ndim < 2.

    Raises:
        ValueError: delta is not finite.
    """
    if not bool(delta.isfinite().all()):
        raise ValueError("a task vector with infinite or undefined elements cannot be stored")
    values = delta.detach().float()
    rows = values.shape[:1] if values.ndim >= 2 else ()
    scale = torch.ones([*rows, *[1] * (values.ndim - 1)] if rows else [])
    if values.numel():
        axes = tuple(range(len(rows), values.ndim))
        peak = values.abs().amax(axes, keepdim=bool(rows)) if axes else values.abs()
        # A row of zeros keeps the scale 1, not 0 / 0.
        scale = torch.where(peak > 0, peak / 127, scale)
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale


def save_task_vector(path: Path, delta: Mapping[str, Tensor], base: str, **fields: Any) -> None:
    """Writes a task vector (parameter name to delta) as int8, whole or not at all.

    Args:
        path: where to.
        delta: by parameter name.
        base: `fingerprint` of the image encoder that delta is added to.
        fields: further facts for the file's metadata, anything that JSON holds.
    """
    tensors = {}
    for name, tensor in delta.items():
        tensors[f"codes/{name}"], tensors[f"scale/{name}"] = quantize(tensor)
    write_tensors(path, tensors, _KIND, base=base, **fields)


def read_task_vector(path: Path, base: str) -> dict[str, Tensor]:
    """The float32 deltas of a file that `save_task_vector` wrote for this base.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is damaged or of another kind.
        ValueError: it belongs to another base.
    """
    former = describe(path)[0] == _FORMER_KIND
    tensors, fields = read_tensors(path, _FORMER_KIND if former else _KIND)
    with parts_of(path):
        found = fields["base"]
        names = [key.removeprefix("codes/") for key in tensors if key.startswith("codes/")]
        deltas = {name: tensors[f"codes/{name}"] * tensors[f"scale/{name}"] for name in names}
    if found != base:
        raise ValueError(
            f"{path} was made from another base model (fingerprint {found}, not {base}):"
            " make the assets again, in an empty folder"
        )
    return deltas


def task_vector_names(folder: Path = WEIGHTS) -> tuple[str, ...]:
    """The tasks that a folder of assets holds a vector of, sorted."""
    paths = folder.glob(f"{_VECTOR_PREFIX}*.safetensors")
    return tuple(sorted(path.stem.removeprefix(_VECTOR_PREFIX) for path in paths))


def load_task_vectors(
    names: Sequence[str] | None = None,
    *,
    folder: Path = WEIGHTS,
    base: nn.Module | None = None,
) -> dict[str, TaskVector]:
    """Task vectors of the image encoder (``model.visual``) in float32, bound to it, by task.

    Args:
        names: of tasks, by default all of `task_vector_names`.
        folder: of assets, by default the one that ships with us.
        base: the model of the same folder, if it is loaded already; checked against every vector.

    Raises:
        ValueError: a name without a vector, or a vector of another base.
    """
    available = task_vector_names(folder)
    chosen = available if names is None else tuple(names)
    missing = [name for name in chosen if name not in available]
    if missing:
        raise ValueError(
            f"no task vector of {', '.join(missing)} in {folder}: expected some of"
            f" {', '.join(available)}"
        )
    visual = (load_model(folder) if base is None else base).get_submodule("visual")
    expected = fingerprint(visual)
    digests = {name: digest(parameter) for name, parameter in visual.named_parameters()}
    vectors = {}
    for name in chosen:
        deltas = read_task_vector(vector_path(folder, name), expected)
        # In the model's order, whatever that of the file is.
        vectors[name] = TaskVector({key: deltas[key] for key in digests}, base=digests, name=name)
    return vectors


def vector_path(folder: Path, name: str) -> Path:
    """The file of one task's vector in a folder of assets."""
    return folder / f"{_VECTOR_PREFIX}{name}.safetensors"
