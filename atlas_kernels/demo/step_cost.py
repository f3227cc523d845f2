"""Time and memory of one learning step: composed in one pass, or in a plain Python loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from .. import ComposedModel, TaskVector, TaskVectorBank
from ..clip import ImageClassifier
from ..codecs import codec_named
from ..low_rank import to_dense
from ..memory import PeakMemory


def step_cost(
    visual: nn.Module,
    vectors: Sequence[TaskVector],
    head: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    codec: str = "bf16",
    repeats: int = 15,
) -> dict[str, Any]:
    """Measures compose + forward + backward, ours beside the loop, on PyTorch's current threads.

    The loop is what one writes without this package: ``theta = base + sum(c * delta)``, block by
    block and vector by vector, with deltas in float32 (in bf16 it would have to convert each of
    them in every step). Both compute the same gradient, which is checked first. They take turns,
    so that both see the same machine.

    Args:
        visual: the image encoder; its parameters stop requiring gradients.
        vectors: N task vectors of it.
        head: [C, d].
        images: the model's input, one batch.
        labels: int64, one per image.
        codec: of our bank.
        repeats: how often each is timed.

    Returns:
        For "fused" and "loop": "seconds" (median), "quartiles", "peak_bytes" of tensors that one
        step makes, and "stored_bytes" of the task vectors; and what was measured.
    """
    bank = TaskVectorBank.from_task_vectors(visual, vectors, codec=codec)
    composed = ComposedModel(visual, bank)
    model = ImageClassifier(composed, head).train()
    coef = composed.coef
    # As stored, so that both add the same numbers.
    deltas = [
        [to_dense(vector.deltas[block]).to(_stored(bank)).float() for block in bank.blocks]
        for vector in vectors
    ]
    base = list(bank.base.values())

    def fused() -> Tensor:
        return torch.autograd.grad(cross_entropy(model(images), labels), coef)[0]

    plain = ImageClassifier(visual, head).train()

    def loop() -> Tensor:
        weights = {}
        for b, block in enumerate(bank.blocks):
            theta = base[b]
            for i in range(len(deltas)):
                theta = theta + coef[i, b] * deltas[i][b]
            weights[f"encoder.{block}"] = theta
        logits = functional_call(plain, weights, (images,))
        return torch.autograd.grad(cross_entropy(logits, labels), coef)[0]

    steps: dict[str, Callable[[], Tensor]] = {"fused": fused, "loop": loop}
    expected = loop()
    difference = (fused() - expected).norm() / expected.norm()
    # Same products in another order: rounding only. 1e-3 is far above it, far below any mistake.
    if not difference < 1e-3:
        raise RuntimeError(f"the two steps disagree: relative difference {difference:.1e}")
    peaks = {name: _peak(step) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    stored = {
        "fused": bank.nbytes - sum(segment.base.nbytes for segment in bank.segments),
        "loop": sum(delta.nbytes for vector in deltas for delta in vector),
    }
    return {
        "vectors": len(vectors),
        "blocks": len(bank.blocks),
        "batch": len(labels),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "codec": codec,
        "gradient_difference": float(difference),
        **{
            name: {
                "seconds": statistics.median(seconds[name]),
                "quartiles": statistics.quantiles(seconds[name], n=4)[::2],
                "peak_bytes": peaks[name],
                "stored_bytes": stored[name],
            }
            for name in steps
        },
    }


def _peak(step: Callable[[], Tensor]) -> int:
    with PeakMemory() as memory:
        step()
    return memory.peak


def _stored(bank: TaskVectorBank) -> torch.dtype:
    return codec_named(bank.codec).dtype
