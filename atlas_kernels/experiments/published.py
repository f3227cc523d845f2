"""The suites that come with the package: the paper's tables, and all methods on embedded tasks."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .config import Checkpoints, Suite, checked, read_yaml
from .workspace import describe_layout

_FOLDER = Path(__file__).resolve().parent / "suites"
EMBEDDED = ("embedded", "demo", "demo-full")
"""Those on what comes with the package."""


def suite_names() -> tuple[str, ...]:
    """Their names, those on what comes with the package first."""
    names = sorted(path.stem for path in _FOLDER.glob("*.yaml"))
    return (*EMBEDDED, *(name for name in names if name not in EMBEDDED))


def read_suite(name: str) -> Suite:
    """A suite that comes with the package, by name, or the suite of a file, as it is written.

    Raises:
        ValueError: there is none of that name; the known ones are listed.
        OSError: the file cannot be read.
    """
    if name in suite_names():
        return read_yaml(_FOLDER / f"{name}.yaml", Suite)
    if Path(name).suffix in (".yaml", ".yml"):
        return read_yaml(Path(name), Suite)
    close = get_close_matches(name, suite_names(), 1, 0.4)
    raise ValueError(
        f"no suite {name!r}"
        + (f": did you mean {close[0]}?" if close else "")
        + f" There are {', '.join(suite_names())}, or a file that ends in .yaml"
    )


def load_suite(name: str, source: Mapping[str, Any] | None) -> Suite:
    """`read_suite`, on files of one's own: ``source`` holds the fields of `Checkpoints`.

    Raises:
        ValueError: besides, the suite needs files and there are none given, or the reverse.
    """
    suite = read_suite(name)
    if not isinstance(suite.source, Checkpoints):
        if source is not None:
            raise ValueError(
                f"the suite {suite.name} runs on what comes with the package, not files"
            )
        return suite
    if source is None:
        raise ValueError(
            f"the suite {suite.name} needs files: give --checkpoints DIR and --data DIR, in this "
            f"layout:\n{describe_layout(suite.source)}"
        )
    fields = {**suite.source.model_dump(), **source}
    return suite.model_copy(update={"source": checked(Checkpoints, fields, suite.name)})
