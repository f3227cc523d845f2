"""ComposedModel: any module with weights composed from a bank."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .bank import TaskVectorBank
from .checkpoints import read_tensors, write_tensors

_KIND = "coefficients"
Granularity = Literal["task", "block"]


class ComposedModel(nn.Module):
    """A module whose weights are ``base[block] + sum_i coef[i, block] * delta_i[block]``.

    ``coef`` is the only parameter that learns. It is zero at the start, so the model starts as the
    base, bit for bit. The module is used in place: its own parameters stop requiring gradients, and
    those that the bank composes are replaced in every forward pass, tied ones included. Buffers
    (BatchNorm statistics) stay the module's own.

    In eval mode, and without gradients, the composition is done once, until ``coef`` changes (or a
    backward pass has used it up). In training it is done once per forward pass, or once for several
    of them inside `composed_once`. Changes to ``coef.data`` go unnoticed: assign with
    ``coef.copy_`` under ``torch.no_grad()``.

    Args:
        module: any module that holds the bank's base, on the bank's device.
        bank: what to compose.
        granularity: "block" for coefficients (N, B), "task" for (N,).

    Raises:
        ValueError: the module lacks a block of the bank, has it in another shape, dtype or place,
            or holds other weights than the bank's base.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> module = torch.nn.Linear(2, 1)
        >>> tuned = {name: p + 1 for name, p in module.state_dict().items()}
        >>> vector = ak.TaskVector.from_state_dicts(module.state_dict(), tuned, name="plus-one")
        >>> model = ak.ComposedModel(module, ak.TaskVectorBank.from_task_vectors(module, [vector]))
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.coef.grad.shape, model.coef.grad.sum().item()
        (torch.Size([1, 2]), 3.0)
    """

    def __init__(
        self, module: nn.Module, bank: TaskVectorBank, *, granularity: Granularity = "block"
    ) -> None:
        super().__init__()
        if granularity not in ("task", "block"):
            raise ValueError(f"unknown granularity {granularity!r}: expected 'task' or 'block'")
        _check_fit(module, bank)
        self.module = module.requires_grad_(False)
        self.bank = bank
        self.granularity = granularity
        count = len(bank.names)
        shape = (count,) if granularity == "task" else (count, len(bank.blocks))
        self.coef = nn.Parameter(torch.zeros(shape, device=bank.device))
        self._cache: _Composition | None = None
        self._hold = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with the composed weights."""
        return functional_call(self.module, self.weights(), args, kwargs)

    def weights(self) -> dict[str, Tensor]:
        """The composed blocks by name, composed anew only if need be."""
        records = torch.is_grad_enabled() and self.coef.requires_grad
        inference = torch.is_inference_mode_enabled()
        cache = self._cache
        if cache is not None and cache.serves(self.bank, self.coef, records, inference):
            return cache.weights
        # Dropped first, so that two composed models are never alive at once.
        self._cache = cache = None
        coef: Tensor = self.coef
        if records:
            # A backward pass through a composition uses it up: the next forward needs another.
            coef = self.coef.view_as(self.coef)
            coef.register_hook(self._drop)
        weights = self.bank.compose(coef)
        if self._hold or not records or not self.training:
            version = self.coef._version
            self._cache = _Composition(self.bank, self.coef, version, records, inference, weights)
        return weights

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        """Inside, all forward passes share one composition, gradients included."""
        self._hold, self._cache = True, None
        try:
            yield
        finally:
            self._hold, self._cache = False, None

    def merge(self) -> nn.Module:
        """A copy of the module with the composed weights: nothing of the bank stays with it."""
        merged = copy.deepcopy(self.module).requires_grad_(True)
        parameters = dict(merged.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for block, value in self.weights().items():
                parameters[block].copy_(value)
        return merged

    def save_coefficients(self, path: str | Path) -> None:
        """Writes ``coef`` with the names of its vectors and blocks (safetensors)."""
        write_coefficients(path, self.coef, self.bank)

    def load_coefficients(self, path: str | Path) -> None:
        """Reads what `save_coefficients` wrote, matched by name.

        Raises:
            FileNotFoundError, FileFormatError: there is no such file, or it holds no coefficients.
            ValueError: they belong to another bank or granularity; nothing is changed.
        """
        coef = read_coefficients(path, self.bank)
        if coef.shape != self.coef.shape:
            raise ValueError(
                f"{path} holds coefficients of shape {tuple(coef.shape)}, but this model with "
                f"granularity={self.granularity!r} has {tuple(self.coef.shape)}"
            )
        with torch.no_grad():
            self.coef.copy_(coef)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"bank={self.bank!r}, granularity={self.granularity!r}"

    def _drop(self, gradient: Tensor) -> None:
        self._cache = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComposedModel:
        if fn(self.coef.detach()[:0]).dtype != self.coef.dtype:
            raise TypeError(
                "a ComposedModel keeps the dtypes of its bank: use torch.autocast, or convert the "
                "base before packing the bank, or convert what merge() returns"
            )
        super()._apply(fn, recurse)
        self.bank = self.bank.to(self.coef.device)
        self._cache = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}


@dataclass(frozen=True)
class _Composition:
    """Composed weights, and what they were composed from."""

    bank: TaskVectorBank
    coef: Tensor
    version: int
    records: bool
    inference: bool
    weights: dict[str, Tensor]

    def serves(self, bank: TaskVectorBank, coef: Tensor, records: bool, inference: bool) -> bool:
        """Whether composing anew would give the same."""
        return (
            bank is self.bank
            and coef is self.coef
            and coef._version == self.version
            and (records, inference) == (self.records, self.inference)
        )


def write_coefficients(path: str | Path, coef: Tensor, bank: TaskVectorBank) -> None:
    """Writes coefficients (N, B) or (N,) of a bank, by name (safetensors)."""
    write_tensors(
        path,
        {"coef": coef},
        _KIND,
        names=bank.names,
        blocks=bank.blocks,
        base=_fingerprint(bank),
    )


def read_coefficients(path: str | Path, bank: TaskVectorBank) -> Tensor:
    """Coefficients in the bank's order of vectors and blocks, on its device.

    Raises:
        FileNotFoundError, FileFormatError: there is no such file, or it holds no coefficients.
        ValueError: they were learned on another base, or on other task vectors or blocks.
    """
    tensors, fields = read_tensors(path, _KIND, mmap=False)
    for what, theirs, ours in (
        ("task vectors", fields["names"], bank.names),
        ("blocks", fields["blocks"], bank.blocks),
    ):
        lacking = [name for name in theirs if name not in ours]
        extra = [name for name in ours if name not in theirs]
        if lacking or extra:
            raise ValueError(
                f"{path} belongs to another bank, its {what} differ: "
                f"not in this bank: {_some(lacking)}; only in this bank: {_some(extra)}"
            )
    if fields["base"] != _fingerprint(bank):
        raise ValueError(
            f"{path} belongs to another bank: its coefficients were learned on another base model"
        )
    coef = tensors["coef"][[fields["names"].index(name) for name in bank.names]]
    if coef.dim() == 2:
        coef = coef[:, [fields["blocks"].index(block) for block in bank.blocks]]
    return coef.to(bank.device)


def _fingerprint(bank: TaskVectorBank) -> str:
    pairs = sorted(zip(bank.blocks, bank.base_digests, strict=True))
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def _some(names: list[str]) -> str:
    listed = ", ".join(names[:5]) or "none"
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed


def _check_fit(module: nn.Module, bank: TaskVectorBank) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    for block, base in bank.base.items():
        if block not in parameters:
            raise ValueError(
                f"the module has no parameter {block!r}, which the bank composes: was the bank "
                f"made from another architecture? The module's parameters begin with "
                f"{_some(list(parameters)[:3])}"
            )
        parameter = parameters[block]
        for what, came, expected in (
            ("shape", tuple(parameter.shape), tuple(base.shape)),
            ("dtype", parameter.dtype, base.dtype),
            ("device", parameter.device, base.device),
        ):
            if came != expected:
                raise ValueError(
                    f"the module's parameter {block!r} has {what} {came}, but the bank's base has "
                    f"{expected}"
                )
        if id(parameter) in owners:
            raise ValueError(
                f"{owners[id(parameter)]!r} and {block!r} are one tied parameter in the module, "
                "but two blocks of the bank: pack the bank from the module itself, or with "
                f"exclude={block!r}"
            )
        owners[id(parameter)] = block
    base_values = {**bank.constants, **bank.base}
    for name, parameter in parameters.items():
        base = base_values.get(name, parameter)
        alike = parameter.dtype == base.dtype and parameter.device == base.device
        if not (alike and torch.equal(parameter, base)):
            raise ValueError(
                f"the module's parameter {name!r} differs from the bank's base: load the base "
                "with module.load_state_dict(bank.state_dict(torch.zeros(len(bank.names))))"
            )
