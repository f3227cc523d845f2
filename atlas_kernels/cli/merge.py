"""``merge``: the checkpoint that coefficients make of a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App

from .options import Output, checked

app = App(
    name="merge",
    help_epilogue="example: atlas-kernels merge bank.safetensors coefficients.safetensors -o "
    "model.safetensors",
)


@app.default
def merge(bank: Path, coefficients: Path, /, *, output: Output) -> dict[str, Any]:
    """Writes a state dict.

    Args:
        bank: Made by bank.
        coefficients: Learned for it.
        output: the file.
    """
    output = checked(output, bank, coefficients)
    from ..bank import TaskVectorBank
    from ..files import write_tensors
    from ..models import read_coefficients

    packed = TaskVectorBank.load(bank)
    coef, seed = read_coefficients(coefficients, packed)
    state = packed.state_dict(coef, seed=seed)
    write_tensors(output, state)
    print(f"{output}: state dict of {len(state)} tensors, {len(packed.blocks)} of them composed")
    return {"file": output, "tensors": len(state), "composed": len(packed.blocks)}
