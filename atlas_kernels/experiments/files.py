"""What a run leaves on the disk of what it learned."""

from __future__ import annotations

from pathlib import Path

from ..files import write_tensors
from ..learn import LPPlusPlus, TipAdapter
from ..models import LinearizedModel
from .setting import Result


def write_models(result: Result, folder: Path, suffix: str = "") -> list[str]:
    """Writes what was learned; the names of the files.

    ``coefficients{suffix}.safetensors`` and ``merged{suffix}.safetensors`` of coefficients, or
    ``model{suffix}.safetensors`` of weights; ``adapter{suffix}.safetensors`` besides.
    """
    names = []

    def path(kind: str) -> Path:
        names.append(f"{kind}{suffix}.safetensors")
        return folder / names[-1]

    encoder = result.encoder
    if encoder is not None:
        encoder.save_coefficients(path("coefficients"))
        if not isinstance(encoder, LinearizedModel):
            merged = {**encoder.bank.constants, **encoder.merge().state_dict()}
            write_tensors(path("merged"), merged)
    elif result.model is not None and result.learned is not None:
        write_tensors(path("model"), result.model.state_dict())
    for part in result.model.modules() if result.model is not None else ():
        if isinstance(part, TipAdapter | LPPlusPlus):
            part.save(path("adapter"))
    return names
