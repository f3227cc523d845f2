"""Fast, small composition of task vectors: theta_j = theta0_j + sum_i lambda_ij * tau_ij."""

from .backends import BackendUnavailableError, backends
from .bank import TaskVectorBank
from .compose import compose
from .composed import ComposedModel
from .linearized import LinearizedModel
from .low_rank import LowRank
from .plan import Plan, plan
from .task_vector import TaskVector

__all__ = [
    "BackendUnavailableError",
    "ComposedModel",
    "LinearizedModel",
    "LowRank",
    "Plan",
    "TaskVector",
    "TaskVectorBank",
    "backends",
    "compose",
    "plan",
]
__version__ = "0.1.0"
