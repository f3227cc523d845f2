"""``diff``, ``bank``, ``inspect``, ``merge``: from files to files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CHECKPOINT = "state dict (.safetensors, .pt, .pth, .bin, .ckpt)"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the four commands to the parser."""

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name, parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}."
        )
        parser.set_defaults(run=run)
        return parser

    diff = command("diff", _diff, "make a task vector from two checkpoints")
    diff.add_argument("base", metavar="BASE", type=Path, help=f"the pre-trained {_CHECKPOINT}")
    diff.add_argument("finetuned", metavar="FINETUNED", type=Path, help="the fine-tuned one")
    diff.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default: %(default)s")
    diff.add_argument("--name", help="the vector's name (default: the name of the output file)")

    bank = command("bank", _bank, "pack a base and its task vectors into a bank")
    bank.add_argument("base", metavar="BASE", type=Path, help=f"the pre-trained {_CHECKPOINT}")
    bank.add_argument("vectors", metavar="VECTOR", type=Path, nargs="+", help="made by diff")
    bank.add_argument(
        "--codec", default="bf16", help="how deltas are stored: fp32, bf16 or fp16 (%(default)s)"
    )
    for option, effect in (("--include", "compose only"), ("--exclude", "do not compose")):
        bank.add_argument(
            option,
            metavar="PATTERN",
            action="append",
            help=f"{effect} blocks of this name, e.g. 'visual.*'; may be repeated",
        )

    merge = command("merge", _merge, "write the checkpoint that coefficients make of a bank")
    merge.add_argument("bank", metavar="BANK", type=Path, help="made by bank")
    merge.add_argument("coefficients", metavar="COEFFICIENTS", type=Path, help="learned for it")

    for parser in (diff, bank, merge):
        parser.add_argument(
            "-o",
            "--output",
            metavar="FILE",
            type=Path,
            required=True,
            help="a .safetensors file; replaced in one step if it exists",
        )
    inspect = command(
        "inspect", _inspect, "describe a file: vector, bank, coefficients, state dict"
    )
    inspect.add_argument("file", metavar="FILE", type=Path)


def _diff(arguments: argparse.Namespace) -> None:
    output = _checked(arguments.output, arguments.base, arguments.finetuned)
    import torch

    from ..checkpoints import read_state_dict
    from ..task_vector import TaskVector

    vector = TaskVector.from_state_dicts(
        read_state_dict(arguments.base),
        read_state_dict(arguments.finetuned),
        getattr(torch, _DTYPES[arguments.dtype]),
        arguments.name or output.stem,
    )
    vector.save(output)
    changed = sum(bool(delta.count_nonzero()) for delta in vector.deltas.values())
    print(
        f"{output}: task vector {vector.name!r}, {len(vector.deltas)} blocks, {changed} of them "
        f"changed, norm {vector.norm():.4g}"
    )


def _bank(arguments: argparse.Namespace) -> None:
    output = _checked(arguments.output, arguments.base, *arguments.vectors)
    from ..bank import TaskVectorBank
    from ..checkpoints import read_state_dict
    from ..task_vector import TaskVector

    bank = TaskVectorBank.from_task_vectors(
        read_state_dict(arguments.base),
        [TaskVector.load(path) for path in arguments.vectors],
        codec=arguments.codec,
        include=arguments.include,
        exclude=arguments.exclude,
    )
    if not bank.blocks:
        raise ValueError("nothing to pack: no chosen block is changed by any of the task vectors")
    bank.save(output)
    print(f"{output}: {bank!r}")


def _merge(arguments: argparse.Namespace) -> None:
    output = _checked(arguments.output, arguments.bank, arguments.coefficients)
    from ..bank import TaskVectorBank
    from ..checkpoints import write_tensors
    from ..composed import read_coefficients

    bank = TaskVectorBank.load(arguments.bank)
    state = bank.state_dict(read_coefficients(arguments.coefficients, bank))
    write_tensors(output, state)
    print(f"{output}: state dict of {len(state)} tensors, {len(bank.blocks)} of them composed")


def _inspect(arguments: argparse.Namespace) -> None:
    from ..checkpoints import describe, read_state_dict
    from .output import print_table, size

    path: Path = arguments.file
    if path.suffix == ".safetensors":
        kind, fields, tensors = describe(path)
    else:
        kind, fields = "", {}
        tensors = {
            name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in read_state_dict(path).items()
        }
    stored = size(path.stat().st_size)
    if kind == "task_vector":
        deltas = _under("delta.", tensors)
        print(f"{path}: task vector {fields['name'] or path.stem!r}, {stored}")
        print(f"{_count(deltas)}; made from a base of {len(fields['base'])} parameters")
        _print_tensors(deltas)
    elif kind == "bank":
        print(f"{path}: bank of {len(fields['names'])} task vectors, {stored}")
        print(f"codec {fields['codec']}; task vectors: {', '.join(fields['names'])}")
        print(f"{len(fields['constants'])} tensors of the base are not composed; the blocks are")
        dtypes = {
            column: tensors[f"base.{index}"][0]
            for index, columns in enumerate(fields["segments"])
            for column in columns
        }
        _print_tensors(
            {
                block: (dtypes[column], shape)
                for column, (block, shape) in enumerate(
                    zip(fields["blocks"], fields["shapes"], strict=True)
                )
            }
        )
    elif kind == "coefficients":
        from ..checkpoints import read_tensors

        values = read_tensors(path, kind)[0]["coef"]
        print(f"{path}: coefficients {tuple(values.shape)}, {stored}")
        print(f"{len(fields['names'])} task vectors, {len(fields['blocks'])} blocks")
        rows = values.reshape(len(fields["names"]), -1)
        print_table(
            ("task vector", "mean", "smallest", "largest"),
            [
                (name, *(f"{value:+.3f}" for value in (row.mean(), row.min(), row.max())))
                for name, row in zip(fields["names"], rows, strict=True)
            ],
            numbers=3,
        )
    else:
        what = kind or "state dict"
        print(f"{path}: {what}, {_count(tensors)}, {stored}")
        _print_tensors(tensors)


def _checked(output: Path, *inputs: Path) -> Path:
    """The output path, if it can be written without harm to an input; before any work."""
    if output.suffix != ".safetensors":
        raise ValueError(f"{output}: the output is a safetensors file, call it *.safetensors")
    if output.is_dir():
        raise ValueError(f"{output} is a folder, expected the name of a file")
    if not output.parent.is_dir():
        raise ValueError(f"cannot write {output}: the folder {output.parent} does not exist")
    for path in inputs:
        if path.exists() and output.exists() and path.samefile(output):
            raise ValueError(f"{output} is an input: choose another name for the output")
    return output


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _count(tensors: Mapping[str, tuple[str, list[int]]]) -> str:
    elements = sum(prod(shape) for _, shape in tensors.values())
    return f"{len(tensors)} tensors with {elements:,} elements"


def _print_tensors(tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    from .output import print_table

    print_table(
        ("tensor", "dtype", "shape"),
        [(name, dtype, str(tuple(shape))) for name, (dtype, shape) in tensors.items()],
    )
