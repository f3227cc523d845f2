"""What is wrong with a file, in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileFormatError(ValueError):
    """A file is not what it should be; the message says what it is and what was expected."""


@contextmanager
def parts_of(path: str | Path) -> Iterator[None]:
    """Inside, a part that a file should have and has not, or not as it should be, is its damage."""
    try:
        yield
    except FileFormatError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"{path}: the file is damaged, or was not written by atlas_kernels "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def existing(path: str | Path) -> Path:
    """The path; FileNotFoundError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what it is called."""
    return (str(error).splitlines() or [type(error).__name__])[0]
