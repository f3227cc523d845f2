"""Running a module with other tensors in place of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


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
