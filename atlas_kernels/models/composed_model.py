"""ComposedModel: any module with weights composed from a bank."""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..bank import Stream, TaskVectorBank, check_streamable
from ..ops import check_groups
from .coefficients import listed, read_coefficients, write_coefficients
from .door import install, uninstall
from .recompute import OnUse, ResidentBlocks
from .whole import Whole

Granularity = Literal["task", "block", "partition"]
Memory = Literal["whole", "recompute", "stream"]


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
    of float32. The peak of a learning step, besides what the module computes (activations):

    - "whole": all blocks, in one pass over the bank, before the forward pass. Base + bank + two
      models: the composed weights and their gradient (inside `composed_once` three, because it
      keeps the weights while the gradient is gathered into one arena). In eval mode, and without
      gradients, it is done once, until ``coef`` changes (or a backward pass has used it up); in
      training once per forward pass, or once for several of them inside `composed_once`.
      Where activation checkpointing runs parts of the module again, the weights are composed once
      more. Threads share the weights that record no graph; in training each has its own.
    - "recompute": each block where the module asks for it, dropped after use (in the forward pass
      when the next one is asked for), and again in the backward pass, where its gradient becomes N
      numbers at once. Base + bank + the largest two blocks: a composed one and its gradient, or in
      the forward pass one in use and the one asked for last. It costs a second pass over the bank.
      What else may be alive: the gradients of blocks used in several places, until the backward
      has met them all; the blocks of a region that activation checkpointing runs again, or of an
      RNN; and autocast's copies of weights.

    - "stream": as "recompute", with deltas that stay in the bank's file (see
      `TaskVectorBank.load`), or for a GPU in host memory. Base + the largest two blocks + a fixed
      read-ahead of 64 MiB, whatever N is. A step reads the bank once in the forward pass, and up to
      twice in the backward pass.

    Changes to ``coef.data`` go unnoticed: assign with ``coef.copy_`` under ``torch.no_grad()``.

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
        TypeError: "recompute" or "stream", and a part of the module is compiled or scripted.

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

    # Whether the module finds the composed weights in place of its own.
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
        _check_granularity(granularity, partitions)
        _check_seed(seed)
        if memory not in get_args(Memory):
            raise ValueError(
                f"unknown memory {memory!r}: expected 'whole', 'recompute' or 'stream'"
            )
        _check_uncompiled(module, memory)
        if memory != "whole" and bank.weights != bank.blocks:
            raise ValueError(
                f"memory={memory!r} composes block by block, but weights of this bank are "
                "products of blocks (lora='factorwise'): use memory='whole'"
            )
        if memory == "stream":
            check_streamable(bank)
        _check_fit(module, bank)
        # What an earlier model has left.
        uninstall(module)
        self.module = module.requires_grad_(False)
        self.memory = memory
        self._source: Whole | OnUse | None = None
        self._hold = False
        self._sums: _Sums | None = None
        self._rnns = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
        self.granularity = granularity
        self.partitions = partitions
        self.seed = seed
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
        self._bank = bank
        self._share_base()

    @property
    def seed(self) -> int:
        """Of the partition, if there is one."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        _check_seed(seed)
        self._seed = operator.index(seed)
        # What there is composes with the old one.
        self._source = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass with the composed weights."""
        try:
            source = self._installed()
            cut = self._sums.cut if self._sums else None
            if isinstance(source, Whole):
                running = source.forward_pass()
            else:
                running = source.forward_pass(self._hold, cut)
            with running:
                return self.module(*args, **kwargs)
        finally:
            for rnn in self._rnns:
                _forget_weights(rnn)

    def weights(self) -> dict[str, Tensor]:
        """The composed blocks by name; with ``memory="whole"`` composed anew only if need be."""
        if self.memory == "recompute":
            return self.bank.compose(self.coef, seed=self.seed)
        if self.memory == "stream":
            # Without gradients: their graph would need the whole bank.
            return dict(self._on_use().values())
        return self._whole().weights()

    @contextmanager
    def composed_once(self, *, accumulate: bool = False) -> Iterator[None]:
        """Inside, all forward passes share one composition, gradients included.

        Unless ``memory="whole"``, blocks are still composed where they are used, but a backward
        through several passes reduces the gradient of each block once.

        Args:
            accumulate: sum the weight gradients of several ``backward()`` calls (micro-batches),
                which takes the memory of one model's gradients. They reach ``coef.grad`` in one
                pass over the bank when the context ends; if it ends by an exception, they are
                dropped. `torch.autograd.grad` finds no way to ``coef`` inside.
        """
        self._end_composition()
        self._set_hold(True, _Sums() if accumulate else None)
        try:
            yield
            if self._sums:
                self._sums.send()
        finally:
            self._set_hold(False, None)
            self._end_composition()

    def merge(self) -> nn.Module:
        """A copy of the module with the composed weights: nothing of the bank stays with it."""
        with self._base_in_place():
            merged = copy.deepcopy(self.module).requires_grad_(True)
        parameters = dict(merged.named_parameters(remove_duplicate=False))
        whole = self.memory == "whole"
        with torch.no_grad():
            for block, value in self.weights().items() if whole else self._on_use().values():
                parameters[block].copy_(value)
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

    def _compose(self) -> dict[str, Tensor]:
        """What `weights` keeps: here the composed blocks."""
        return self.bank.compose(self.coef, seed=self.seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ComposedModel:
        if fn(self.coef.detach()[:0]).dtype != self.coef.dtype:
            raise TypeError(
                "a ComposedModel keeps the dtypes of its bank: use torch.autocast, or convert the "
                "base before packing the bank, or convert what merge() returns"
            )
        uninstall(self.module)
        super()._apply(fn, recurse)
        self.bank = self.bank.to(self.coef.device, deltas=self.memory != "stream")
        self._end_composition()
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
        with self._base_in_place():
            twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        if self._rnns:
            # It asks for its weights when it is copied.
            uninstall(self.module)
        passing = {"_hold": False, "_sums": None, "_source": None}
        return {**self.__dict__, **passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_base()

    def _share_base(self) -> None:
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for block, base in self.bank.base.items():
            parameters[block].data = base
        self._source = None
        if self._stands:
            self._installed()

    def _installed(self) -> Whole | OnUse:
        """What composes the module's weights, from the current bank and coefficients."""
        source = self._source
        if source is None or not source.installed or not source.serves(self.bank, self.coef):
            uninstall(self.module)
            source = self._new_source()
            install(self.module, self.bank, source)
            self._source = source
            self._set_hold(self._hold, self._sums)
        return source

    @contextmanager
    def _base_in_place(self) -> Iterator[None]:
        """Inside, the module is as it was: to be copied."""
        uninstall(self.module)
        try:
            yield
        finally:
            if self._stands:
                self._installed()

    def _new_source(self) -> Whole | OnUse:
        if self.memory == "whole":
            return Whole(self)
        kind = Stream if self.memory == "stream" else ResidentBlocks
        blocks = kind(self.bank, self.partitions or 0, self.seed)
        return OnUse(self.bank, blocks, self.coef)

    def _whole(self) -> Whole:
        source = self._installed() if self._stands else self._source or Whole(self)
        assert isinstance(source, Whole)
        self._source = source
        return source

    def _on_use(self) -> OnUse:
        source = self._installed()
        assert isinstance(source, OnUse)
        return source

    def _set_hold(self, hold: bool, sums: _Sums | None) -> None:
        self._hold, self._sums = hold, sums
        if isinstance(self._source, Whole):
            self._source.hold, self._source.cut = hold, sums.cut if sums else None

    def _end_composition(self) -> None:
        if self._source is not None:
            self._source.end()


class _Sums:
    """Gradients of several backward passes, summed before they go on."""

    def __init__(self) -> None:
        self._cuts: list[tuple[Tensor, Tensor]] = []

    def cut(self, tensor: Tensor) -> Tensor:
        """A leaf in place of the tensor: gradients stop there."""
        leaf = tensor.detach().requires_grad_()
        self._cuts.append((tensor, leaf))
        return leaf

    def send(self) -> None:
        """Sends the sums on through the tensors that were cut."""
        arrived = [(tensor, leaf.grad) for tensor, leaf in self._cuts if leaf.grad is not None]
        if arrived:
            tensors, gradients = zip(*arrived, strict=True)
            torch.autograd.backward(tensors, gradients)


def _forget_weights(rnn: nn.RNNBase) -> None:
    # It keeps a list of the weights that it used last: composed ones would live on in there.
    weights = [dict.get(rnn._parameters, name) for name in rnn._flat_weights_names]
    rnn._flat_weights = weights
    rnn._flat_weight_refs = [
        weight if weight is None else weakref.ref(weight) for weight in weights
    ]


def _check_granularity(granularity: Granularity, partitions: int | None) -> None:
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"unknown granularity {granularity!r}: expected 'task', 'block' or 'partition'"
        )
    if granularity != "partition":
        if partitions is not None:
            raise ValueError(
                f"partitions={partitions} with granularity={granularity!r}: groups of elements "
                "take granularity='partition'"
            )
    elif partitions is None:
        raise ValueError("granularity='partition' needs partitions, the number of groups (1-4096)")
    else:
        check_groups(partitions)


def _check_seed(seed: int) -> None:
    # What a state dict can hold.
    if not -(2**63) <= operator.index(seed) < 2**63:
        raise ValueError(f"seed is {seed}, expected an integer of 64 bits")


def _check_uncompiled(module: nn.Module, memory: Memory) -> None:
    for name, part in module.named_modules():
        scripted = isinstance(part, torch.jit.ScriptModule)
        # Either what torch.compile(module) returns, or a module after its own compile().
        compiled = "_orig_mod" in part._modules or part._compiled_call_impl is not None
        if scripted or (compiled and memory != "whole"):
            raise TypeError(
                f"memory={memory!r} cannot compose inside a compiled or scripted module "
                f"({name or 'the module itself'}): use "
                + ("an eager module" if scripted else "memory='whole', or an eager module")
            )


def _check_fit(module: nn.Module, bank: TaskVectorBank) -> None:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    owners: dict[int, str] = {}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for block, base in bank.base.items():
        if block in buffers:
            raise ValueError(
                f"{block!r} is a buffer of the module, which no bank composes: pack the bank from "
                f"the module itself, or with exclude={block!r}"
            )
        if block not in parameters:
            raise ValueError(
                f"the module has no parameter {block!r}, which the bank composes: was the bank "
                f"made from another architecture? The module's parameters begin with "
                f"{listed(list(parameters)[:3])}"
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
