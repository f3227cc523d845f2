"""A module that finds composed weights where its parameters were.

Weights are handed out on attribute access, to every method of the module and to every thread.
Whatever lists the parameters (``state_dict``, ``named_parameters``, ``to``) still finds the
parameters themselves, which are the base: nothing is swapped, so nothing has to be put back.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Door(Protocol):
    """What a module asks for its weights.

    Attributes:
        installed: whether the module still does.
    """

    installed: bool

    def weight(self, name: str, parameter: Tensor) -> Tensor:
        """What stands in place of a parameter."""

    def check_idle(self) -> None:
        """Raises RuntimeError if it is in use in another thread."""


def install(module: nn.Module, names: Iterable[str], door: Door) -> None:
    """Has a module ask ``door`` for these parameters, tied ones included, until `uninstall`.

    Raises:
        RuntimeError: another one is in use.
    """
    uninstall(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = {id(parameters[name]): name for name in names}
    for owner in module.modules():
        own = {
            name: known[id(parameter)]
            for name, parameter in owner._parameters.items()
            if id(parameter) in known
        }
        if own:
            owner._parameters = _Parameters(owner._parameters, own, door)
    door.installed = True


def uninstall(module: nn.Module) -> None:
    """Gives a module its parameters back.

    Raises:
        RuntimeError: what it asks is in use in another thread.
    """
    owners = [owner for owner in module.modules() if isinstance(owner._parameters, _Parameters)]
    doors = {id(owner._parameters.door): owner._parameters.door for owner in owners}  # type: ignore[attr-defined]
    for door in doors.values():
        door.check_idle()
    for door in doors.values():
        door.installed = False
    for owner in owners:
        owner._parameters = dict(owner._parameters.items())


def forget_weights(rnn: nn.RNNBase) -> None:
    """Empties the list that an RNN keeps of what it used last: weights would live on in there."""
    weights = [dict.get(rnn._parameters, name) for name in rnn._flat_weights_names]
    rnn._flat_weights = weights
    rnn._flat_weight_refs = [
        weight if weight is None else weakref.ref(weight) for weight in weights
    ]


class _Parameters(dict[str, Any]):
    """A module's own parameters: listed as they are, composed when asked for by name.

    `nn.Module` asks by name for attribute access only.
    """

    def __init__(self, parameters: Mapping[str, Any], names: dict[str, str], door: Door) -> None:
        super().__init__(parameters.items())
        self._names = names
        self.door = door

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        known = self._names.get(name)
        return parameter if known is None else self.door.weight(known, parameter)

    def __setitem__(self, name: str, value: Any) -> None:
        # `functional_call` would put back what it found, which is no parameter.
        if name in self._names and not isinstance(value, nn.Parameter):
            raise TypeError(
                f"the parameter {name!r} is composed on use and cannot be replaced: use the module "
                "that merge() returns, or another copy of the module"
            )
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module is an ordinary one.
        return dict, (dict(self.items()),)
