"""Fast, small composition of task vectors: theta_j = theta0_j + sum_i lambda_ij * tau_ij."""

from .backends import BackendUnavailableError, backends
from .compose import compose

__all__ = ["BackendUnavailableError", "backends", "compose"]
__version__ = "0.1.0"
