"""How a bank stores its deltas: `dense` floating point, or `packed` integers with scales.

A codec turns one row of elements into stored items, and back; the kernels decode tile by tile.
"""

from __future__ import annotations

from .dense import Dense
from .packed import Packed

Codec = Dense | Packed

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Dense("fp32"),
        Dense("bf16"),
        Dense("fp16"),
        Packed("int8", 8),
        Packed("int4", 4),
        Packed("int3", 3),
        Packed("int2", 2),
        Packed("sign", 1),
    )
}


def codec_named(name: str) -> Codec:
    """The codec of this name. Raises ValueError for an unknown one."""
    if name not in CODECS:
        raise ValueError(
            f"unknown codec {name!r}: expected one of {', '.join(map(repr, CODECS))}, or "
            "'auto:<bits>' for an average of so many bits per weight, scales included"
        )
    return CODECS[name]


def parse_codec(text: str) -> tuple[Codec | None, float]:
    """A named codec; or None, and the bits per weight of "auto:<bits>".

    Raises ValueError for anything else.
    """
    if not isinstance(text, str):
        raise TypeError(f"codec is a {type(text).__name__}, expected a name such as 'bf16'")
    name, _, bits = text.partition(":")
    if name != "auto":
        return codec_named(text), 0.0
    least = CODECS["sign"].bits_per_weight
    try:
        budget = float(bits)
    except ValueError:
        budget = 0.0
    if not budget >= least:
        raise ValueError(
            f"codec {text!r}: expected 'auto:<bits>' with at least {least} bits per weight, "
            "for example 'auto:3.5'"
        )
    return None, budget


__all__ = ["CODECS", "Codec", "Dense", "Packed", "codec_named", "parse_codec"]
