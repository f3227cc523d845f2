"""Jobs in several processes: results as they come, errors and interrupts at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def default_processes() -> int:
    """One per core that this process may use, at most eight."""
    # Not on every system: macOS has no affinities.
    usable = getattr(os, "sched_getaffinity", None)
    return min(8, len(usable(0)) if usable else os.cpu_count() or 1)


def run_jobs(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int
) -> Iterator[Result]:
    """Yields ``function(job)`` for every job, in the order in which they finish.

    Every process uses one thread: for models as small as the demo's, two processes of one thread
    finish sooner than one of two. With ``processes=1`` everything happens in this process. The
    caller's interrupt, or any exception, ends all processes at once. (A pool from the standard
    library waits forever for a process that the system has killed, or cannot be stopped in the
    middle of a job.)

    Raises:
        OSError: as a job raised it.
        RuntimeError: a job failed otherwise in another process, or the process was killed.
    """
    if processes <= 1 or len(jobs) <= 1:
        with one_thread():
            for job in jobs:
                yield function(job)
        return
    context = get_context("spawn")
    waiting = list(reversed(jobs))
    workers: dict[Connection, Any] = {}
    busy: set[Connection] = set()
    try:
        for _ in range(min(processes, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function), daemon=True)
            with _interrupts_ignored():
                process.start()
            theirs.close()
            workers[ours] = process
            busy.add(ours)
            ours.send(waiting.pop())
        while busy:
            for connection in cast(list[Connection], wait(busy)):
                try:
                    failed, value = connection.recv()
                except EOFError:
                    workers[connection].join()
                    raise RuntimeError(
                        "a worker process was killed (exit code "
                        f"{workers[connection].exitcode}): is there enough memory?"
                    ) from None
                if failed:
                    raise value
                if waiting:
                    connection.send(waiting.pop())
                else:
                    busy.remove(connection)
                yield value
    finally:
        for connection, process in workers.items():
            # An idle worker ends by itself when its connection closes; a busy one is told to.
            connection.close()
            if connection in busy:
                process.terminate()
        for process in workers.values():
            process.join(timeout=10)
            process.kill()
            process.join()


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    torch.set_num_threads(1)
    # Leaves through Python, so that everything is put in order behind it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Ends with the parent, whichever way that one ends.
    with connection:
        while True:
            try:
                job = connection.recv()
            except EOFError:
                return
            try:
                answer = (False, function(job))
            except OSError as error:
                # A full disk is for the caller to tell; all else is in words, which always pickle.
                answer = (True, error)
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
                answer = (True, RuntimeError(text))
            connection.send(answer)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C, which reaches all of them: the parent ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
