"""The options that the benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from .measure import BACKENDS


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Of ``python -m bench.NAME``."""
    return argparse.ArgumentParser(prog=f"python -m bench.{name}", description=text)


def timing(name: str, text: str | None, repeats: int) -> argparse.ArgumentParser:
    """With where to measure, how often, and where rows go."""
    made = parser(name, text)
    made.add_argument("--device", choices=list(BACKENDS), default="cpu")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--out", type=Path, help="a file for JSON lines")
    return made


def learning(name: str, text: str | None) -> argparse.ArgumentParser:
    """With a folder, and how much is learned there."""
    made = parser(name, text)
    made.add_argument("folder", type=Path)
    made.add_argument("--shots", type=int, default=16)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--epochs", type=int, default=5)
    return made
