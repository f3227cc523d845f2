"""The command line. Each command is a module with `add` (its parser) and `run` (its work)."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import traceback
from collections.abc import Sequence

from . import demo, files, info, learn, plan, reproduce

_EPILOG = """exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0: done. 1: the run failed. 2: wrong usage or input. 130: interrupted. Whatever goes wrong is
    one message on standard error, with a traceback only under ``--debug``.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        # argparse has printed the help (0) or what is wrong (2).
        return int(stop.code or 0)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        # The reader has gone (``| head``). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        return _report(arguments, f"interrupted{_after_colon(error)}", 130)
    except (ValueError, TypeError) as error:
        return _report(arguments, str(error), 2)
    except OSError as error:
        # A full disk is not the caller's mistake; a wrong path or missing permission is.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        return _report(arguments, _sentence(error), 1 if full else 2)
    except ImportError as error:
        return _report(arguments, str(error), 2)
    except Exception as error:
        message = f"failed: {type(error).__name__}{_after_colon(error)}"
        return _report(arguments, f"{message} (--debug shows where)", 1)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--debug",
        action="store_true",
        # Known to every command as well: suppressed, one does not reset what the other has set.
        default=argparse.SUPPRESS,
        help="show a traceback when something goes wrong",
    )
    parser = argparse.ArgumentParser(
        prog="atlas-kernels",
        description="Learn how to add task vectors: compositions of fine-tuned models.",
        epilog=_EPILOG,
        parents=[common],
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (info, demo, learn, reproduce, files, plan):
        module.add(commands, common)
    return parser


def _report(arguments: argparse.Namespace, message: str, code: int) -> int:
    if getattr(arguments, "debug", False):
        traceback.print_exc()
    print(f"atlas-kernels: {message}", file=sys.stderr)
    return code


def _after_colon(error: BaseException) -> str:
    return f": {error}" if str(error) else ""


def _sentence(error: OSError) -> str:
    """Ours as they are; the system's without their number."""
    if error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
