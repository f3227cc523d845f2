from .atomic import abandoned, write_atomically
from .checksums import crc
from .errors import FileFormatError, parts_of
from .fields import check_unique, parsed
from .locks import in_use
from .quantised import check_dequantised
from .state_dicts import read_state_dict
from .tensors import (
    Origin,
    data_offsets,
    describe,
    digest,
    map_tensors,
    read_tensors,
    torch_dtype,
    write_mapped,
    write_tensors,
)
from .text import printable

__all__ = [
    "FileFormatError",
    "Origin",
    "abandoned",
    "check_dequantised",
    "check_unique",
    "crc",
    "data_offsets",
    "describe",
    "digest",
    "in_use",
    "map_tensors",
    "parsed",
    "parts_of",
    "printable",
    "read_state_dict",
    "read_tensors",
    "torch_dtype",
    "write_atomically",
    "write_mapped",
    "write_tensors",
]
