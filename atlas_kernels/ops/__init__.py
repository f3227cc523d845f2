"""The operator: composition and its coefficient gradient, for every backend, codec and grouping.

`schema` defines each operator once, `reference` says what it computes, `backends` how fast,
`composition` makes it differentiable. Knows no names, no files and no models. Below everything: any
room may use it.
"""

from .arena import Arena, ArenaComposition
from .backends import BackendUnavailableError, backends, resolve
from .codecs import CODECS, Codec, codec_named, parse_codec
from .composition import (
    STORAGE_DTYPES,
    BlockComposition,
    Composition,
    check_coef,
    compose,
    compose_blocks_with,
    compose_with,
    dots_with,
    per_block,
)
from .groups import check_groups, group_of, group_sums, slots, tile_keys
from .internals import in_transform
from .layout import CHUNK_TILES, TILE, Layout, padded, pieces

__all__ = [
    "CHUNK_TILES",
    "CODECS",
    "STORAGE_DTYPES",
    "TILE",
    "Arena",
    "ArenaComposition",
    "BackendUnavailableError",
    "BlockComposition",
    "Codec",
    "Composition",
    "Layout",
    "backends",
    "check_coef",
    "check_groups",
    "codec_named",
    "compose",
    "compose_blocks_with",
    "compose_with",
    "dots_with",
    "group_of",
    "group_sums",
    "in_transform",
    "padded",
    "parse_codec",
    "per_block",
    "pieces",
    "resolve",
    "slots",
    "tile_keys",
]
