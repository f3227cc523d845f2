"""What a run will need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..bank import BUCKET, CHUNK, SLOTS, Patterns, check_dtype, chosen, split_base
from ..ops import CODECS, TILE, Codec, padded, parse_codec
from .fitting import Memory
from .substitution import call_with

# Best first: how faithfully deltas are stored; then, what costs the least time.
_CODECS = ("fp32", "bf16", "int8", "int4", "int3", "int2", "sign")
_MODES: tuple[Memory, ...] = get_args(Memory)


@dataclass(frozen=True)
class Plan:
    """The predicted cost of learning coefficients.

    Attributes:
        num_vectors, codec, memory: the settings.
        num_blocks, num_parameters: what is composed.
        parts: bytes in memory at the peak of a step, by what they are for: "base" (with the tensors
            that are not composed), "bank", "composed", "gradients", "activations" (if known). Each
            as if all were at their largest at the same time.
        disk: bytes of the bank's file.
        moved: bytes that composition reads and writes in one step, by direction.
    """

    num_vectors: int
    codec: str
    memory: Memory
    num_blocks: int
    num_parameters: int
    parts: dict[str, int]
    disk: int
    moved: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes in memory at the peak of a learning step."""
        return sum(self.parts.values())


def plan(
    model: nn.Module | Mapping[str, Tensor],
    num_vectors: int,
    *,
    codec: str = "bf16",
    memory: Memory = "whole",
    activations: int | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    ranks: Mapping[str, int] | None = None,
) -> Plan:
    """Predicts memory, disk and traffic of learning coefficients for ``num_vectors`` task vectors.

    With P the bytes of the composed blocks, D those of their packed deltas, p those of the largest
    block, all with padding, a step holds at its peak, besides the base and the activations:

    - "whole": D, the composed blocks P, one gradient p, and up to 2 MiB for gradients of small
      blocks, which are reduced together;
    - "recompute": D, two blocks 2 p, one gradient p;
    - "stream": a fixed read-ahead instead of D, 2 p and p.

    The deltas of a low-rank block (out, ...) are R (out + in) numbers of the codec, or bfloat16 if
    it packs, for ranks that sum up to R; they stay in memory in any mode.

    Optimiser states of coefficients, and what single operations need for themselves, are left out.

    Args:
        model: a module or a state dict; nothing of it is read but names, shapes and dtypes, so
            tensors may be on the "meta" device.
        num_vectors: N.
        codec: as for `TaskVectorBank.from_task_vectors`; "auto:<bits>" counts as so many bits.
        memory: as for `ComposedModel`.
        activations: their bytes, for example from `activation_bytes`; None leaves them out.
        include: as for `TaskVectorBank.from_task_vectors`.
        exclude: likewise.
        ranks: of the blocks that are low-rank (LoRA), R: their ranks in all task vectors, added up.

    Raises:
        ValueError: an unknown codec or memory mode, nothing to compose, or ranks of no block.
        TypeError: a block's dtype cannot be composed, or `num_vectors` is no whole number.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(4096, 4096, bias=False)
        >>> ak.plan(model, 21, codec="int4").parts["bank"] / 2**20  # 21 * 16 MiB * 4.125 / 8 bits
        173.25
    """
    if memory not in _MODES:
        raise ValueError(f"unknown memory {memory!r}: expected one of {', '.join(_MODES)}")
    if not isinstance(num_vectors, int):
        raise TypeError(f"num_vectors is {num_vectors!r}, expected a whole number")
    if num_vectors < 0:
        raise ValueError(f"num_vectors is {num_vectors}, expected 0 or more")
    parameters, constants, _ = split_base(model)
    blocks = {name: p for name, p in parameters.items() if chosen(name, include, exclude)}
    if not blocks:
        raise ValueError("nothing to compose: no parameter is chosen by include and exclude")
    ranks = ranks or {}
    unknown = sorted(ranks.keys() - {name for name, p in blocks.items() if p.dim() >= 2})
    if unknown:
        raise ValueError(f"ranks of what is no matrix to compose: {', '.join(unknown)}")
    for name, block in blocks.items():
        check_dtype(name, block)
    left = sum(t.nbytes for t in constants.values())
    left += sum(p.nbytes for name, p in parameters.items() if name not in blocks)
    stored, bits = _stored(codec)
    factor_size = CODECS["bf16" if stored.bits else stored.name].dtype.itemsize
    bases, deltas, factors = [], 0, 0
    for name, block in blocks.items():
        elements = block.numel()
        if name in ranks:
            factors += ranks[name] * (block.shape[0] + prod(block.shape[1:])) * factor_size
        else:
            elements = padded(elements, stored.alignment)
            deltas += int(num_vectors * elements * bits / 8)
        bases.append(elements * block.dtype.itemsize)
    base, bank = sum(bases), deltas + factors
    largest = max(bases)
    parts = {"base": base + left, "bank": bank}
    if memory == "whole":
        parts |= {"composed": base, "gradients": min(base, largest + BUCKET) + min(base, BUCKET)}
        moved = {"forward": 2 * base + bank, "backward": base + bank}
    else:
        if memory == "stream":
            tile = int(num_vectors * TILE * bits / 8)
            parts["bank"] = factors + min(deltas, SLOTS * max(CHUNK, tile))
        parts |= {"composed": 2 * largest, "gradients": largest}
        # The backward composes each block again.
        moved = {"forward": 2 * base + bank, "backward": 3 * base + 2 * bank}
    if activations is not None:
        parts["activations"] = activations
    return Plan(
        num_vectors=num_vectors,
        codec=codec,
        memory=memory,
        num_blocks=len(blocks),
        num_parameters=sum(block.numel() for block in blocks.values()),
        parts=parts,
        disk=base + left + bank + 4 * num_vectors * len(blocks),
        moved=moved,
    )


def plans(model: nn.Module | Mapping[str, Tensor], num_vectors: int, **options: Any) -> list[Plan]:
    """`plan` for every codec and memory mode: faithful codecs first, then fast modes first."""
    return [
        plan(model, num_vectors, codec=codec, memory=memory, **options)
        for codec in _CODECS
        for memory in _MODES
    ]


def activation_bytes(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward, parameters aside.

    The pass runs on the "meta" device: shapes only, no memory, no time.

    Raises:
        ValueError: the module cannot run there; the message says at what.
    """

    def ghost(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device="meta")
        return made.requires_grad_() if isinstance(tensor, nn.Parameter) else made

    state = {
        name: ghost(tensor)
        for name, tensor in (
            *module.named_parameters(remove_duplicate=True),
            *module.named_buffers(remove_duplicate=True),
        )
    }
    own = {tensor.untyped_storage()._cdata for tensor in state.values()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            kept[key] = tensor
        return tensor

    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
            call_with(module, state, [ghost(tensor) for tensor in inputs])
    except (RuntimeError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"the activations of this module cannot be predicted from shapes alone ({first}): "
            "leave inputs out"
        ) from error
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _stored(codec: str) -> tuple[Codec, float]:
    """A codec and the bits per element that it takes; for a budget, the budget."""
    named, budget = parse_codec(codec)
    if named is not None:
        return named, named.bits_per_weight
    # Of the widest alignment: some blocks will be signs.
    return CODECS["sign"], min(budget, CODECS["bf16"].bits_per_weight)
