"""Learning coefficients: one trainer, and the methods that use it."""

from .few_shot import ImageBatches, accuracy, classify, oversample, sample_shots
from .search import GRID, isotropic, search, single_vector
from .trainer import Batches, Learned, Objective, Recipe, learn

__all__ = [
    "GRID",
    "Batches",
    "ImageBatches",
    "Learned",
    "Objective",
    "Recipe",
    "accuracy",
    "classify",
    "isotropic",
    "learn",
    "oversample",
    "sample_shots",
    "search",
    "single_vector",
]
