"""Learning coefficients: one trainer, and the methods that use it."""

from .arithmetic import (
    ADDITION,
    NEGATION,
    JointTask,
    Outcome,
    Penalty,
    add,
    negate,
    search_addition,
    search_negation,
    weights_only,
)
from .few_shot import ImageBatches, accuracy, classify, oversample, sample_shots
from .search import GRID, isotropic, search, single_vector
from .trainer import Batches, Learned, Objective, Recipe, learn

__all__ = [
    "ADDITION",
    "GRID",
    "NEGATION",
    "Batches",
    "ImageBatches",
    "JointTask",
    "Learned",
    "Objective",
    "Outcome",
    "Penalty",
    "Recipe",
    "accuracy",
    "add",
    "classify",
    "isotropic",
    "learn",
    "negate",
    "oversample",
    "sample_shots",
    "search",
    "search_addition",
    "search_negation",
    "single_vector",
    "weights_only",
]
