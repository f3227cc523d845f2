"""From a base and task vectors to the parts of a bank, block by block.

`Packing.of` checks everything and decides what is stored how; `Packing.fill` then encodes into
tensors that are given to it, in memory or mapped to a file, one block of one vector at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints import digest
from .codecs import CODECS, Codec, parse_codec
from .compose import STORAGE_DTYPES
from .layout import Layout, pieces
from .task_vector import TaskVector

Patterns = str | Sequence[str] | None

# What "auto" chooses from, smallest first.
_LADDER = tuple(CODECS[name] for name in ("sign", "int2", "int3", "int4", "int8", "bf16"))


@dataclass(frozen=True)
class Arena:
    """The blocks that share a base dtype and a codec.

    Attributes:
        columns: their places among all blocks.
        layout: where their elements lie.
    """

    columns: tuple[int, ...]
    codec: Codec
    dtype: torch.dtype
    layout: Layout


@dataclass(frozen=True)
class Packing:
    """What goes into a bank, checked, before anything is encoded.

    Attributes:
        blocks: the parameters to compose, by name.
        constants: all other tensors of the base.
        aliases: second names of blocks (tied weights).
        vectors: the task vectors by name.
        digests: fingerprints of the blocks' base.
        arenas: where the blocks go.
    """

    codec: str
    blocks: dict[str, Tensor]
    constants: dict[str, Tensor]
    aliases: dict[str, str]
    vectors: dict[str, TaskVector]
    digests: list[str]
    arenas: list[Arena]

    @classmethod
    def of(
        cls,
        base: Mapping[str, Tensor] | nn.Module,
        vectors: Mapping[str, TaskVector] | Sequence[TaskVector],
        codec: str,
        include: Patterns,
        exclude: Patterns,
        progress: bool,
    ) -> Packing:
        """Raises as `TaskVectorBank.from_task_vectors` documents."""
        fixed, budget = parse_codec(codec)
        parameters, constants, aliases = split_base(base)
        named = _named(vectors)
        digests = {name: digest(parameter) for name, parameter in parameters.items()}
        for name, vector in named.items():
            _check_vector(name, vector, parameters, digests, aliases)
        blocks: dict[str, Tensor] = {}
        for block, parameter in parameters.items():
            if chosen(block, include, exclude) and any(
                _changes(vector, block) for vector in named.values()
            ):
                _check_block(block, parameter, next(iter(blocks.values()), parameter))
                blocks[block] = parameter
            else:
                constants[block] = parameter
        if fixed is None:
            codecs = _within_budget(budget, blocks, named, progress)
        else:
            codecs = [fixed] * len(blocks)
        columns: dict[tuple[int, Codec], list[int]] = {}
        for column, (parameter, its) in enumerate(zip(blocks.values(), codecs, strict=True)):
            key = STORAGE_DTYPES.index(parameter.dtype), its
            columns.setdefault(key, []).append(column)
        tensors = list(blocks.values())
        arenas = [
            Arena(
                tuple(members),
                its,
                STORAGE_DTYPES[dtype],
                Layout.from_shapes([tensors[j].shape for j in members], its.alignment),
            )
            for (dtype, its), members in sorted(columns.items(), key=lambda item: item[0][0])
        ]
        chosen_digests = [digests[block] for block in blocks]
        return cls(codec, blocks, constants, aliases, named, chosen_digests, arenas)

    @property
    def device(self) -> torch.device:
        """Of the base."""
        return next((tensor.device for tensor in self.blocks.values()), torch.device("cpu"))

    def fields(self) -> dict[str, Any]:
        """All that describes the bank and is no tensor, fit for JSON."""
        return {
            "names": list(self.vectors),
            "blocks": list(self.blocks),
            "shapes": [list(tensor.shape) for tensor in self.blocks.values()],
            "codec": self.codec,
            "segments": [[list(arena.columns), arena.codec.name] for arena in self.arenas],
            "base_digests": self.digests,
            "constants": list(self.constants),
            "aliases": self.aliases,
        }

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the tensors that `fill` fills, by name."""
        count = len(self.vectors)
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "errors": (torch.float32, (count, len(self.blocks)))
        }
        for index, arena in enumerate(self.arenas):
            elements = count * arena.layout.numel
            specs[f"base.{index}"] = (arena.dtype, (arena.layout.numel,))
            specs[f"deltas.{index}"] = (arena.codec.dtype, (arena.codec.items(elements),))
            if arena.codec.bits:
                specs[f"scales.{index}"] = (torch.bfloat16, (arena.codec.scales(elements),))
        return specs

    def fill(self, tensors: Mapping[str, Tensor], progress: bool) -> None:
        """Writes base, deltas, scales and errors into zeros of these `specs`."""
        count = len(self.vectors)
        names = list(self.blocks)
        errors = tensors["errors"]
        with tqdm(total=len(names), desc="packing", disable=not progress, leave=False) as bar:
            for index, arena in enumerate(self.arenas):
                base, deltas = tensors[f"base.{index}"], tensors[f"deltas.{index}"]
                scales = tensors.get(f"scales.{index}")
                items, scale_items = arena.codec.items, arena.codec.scales
                offsets = zip(arena.layout.offsets, arena.layout.offsets[1:], strict=False)
                for column, (start, end) in zip(arena.columns, offsets, strict=True):
                    block = self.blocks[names[column]]
                    base[start : start + block.numel()] = block.flatten()
                    first, last = count * start, count * end
                    errors[:, column] = _encode(
                        names[column],
                        self.vectors,
                        arena.codec,
                        end - start,
                        deltas[items(first) : items(last)],
                        None if scales is None else scales[scale_items(first) : scale_items(last)],
                    )
                    bar.update()


def _within_budget(
    budget: float,
    blocks: Mapping[str, Tensor],
    vectors: Mapping[str, TaskVector],
    progress: bool,
) -> list[Codec]:
    """The codec of every block.

    With ``error(b, c)`` the relative error of block b over all vectors together in codec c, the
    least e such that the smallest codecs with ``error(b, c) <= e`` average no more bits per weight
    than the budget.
    """
    bar = tqdm(blocks, desc="measuring errors", disable=not progress, leave=False)
    errors = torch.tensor(
        [[_block_error(block, vectors, codec) for codec in _LADDER] for block in bar],
        dtype=torch.float64,
    ).view(len(blocks), len(_LADDER))
    elements = torch.tensor([tensor.numel() for tensor in blocks.values()], dtype=torch.float64)
    bits = torch.tensor([codec.bits_per_weight for codec in _LADDER], dtype=torch.float64)

    def chosen(limit: float) -> Tensor:
        fits = errors <= limit
        # A block that no codec serves within the limit gets the largest.
        fits[:, -1] = True
        return fits.int().argmax(1)

    limits = sorted({0.0, *errors.flatten().tolist()})
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        within = (bits[chosen(limits[middle])] * elements).sum() <= budget * elements.sum()
        low, high = (low, middle) if within else (middle + 1, high)
    return [_LADDER[k] for k in chosen(limits[low]).tolist()]


def _encode(
    block: str,
    vectors: Mapping[str, TaskVector],
    codec: Codec,
    length: int,
    items: Tensor,
    scales: Tensor | None,
) -> Tensor:
    """Encodes a block of all vectors into its ranges of the arenas; returns the N relative errors.

    Needs memory for one block of one vector.

    Raises:
        ValueError: a delta is not finite in the codec.
    """
    count = len(vectors)
    targets = pieces(items, length, count)
    scale_targets = [] if scales is None else pieces(scales, length, count)
    errors = torch.zeros(count)
    for i, (name, vector) in enumerate(vectors.items()):
        row = _row(vector, block, length, items.device)
        stored, row_scales = codec.encode(row)
        decoded = codec.decode(stored, row_scales)
        # A zero coefficient would not silence it: 0 * inf is NaN.
        if not bool(torch.isfinite(decoded).all()):
            raise ValueError(
                f"task vector {name!r}, block {block!r} is not finite when stored in {codec.name}"
            )
        # Without the padding, which need not decode to zero.
        size = vector.deltas[block].numel() if block in vector.deltas else 0
        errors[i] = _relative(decoded[:size], row[:size])
        for target, source in zip(targets, pieces(stored, length), strict=True):
            target[:, i] = source[:, 0]
        if row_scales is not None:
            for target, source in zip(scale_targets, pieces(row_scales, length), strict=True):
                target[:, i] = source[:, 0]
    return errors


def _block_error(block: str, vectors: Mapping[str, TaskVector], codec: Codec) -> float:
    squares, total = 0.0, 0.0
    for vector in vectors.values():
        delta = vector.deltas.get(block)
        if delta is not None:
            length = -(-delta.numel() // codec.alignment) * codec.alignment
            row = _row(vector, block, length, delta.device)
            difference = codec.decode(*codec.encode(row)) - row
            squares += float(difference[: delta.numel()].double().square().sum())
            total += float(row.double().square().sum())
    return (squares / total) ** 0.5 if total else 0.0


def _row(vector: TaskVector, block: str, length: int, device: torch.device) -> Tensor:
    """The delta, flat and zero-padded, in float32; zeros if the vector has no such block."""
    row = torch.zeros(length, device=device)
    delta = vector.deltas.get(block)
    if delta is not None:
        row[: delta.numel()] = delta.to(device).flatten()
    return row


def _relative(decoded: Tensor, row: Tensor) -> float:
    norm = torch.linalg.vector_norm(row, dtype=torch.float64)
    return float(torch.linalg.vector_norm(decoded - row, dtype=torch.float64) / norm.clamp(1e-300))


def split_base(
    base: Mapping[str, Tensor] | nn.Module,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The base's parameters, its other tensors, and second names of tied parameters."""
    if isinstance(base, nn.Module):
        state = base.state_dict()
        buffers = {name for name, _ in base.named_buffers(remove_duplicate=False)}
    else:
        state = dict(base)
        buffers = {name for name in state if name.rsplit(".", 1)[-1].startswith("running_")}
    parameters: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Hashable, str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        if name in buffers or not tensor.is_floating_point():
            constants[name] = tensor
            continue
        # Tensors without data have no address, but their storage has an identity.
        address = tensor.data_ptr() or (tensor.untyped_storage()._cdata, tensor.storage_offset())
        identity = (address, tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            aliases[name] = seen[identity]
            continue
        seen[identity] = name
        parameters[name] = tensor
    return parameters, constants, aliases


def _named(vectors: Mapping[str, TaskVector] | Sequence[TaskVector]) -> dict[str, TaskVector]:
    if isinstance(vectors, Mapping):
        return dict(vectors)
    names = [vector.name or f"vector-{i}" for i, vector in enumerate(vectors)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several task vectors are called {', '.join(repeated)}: names must be unique, pass a "
            "dictionary {name: vector}"
        )
    return dict(zip(names, vectors, strict=True))


def _check_vector(
    name: str,
    vector: TaskVector,
    parameters: Mapping[str, Tensor],
    digests: Mapping[str, str],
    aliases: Mapping[str, str],
) -> None:
    for block, delta in vector.deltas.items():
        if block in aliases:
            owner = vector.deltas.get(aliases[block])
            if owner is None or not torch.equal(owner, delta):
                raise ValueError(
                    f"task vector {name!r} changes {block!r} and {aliases[block]!r} apart, but in "
                    "the base they are one tied parameter: give the base copies of its own for both"
                )
            continue
        if block not in parameters:
            raise ValueError(
                f"task vector {name!r} has the block {block!r}, but the base has no such "
                "parameter: was it made from another architecture?"
            )
        if delta.shape != parameters[block].shape:
            raise ValueError(
                f"task vector {name!r}, block {block!r} has shape {tuple(delta.shape)}, expected "
                f"{tuple(parameters[block].shape)} as in the base"
            )
        if block in vector.base and vector.base[block] != digests[block]:
            raise ValueError(
                f"task vector {name!r} was made from another base: block {block!r} differs from "
                "the base given here. Pack it with the checkpoint that it was made from"
            )


def _check_block(block: str, parameter: Tensor, first: Tensor) -> None:
    if parameter.dtype not in STORAGE_DTYPES:
        raise TypeError(
            f"base block {block!r} has dtype {parameter.dtype}, expected float32, bfloat16 or "
            "float16: convert it, or leave it out with exclude"
        )
    if parameter.device != first.device:
        raise ValueError(
            f"base block {block!r} is on {parameter.device}, others on {first.device}: move the "
            "base to one device"
        )


def chosen(block: str, include: Patterns, exclude: Patterns) -> bool:
    """Whether shell-style patterns choose a block."""
    included = include is None or _matches(block, include)
    return included and not (exclude is not None and _matches(block, exclude))


def _matches(block: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(block, pattern) for pattern in patterns)


def _changes(vector: TaskVector, block: str) -> bool:
    delta = vector.deltas.get(block)
    return delta is not None and bool(delta.count_nonzero())
