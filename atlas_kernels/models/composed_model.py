"""ComposedModel: any module with weights composed from a bank."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bank import Stream, TaskVectorBank
from .coefficients import read_coefficients, write_coefficients
from .door import forget_weights, uninstall
from .fitting import (
    Granularity,
    Memory,
    check_fit,
    check_granularity,
    check_memory,
    check_seed,
)
from .recompute import OnUse, ResidentBlocks
from .source import Source
from .whole import Whole


class ComposedModel(nn.Module):
    """A module whose weights are ``base[block] + sum_i coef[i, block] * delta_i[block]``.

    ``coef`` is the only parameter that learns. It is zero at the start, so the model starts as the
    base, bit for bit. The module is used in place: its own parameters stop requiring gradients, and
    their memory is the bank's base itself. Composed weights stand in its attributes, tied ones
    included, from one change of ``coef`` to the next: whatever method of it runs, from any thread,
    runs with them (``model.module.generate(...)``, a submodule called alone). Lists of parameters
    (``state_dict``, ``named_parameters``) show the base, and copies of the module are the base.
    Buffers (BatchNorm statistics) stay the module's own.

    ``memory`` says when blocks are composed; losses and gradients are the same up to the rounding
    of float32. In the backward pass the gradient of a block becomes N numbers as soon as it is
    complete (of small blocks: those of a few neighbours together), so that no model of gradients is
    ever alive. The peak of a learning step, besides what the module computes (activations):

    - "whole": all blocks in one pass over the bank, once from one change of ``coef`` to the next,
      in training and evaluation, for all threads. Base + bank + one model, the composed weights,
      + the gradient of the largest block, or of small ones 2 MiB.
    - "recompute": each block where the module asks for it, dropped after use (in the forward pass
      when the next one is asked for), and again in the backward pass. Base + bank + the largest two
      blocks: a composed one and its gradient, or in the forward pass one in use and the one asked
      for last. It costs a second pass over the bank. What else may be alive: the gradients of
      blocks used in several places, until the backward has met them all; the blocks of a region
      that activation checkpointing runs again, or of an RNN; and autocast's copies of weights.
    - "stream": as "recompute", with deltas that stay in the bank's file (see
      `TaskVectorBank.load`), or for a GPU in host memory. Base + the largest two blocks + a fixed
      read-ahead of 64 MiB, whatever N is. A step reads the bank once in the forward pass, and up to
      twice in the backward pass.

    Changes to ``coef.data`` go unnoticed: assign with ``coef.copy_`` under ``torch.no_grad()``.

    Threads may evaluate and train one model at the same time. Models may share a module by turns;
    while one of them runs in a thread, the others refuse to. Under `torch.compile` of the model and
    inside transforms of `torch.func`, which take "whole", all weights are composed by each call.

    Args:
        module: any module that holds the bank's base, on the bank's device.
        bank: what to compose.
        granularity: "block" for coefficients (N, B), "task" for (N,); "partition" for (N, B, K),
            where every element of a block belongs to one of K random groups (see
            `TaskVectorBank.compose`).
        partitions: K, 1 to 4096, with "partition" and only there.
        seed: of the partition. It goes with the coefficients: into their file and the state dict,
            and from there into the model that loads them.
        memory: "whole", "recompute" or "stream".

    Raises:
        ValueError: ``partitions`` or ``seed`` do not fit.
        ValueError: the module lacks a block of the bank, has it in another shape, dtype or place,
            or holds other weights than the bank's base.
            Or "stream", and the bank comes from no file, or its file was replaced.
        TypeError: a part of the module is scripted; or compiled, unless memory is "whole".
        RuntimeError: another model of this module is running in another thread.

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

    # Whether the module itself asks for the composed weights.
    _stands = True

    def __init__(
        self,
        module: nn.Module,
        bank: TaskVectorBank,
        *,
        granularity: Granularity = "block",
        partitions: int | None = None,
        seed: int = 0,
        memory: Memory = "whole",
    ) -> None:
        super().__init__()
        check_granularity(granularity, partitions)
        check_seed(seed)
        check_memory(module, bank, memory)
        check_fit(module, bank)
        # What an earlier model has left.
        uninstall(module)
        self.module = module.requires_grad_(False)
        self.memory = memory
        self.granularity = granularity
        self.partitions = partitions
        self._seed = operator.index(seed)
        shape: tuple[int, ...] = (len(bank.names),)
        if granularity != "task":
            shape += (len(bank.blocks),)
        if partitions is not None:
            shape += (partitions,)
        self.coef = nn.Parameter(torch.zeros(shape, device=bank.device))
        self.bank = bank

    @property
    def bank(self) -> TaskVectorBank:
        """What is composed. The module's parameters are views of its base."""
        return self._bank

    @bank.setter
    def bank(self, bank: TaskVectorBank) -> None:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for block, base in bank.base.items():
            parameters[block].data = base
        self._bank = bank
        self._renew()

    @property
    def seed(self) -> int:
        """Of the partition, if there is one."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        check_seed(seed)
        self._seed = operator.index(seed)
        self._renew()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with the composed weights.

        Raises:
            RuntimeError: another model runs on the same module, in another thread.
        """
        try:
            with self._source.forward_pass():
                return self._run(*args, **kwargs)
        finally:
            for rnn in self._rnns:
                forget_weights(rnn)

    def weights(self) -> dict[str, Tensor]:
        """The composed weights by name, as the module finds them: with a graph, if one is recorded.

        All of them are in memory as long as they are in use, whatever ``memory`` says.
        """
        return self._source.weights()

    @contextmanager
    def composed_once(self, *, accumulate: bool = False) -> Iterator[None]:
        """Inside, all of this thread's forward passes share one graph of weights.

        A backward pass through several of them reduces the gradient of each block once.

        Args:
            accumulate: sum the weight gradients of several ``backward()`` calls (micro-batches),
                which takes the memory of one model's gradients. They reach ``coef.grad`` in one
                pass over the bank when the context ends; if it ends by an exception, they are
                dropped. `torch.autograd.grad` finds no way to ``coef`` inside.
        """
        with self._source.shared_pass(accumulate):
            yield

    def merge(self) -> nn.Module:
        """A copy of the module with the composed weights: nothing of the bank stays with it."""
        with self._source.copying():
            merged = copy.deepcopy(self.module).requires_grad_(True)
        parameters = dict(merged.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name in self.bank.weights:
                parameters[name].copy_(self._source.weight(name))
        return merged

    def save_coefficients(self, path: str | Path) -> None:
        """Writes ``coef`` with the names of its vectors and blocks, and the seed (safetensors)."""
        write_coefficients(path, self.coef, self.bank, self.seed)

    def load_coefficients(self, path: str | Path) -> None:
        """Reads what `save_coefficients` wrote, matched by name; of partitions with their seed.

        Raises:
            FileNotFoundError, FileFormatError: there is no such file, or it holds no coefficients.
            ValueError: they belong to another bank or granularity, or to another number of
                partitions; nothing is changed.
        """
        coef, seed = read_coefficients(path, self.bank)
        if coef.shape != self.coef.shape:
            raise ValueError(
                f"{path} holds coefficients of shape {tuple(coef.shape)}, but this model with "
                f"granularity={self.granularity!r} has {tuple(self.coef.shape)}"
            )
        with torch.no_grad():
            self.coef.copy_(coef)
        if self.partitions:
            self.seed = seed

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        partition = f", partitions={self.partitions}, seed={self.seed}" if self.partitions else ""
        return (
            f"bank={self.bank!r}, granularity={self.granularity!r}{partition}, "
            f"memory={self.memory!r}"
        )

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def _composed(self, coef: Tensor) -> dict[str, Tensor]:
        """All blocks and weights, differentiable."""
        return self.bank.compose(coef, seed=self.seed, factors=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComposedModel:
        if fn(self.coef.detach()[:0]).dtype != self.coef.dtype:
            raise TypeError(
                "a ComposedModel keeps the dtypes of its bank: use torch.autocast, or convert the "
                "base before packing the bank, or convert what merge() returns"
            )
        uninstall(self.module)
        super()._apply(fn, recurse)
        self.bank = self.bank.to(self.coef.device, deltas=self.memory != "stream")
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.partitions:
            destination[f"{prefix}seed"] = torch.tensor(self.seed)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        # Loading writes into the module's parameters, which are the bank's base.
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        composed = {id(parameters[block]) for block in self.bank.blocks}
        for name, base in parameters.items():
            found = state_dict.get(f"{prefix}module.{name}", base)
            if id(base) in composed and not torch.equal(found.to(base), base):
                raise ValueError(
                    f"the state dict holds another base than the bank in {prefix}module.{name}"
                )
        if self.partitions:
            seed = state_dict.pop(f"{prefix}seed", None)
            if seed is not None:
                self.seed = int(seed)
            elif strict:
                missing_keys.append(f"{prefix}seed")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedModel:
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        with self._source.copying():
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_source", "_rnns")
        return {key: value for key, value in self.__dict__.items() if key not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.bank = self._bank

    def _renew(self) -> None:
        """Composes from the bank and the seed as they are now."""
        uninstall(self.module)
        self._rnns = [part for part in self.module.modules() if isinstance(part, nn.RNNBase)]
        self._source = Source(
            self._mode(), lambda: self.coef, self.module if self._stands else None
        )

    def _mode(self) -> Whole | OnUse:
        groups = self.partitions or 0
        if self.memory == "whole":
            return Whole(self.bank, self._composed, groups, self.seed)
        blocks = Stream if self.memory == "stream" else ResidentBlocks
        return OnUse(self.bank, blocks(self.bank, groups, self.seed))
