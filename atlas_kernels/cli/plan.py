"""``plan``: what learning coefficients will need, from names and shapes alone."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..models import Plan

# Dtype and shape of tensors by name.
Described = dict[str, tuple[str, list[int]]]

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{prefix}i": 2 ** (10 * power) for power, prefix in enumerate("kMGT", 1)}


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command to the parser."""
    text = "predict memory, disk and traffic of learning coefficients, without loading anything"
    parser = commands.add_parser(
        "plan", parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    parser.set_defaults(run=_run)
    parser.add_argument(
        "files",
        metavar="FILE",
        type=Path,
        nargs="*",
        help="a bank; or the base's checkpoint, and the task vectors (or folders of LoRA adapters) "
        "made from it",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="an open_clip architecture, such as ViT-B-32: its image encoder is planned, if there "
        "is no FILE, and its activations are part of the prediction",
    )
    parser.add_argument("--batch", type=int, default=32, help="images per step (%(default)s)")
    parser.add_argument("--vectors", metavar="N", type=int, help="number of task vectors")
    parser.add_argument("--codec", help="how deltas are stored (default: bf16, or the bank's)")
    parser.add_argument(
        "--memory", default="whole", help="whole, recompute or stream (%(default)s)"
    )
    parser.add_argument(
        "--fit", metavar="SIZE", help="list the settings that need at most this, such as 16GB"
    )


def _run(arguments: argparse.Namespace) -> None:
    budget = None if arguments.fit is None else parse_size(arguments.fit)
    if arguments.batch < 1:
        raise ValueError(f"--batch is {arguments.batch}, expected 1 or more")
    if not arguments.files and arguments.model is None:
        raise ValueError("nothing to plan: name a bank, a checkpoint, or --model NAME")
    from ..models import activation_bytes, plan, plans

    model, options = _model(arguments)
    if arguments.model is not None:
        encoder = _encoder(arguments.model)
        model = encoder if model is None else model
        options["activations"] = activation_bytes(encoder, [_images(encoder, arguments.batch)])
    assert model is not None
    count = _count(arguments, options)
    stored = options.pop("codec", "bf16")
    codec = arguments.codec or stored
    if budget is None:
        its = plan(model, count, codec=codec, memory=arguments.memory, **options)
        _print(its, known="activations" in options)
        return
    every = plans(model, count, **options)
    fitting = [its for its in every if its.peak <= budget]
    if not fitting:
        from ..report import size

        least = min(every, key=lambda its: its.peak)
        activations = least.parts.get("activations", 0)
        raise ValueError(
            f"nothing fits {arguments.fit}: the least, codec {least.codec} with memory "
            f"{least.memory}, needs {size(least.peak)}"
            + (f", {size(activations)} of it activations: lower --batch" if activations else "")
        )
    _print_fitting(fitting, arguments.fit)


def parse_size(text: str) -> int:
    """Bytes of "16GB" or "500 MiB". Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?\s*", text)
    unit = match and match[2].replace("K", "k")
    if match is None or unit not in _UNITS:
        raise ValueError(f"{text!r} is no size: expected a number and a unit, such as 16GB")
    return int(float(match[1]) * _UNITS[unit])


def _model(arguments: argparse.Namespace) -> tuple[dict[str, Tensor] | nn.Module | None, Any]:
    """The base without its data, and what else the files say."""
    if not arguments.files:
        return None, {}
    from ..files import describe

    first, *vectors = arguments.files
    if first.suffix == ".safetensors":
        kind, fields, tensors = describe(first)
    else:
        kind, fields, tensors = "", {}, _pickled(first)
    if kind == "bank":
        if vectors:
            raise ValueError(f"{first} is a bank: it holds its task vectors, name no others")
        return _bank(first, fields, tensors)
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


def _bank(path: Path, fields: dict[str, Any], tensors: Described) -> tuple[dict[str, Tensor], Any]:
    """What is to be planned of a bank."""
    if fields.get("products"):
        raise ValueError(
            f"{path}: its weights are products of composed factors (lora='factorwise'), which plan "
            "does not predict; it does lora='product'"
        )
    described = {name: tensors[f"constant.{name}"] for name in fields["constants"]}
    ranks: dict[str, int] = {}
    for index, (columns, _) in enumerate(fields["segments"]):
        low_rank = fields.get("low_rank", {}).get(str(index))
        for k, column in enumerate(columns):
            block = fields["blocks"][column]
            described[block] = tensors[f"base.{index}"][0], fields["shapes"][column]
            if low_rank is not None:
                ranks[block] = sum(low_rank["ranks"][k])
    return _ghosts(described), {
        "count": len(fields["names"]),
        "codec": fields["codec"],
        "ranks": ranks,
        "include": [_literal(block) for block in fields["blocks"]],
    }


def _deltas(path: Path) -> dict[str, tuple[list[int], int | None]]:
    """Shape of every delta of a task vector or an adapter, and its rank if it is low-rank."""
    if path.is_dir():
        from ..vectors import read_adapter

        return {name: (list(its.shape), its.rank) for name, its in read_adapter(path).items()}
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


def _count(arguments: argparse.Namespace, options: dict[str, Any]) -> int:
    found: int | None = options.pop("count", None)
    if arguments.vectors is None and found is None:
        raise ValueError("how many task vectors? Name their files, or --vectors N")
    if arguments.vectors is not None and found not in (None, arguments.vectors):
        raise ValueError(f"--vectors is {arguments.vectors}, but the files hold {found}")
    return arguments.vectors if found is None else found


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
