"""Modules whose weights come from a bank: composed whole, on use or from a stream; what that takes.

Stands on `bank`; used by `learn` and above.
"""

from .coefficients import Coefficients, read_coefficients
from .composed_model import ComposedModel
from .linearized import LinearizedModel, expand
from .live_memory import PeakMemory
from .planning import Plan, activation_bytes, plan, plans
from .substitution import call_with

__all__ = [
    "Coefficients",
    "ComposedModel",
    "LinearizedModel",
    "PeakMemory",
    "Plan",
    "activation_bytes",
    "call_with",
    "expand",
    "plan",
    "plans",
    "read_coefficients",
]
