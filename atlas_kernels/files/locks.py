"""Folders that one process at a time writes results into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_NAME = ".in-use.lock"


@contextmanager
def in_use(folder: str | Path) -> Iterator[None]:
    """Inside, no other process of ours writes into the folder, which is made if need be.

    Raises:
        ValueError: another one does at this moment.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"{folder} is in use by another run: wait for it to end, or choose another folder"
        ) from error
    try:
        yield
    finally:
        # Before the lock goes, so that no one is found to hold a file that is no longer there.
        (folder / _NAME).unlink(missing_ok=True)
        lock.release()
