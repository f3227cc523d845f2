"""``plan``: what learning coefficients will need, from names and shapes alone."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models import Plan

# Dtype and shape of tensors by name.
Described = dict[str, tuple[str, list[int]]]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{prefix}i": 2 ** (10 * power) for power, prefix in enumerate("kMGT", 1)}


app = App(
    name="plan",
    help_epilogue="examples: atlas-kernels plan --model ViT-L-14 --vectors 8 --fit 16GB; "
    "atlas-kernels plan bank.safetensors --memory stream",
)


@app.default
def plan(
    files: Annotated[tuple[Path, ...], Parameter(name="FILE")] = (),
    /,
    *,
    model: str | None = None,
    batch: int = 32,
    vectors: int | None = None,
    codec: str | None = None,
    memory: Any = "whole",
    fit: str | None = None,
) -> Any:
    """Prints what learning coefficients will need.

    Args:
        files: A bank; or the base's checkpoint, and the task vectors (or folders of LoRA adapters)
            made from it.
        model: An open_clip architecture, such as ViT-B-32: its image encoder is planned, if there
            is no FILE, and its activations are part of the prediction.
        batch: Images per step.
        vectors: Number of task vectors.
        codec: How deltas are stored; by default bf16, or as in the bank.
        memory: whole, recompute or stream.
        fit: List the settings that need at most this, such as 16GB.
    """
    budget = None if fit is None else parse_size(fit)
    if batch < 1:
        raise ValueError(f"--batch is {batch}, expected 1 or more")
    if not files and model is None:
        raise ValueError("nothing to plan: name a bank, a checkpoint, or --model NAME")
    from ..models import activation_bytes, plans
    from ..models import plan as planned
    from ..ops import parse_codec

    if codec is not None:
        parse_codec(codec)
    base, options = _model(files)
    if model is not None:
        encoder = _encoder(model)
        base = encoder if base is None else base
        options["activations"] = activation_bytes(encoder, [_images(encoder, batch)])
    assert base is not None
    count = _count(vectors, options)
    stored = options.pop("codec", "bf16")
    if budget is None:
        its = planned(base, count, codec=codec or stored, memory=memory, **options)
        _print(its, known="activations" in options)
        return _document(its)
    every = plans(base, count, **options)
    fitting = [its for its in every if its.peak <= budget]
    if not fitting:
        from ..report import size

        least = min(every, key=lambda its: its.peak)
        activations = least.parts.get("activations", 0)
        raise ValueError(
            f"nothing fits {fit}: the least, codec {least.codec} with memory "
            f"{least.memory}, needs {size(least.peak)}"
            + (f", {size(activations)} of it activations: lower --batch" if activations else "")
        )
    _print_fitting(fitting, str(fit))
    return [_document(its) for its in fitting]


def _document(its: Plan) -> dict[str, Any]:
    return {**asdict(its), "peak": its.peak}


def parse_size(text: str) -> int:
    """Bytes of "16GB" or "500 MiB". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?\s*", text)
    unit = match and match[2].replace("K", "k")
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is no size: expected a number and a unit, such as 16GB")
    return int(float(match[1]) * _UNITS[unit])


def _model(files: tuple[Path, ...]) -> tuple[dict[str, Tensor] | nn.Module | None, Any]:
    """The base without its data, and what else the files say."""
    if not files:
        return None, {}
    from ..files import describe

    first, *vectors = files
    if first.suffix == ".safetensors":
        kind, _, tensors = describe(first)
    else:
        kind, tensors = "", _pickled(first)
    if kind == "bank":
        if vectors:
            raise ValueError(f"{first} is a bank: it holds its task vectors, name no others")
        return _bank(first)
    if kind not in ("", "model"):
        raise ValueError(f"{first} is a {kind}: expected a bank, or the base's checkpoint")
    problems: list[str] = []
    found: dict[str, dict[Path, int | None]] = {}
    for path in vectors:
        for block, (shape, rank) in _deltas(path).items():
            found.setdefault(block, {})[path] = rank
            if block not in tensors:
                problems.append(f"{path}: the base has no parameter {block!r}")
            elif tensors[block][1] != shape:
                problems.append(
                    f"{path}: {block!r} has shape {tuple(shape)}, in the base "
                    f"{tuple(tensors[block][1])}"
                )
    ranks: dict[str, int] = {}
    for block, its in found.items():
        factored = [path for path, rank in its.items() if rank is not None]
        dense = [path for path, rank in its.items() if rank is None]
        if factored and dense:
            problems.append(f"{block!r} is low-rank in {factored[0]}, but dense in {dense[0]}")
        elif factored:
            # One file for each task vector, even where one is named twice.
            ranks[block] = sum(its[path] or 0 for path in vectors if path in its)
    if problems:
        raise ValueError("the files do not fit together:\n  " + "\n  ".join(problems))
    options: dict[str, Any] = {"count": len(vectors), "ranks": ranks} if vectors else {}
    if found:
        options["include"] = sorted(map(_literal, found))
    return _ghosts(tensors), options


def _bank(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What is to be planned of a bank."""
    import torch

    from ..bank import TaskVectorBank

    bank = TaskVectorBank.load(path)
    if bank.fields.get("products"):
        raise ValueError(
            f"{path}: its weights are products of composed factors (lora='factorwise'), which plan "
            "does not predict; it does lora='product'"
        )
    ranks = {
        bank.blocks[column]: sum(its)
        for index, parts in bank.fields.get("low_rank", {}).items()
        for column, its in zip(bank.segments[int(index)].columns, parts["ranks"], strict=True)
    }
    tensors = {**bank.constants, **bank.base}
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}, {
        "count": len(bank.names),
        "codec": bank.codec,
        "ranks": ranks,
        "include": [_literal(block) for block in bank.blocks],
    }


def _deltas(path: Path) -> dict[str, tuple[list[int], int | None]]:
    """Shape of every delta of a task vector or an adapter, and its rank if it is low-rank."""
    if path.is_dir():
        from ..vectors import read_adapter

        return {
            name: (list(its.shape), getattr(its, "rank", None))
            for name, its in read_adapter(path).items()
        }
    from ..files import describe

    kind, _, tensors = describe(path)
    if kind != "task_vector":
        raise ValueError(
            f"{path}: expected a task vector, made by atlas-kernels diff, or the folder of a LoRA "
            "adapter"
        )
    found: dict[str, tuple[list[int], int | None]] = {}
    for name, (_, shape) in tensors.items():
        if name.startswith("delta."):
            found[name.removeprefix("delta.")] = shape, None
        elif name.startswith("factor.up."):
            block = name.removeprefix("factor.up.")
            down = tensors[f"factor.down.{block}"][1]
            found[block] = [shape[0], *down[1:]], shape[1]
    return found


def _literal(name: str) -> str:
    """A shell-style pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _pickled(path: Path) -> Described:
    from ..files import read_state_dict

    return {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in read_state_dict(path).items()
    }


def _ghosts(described: Described) -> dict[str, Tensor]:
    import torch

    from ..files import torch_dtype

    return {
        name: torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        for name, (dtype, shape) in described.items()
    }


def _encoder(name: str) -> nn.Module:
    import torch

    from ..tasks.clip import image_encoder

    with torch.device("meta"):
        return image_encoder(name)


def _images(encoder: nn.Module, batch: int) -> Tensor:
    import torch

    size = getattr(encoder, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(batch, 3, height, width, device="meta")


def _count(vectors: int | None, options: dict[str, Any]) -> int:
    found: int | None = options.pop("count", None)
    if vectors is None and found is None:
        raise ValueError("how many task vectors? Name their files, or --vectors N")
    if vectors is not None and found not in (None, vectors):
        raise ValueError(f"--vectors is {vectors}, but the files hold {found}")
    return vectors if found is None else found  # type: ignore[return-value]


def _print(its: Plan, known: bool) -> None:
    from ..report import print_table, size

    rows = [(part, size(count)) for part, count in its.parts.items()]
    if not known:
        rows.append(("activations", "not known: --model NAME"))
    rows += [
        ("peak memory", size(its.peak)),
        ("bank on disk", size(its.disk)),
        ("moved per forward", size(its.moved["forward"])),
        ("moved per backward", size(its.moved["backward"])),
    ]
    print_table(
        ("what", "needs"),
        rows,
        title=f"{its.num_vectors} task vectors, {its.num_blocks} blocks, "
        f"{its.num_parameters:,} parameters; codec {its.codec}, memory {its.memory}",
        numbers=1,
        sections=(len(rows) - 5,),
    )


def _print_fitting(fitting: list[Plan], budget: str) -> None:
    from ..report import print_table, size

    best = fitting[0]
    print_table(
        ("codec", "memory", "peak", "disk", "moved per step"),
        [
            (
                its.codec,
                its.memory,
                size(its.peak),
                size(its.disk),
                size(sum(its.moved.values())),
            )
            for its in fitting
        ],
        title=f"Fits {budget}, the most faithful first",
        numbers=3,
    )
    print(f"Take --codec {best.codec} --memory {best.memory}.")
