"""The command line: a module per command, each thin; `app` puts them together.

On top of everything: nothing imports it but the script.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (see `app.run`)."""
    try:
        from .app import run
    except ModuleNotFoundError as error:
        import sys

        advice = "run pip install 'atlas_kernels[cli]'"
        print(f"atlas-kernels: the commands need {error.name}: {advice}", file=sys.stderr)
        return 2
    return run(argv)
