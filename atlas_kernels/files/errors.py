"""What is wrong with a file, in one sentence."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .text import printable


class FileFormatError(ValueError):
    """A file is not what it should be; the message says what it is and what was expected."""

    def __init__(self, message: str) -> None:
        # Names come from files: in a terminal they could clear the screen or forge a line.
        super().__init__(printable(message))


@contextmanager
def parts_of(path: str | Path) -> Iterator[None]:
    """Inside, a part that a file should have and has not, or not as it should be, is its damage."""
    try:
        yield
    except FileFormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        ours = isinstance(error, ValueError)
        reason = first_line(error) if ours else f"{type(error).__name__}: {first_line(error)}"
        raise FileFormatError(
            f"{path}: the file is damaged, or was not written by atlas_kernels ({reason})"
        ) from error


def existing(path: str | Path) -> Path:
    """The path; an OSError that says why, unless a file can be read there."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path}: symbolic links that lead in a circle") from None
        raise
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path} is a device, a pipe or a socket, expected a file")
    return path


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or what it is called."""
    return (str(error).splitlines() or [type(error).__name__])[0]
