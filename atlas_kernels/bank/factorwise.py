"""LoRA with a coefficient for every factor: ``W_0 + s * (sum_i b_i B_i) @ (A_0 + sum_i a_i A_i)``.

A bank composes the factors like any other blocks; their product is the last step.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..vectors import Delta, LowRank, TaskVector


def factor_names(block: str) -> tuple[str, str]:
    """What the factors ``down`` and ``up`` of a block are called."""
    return f"{block}.lora_A", f"{block}.lora_B"


def expand(
    blocks: Mapping[str, Tensor], low_rank: Collection[str], vectors: Mapping[str, TaskVector]
) -> tuple[dict[str, Tensor], dict[str, TaskVector], dict[str, float]]:
    """Blocks and vectors with factors in place of low-rank blocks, and the scale of those blocks.

    The factors' base is (A_0, 0), with A_0 as PEFT initialises it: Kaiming-uniform with a = sqrt 5,
    from a seed that depends on the block's name alone.

    Raises:
        ValueError: ranks or scales of a block differ between the vectors.
    """
    expanded: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for block, weight in blocks.items():
        if block not in low_rank:
            expanded[block] = weight
            continue
        found = {name: vector.deltas.get(block) for name, vector in vectors.items()}
        deltas = {name: delta for name, delta in found.items() if isinstance(delta, LowRank)}
        name, first = next(iter(deltas.items()))
        for other, delta in deltas.items():
            if (delta.rank, delta.scale) != (first.rank, first.scale):
                raise ValueError(
                    "lora='factorwise' adds factors, which takes one rank and one scale, but block "
                    f"{block!r} has rank {first.rank} and scale {first.scale:g} in task vector "
                    f"{name!r}, rank {delta.rank} and scale {delta.scale:g} in {other!r}: use "
                    "lora='product'"
                )
        down, up = factor_names(block)
        expanded[down] = _initial(block, first).to(weight.device)
        expanded[up] = torch.zeros(first.up.shape, device=weight.device)
        scales[block] = first.scale
    factored = {
        name: replace(vector, deltas=_factored(vector.deltas, scales))
        for name, vector in vectors.items()
    }
    return expanded, factored, scales


def multiply(
    composed: dict[str, Tensor], weights: Mapping[str, Tensor], scales: Mapping[str, float]
) -> dict[str, Tensor]:
    """Composed blocks with ``weight + scale * up @ down`` in place of the factors of a block."""
    composed = dict(composed)
    for block, scale in scales.items():
        down, up = (composed.pop(name) for name in factor_names(block))
        weight = weights[block]
        # Autocast would round the factors.
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.addmm(weight.flatten(1).float(), up, down.flatten(1), alpha=scale)
        composed[block] = total.to(weight.dtype).view(weight.shape)
    return composed


def _initial(block: str, delta: LowRank) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(block.encode()))
    factor = torch.empty(delta.down.shape)
    return nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)


def _factored(deltas: Mapping[str, Delta], scales: Mapping[str, float]) -> dict[str, Delta]:
    factored: dict[str, Delta] = {}
    for block, delta in deltas.items():
        if block in scales and isinstance(delta, LowRank):
            down, up = factor_names(block)
            factored |= {down: delta.down, up: delta.up}
        else:
            factored[block] = delta
    return factored
