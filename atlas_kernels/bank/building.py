"""From a base and task vectors to the parts of a bank, block by block.

`Packing.of` checks everything and decides what is stored how; `Packing.fill` then encodes into
tensors that are given to it, in memory or mapped to a file, one block of one vector at a time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import check_dequantised, digest
from ..ops import CODECS, STORAGE_DTYPES, Codec, Layout, parse_codec, pieces
from ..vectors import LowRank, TaskVector, to_dense
from .factorwise import expand, factor_names
from .low_rank_segment import factor_views, num_factor_elements
from .segment import chunks

Patterns = str | Sequence[str] | None
Lora = Literal["product", "factorwise"]
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]

# What "auto" chooses from, smallest first.
_LADDER = tuple(CODECS[name] for name in ("sign", "int2", "int3", "int4", "int8", "bf16"))


@dataclass(frozen=True)
class Arena:
    """The dense blocks that share a base dtype and a codec: what becomes a `Segment`.

    Attributes:
        columns: their places among all blocks.
        layout: where their elements lie.
        count: the number of task vectors.
    """

    columns: tuple[int, ...]
    codec: Codec
    dtype: torch.dtype
    layout: Layout
    count: int

    @property
    def num_checksums(self) -> int:
        """Of the segment."""
        return len(chunks(self.layout, self.codec, self.count))

    def specs(self) -> Specs:
        """Dtype and shape of the segment's tensors."""
        codec, elements = self.codec, self.count * self.layout.numel
        specs: Specs = {
            "base": (self.dtype, (self.layout.numel,)),
            "deltas": (codec.dtype, (codec.items(elements),)),
        }
        if codec.bits:
            specs["scales"] = (torch.bfloat16, (codec.scales(elements),))
        return specs

    def encode(
        self, k: int, block: str, vectors: Mapping[str, TaskVector], parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Writes the deltas of the k-th block; returns the N relative errors."""
        start, end = self.layout.offsets[k : k + 2]
        first, last = self.count * start, self.count * end
        items, scale_items = self.codec.items, self.codec.scales
        scales = parts.get("scales")
        return _encode(
            block,
            vectors,
            self.codec,
            end - start,
            parts["deltas"][items(first) : items(last)],
            None if scales is None else scales[scale_items(first) : scale_items(last)],
        )


@dataclass(frozen=True)
class LowRankArena:
    """The low-rank blocks that share a base dtype: what becomes a `LowRankSegment`.

    Attributes:
        columns: their places among all blocks.
        layout: where their elements lie in the base.
        ranks, scales: of every block those of each task vector; 0 where it does not change it.
    """

    columns: tuple[int, ...]
    codec: Codec
    dtype: torch.dtype
    layout: Layout
    ranks: list[list[int]]
    scales: list[list[float]]

    num_checksums = 1

    @classmethod
    def of(
        cls,
        columns: Sequence[int],
        codec: Codec,
        dtype: torch.dtype,
        blocks: Mapping[str, Tensor],
        vectors: Mapping[str, TaskVector],
    ) -> LowRankArena:
        """The arena of the blocks in these columns."""
        names = [list(blocks)[column] for column in columns]
        layout = Layout.from_shapes([blocks[name].shape for name in names], alignment=1)
        pairs = [[_rank_and_scale(vector, name) for vector in vectors.values()] for name in names]
        ranks = [[rank for rank, _ in its] for its in pairs]
        scales = [[scale for _, scale in its] for its in pairs]
        return cls(tuple(columns), codec, dtype, layout, ranks, scales)

    def specs(self) -> Specs:
        """Dtype and shape of the segment's tensors."""
        elements = num_factor_elements(self.layout.shapes, self.ranks)
        return {
            "base": (self.dtype, (self.layout.numel,)),
            "factors": (self.codec.dtype, (elements,)),
        }

    def encode(
        self, k: int, block: str, vectors: Mapping[str, TaskVector], parts: Mapping[str, Tensor]
    ) -> Tensor:
        """Writes the factors of the k-th block; returns the N relative errors."""
        up, down = factor_views(parts["factors"], self.layout.shapes, self.ranks)[k]
        errors = torch.zeros(len(vectors))
        each = zip(
            vectors.items(), up.split(self.ranks[k], 1), down.split(self.ranks[k]), strict=True
        )
        for i, ((name, vector), its_up, its_down) in enumerate(each):
            delta = vector.deltas.get(block)
            if its_down.shape[0] and isinstance(delta, LowRank):
                its_up.copy_(delta.up)
                its_down.copy_(delta.down.flatten(1))
                stored = LowRank(its_up, its_down.view(delta.down.shape), delta.scale)
                _check_finite(stored.is_finite(), name, block, self.codec)
                errors[i] = delta.error(stored)
        return errors


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
        products: the scales of weights whose factors are blocks (see `factorwise`).
    """

    codec: str
    blocks: dict[str, Tensor]
    constants: dict[str, Tensor]
    aliases: dict[str, str]
    vectors: dict[str, TaskVector]
    digests: list[str]
    arenas: list[Arena | LowRankArena]
    products: dict[str, float]

    @classmethod
    def of(
        cls,
        base: Mapping[str, Tensor] | nn.Module,
        vectors: Mapping[str, TaskVector] | Sequence[TaskVector],
        codec: str,
        include: Patterns,
        exclude: Patterns,
        lora: Lora,
        progress: bool,
    ) -> Packing:
        """Raises as `TaskVectorBank.from_task_vectors` documents."""
        fixed, budget = parse_codec(codec)
        if lora not in get_args(Lora):
            raise ValueError(f"unknown lora {lora!r}: expected 'product' or 'factorwise'")
        parameters, constants, aliases = split_base(base)
        named = _named(vectors)
        digests = {name: digest(parameter) for name, parameter in parameters.items()}
        for name, vector in named.items():
            _check_vector(name, vector, parameters, digests, aliases, constants)
        blocks: dict[str, Tensor] = {}
        for block, parameter in parameters.items():
            if chosen(block, include, exclude) and any(
                vector.changes(block) for vector in named.values()
            ):
                _check_block(block, parameter, next(iter(blocks.values()), parameter))
                blocks[block] = parameter
            else:
                constants[block] = parameter
        low_rank = {block for block in blocks if _is_low_rank(block, named)}
        products: dict[str, float] = {}
        if lora == "factorwise":
            constants |= {block: blocks[block] for block in low_rank}
            blocks, named, products = expand(blocks, low_rank, named)
            # Of what the factors' product is added to.
            digests |= {name: digests[block] for block in products for name in factor_names(block)}
            low_rank = set()
        dense = {block: tensor for block, tensor in blocks.items() if block not in low_rank}
        if fixed is None:
            codecs = dict(zip(dense, _within_budget(budget, dense, named, progress), strict=True))
        else:
            codecs = dict.fromkeys(dense, fixed)
        factor_codec = fixed if fixed is not None and not fixed.bits else CODECS["bf16"]
        columns: dict[tuple[bool, int, Codec], list[int]] = {}
        for column, (block, parameter) in enumerate(blocks.items()):
            dtype = STORAGE_DTYPES.index(parameter.dtype)
            key = block in low_rank, dtype, codecs.get(block, factor_codec)
            columns.setdefault(key, []).append(column)
        tensors = list(blocks.values())
        arenas = [
            LowRankArena.of(members, its, STORAGE_DTYPES[dtype], blocks, named)
            if factored
            else Arena(
                tuple(members),
                its,
                STORAGE_DTYPES[dtype],
                Layout.from_shapes([tensors[j].shape for j in members], its.alignment),
                len(named),
            )
            for (factored, dtype, its), members in sorted(columns.items(), key=lambda c: c[0][:2])
        ]
        chosen_digests = [digests[block] for block in blocks]
        return cls(codec, blocks, constants, aliases, named, chosen_digests, arenas, products)

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
            "low_rank": {
                str(index): {"ranks": arena.ranks, "scales": arena.scales}
                for index, arena in enumerate(self.arenas)
                if isinstance(arena, LowRankArena)
            },
            "products": self.products,
            "base_digests": self.digests,
            "constants": list(self.constants),
            "aliases": self.aliases,
        }

    def specs(self) -> Specs:
        """Dtype and shape of the tensors that `fill` fills, by name."""
        specs: Specs = {"errors": (torch.float32, (len(self.vectors), len(self.blocks)))}
        for index, arena in enumerate(self.arenas):
            specs |= {f"{name}.{index}": spec for name, spec in arena.specs().items()}
        return specs

    def fill(self, tensors: Mapping[str, Tensor], progress: bool) -> None:
        """Writes base, deltas and scales (or factors), and errors into zeros of these `specs`."""
        names = list(self.blocks)
        with tqdm(total=len(names), desc="packing", disable=not progress, leave=False) as bar:
            for index, arena in enumerate(self.arenas):
                parts = {name: tensors[f"{name}.{index}"] for name in arena.specs()}
                for k, (column, start) in enumerate(
                    zip(arena.columns, arena.layout.offsets, strict=False)
                ):
                    name = names[column]
                    block = self.blocks[name]
                    parts["base"][start : start + block.numel()] = block.flatten()
                    tensors["errors"][:, column] = arena.encode(k, name, self.vectors, parts)
                    bar.update()


def _is_low_rank(block: str, vectors: Mapping[str, TaskVector]) -> bool:
    """Whether the deltas of a block are low-rank. Raises ValueError if only some of them are."""
    found = {
        name: isinstance(vector.deltas[block], LowRank)
        for name, vector in vectors.items()
        if vector.changes(block)
    }
    if all(found.values()) or not any(found.values()):
        return any(found.values())
    factored, dense = (
        next(n for n, kind in found.items() if kind is want) for want in (True, False)
    )
    raise ValueError(
        f"block {block!r} is low-rank in task vector {factored!r}, but dense in {dense!r}: use "
        f"vector.dense() in place of {factored!r}"
    )


def _rank_and_scale(vector: TaskVector, block: str) -> tuple[int, float]:
    delta = vector.deltas.get(block)
    changes = isinstance(delta, LowRank) and not delta.is_zero()
    return (delta.rank, delta.scale) if isinstance(delta, LowRank) and changes else (0, 0.0)


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
        _check_finite(bool(torch.isfinite(decoded).all()), name, block, codec)
        # Without the padding, which need not decode to zero.
        size = prod(vector.deltas[block].shape) if block in vector.deltas else 0
        errors[i] = _relative(decoded[:size], row[:size])
        for target, source in zip(targets, pieces(stored, length), strict=True):
            target[:, i] = source[:, 0]
        if row_scales is not None:
            for target, source in zip(scale_targets, pieces(row_scales, length), strict=True):
                target[:, i] = source[:, 0]
    return errors


def _check_finite(finite: bool, name: str, block: str, codec: Codec) -> None:
    # A zero coefficient would not silence it: 0 * inf is NaN.
    if not finite:
        raise ValueError(
            f"task vector {name!r}, block {block!r} is not finite when stored in {codec.name}"
        )


def _block_error(block: str, vectors: Mapping[str, TaskVector], codec: Codec) -> float:
    squares, total = 0.0, 0.0
    for vector in vectors.values():
        delta = vector.deltas.get(block)
        if isinstance(delta, Tensor):
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
    if isinstance(delta, Tensor):
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
        if not isinstance(base, Mapping):
            raise TypeError(
                f"the base is a {type(base).__name__}, expected a module or a state dict"
            )
        state = dict(base)
        check_dequantised("the base", state)
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
        _check_vectors(vectors.values())
        return dict(vectors)
    _check_vectors(vectors)
    names = [vector.name or f"vector-{i}" for i, vector in enumerate(vectors)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"several task vectors are called {', '.join(repeated)}: names must be unique, pass a "
            "dictionary {name: vector}"
        )
    return dict(zip(names, vectors, strict=True))


def _check_vectors(vectors: Iterable[object]) -> None:
    for vector in vectors:
        if not isinstance(vector, TaskVector):
            raise TypeError(
                f"a task vector is a {type(vector).__name__}, expected a TaskVector: make it with "
                "TaskVector.from_state_dicts(base, finetuned)"
            )


def _check_vector(
    name: str,
    vector: TaskVector,
    parameters: Mapping[str, Tensor],
    digests: Mapping[str, str],
    aliases: Mapping[str, str],
    constants: Mapping[str, Tensor],
) -> None:
    for block, delta in vector.deltas.items():
        if block in aliases:
            owner = vector.deltas.get(aliases[block])
            if owner is None or not torch.equal(to_dense(owner), to_dense(delta)):
                raise ValueError(
                    f"task vector {name!r} changes {block!r} and {aliases[block]!r} apart, but in "
                    "the base they are one tied parameter: give the base copies of its own for both"
                )
            continue
        if block in constants and constants[block].shape == delta.shape:
            # A buffer, which a state dict does not tell from a parameter: it stays the base's.
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


def check_dtype(block: str, parameter: Tensor) -> None:
    """Raises TypeError if a block of the base has a dtype that cannot be composed."""
    if parameter.dtype not in STORAGE_DTYPES:
        raise TypeError(
            f"base block {block!r} has dtype {parameter.dtype}, expected float32, bfloat16 or "
            "float16: convert it, or leave it out with exclude"
        )


def _check_block(block: str, parameter: Tensor, first: Tensor) -> None:
    check_dtype(block, parameter)
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
