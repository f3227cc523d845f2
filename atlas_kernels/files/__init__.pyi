from .atomic import write_atomically
from .errors import FileFormatError, parts_of
from .state_dicts import read_state_dict
from .tensors import (
    data_offsets,
    describe,
    digest,
    read_tensors,
    torch_dtype,
    write_mapped,
    write_tensors,
)
from .text import printable

__all__ = [
    "FileFormatError",
    "data_offsets",
    "describe",
    "digest",
    "parts_of",
    "printable",
    "read_state_dict",
    "read_tensors",
    "torch_dtype",
    "write_atomically",
    "write_mapped",
    "write_tensors",
]
