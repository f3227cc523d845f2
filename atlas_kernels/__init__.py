"""Fast, small composition of task vectors: theta_j = theta0_j + sum_i lambda_ij * tau_ij."""

from .backends import BackendUnavailableError, backends
from .bank import TaskVectorBank
from .compose import compose
from .composed import ComposedModel
from .task_vector import TaskVector

__all__ = [
    "BackendUnavailableError",
    "ComposedModel",
    "TaskVector",
    "TaskVectorBank",
    "backends",
    "compose",
]
__version__ = "0.1.0"
