"""What fine-tuning changed: task vectors, low-rank deltas, adapters of PEFT.

Stands on `files` and `ops`; used from everywhere above.
"""

from .low_rank import Delta, LowRank, to_dense
from .peft import read_adapter
from .task_vector import TaskVector

__all__ = [
    "Delta",
    "LowRank",
    "TaskVector",
    "read_adapter",
    "to_dense",
]
