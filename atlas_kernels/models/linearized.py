"""LinearizedModel: a module's first-order expansion around the base, in task vectors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..bank import TaskVectorBank
from .composed_model import ComposedModel
from .fitting import Granularity
from .substitution import call_with


class LinearizedModel(ComposedModel):
    """``f(x; theta_0) + J(x) @ sum_i coef[i, block] * delta_i[block]``, J = df/dtheta at theta_0.

    A `ComposedModel` whose composition moves the output along its tangent, by one forward-mode
    product, instead of moving the weights: the output is linear in ``coef``. Task vectors should
    come from fine-tuning in the tangent space (`atlas_kernels.learn.finetuning`). Everything that
    learns coefficients takes either model.

    The module is always in eval mode: f is one fixed function, without dropout and with
    BatchNorm's own statistics. Attention runs without fused kernels, which cannot be differentiated
    forwards; f(x; theta_0) itself is the module's own output, bit for bit.

    ``weights()`` are the tangent, by block; there is no ``merge()``, since no weights of the module
    give these outputs.

    Args:
        module: any module that holds the bank's base, on the bank's device, and returns one tensor.
        bank: what to compose.
        granularity: "block" for coefficients (N, B), "task" for (N,), "partition" for (N, B, K).
        partitions: as for `ComposedModel`.
        seed: likewise.

    Raises:
        ValueError: as for `ComposedModel`, or the bank has ``lora="factorwise"``, which is not
            linear in ``coef``.

    Source: aTLAS (arXiv 2407.02880), equation 1 and section 5.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> module = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Tanh())
        >>> _ = torch.nn.init.zeros_(module[0].weight)
        >>> base = module.state_dict()
        >>> tuned = {"0.weight": torch.ones(1, 1)}
        >>> vector = ak.TaskVector.from_state_dicts(base, tuned, name="plus-one")
        >>> bank = ak.TaskVectorBank.from_task_vectors(module, [vector])
        >>> model = ak.LinearizedModel(module, bank)
        >>> _ = torch.nn.init.constant_(model.coef, 3.0)
        >>> model(torch.ones(1, 1)).item()  # the tangent of tanh at 0, not tanh(3)
        3.0
    """

    _stands = False

    def __init__(
        self,
        module: nn.Module,
        bank: TaskVectorBank,
        *,
        granularity: Granularity = "block",
        partitions: int | None = None,
        seed: int = 0,
    ) -> None:
        if bank.weights != bank.blocks:
            raise ValueError(
                "a linearised model needs deltas that are linear in coef, but weights of this bank "
                "are products of blocks (lora='factorwise'): pack it with lora='product'"
            )
        super().__init__(module, bank, granularity=granularity, partitions=partitions, seed=seed)
        self.module.eval()

    def _run(self, *args: Any, **kwargs: Any) -> Tensor:
        return expand(self.module, self.weights(), *args, **kwargs)

    def train(self, mode: bool = True) -> LinearizedModel:
        """Training mode is the model's, never its module's."""
        super().train(mode)
        self.module.eval()
        return self

    def merge(self) -> NoReturn:
        """Raises TypeError: no weights of the module give these outputs."""
        raise TypeError(
            "a linearised model cannot be merged: no weights of its module give its outputs; keep "
            "its coefficients (save_coefficients) and its bank"
        )

    def _composed(self, coef: Tensor) -> dict[str, Tensor]:
        return self.bank.combine(coef, seed=self.seed)


def expand(module: nn.Module, tangent: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """``f(x; theta_0) + J(x) @ tangent``: the module's expansion around its own parameters.

    Args:
        module: returns one tensor.
        tangent: by parameter name, with the parameter's shape and dtype; 0 where it has none.
        args: of the module's forward pass.
        kwargs: likewise.

    Returns:
        The output, differentiable in the tangent.
    """
    _import_forward_mode()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    base = {name: parameters[name].detach() for name in tangent}
    # By itself: without fused attention, its last bits would not be the module's own.
    output: Tensor = module(*args, **kwargs)
    with _plain_attention():
        change: Tensor = jvp(
            lambda weights: call_with(module, weights, args, kwargs), (base,), (tangent,)
        )[1]
    return output + change


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by operators that forward mode knows."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@cache
def _import_forward_mode() -> None:
    # PyTorch's own formulas are scripted at the first use, which warns that scripting is outdated.
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
