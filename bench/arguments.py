"""The options that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .measure import BACKENDS, machine


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Of ``python -m bench.NAME``."""
    return argparse.ArgumentParser(prog=f"python -m bench.{name}", description=text)


def timing(
    name: str, text: str | None, repeats: int, devices: Sequence[str] = tuple(BACKENDS)
) -> argparse.ArgumentParser:
    """With where to measure, how often, and where rows go."""
    made = parser(name, text)
    made.add_argument("--device", choices=devices, default=devices[0])
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


def started(args: argparse.Namespace) -> tuple[Console, dict[str, Any]]:
    """A console that has been told the machine, and the machine, on as many threads as asked."""
    torch.set_num_threads(args.threads)
    console = Console(width=None if Console().is_terminal else 120)
    device = machine(args.device)
    console.print({key: value for key, value in device.items() if key != "backends"})
    return console, device
