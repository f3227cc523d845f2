"""Time and memory of one learning step: composed in one pass, or in a plain Python loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..bank import TaskVectorBank
from ..models import PeakMemory, call_with
from ..ops import codec_named
from ..vectors import to_dense
from .setting import Setting


def step_cost(setting: Setting[Any], *, repeats: int = 15) -> dict[str, Any]:
    """Measures compose + forward + backward, ours beside the loop, on PyTorch's current threads.

    The loop is what one writes without this package: ``theta = base + sum(c * delta)``, block by
    block and vector by vector, with deltas in float32 (in bf16 it would have to convert each of
    them in every step). Both compute the same gradient, which is checked first. They take turns,
    so that both see the same machine.

    Args:
        setting: a run per block on a task, stored as a floating-point type.
        repeats: how often each is timed.

    Returns:
        For "fused" and "loop": "seconds" (median), "quartiles", "peak_bytes" of tensors that one
        step makes, and "stored_bytes" of the task vectors; and what was measured.
    """
    composed = setting.compose()
    bank, coef = composed.bank, composed.coef
    model = setting.classifier(composed).train()
    images, labels = next(iter(setting.batches(setting.space.task(setting.target).train).epoch(0)))
    # As stored, so that both add the same numbers.
    deltas = [
        [to_dense(vector.deltas[block]).to(_stored(bank)).float() for block in bank.blocks]
        for vector in setting.vectors().values()
    ]
    base = list(bank.base.values())

    def fused() -> Tensor:
        with torch.no_grad():
            # As after an optimiser's step: weights are kept only while the coefficients stay.
            coef.add_(0)
        return torch.autograd.grad(cross_entropy(model(images), labels), coef)[0]

    plain = setting.classifier(setting.space.encoder().requires_grad_(False)).train()

    def loop() -> Tensor:
        weights = {}
        for b, block in enumerate(bank.blocks):
            theta = base[b]
            for i in range(len(deltas)):
                theta = theta + coef[i, b] * deltas[i][b]
            weights[f"encoder.{block}"] = theta
        logits = call_with(plain, weights, (images,))
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
        "vectors": len(deltas),
        "blocks": len(bank.blocks),
        "batch": len(labels),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "codec": bank.codec,
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
