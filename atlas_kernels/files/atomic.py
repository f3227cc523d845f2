"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("atlas_kernels")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ENDING = ".unfinished"


def write_atomically(path: str | Path, write: Callable[[str], object], nbytes: int = 0) -> None:
    """Calls ``write(temporary name)`` beside ``path`` and renames; nothing is left on failure.

    A process that is killed meanwhile leaves the temporary file; the next one that writes the same
    ``path`` removes it (see `abandoned`) and says so in the log.

    Args:
        path: of the file.
        write: writes into an empty file that exists.
        nbytes: how large it will be, if that is known: what is said when the disk is full.

    Raises:
        OSError: it cannot be written; the message names ``path``, not the temporary file.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: the folder {path.parent} does not exist")
    for left in abandoned(path):
        with _unlocked(left) as free:
            if free:
                _log.warning("removed %s, which a process that was killed had left", left)
                left.unlink()
    temporary = ""
    try:
        temporary, handle = _locked(path)
        try:
            write(temporary)
            # mkstemp makes private files; ours are as readable as any other that the user creates.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            os.close(handle)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and _is_temporary(error.filename, path):
            raise OSError(error.errno, _reason(error, path, nbytes), str(path)) from error
        raise


def abandoned(path: str | Path) -> list[Path]:
    """Temporary files of ``path`` that processes left behind which no longer live."""
    path, found = Path(path), []
    for entry in path.parent.iterdir() if os.access(path.parent, os.R_OK) else ():
        if _is_temporary(entry, path):
            with _unlocked(entry) as free:
                found += [entry] * free
    return found


def _is_temporary(name: str | Path | None, path: Path) -> bool:
    """Whether it is a temporary file of ``path``; None is what an open file's errors have."""
    pattern = rf"\.{re.escape(path.name)}\.\w{{8}}{re.escape(_ENDING)}"
    return name is None or re.fullmatch(pattern, Path(name).name) is not None


def _locked(path: Path) -> tuple[str, int]:
    """A new temporary file and a handle that locks it; the lock ends with the process."""
    while True:
        handle, temporary = tempfile.mkstemp(_ENDING, f".{path.name}.", path.parent)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for abandoned.
        if os.path.exists(temporary):
            return temporary, handle
        os.close(handle)


@contextmanager
def _unlocked(path: Path) -> Iterator[bool]:
    """Whether no process holds the lock of a temporary file; inside, nobody else gets it."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(handle)


def _reason(error: OSError, path: Path, nbytes: int) -> str:
    """The system's, and of a full disk the numbers."""
    reason = error.strerror or str(error)
    if error.errno in _FULL and nbytes:
        free = shutil.disk_usage(path.parent).free
        reason += f": the file takes {nbytes:,} bytes, {free:,} are free on this disk"
    return reason
