"""Learning coefficients: one trainer, and the methods that use it."""

from .adapters import (
    TIP_FROZEN,
    TIP_JOINT,
    Adapted,
    LPPlusPlus,
    TipAdapter,
    load_adapter,
    lp_plus_plus,
    tip_adapter,
)
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
from .few_shot import ImageBatches, accuracy, classify, features, oversample, sample_shots
from .search import GRID, isotropic, search, single_vector
from .trainer import Batches, Learned, Objective, Recipe, learn

__all__ = [
    "ADDITION",
    "GRID",
    "NEGATION",
    "TIP_FROZEN",
    "TIP_JOINT",
    "Adapted",
    "Batches",
    "ImageBatches",
    "JointTask",
    "LPPlusPlus",
    "Learned",
    "Objective",
    "Outcome",
    "Penalty",
    "Recipe",
    "TipAdapter",
    "accuracy",
    "add",
    "classify",
    "features",
    "isotropic",
    "learn",
    "load_adapter",
    "lp_plus_plus",
    "negate",
    "oversample",
    "sample_shots",
    "search",
    "search_addition",
    "search_negation",
    "single_vector",
    "tip_adapter",
    "weights_only",
]
