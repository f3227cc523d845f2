from . import bank, files, learn, models, ops, tasks, vectors
from .bank import TaskVectorBank
from .files import FileFormatError, read_state_dict
from .models import ComposedModel, LinearizedModel, Plan, plan, plans, read_coefficients
from .ops import BackendUnavailableError, backends, compose
from .vectors import LowRank, TaskVector

__all__ = [
    "BackendUnavailableError",
    "ComposedModel",
    "FileFormatError",
    "LinearizedModel",
    "LowRank",
    "Plan",
    "TaskVector",
    "TaskVectorBank",
    "backends",
    "bank",
    "compose",
    "files",
    "learn",
    "models",
    "ops",
    "plan",
    "plans",
    "read_coefficients",
    "read_state_dict",
    "tasks",
    "vectors",
]
__version__: str
