"""Tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files import printable


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    numbers: int = 0,
    sections: Sequence[int] = (),
) -> None:
    """Prints a table.

    Args:
        columns: headings.
        rows: one text per column.
        title: above the table.
        numbers: how many of the last columns are aligned to the right.
        sections: indices of rows with a line below them.
    """
    table = Table(title=title or None, title_justify="left", title_style="bold")
    for index, heading in enumerate(columns):
        number = index >= len(columns) - numbers
        table.add_column(
            heading, justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for index, row in enumerate(rows):
        # As plain text: a name with [brackets] is not markup, nor one with colours a colour.
        table.add_row(*(escape(printable(text)) for text in row), end_section=index in sections)
    # A pipe has no width; 120 columns keep the rows whole.
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def size(count: float) -> str:
    """A number of bytes in words: "1.5 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")
