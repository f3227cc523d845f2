"""Coefficients predicted from the images themselves, batch by batch.

Source: the published aTLAS code; not in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import ComposedModel, call_with
from .trainer import Recipe

PER_INSTANCE = Recipe(epochs=1, lr=1e-4, warmup=500)
"""The published recipe; epochs: DTD 5, EuroSAT 6, MNIST 4, all others 1."""


class PerInstance(nn.Module):
    """An encoder composed anew for every batch: ``coef = mean over the batch of W f_0(x) + b``.

    f_0(x) are the features [b, d] of the base, in a pass of its own and without gradients; W (N, d)
    and b (N,) learn and are zero at the start, so the encoder starts as the base. All blocks share
    the coefficient of a task vector. What an image's features are depends on the batch it is in.

    Args:
        encoder: images to features, with ``granularity="task"`` and ``memory="whole"``; its own
            ``coef`` is set to zero and stops requiring gradients.
        width: d, the encoder's output width: the number of columns of a zero-shot head.

    Raises:
        ValueError: an encoder of another granularity or memory.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> from atlas_kernels.learn import PerInstance
        >>> module = torch.nn.Linear(2, 3)
        >>> tuned = {name: p + 1 for name, p in module.state_dict().items()}
        >>> vector = ak.TaskVector.from_state_dicts(module.state_dict(), tuned, name="plus-one")
        >>> bank = ak.TaskVectorBank.from_task_vectors(module, [vector])
        >>> encoder = PerInstance(ak.ComposedModel(module, bank, granularity="task"), width=3)
        >>> torch.equal(encoder(torch.ones(4, 2)), module(torch.ones(4, 2)))
        True
    """

    def __init__(self, encoder: ComposedModel, width: int) -> None:
        super().__init__()
        if encoder.granularity != "task" or encoder.memory != "whole":
            raise ValueError(
                "coefficients are predicted per task vector, for all blocks at once: expected an "
                f"encoder of granularity='task' and memory='whole', got {encoder.extra_repr()}"
            )
        self.encoder = encoder
        with torch.no_grad():
            encoder.coef.requires_grad_(False).zero_()
        self.predictor = nn.Linear(width, len(encoder.bank.names), device=encoder.coef.device)
        nn.init.zeros_(self.predictor.weight)
        nn.init.zeros_(self.predictor.bias)

    def coefficients(self, images: Tensor) -> Tensor:
        """Coefficients (N,) of a batch of images."""
        with torch.no_grad():
            # Its own coefficients are zero: the base.
            features = self.encoder.module(images)
        coef: Tensor = self.predictor(features.to(self.predictor.weight.dtype)).mean(0)
        return coef

    def forward(self, images: Tensor) -> Any:
        """The encoder's features of images, with the coefficients of this batch."""
        return call_with(self.encoder, {"coef": self.coefficients(images)}, (images,))
