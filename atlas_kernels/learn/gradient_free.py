"""Learning without gradients: coefficients from the values of a loss alone.

Source: aTLAS (arXiv 2407.02880), appendix D.8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from ..models import ComposedModel
from ..tasks.images import LabelledImages

# About the size of learned coefficients.
_FIRST_STEP = 0.1


def learn_gradient_free(
    encoder: ComposedModel,
    loss: Callable[[], float],
    *,
    budget: int = 50,
    bound: float = 1.5,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Tensor, float]:
    """The coefficients of the lowest loss that a (1+1) evolution strategy finds, and that loss.

    Zero is the first of ``budget`` evaluations, so the result is never worse than the base; ties
    keep the earlier. One evaluation takes the memory of inference. In the paper, one coefficient
    per task vector (``granularity="task"``) learns much more than one per block.

    The strategy is nevergrad's OnePlusOne: the best so far, varied at random, by 0.1 at first, more
    while it succeeds. The paper has nevergrad choose (NGOpt): for 50 evaluations it takes COBYLA,
    which draws no random numbers, so that seeds mean nothing, and for several hundred a method that
    fails beside numpy 2.4. On the embedded tasks COBYLA ends with higher losses.

    Args:
        encoder: starts from ``coef = 0`` and holds the result afterwards.
        loss: of the encoder as it is, lower is better (see `summed_cross_entropy`).
        budget: evaluations of the loss.
        bound: coefficients stay within [-bound, bound].
        seed: of the search.
        progress: shows a progress bar on standard error.

    Raises:
        ImportError: nevergrad is not installed.
        ValueError: a budget below 1 or a bound that is not positive.
        FloatingPointError: a loss is NaN.

    Source: aTLAS (arXiv 2407.02880), appendix D.8.

    Example (``model`` is an image classifier on ``encoder``, ``shots`` are `LabelledImages`):
        ``learn_gradient_free(encoder, lambda: summed_cross_entropy(model, shots))``
    """
    if budget < 1 or bound <= 0:
        raise ValueError(f"expected a budget of 1 or more and a bound > 0, got {budget}, {bound}")
    nevergrad = _nevergrad()
    best, best_loss = torch.zeros_like(encoder.coef), math.inf
    space = nevergrad.p.Array(init=best.cpu().numpy()).set_bounds(-bound, bound)
    space.set_mutation(sigma=_FIRST_STEP)
    space.random_state.seed(seed)
    optimizer = nevergrad.optimizers.OnePlusOne(space, budget=budget)
    optimizer.suggest(best.cpu().numpy())
    for _ in tqdm(range(budget), desc="gradient-free", disable=not progress, leave=False):
        asked = optimizer.ask()
        coef = torch.from_numpy(asked.value).to(best)
        with torch.no_grad():
            encoder.coef.copy_(coef)
        value = loss()
        if math.isnan(value):
            raise FloatingPointError(f"the loss is NaN at coefficients within {bound} of zero")
        optimizer.tell(asked, value)
        if value < best_loss:
            best, best_loss = coef, value
    with torch.no_grad():
        encoder.coef.copy_(best)
    return best, best_loss


def summed_cross_entropy(
    model: nn.Module, examples: LabelledImages, *, batch_size: int = 500
) -> float:
    """The sum over plain images of the cross-entropy of the model's logits.

    Without gradients, in eval mode.
    """
    model.eval()
    total = 0.0
    with torch.no_grad():
        for chosen in torch.arange(len(examples)).split(batch_size):
            logits = model(examples.images.plain(chosen))
            labels = examples.labels[chosen].to(logits.device)
            total += cross_entropy(logits, labels, reduction="sum").item()
    return total


def _nevergrad() -> ModuleType:
    try:
        import nevergrad
    except ImportError as error:
        raise ImportError(
            "learning without gradients needs nevergrad, which is not installed: run"
            " pip install 'atlas_kernels[gradient-free]'"
        ) from error
    return cast(ModuleType, nevergrad)
