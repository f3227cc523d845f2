"""Options and arguments that several commands take, and the check of an output."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

CHECKPOINT = "state dict (.safetensors, .pt, .pth, .bin, .ckpt)"

Base = Annotated[Path, Parameter(help=f"The pre-trained {CHECKPOINT}.")]
Output = Annotated[
    Path,
    Parameter(
        name=["--output", "-o"], help="A .safetensors file; replaced in one step if it exists."
    ),
]
AllowPickle = Annotated[
    bool,
    Parameter(
        negative="",
        help="Also read whole pickled models, such as zeroshot.pt, from people you trust; only "
        "their tensors are taken, and their code is neither needed nor run.",
    ),
]


def checked(output: Path, *inputs: Path) -> Path:
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
