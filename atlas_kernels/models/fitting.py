"""Whether a module, a bank and the settings of a model fit together."""

from __future__ import annotations

import operator
from typing import Literal, get_args

import torch
from torch import nn

from ..bank import TaskVectorBank, check_streamable
from ..ops import check_groups
from .coefficients import listed

Granularity = Literal["task", "block", "partition"]
Memory = Literal["whole", "recompute", "stream"]


def check_granularity(granularity: Granularity, partitions: int | None) -> None:
    """Raises ValueError unless it is one, and has partitions if it takes them."""
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


def check_seed(seed: int) -> None:
    """Raises ValueError unless a state dict can hold it."""
    if not -(2**63) <= operator.index(seed) < 2**63:
        raise ValueError(f"seed is {seed}, expected an integer of 64 bits")


def check_memory(module: nn.Module, bank: TaskVectorBank, memory: Memory) -> None:
    """Raises ValueError or TypeError unless module and bank can be used in this memory mode."""
    if memory not in get_args(Memory):
        raise ValueError(f"unknown memory {memory!r}: expected 'whole', 'recompute' or 'stream'")
    _check_uncompiled(module, memory)
    if memory != "whole" and bank.weights != bank.blocks:
        raise ValueError(
            f"memory={memory!r} composes block by block, but weights of this bank are "
            "products of blocks (lora='factorwise'): use memory='whole'"
        )
    if memory == "stream":
        check_streamable(bank)


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


def check_fit(module: nn.Module, bank: TaskVectorBank) -> None:
    """Raises ValueError unless the module holds the bank's base, each block once."""
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
