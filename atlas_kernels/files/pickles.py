"""Whole pickled models whose code is not installed: their tensors, and nothing else.

This module serves `torch.load` as its ``pickle_module``. An ordinary unpickler imports and calls
whatever the file names. This one knows how to rebuild a tensor; every other class or function that
a file names, PyTorch's own modules included, becomes a stub that keeps what it is given and does
nothing.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class Stub:
    """An object of a class that is not imported: it takes anything and keeps its attributes."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def _ignored(self, *arguments: Any) -> None:
        pass

    # What filling a list, a set or a dictionary of another class calls.
    append = extend = add = update = __setitem__ = _ignored


class Unpickler(pickle.Unpickler):
    """An unpickler that calls nothing but what rebuilds tensors."""

    def find_class(self, module: str, name: str, /) -> Any:
        """The few things that are what they are called, a new stub for everything else."""
        known = _KNOWN.get(f"{module}.{name}")
        # New ones every time: a file may set attributes of what it was given.
        return known() if known else type(name, (Stub,), {})


def module_tensors(module: Stub, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The parameters and persistent buffers of a pickled ``nn.Module``, named as in a state dict.

    Raises:
        ValueError: it is no module, or something in the place of a tensor is none.
    """
    state = vars(module)
    if not is_module(module):
        raise ValueError(f"{prefix or 'the object'} is a {type(module).__name__}, not a module")
    transient = state.get("_non_persistent_buffers_set", ())
    own = {**state["_parameters"], **state.get("_buffers", {})}
    for name, tensor in own.items():
        if tensor is None or name in transient:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{prefix}{name} is a {type(tensor).__name__}, not a tensor")
        yield prefix + name, tensor
    for name, child in state["_modules"].items():
        if child is not None:
            yield from module_tensors(child, f"{prefix}{name}.")


def is_module(loaded: object) -> bool:
    """Whether this is a pickled ``nn.Module``."""
    return isinstance(loaded, Stub) and {"_parameters", "_modules"} <= vars(loaded).keys()


def _rebuilt(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)  # type: ignore[no-any-return]


def _data(data: Tensor, *_: Any) -> Tensor:
    return data


def _wrapped(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: lambda *arguments: function(*arguments)


# Under the names that files of any age use.
_KNOWN: dict[str, Callable[[], Any]] = {
    "collections.OrderedDict": lambda: OrderedDict,
    "builtins.set": lambda: set,
    "__builtin__.set": lambda: set,
    "torch._utils._rebuild_tensor": _wrapped(_rebuilt),
    "torch._utils._rebuild_tensor_v2": _wrapped(_rebuilt),
    "torch._utils._rebuild_parameter": _wrapped(_data),
    "torch._utils._rebuild_parameter_with_state": _wrapped(_data),
}
