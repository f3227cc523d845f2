"""Running a module with other tensors in place of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The module's forward pass with these parameters and buffers by name, tied ones included."""
    own: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
    own |= module.named_parameters(remove_duplicate=False)
    known = {id(own[name]): tensor for name, tensor in tensors.items()}
    # A module that is part of two others counts once: `functional_call` would put its tensors back
    # in the wrong order, and so leave the others in there.
    everywhere = {
        f"{prefix}.{name}" if prefix else name: known[id(tensor)]
        for prefix, owner in module.named_modules()
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if id(tensor) in known
    }
    return functional_call(module, everywhere, tuple(args), dict(kwargs or {}), tie_weights=False)
