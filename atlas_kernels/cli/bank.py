"""``bank``: a base and its task vectors, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from .options import AllowPickle, Base, Output, checked

app = App(
    name="bank",
    help_epilogue="examples: atlas-kernels bank base.pt cars.safetensors sun.safetensors -o "
    "bank.safetensors; the same with --codec int4, or --include 'visual.*'",
)
_Patterns = Annotated[list[str] | None, Parameter(negative="")]


@app.default
def bank(
    base: Base,
    vectors: Annotated[tuple[Path, ...], Parameter(name="VECTOR")],
    /,
    *,
    output: Output,
    codec: str = "bf16",
    include: _Patterns = None,
    exclude: _Patterns = None,
    allow_pickle: AllowPickle = False,
) -> dict[str, Any]:
    """Writes a bank.

    Args:
        base: the pre-trained checkpoint.
        vectors: Made by diff, or folders of PEFT adapters.
        output: the file.
        codec: How deltas are stored: fp32, bf16, fp16, int8, int4, int3, int2, sign, or auto:BITS
            for an average of so many bits per weight.
        include: Compose only blocks of this name, e.g. 'visual.*'; may be repeated.
        exclude: Do not compose blocks of this name; may be repeated.
        allow_pickle: whether to read pickled models.
    """
    output = checked(output, base, *vectors)
    from ..bank import TaskVectorBank
    from ..files import read_state_dict
    from ..ops import parse_codec
    from ..vectors import TaskVector

    parse_codec(codec)
    state = read_state_dict(base, allow_pickle=allow_pickle)
    loaded = [
        TaskVector.from_peft(path, base=state) if path.is_dir() else TaskVector.load(path)
        for path in vectors
    ]
    first: dict[str, Path] = {}
    for path, vector in zip(vectors, loaded, strict=True):
        other = first.setdefault(vector.name, path)
        if other is not path:
            raise ValueError(
                f"{other} and {path} are both called {vector.name!r}: name each task vector once, "
                "or make one of them again with diff --name"
            )
    packed = TaskVectorBank.pack(
        output,
        state,
        loaded,
        codec=codec,
        include=include,
        exclude=exclude,
        progress=True,
    )
    print(f"{output}: {packed!r}")
    return {
        "file": output,
        "names": packed.names,
        "blocks": len(packed.blocks),
        "codec": packed.codec,
        "bits_per_weight": packed.bits_per_weight,
        "nbytes": packed.nbytes,
    }
