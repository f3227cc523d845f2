"""``diff``: a task vector from two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from .options import AllowPickle, Base, Output, checked

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

app = App(
    name="diff", help_epilogue="example: atlas-kernels diff base.pt tuned.pt -o vector.safetensors"
)


@app.default
def diff(
    base: Base,
    finetuned: Path,
    /,
    *,
    output: Output,
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    name: str | None = None,
    allow_pickle: AllowPickle = False,
) -> dict[str, Any]:
    """Writes a task vector.

    Args:
        base: the pre-trained checkpoint.
        finetuned: The fine-tuned one.
        output: the file.
        dtype: How differences are stored.
        name: The vector's name; by default that of the output file.
        allow_pickle: whether to read pickled models.
    """
    output = checked(output, base, finetuned)
    if name == "":
        raise ValueError("--name is empty: leave it out, or give the vector a name")
    import torch

    from ..files import read_state_dict
    from ..vectors import TaskVector

    vector = TaskVector.from_state_dicts(
        read_state_dict(base, allow_pickle=allow_pickle),
        read_state_dict(finetuned, allow_pickle=allow_pickle),
        getattr(torch, _DTYPES[dtype]),
        name or output.stem,
    )
    vector.save(output)
    changed, norm = sum(map(vector.changes, vector.deltas)), vector.norm()
    print(
        f"{output}: task vector {vector.name!r}, {len(vector.deltas)} blocks, {changed} of them "
        f"changed, norm {norm:.4g}"
    )
    return {
        "file": output,
        "name": vector.name,
        "blocks": len(vector.deltas),
        "changed": changed,
        "norm": norm,
    }
