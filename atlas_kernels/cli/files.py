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
    bank.add_argument(
        "vectors", metavar="VECTOR", type=Path, nargs="+", help="made by diff, or a PEFT folder"
    )
    bank.add_argument(
        "--codec",
        default="bf16",
        help="how deltas are stored: fp32, bf16, fp16, int8, int4, int3, int2, sign, or auto:BITS "
        "for an average of so many bits per weight (%(default)s)",
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
    for parser in (diff, bank, inspect):
        parser.add_argument(
            "--allow-pickle",
            action="store_true",
            help="also read whole pickled models, such as zeroshot.pt, from people you trust; only "
            "their tensors are taken, and their code is neither needed nor run",
        )
    inspect.add_argument(
        "--picture", metavar="PNG", type=Path, help="of a bank: bits and error of every block"
    )


def _diff(arguments: argparse.Namespace) -> None:
    output = _checked(arguments.output, arguments.base, arguments.finetuned)
    import torch

    from ..files import read_state_dict
    from ..vectors import TaskVector

    vector = TaskVector.from_state_dicts(
        read_state_dict(arguments.base, allow_pickle=arguments.allow_pickle),
        read_state_dict(arguments.finetuned, allow_pickle=arguments.allow_pickle),
        getattr(torch, _DTYPES[arguments.dtype]),
        arguments.name or output.stem,
    )
    vector.save(output)
    changed = sum(map(vector.changes, vector.deltas))
    print(
        f"{output}: task vector {vector.name!r}, {len(vector.deltas)} blocks, {changed} of them "
        f"changed, norm {vector.norm():.4g}"
    )


def _bank(arguments: argparse.Namespace) -> None:
    output = _checked(arguments.output, arguments.base, *arguments.vectors)
    from ..bank import TaskVectorBank
    from ..files import read_state_dict
    from ..vectors import TaskVector

    bank = TaskVectorBank.pack(
        output,
        read_state_dict(arguments.base, allow_pickle=arguments.allow_pickle),
        [
            TaskVector.from_peft(path) if path.is_dir() else TaskVector.load(path)
            for path in arguments.vectors
        ],
        codec=arguments.codec,
        include=arguments.include,
        exclude=arguments.exclude,
        progress=True,
    )
    print(f"{output}: {bank!r}")


def _merge(arguments: argparse.Namespace) -> None:
    output = _checked(arguments.output, arguments.bank, arguments.coefficients)
    from ..bank import TaskVectorBank
    from ..files import write_tensors
    from ..models import read_coefficients

    bank = TaskVectorBank.load(arguments.bank)
    coef, seed = read_coefficients(arguments.coefficients, bank)
    state = bank.state_dict(coef, seed=seed)
    write_tensors(output, state)
    print(f"{output}: state dict of {len(state)} tensors, {len(bank.blocks)} of them composed")


def _inspect(arguments: argparse.Namespace) -> None:
    from ..files import describe, read_state_dict
    from ..report import print_table, size

    path: Path = arguments.file
    if path.suffix == ".safetensors":
        kind, fields, tensors = describe(path)
    else:
        kind, fields = "", {}
        tensors = {
            name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in read_state_dict(path, allow_pickle=arguments.allow_pickle).items()
        }
    stored = size(path.stat().st_size)
    if kind == "task_vector":
        deltas = _under("delta.", tensors)
        print(f"{path}: task vector {fields['name'] or path.stem!r}, {stored}")
        print(f"{_count(deltas)}; made from a base of {len(fields['base'])} parameters")
        _print_tensors(deltas)
    elif kind == "bank":
        _inspect_bank(path, arguments.picture)
    elif kind == "coefficients":
        from ..files import read_tensors

        values = read_tensors(path, kind)[0]["coef"]
        print(f"{path}: coefficients {tuple(values.shape)}, {stored}")
        counts = f"{len(fields['names'])} task vectors, {len(fields['blocks'])} blocks"
        if values.dim() == 3:
            counts += f", {values.shape[2]} groups of elements each, seed {fields['seed']}"
        print(counts)
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


def _inspect_bank(path: Path, picture: Path | None) -> None:
    from ..bank import TaskVectorBank
    from ..ops import codec_named
    from ..report import print_table, size

    bank = TaskVectorBank.load(path)
    bits = [codec_named(codec).bits_per_weight for codec in bank.codecs]
    print(f"{path}: bank of {len(bank.names)} task vectors, {size(path.stat().st_size)}")
    print(f"task vectors: {', '.join(bank.names)}")
    print(f"codec {bank.codec}, {bank.bits_per_weight:.3f} bits per weight, scales included")
    print(f"{len(bank.constants)} tensors of the base are not composed; the blocks are")
    errors = bank.errors.norm(dim=0) / max(1, len(bank.names)) ** 0.5
    print_table(
        ("block", "dtype", "shape", "codec", "bits", "error"),
        [
            (
                block,
                str(base.dtype).removeprefix("torch."),
                str(tuple(base.shape)),
                codec,
                f"{its:g}",
                f"{error:.2%}",
            )
            for (block, base), codec, its, error in zip(
                bank.base.items(), bank.codecs, bits, errors.tolist(), strict=True
            )
        ],
        numbers=2,
    )
    if picture is not None:
        from ..report import bank_figure, save

        title = f"{path.name}: codec {bank.codec}, {bank.bits_per_weight:.2f} bits per weight"
        save(bank_figure(bank.errors.numpy(), bits, bank.names, bank.blocks, title=title), picture)
        print(f"picture: {picture}")


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
    from ..report import print_table

    print_table(
        ("tensor", "dtype", "shape"),
        [(name, dtype, str(tuple(shape))) for name, (dtype, shape) in tensors.items()],
    )
