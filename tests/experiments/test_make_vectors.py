"""Linearised and LoRA vectors of the embedded tasks: bound to the encoder, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import same_bits
from torch import Tensor

pytest.importorskip("open_clip")

import atlas_kernels as ak
from atlas_kernels.experiments.embedded import make_vectors as vectors
from atlas_kernels.learn.few_shot import classify
from atlas_kernels.tasks.clip.model import ImageClassifier, zero_shot_head
from atlas_kernels.tasks.embedded.image_task import embedded_task
from atlas_kernels.tasks.embedded.model import load_model

TASK = "mnist-rotated"


def parts(vector: ak.TaskVector) -> list[Tensor]:
    return [
        part
        for delta in vector.deltas.values()
        for part in ((delta.up, delta.down) if isinstance(delta, ak.LowRank) else (delta,))
    ]


@pytest.mark.parametrize("kind", ["linear", "lora"])
def test_made_once_and_of_use(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = embedded_task(TASK).train.subset(torch.arange(64))
    data = replace(embedded_task(TASK), train=small)
    monkeypatch.setattr(vectors, "embedded_task", lambda name: data)
    vector = vectors.make_vector(TASK, kind, tmp_path / "made")
    assert vector.name == TASK

    clip = load_model()
    encoder = clip.get_submodule("visual")
    # A bank refuses what is bound to another base.
    bank = ak.TaskVectorBank.from_task_vectors(encoder, [vector])
    model = (ak.LinearizedModel if kind == "linear" else ak.ComposedModel)(encoder, bank)
    classifier = ImageClassifier(model, zero_shot_head(clip, data.classnames, data.templates))
    batch = small.images.plain(torch.arange(64)), small.labels
    losses = []
    for coef in (0.0, 1.0):
        torch.nn.init.constant_(model.coef, coef)
        with torch.no_grad():
            losses.append(classify(classifier.eval(), batch).item())
    # Four steps.
    assert losses[1] < 0.9 * losses[0]

    monkeypatch.setattr(vectors, "finetune", None)
    again = vectors.make_vector(TASK, kind, tmp_path / "made")
    assert again.base == vector.base
    assert all(map(same_bits, parts(again), parts(vector)))


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'moon'"):
        vectors.make_vector("moon", "lora", tmp_path)
    assert list(tmp_path.iterdir()) == []
