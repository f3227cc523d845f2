"""What JSON holds, as a dataclass: every value checked against its annotation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from itertools import repeat
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def parsed(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of ``str``, finite ``float``, ``int``, ``tuple``, ``dict`` and the like.

    Names that it does not know are left out: a newer version may have written them.

    Raises:
        ValueError: a value is missing or is something else; and what the dataclass itself raises.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Size:
        ...     names: tuple[str, ...]
        ...     count: int = 0
        >>> parsed(Size, {"names": ["a", "b"]})
        Size(names=('a', 'b'), count=0)
    """
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            found[field.name] = _value(hints[field.name], values[field.name], field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"it lacks {field.name!r}")
    return kind(**found)


def check_unique(what: str, names: Iterable[str]) -> None:
    """Raises ValueError if a name comes twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"several of its {what} are called {repeated[:5]}")


def _value(kind: Any, value: Any, what: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if is_dataclass(kind) and isinstance(value, dict):
        return parsed(kind, value)  # type: ignore[arg-type]
    if origin is dict and isinstance(value, dict):
        return {key: _value(inner[1], its, f"{what}[{key!r}]") for key, its in value.items()}
    if origin is tuple and isinstance(value, list):
        many = inner[-1] is Ellipsis
        if many or len(inner) == len(value):
            kinds = repeat(inner[0]) if many else inner
            pairs = enumerate(zip(kinds, value, strict=False))
            return tuple(_value(its, part, f"{what}[{i}]") for i, (its, part) in pairs)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return value
    if kind is not float and type(value) is kind:
        return value
    shown = repr(value)[:80] if isinstance(value, int | float | str) else type(value).__name__
    expected = "a finite float" if kind is float else str(kind if inner else kind.__name__)
    raise ValueError(f"{what} is {shown}, expected {expected}")
