"""The benchmarks run by hand; that they still fit the package is tested here."""

import importlib
from pathlib import Path

import pytest

for package in ("matplotlib", "open_clip"):
    pytest.importorskip(package)

MODULES = sorted(Path(__file__).parents[1].joinpath("bench").glob("*.py"))


@pytest.mark.parametrize("name", [path.stem for path in MODULES])
def test_every_module_imports(name: str) -> None:
    importlib.import_module(f"bench.{name}" if name != "__init__" else "bench")
