"""N task vectors packed once on one base: in memory, in a file, or read piece by piece.

Stands on `vectors`, `files` and `ops`; used by `models` and above.
"""

from .blocks import BUCKET, parts
from .building import Patterns, check_dtype, chosen, split_base
from .factorwise import factor_names, multiply
from .low_rank_segment import LowRankSegment
from .segment import CHUNK, Segment
from .stream import SLOTS, Stream, check_streamable, open_direct
from .task_vector_bank import TaskVectorBank

__all__ = [
    "BUCKET",
    "CHUNK",
    "SLOTS",
    "LowRankSegment",
    "Patterns",
    "Segment",
    "Stream",
    "TaskVectorBank",
    "check_dtype",
    "check_streamable",
    "chosen",
    "factor_names",
    "multiply",
    "open_direct",
    "parts",
    "split_base",
]
