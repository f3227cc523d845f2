"""Linearised and LoRA task vectors of the embedded tasks: made when they are needed, and kept.

Those of all weights ship (see `assets`); these take seconds each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from ...learn import LinearTuning, LoraTuning, Recipe, Tuning, finetune
from ...tasks.clip import zero_shot_head
from ...tasks.embedded import WEIGHTS, embedded_task, load_model
from ...vectors import TaskVector

Kind = Literal["linear", "lora"]

RECIPES: dict[Kind, Recipe] = {
    "linear": Recipe(epochs=4, lr=5e-4, warmup=6),
    "lora": Recipe(epochs=4, lr=3e-3, warmup=6),
}
"""About half of the steps that made those of all weights, for as high an accuracy."""

_BATCH = 64


def make_vector(task: str, kind: Kind, folder: Path, assets: Path = WEIGHTS) -> TaskVector:
    """The task vector of an embedded task, from ``folder`` if it is there, else made and written.

    Bound to the model's image encoder. On one core a linearised one takes about 12
    seconds, a LoRA (rank 16) about 5.

    Args:
        task: one of ``task_names()``.
        kind: "linear", for `LinearizedModel`, or "lora".
        folder: created if need be; holds ``{kind}-{task}.safetensors``.
        assets: the folder of the model, by default the one that ships with us.

    Raises:
        ValueError: an unknown task.
        FileFormatError: the folder holds something else under this name.
    """
    data = embedded_task(task)
    path = folder / f"{kind}-{task}.safetensors"
    if path.exists():
        return TaskVector.load(path)
    model = load_model(assets)
    head = zero_shot_head(model, data.classnames, data.templates)
    tuning = _tuning(kind, model.get_submodule("visual"))
    vector = finetune(
        tuning, head, data.train, RECIPES[kind], batch_size=_BATCH, name=task, progress=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    vector.save(path)
    return vector


def _tuning(kind: Kind, encoder: nn.Module) -> Tuning:
    return LinearTuning(encoder) if kind == "linear" else LoraTuning(encoder)
