"""The commands put together: their help, what they have in common, and how they fail.

A command prints for people and returns what it found; ``--json`` prints that instead. Modules of
commands are imported when their command is asked for, PyTorch when it runs.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from .. import __version__
from ..files import printable

# Module and name in it of every command, by group; what it does, for the list of commands.
_COMMANDS = {
    "See what is here": {
        "info": ("info:info", "Show backends, devices, versions, and what to install for the rest"),
        "demo": ("demo:app", "Learn compositions on real images that come with the package"),
    },
    "Files": {
        "diff": ("diff:app", "Make a task vector from two checkpoints"),
        "bank": ("bank:app", "Pack a base and its task vectors into a bank"),
        "inspect": ("inspect:app", "Describe a file: vector, bank, coefficients, state dict"),
        "merge": ("merge:app", "Write the checkpoint that coefficients make of a bank"),
    },
    "Learning": {
        "plan": ("plan:app", "Predict memory, disk and traffic of learning, loading nothing"),
        "learn": ("learn:app", "Learn coefficients from images"),
        "reproduce": ("reproduce:app", "Run a table of the paper, or every method on small tasks"),
    },
}

APP = App(
    name="atlas-kernels",
    help="Learn how to add task vectors: compositions of fine-tuned models.",
    help_epilogue="exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted",
    version=__version__,
    # Rendering anything more takes longer to import than all the rest.
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    # The last one holds, so that a command may be taken up again with another value.
    default_parameter=Parameter(allow_repeating=True),
)
for _group, _its in _COMMANDS.items():
    for _name, (_place, _text) in _its.items():
        APP.command(f"{__package__}.{_place}", name=_name, help=f"{_text}.", group=_group)
APP.register_install_completion_command()
APP.meta.suppress_keyboard_interrupt = False
_FLAG = Parameter(negative="", show_default=False)


@APP.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    json: Annotated[bool, _FLAG] = False,
    quiet: Annotated[bool, _FLAG] = False,
    debug: Annotated[bool, _FLAG] = False,
) -> None:
    """Runs a command.

    Args:
        tokens: the command and its options.
        json: print one JSON document and nothing else.
        quiet: print nothing, and show no progress.
        debug: show a traceback when something goes wrong.
    """
    asked = {"--help", "-h", "--version"} & set(tokens)
    with _silence(progress=quiet) if (json or quiet) and not asked else _as_it_is():
        result = APP(tokens, exit_on_error=False, print_error=False)
    if json and not asked:
        _print_json(result)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: done. 1: the run failed. 2: wrong usage or input. 130: interrupted. Whatever goes wrong is
    one message on standard error, with a traceback only under ``--debug``.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    failure: BaseException
    try:
        if not tokens:
            raise ValueError("which command? See atlas-kernels --help")
        APP.meta(tokens, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader has gone (``| head``). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except (KeyboardInterrupt, Exception) as error:
        failure = error
    message, code = _in_words(failure)
    if "--debug" in tokens:
        traceback.print_exception(failure)
    print(f"atlas-kernels: {printable(message, keep=chr(10))}", file=sys.stderr)
    return code


def _in_words(error: BaseException) -> tuple[str, int]:
    """What went wrong in one message, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{_after_colon(error)}", 130
    if isinstance(error, CycloptsError):
        command = " ".join(["atlas-kernels", *(error.command_chain or ())])
        return f"{' '.join(str(error).split()).rstrip('.')}: see {command} --help", 2
    if isinstance(error, ValueError | TypeError | ImportError):
        return str(error), 2
    if isinstance(error, OSError):
        # A full disk is not the caller's mistake; a wrong path or missing permission is.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        return _sentence(error), 1 if full else 2
    return f"failed: {type(error).__name__}{_after_colon(error)} (--debug shows where)", 1


@contextmanager
def _silence(progress: bool) -> Iterator[None]:
    """Prints nothing, and shows no progress if asked to."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        before = os.environ.get("TQDM_DISABLE")
        if progress:
            os.environ["TQDM_DISABLE"] = "1"
        try:
            yield
        finally:
            if progress and before is None:
                del os.environ["TQDM_DISABLE"]


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=2, default=str))


def _after_colon(error: BaseException) -> str:
    return f": {error}" if str(error) else ""


def _sentence(error: OSError) -> str:
    """Ours as they are; the system's without their number."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
