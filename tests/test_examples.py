"""Every example that a reader may paste runs: docstrings, and the README's code."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

MODULES = (
    "bank.task_vector_bank",
    "learn.adapters",
    "learn.analysis",
    "learn.few_shot",
    "learn.finetuning",
    "learn.per_instance",
    "learn.selection",
    "learn.test_time",
    "models.composed_model",
    "models.linearized",
    "models.live_memory",
    "models.planning",
    "ops.backends",
    "ops.composition",
    "tasks.embedded.image_task",
    "tasks.embedded.out_of_domain",
    "vectors.low_rank",
    "vectors.task_vector",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"atlas_kernels.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    gradient = scope["composed"].coef.grad
    assert gradient.abs().sum() > 0
