"""``inspect``: what a file holds."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .options import AllowPickle

app = App(
    name="inspect",
    help_epilogue="examples: atlas-kernels inspect bank.safetensors --verify; atlas-kernels "
    "inspect bank.safetensors --picture bank.png",
)

_Tensors = Mapping[str, tuple[str, list[int]]]


@app.default
def inspect(
    file: Path,
    /,
    *,
    picture: Annotated[Path | None, Parameter(help="Of a bank: bits and error by block.")] = None,
    verify: Annotated[bool, Parameter(negative="")] = False,
    allow_pickle: AllowPickle = False,
) -> dict[str, Any]:
    """Prints what a file holds.

    Args:
        file: A task vector, a bank, coefficients, or a state dict.
        picture: where to.
        verify: Read all of it, and compare its checksums.
        allow_pickle: whether to read pickled models.
    """
    from ..files import abandoned, describe, read_state_dict, read_tensors

    for left in abandoned(file):
        print(f"{left}: a killed process left it; what writes {file.name} next removes it")
    if file.suffix == ".safetensors":
        kind, fields, tensors = describe(file)
    else:
        kind, fields = "", {}
        tensors = {
            name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            for name, tensor in read_state_dict(file, allow_pickle=allow_pickle).items()
        }
    if picture is not None and kind != "bank":
        raise ValueError(f"--picture is of a bank, and {file} is a {kind or 'state dict'}")
    if kind == "task_vector":
        found = _task_vector(file, fields, tensors, verify)
    elif kind == "bank":
        found = _bank(file, picture, verify)
    elif kind == "coefficients":
        found = _coefficients(file)
    else:
        if verify and kind:
            read_tensors(file, kind, mmap=False)
        elif verify:
            raise ValueError(f"{file} is a state dict, which holds no checksums to --verify")
        print(f"{file}: {kind or 'state dict'}, {_count(tensors)}, {_size(file)}")
        _print_tensors(tensors)
        found = {"tensors": tensors}
    if verify:
        print("read whole, and as it should be")
    return {"file": file, "kind": kind or "state_dict", **found}


def _task_vector(
    path: Path, fields: Mapping[str, Any], tensors: _Tensors, verify: bool
) -> dict[str, Any]:
    from ..files import parts_of
    from ..vectors import TaskVector

    if verify:
        TaskVector.load(path)
    with parts_of(path):
        name, base = fields["name"] or path.stem, len(fields["base"])
    deltas = {
        name.removeprefix("delta."): value
        for name, value in tensors.items()
        if name.startswith("delta.")
    }
    print(f"{path}: task vector {name!r}, {_size(path)}")
    print(f"{_count(deltas)}; made from a base of {base} parameters")
    _print_tensors(deltas)
    return {"name": name, "deltas": deltas}


def _bank(path: Path, picture: Path | None, verify: bool) -> dict[str, Any]:
    from ..bank import TaskVectorBank
    from ..ops import codec_named
    from ..report import print_table

    bank = TaskVectorBank.load(path, mmap=not verify)
    bits = [codec_named(codec).bits_per_weight for codec in bank.codecs]
    print(f"{path}: bank of {len(bank.names)} task vectors, {_size(path)}")
    print(f"task vectors: {', '.join(bank.names)}")
    print(f"codec {bank.codec}, {bank.bits_per_weight:.3f} bits per weight, scales included")
    print(f"{len(bank.constants)} tensors of the base are not composed; the blocks are")
    errors = (bank.errors.norm(dim=0) / max(1, len(bank.names)) ** 0.5).tolist()
    blocks = [
        {
            "block": block,
            "dtype": str(base.dtype).removeprefix("torch."),
            "shape": list(base.shape),
            "codec": codec,
            "bits": its,
            "error": error,
        }
        for (block, base), codec, its, error in zip(
            bank.base.items(), bank.codecs, bits, errors, strict=True
        )
    ]
    print_table(
        ("block", "dtype", "shape", "codec", "bits", "error"),
        [
            (
                its["block"],
                its["dtype"],
                str(tuple(its["shape"])),
                its["codec"],
                f"{its['bits']:g}",
                f"{its['error']:.2%}",
            )
            for its in blocks
        ],
        numbers=2,
    )
    if picture is not None:
        from ..report import bank_figure, save

        title = f"{path.name}: codec {bank.codec}, {bank.bits_per_weight:.2f} bits per weight"
        save(bank_figure(bank.errors.numpy(), bits, bank.names, bank.blocks, title=title), picture)
        print(f"picture: {picture}")
    return {
        "names": bank.names,
        "codec": bank.codec,
        "bits_per_weight": bank.bits_per_weight,
        "constants": list(bank.constants),
        "blocks": blocks,
    }


def _coefficients(path: Path) -> dict[str, Any]:
    from ..models import Coefficients
    from ..report import print_table

    its = Coefficients.load(path)
    values = its.values
    print(f"{path}: coefficients {tuple(values.shape)}, {_size(path)}")
    counts = f"{len(its.names)} task vectors, {len(its.blocks)} blocks"
    if values.dim() == 3:
        counts += f", {values.shape[2]} groups of elements each, seed {its.seed}"
    print(counts)
    rows = [
        (name, *(getattr(row, what)().item() for what in ("mean", "min", "max")))
        for name, row in zip(its.names, values, strict=True)
    ]
    print_table(
        ("task vector", "mean", "smallest", "largest"),
        [(name, *(f"{value:+.3f}" for value in numbers)) for name, *numbers in rows],
        numbers=3,
    )
    return {
        "shape": list(values.shape),
        "blocks": its.blocks,
        "vectors": [
            {"name": name, "mean": mean, "smallest": least, "largest": most}
            for name, mean, least, most in rows
        ],
    }


def _size(path: Path) -> str:
    from ..report import size

    return size(path.stat().st_size)


def _count(tensors: _Tensors) -> str:
    elements = sum(prod(shape) for _, shape in tensors.values())
    return f"{len(tensors)} tensors with {elements:,} elements"


def _print_tensors(tensors: _Tensors) -> None:
    from ..report import print_table

    print_table(
        ("tensor", "dtype", "shape"),
        [(name, dtype, str(tuple(shape))) for name, (dtype, shape) in tensors.items()],
    )
