"""Running a module with other tensors in place of its own, and what must not happen to it then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..ops import in_backward


def places(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Every place of these parameters and buffers, tied ones too, with the name it goes by.

    A module that is part of two others counts once: `functional_call` would put its tensors back in
    the wrong order, and so leave the others in there.
    """
    own: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    own |= module.named_parameters(remove_duplicate=False)
    known = {id(own[name]): name for name in names}
    return {
        f"{prefix}.{name}" if prefix else name: known[id(tensor)]
        for prefix, owner in module.named_modules()
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if id(tensor) in known
    }


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    where: Mapping[str, str] | None = None,
) -> Any:
    """The module's forward pass with these tensors by name; ``where`` is `places` of the names."""
    where = places(module, tensors) if where is None else where
    spread = {place: tensors[name] for place, name in where.items()}
    return functional_call(module, spread, tuple(args), dict(kwargs or {}), tie_weights=False)


def guard(module: nn.Module, names: Iterable[str]) -> None:
    """Has the owners of these parameters refuse to run in a backward pass, unless they are swapped.

    Activation checkpointing runs parts of a module again, when the tensors of the forward pass have
    left it. PyTorch's re-entrant kind then gives the gradients of another model without a word; the
    other kind an error that names no cause, or none either, where no weight is saved. What reads a
    parameter without calling its owner is not noticed.
    """
    where = places(module, names)
    for prefix, owner in module.named_modules():
        start = f"{prefix}." if prefix else ""
        own = [name for name in owner._parameters if start + name in where]
        if own and not isinstance(owner, torch.jit.ScriptModule):
            owner.register_forward_pre_hook(_Guard(id(owner), own))


def unguard(module: nn.Module) -> None:
    """Takes the guards away."""
    for owner in module.modules():
        for key, hook in list(owner._forward_pre_hooks.items()):
            if isinstance(hook, _Guard):
                del owner._forward_pre_hooks[key]


class _Guard:
    """A hook; an object, so that it can be found, and knows a copy of its owner as another."""

    def __init__(self, owner: int, names: list[str]) -> None:
        self._owner = owner
        self._names = names

    def __call__(self, owner: nn.Module, args: Any) -> None:
        # In a compiled module checkpointed regions are part of the graph.
        if torch.compiler.is_compiling() or not in_backward():
            return
        # Where a parameter is replaced, the whole composed model is being run again.
        swapped = not all(isinstance(owner._parameters[name], nn.Parameter) for name in self._names)
        if id(owner) == self._owner and not swapped:
            raise RuntimeError(
                f"a {type(owner).__name__} runs again in the backward pass (activation "
                "checkpointing), but its composed weights were there in the forward pass only: "
                "use memory='recompute'"
            )
