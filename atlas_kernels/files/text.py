"""Text that comes from files, made safe to show."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""The text with what a terminal would obey, or a page hide, as escapes.

    A tensor's name may hold anything: ``ESC [2J`` clears a screen, a newline forges a row.

    Example:
        >>> from atlas_kernels.files import printable
        >>> printable("a\x1b[2J\nb")
        'a\\x1b[2J\\nb'
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )
