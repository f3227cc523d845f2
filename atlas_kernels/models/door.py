"""A module that finds composed weights where its parameters were.

Blocks are handed out on attribute access, to every method of the module and to every thread.
Whatever lists the parameters (``state_dict``, ``named_parameters``, ``to``) still finds the
parameters themselves, which are the base: nothing is swapped, so nothing has to be put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..bank import TaskVectorBank


class Source(Protocol):
    """What a module's composed weights come from.

    Attributes:
        installed: whether the module still asks this one.
    """

    installed: bool

    def block(self, column: int, parameter: Tensor) -> Tensor:
        """The composed block in place of a parameter."""


def install(module: nn.Module, bank: TaskVectorBank, source: Source) -> None:
    """Has a module ask ``source`` for the bank's blocks, tied ones included, until `uninstall`."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    columns = {id(parameters[name]): column for column, name in enumerate(bank.weights)}
    for owner in module.modules():
        own = {
            name: columns[id(parameter)]
            for name, parameter in owner._parameters.items()
            if id(parameter) in columns
        }
        if own:
            owner._parameters = _Parameters(owner._parameters, own, source)
    source.installed = True


def uninstall(module: nn.Module) -> None:
    """Gives a module its parameters back."""
    for owner in module.modules():
        if isinstance(owner._parameters, _Parameters):
            owner._parameters.source.installed = False
            owner._parameters = dict(owner._parameters.items())


class _Parameters(dict[str, Any]):
    """A module's own parameters: listed as they are, composed when asked for by name.

    `nn.Module` asks by name for attribute access only.
    """

    def __init__(
        self, parameters: Mapping[str, Any], columns: dict[str, int], source: Source
    ) -> None:
        super().__init__(parameters.items())
        self._columns = columns
        self.source = source

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        column = self._columns.get(name)
        return parameter if column is None else self.source.block(column, parameter)

    def __setitem__(self, name: str, value: Any) -> None:
        # `functional_call` would put back what it found, which is no parameter.
        if name in self._columns and not isinstance(value, nn.Parameter):
            raise TypeError(
                f"the parameter {name!r} is composed on use and cannot be replaced: use the module "
                "that merge() returns, or another copy of the module"
            )
        super().__setitem__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the module is an ordinary one.
        return dict, (dict(self.items()),)
