"""The operator: composition and its coefficient gradient, for every backend, codec and grouping.

`schema` defines each operator once, `reference` says what it computes, `backends` how fast,
`compose` makes it differentiable. Knows no names, no files and no models. Below everything: any
room may use it.
"""

from .backends import BackendUnavailableError, backends, resolve
from .codecs import CODECS, Codec, codec_named, parse_codec
from .composition import STORAGE_DTYPES, Batched, bank_coef_grad, bank_compose, check_coef, compose
from .groups import check_groups, group_of, group_sums, slots, tile_keys
from .layout import CHUNK_TILES, TILE, Layout, padded, pieces

__all__ = [
    "CHUNK_TILES",
    "CODECS",
    "STORAGE_DTYPES",
    "TILE",
    "BackendUnavailableError",
    "Batched",
    "Codec",
    "Layout",
    "backends",
    "bank_coef_grad",
    "bank_compose",
    "check_coef",
    "check_groups",
    "codec_named",
    "compose",
    "group_of",
    "group_sums",
    "padded",
    "parse_codec",
    "pieces",
    "resolve",
    "slots",
    "tile_keys",
]
