"""TaskVectorBank: a base and N task vectors, packed once, laid out for the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import FileFormatError, digest, parts_of, read_tensors, write_tensors
from .codecs import storage_dtype
from .compose import STORAGE_DTYPES, bank_compose, check_coef
from .layout import Layout, pieces
from .task_vector import TaskVector

_KIND = "bank"
Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Segment:
    """The blocks of one base dtype: one arena for the base, one for the deltas.

    Attributes (B' blocks, P elements with padding):
        columns: the blocks' places in the bank's order.
        index: the same as int64 [B'] on the device, so that no call waits for it.
        base: [P].
        deltas: [N * P] in the codec's dtype, interleaved as `layout` says.
    """

    columns: tuple[int, ...]
    index: Tensor
    layout: Layout
    base: Tensor
    deltas: Tensor

    def to(self, device: torch.device | str) -> Segment:
        """The same segment on another device."""
        return Segment(
            self.columns,
            self.index.to(device),
            self.layout.to(device),
            self.base.to(device),
            self.deltas.to(device),
        )


class TaskVectorBank:
    """A base model and N task vectors in one arena per storage format.

    ``compose(coef)[block] = base[block] + sum_i coef[i, block] * delta_i[block]``

    Blocks that no task vector changes are not stored as deltas; they, the buffers and whatever
    ``include`` and ``exclude`` leave out stay in ``constants``.

    Attributes:
        names: the N task vectors.
        blocks: the B composed parameters, in the order of ``coef``'s columns.
        shapes: their shapes.
        codec: how deltas are stored.
        base_digests: fingerprint of each block's base.
        constants: all other tensors of the base, by name.
        aliases: names under which the base also holds a block (tied weights), to the block's name.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> base = {"weight": torch.zeros(2, 2), "scale": torch.ones(1)}
        >>> tuned = {"weight": torch.ones(2, 2), "scale": torch.ones(1)}
        >>> vector = ak.TaskVector.from_state_dicts(base, tuned, name="cars")
        >>> bank = ak.TaskVectorBank.from_task_vectors(base, [vector])
        >>> bank.names, bank.blocks
        (('cars',), ('weight',))
        >>> bank.compose(torch.tensor([[0.5]]))["weight"][0, 0].item()
        0.5
    """

    def __init__(
        self,
        names: Sequence[str],
        blocks: Sequence[str],
        codec: str,
        segments: Sequence[Segment],
        base_digests: Sequence[str],
        constants: Mapping[str, Tensor],
        aliases: Mapping[str, str],
    ) -> None:
        """Internal: use `from_task_vectors` or `load`."""
        self.names = tuple(names)
        self.blocks = tuple(blocks)
        self.codec = codec
        self.segments = tuple(segments)
        self.base_digests = tuple(base_digests)
        self.constants = dict(constants)
        self.aliases = dict(aliases)
        shapes: list[tuple[int, ...]] = [()] * len(self.blocks)
        for segment in self.segments:
            for column, shape in zip(segment.columns, segment.layout.shapes, strict=True):
                shapes[column] = shape
        self.shapes = tuple(shapes)

    @classmethod
    def from_task_vectors(
        cls,
        base: Mapping[str, Tensor] | nn.Module,
        vectors: Mapping[str, TaskVector] | Sequence[TaskVector],
        *,
        codec: str = "bf16",
        include: Patterns = None,
        exclude: Patterns = None,
    ) -> TaskVectorBank:
        """Packs a bank, on the device of ``base``, one block of one vector at a time.

        Args:
            base: the pre-trained state dict or module.
            vectors: by name, or a sequence of vectors that carry their names.
            codec: "fp32", "bf16" or "fp16".
            include: shell-style patterns of the blocks to compose, for example ``"visual.*"``; all
                by default.
            exclude: patterns of blocks to keep as in the base.

        Raises:
            ValueError: an unknown codec, names that are not unique, a vector with a block that the
                base lacks or shapes differently, that changes tied parameters apart or is not
                finite in the codec's dtype, one that was made from another base, or a base spread
                over several devices.
            TypeError: a block of the base is neither float32, bfloat16 nor float16.
        """
        dtype = storage_dtype(codec)
        parameters, constants, aliases = _split_base(base)
        named = _named(vectors)
        digests = {name: digest(parameter) for name, parameter in parameters.items()}
        for name, vector in named.items():
            _check_vector(name, vector, parameters, digests, aliases)
        blocks: list[str] = []
        for block, parameter in parameters.items():
            chosen = _chosen(block, include, exclude)
            if chosen and any(_changes(vector, block) for vector in named.values()):
                _check_block(block, parameter, parameters[blocks[0]] if blocks else parameter)
                blocks.append(block)
            else:
                constants[block] = parameter
        segments = []
        for base_dtype in STORAGE_DTYPES:
            columns = [j for j, block in enumerate(blocks) if parameters[block].dtype == base_dtype]
            if columns:
                members = {blocks[j]: parameters[blocks[j]] for j in columns}
                segments.append(_pack(columns, members, named, dtype))
        return cls(
            names=tuple(named),
            blocks=blocks,
            codec=codec,
            segments=segments,
            base_digests=[digests[block] for block in blocks],
            constants=constants,
            aliases=aliases,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> TaskVectorBank:
        # Nothing changes a bank: a copied model shares it.
        return self

    def __repr__(self) -> str:
        return (
            f"TaskVectorBank({len(self.names)} vectors, {len(self.blocks)} blocks, "
            f"codec={self.codec!r}, {self.nbytes / 1e6:.1f} MB on {self.device})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of base and deltas together, without ``constants``."""
        return sum(segment.base.nbytes + segment.deltas.nbytes for segment in self.segments)

    @property
    def device(self) -> torch.device:
        """Where base and deltas live."""
        return self.segments[0].base.device if self.segments else torch.device("cpu")

    @property
    def base(self) -> dict[str, Tensor]:
        """The base's blocks as views of the arena."""
        found: dict[str, Tensor] = {}
        for segment in self.segments:
            views = segment.layout.split(segment.base)
            found |= zip((self.blocks[j] for j in segment.columns), views, strict=True)
        return {block: found[block] for block in self.blocks}

    def compose(self, coef: Tensor, *, backend: str = "auto") -> dict[str, Tensor]:
        """``base[block] + sum_i coef[i, block] * delta_i[block]``, all blocks in one pass.

        Args:
            coef: (N, B) or (N,), floating point, on the bank's device.
            backend: as for `atlas_kernels.compose`.

        Returns:
            The composed blocks by name, in the base's dtypes, differentiable (twice) in ``coef``.
            They are views of one arena: while gradients are recorded, clone one before changing it
            in place.

        Raises:
            TypeError, ValueError: ``coef`` does not fit the bank.
            BackendUnavailableError: the backend asked for cannot run here.
        """
        check_coef(coef, len(self.names), len(self.blocks), self.device)
        # Here, so that a gradient from several segments is summed before it is rounded.
        coef = coef.to(torch.float32)
        composed: dict[str, Tensor] = {}
        for segment in self.segments:
            whole = coef.dim() == 1 or len(self.segments) == 1
            part = coef if whole else coef.index_select(1, segment.index)
            flat = bank_compose(segment.base, segment.deltas, part, segment.layout, backend)
            members = (self.blocks[j] for j in segment.columns)
            composed |= zip(members, segment.layout.split(flat), strict=True)
        return composed if len(self.segments) == 1 else {b: composed[b] for b in self.blocks}

    def state_dict(self, coef: Tensor) -> dict[str, Tensor]:
        """The complete composed state dict: composed blocks, constants and tied names."""
        with torch.no_grad():
            composed = self.compose(coef)
        return {
            **self.constants,
            **composed,
            **{
                alias: composed[block] for alias, block in self.aliases.items() if block in composed
            },
        }

    def to(self, device: torch.device | str) -> TaskVectorBank:
        """A bank on ``device`` (this one, if it is there already)."""
        if torch.device(device) == self.device:
            return self
        return TaskVectorBank(
            self.names,
            self.blocks,
            self.codec,
            [segment.to(device) for segment in self.segments],
            self.base_digests,
            {name: tensor.to(device) for name, tensor in self.constants.items()},
            self.aliases,
        )

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tensors = {f"constant.{name}": tensor for name, tensor in self.constants.items()}
        for index, segment in enumerate(self.segments):
            tensors[f"base.{index}"] = segment.base
            tensors[f"deltas.{index}"] = segment.deltas
        write_tensors(
            path,
            tensors,
            _KIND,
            names=self.names,
            blocks=self.blocks,
            shapes=self.shapes,
            codec=self.codec,
            segments=[segment.columns for segment in self.segments],
            base_digests=self.base_digests,
            constants=list(self.constants),
            aliases=self.aliases,
        )

    @classmethod
    def load(cls, path: str | Path, mmap: bool = True) -> TaskVectorBank:
        """Reads what `save` wrote, on the CPU; with ``mmap``, pages are read when they are used.

        Raises:
            FileNotFoundError, FileFormatError: there is no such file, it is no bank, or its parts
                do not fit together.
        """
        tensors, fields = read_tensors(path, _KIND, mmap)
        with parts_of(path):
            shapes, names = fields["shapes"], fields["names"]
            dtype = storage_dtype(fields["codec"])
            segments = []
            for index, columns in enumerate(fields["segments"]):
                layout = Layout.from_shapes([shapes[j] for j in columns])
                base, deltas = tensors[f"base.{index}"], tensors[f"deltas.{index}"]
                if (base.numel(), deltas.numel()) != (layout.numel, len(names) * layout.numel) or (
                    deltas.dtype != dtype
                ):
                    raise FileFormatError(
                        f"{path}: segment {index} holds {base.numel()} and {deltas.numel()} "
                        f"elements of {deltas.dtype}, expected {layout.numel} and "
                        f"{len(names) * layout.numel} of {dtype} for {len(names)} task vectors"
                    )
                segments.append(
                    Segment(tuple(columns), torch.tensor(columns), layout, base, deltas)
                )
            return cls(
                names=names,
                blocks=fields["blocks"],
                codec=fields["codec"],
                segments=segments,
                base_digests=fields["base_digests"],
                constants={name: tensors[f"constant.{name}"] for name in fields["constants"]},
                aliases=fields["aliases"],
            )


def _split_base(
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
    seen: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        if name in buffers or not tensor.is_floating_point():
            constants[name] = tensor
            continue
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
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


def _chosen(block: str, include: Patterns, exclude: Patterns) -> bool:
    included = include is None or _matches(block, include)
    return included and not (exclude is not None and _matches(block, exclude))


def _matches(block: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(block, pattern) for pattern in patterns)


def _changes(vector: TaskVector, block: str) -> bool:
    delta = vector.deltas.get(block)
    return delta is not None and bool(delta.count_nonzero())


def _pack(
    columns: list[int],
    members: Mapping[str, Tensor],
    vectors: Mapping[str, TaskVector],
    dtype: torch.dtype,
) -> Segment:
    layout = Layout.from_shapes([tensor.shape for tensor in members.values()])
    first = next(iter(members.values()))
    count = len(vectors)
    base = torch.zeros(layout.numel, dtype=first.dtype, device=first.device)
    # Zeros, not empty: they are the padding, and the blocks that a vector lacks.
    deltas = torch.zeros(count * layout.numel, dtype=dtype, device=first.device)
    ranges = zip(members.items(), layout.offsets, layout.offsets[1:], strict=False)
    for (block, tensor), start, end in ranges:
        length = tensor.numel()
        base[start : start + length] = tensor.flatten()
        targets = pieces(deltas[count * start : count * end], end - start, count)
        row = torch.zeros(end - start, dtype=dtype, device=first.device)
        for i, (name, vector) in enumerate(vectors.items()):
            if block in vector.deltas:
                row[:length] = vector.deltas[block].to(first.device).flatten().to(dtype)
                # A zero coefficient would not silence it: 0 * inf is NaN.
                if not bool(torch.isfinite(row).all()):
                    raise ValueError(
                        f"task vector {name!r}, block {block!r} is not finite when stored in "
                        f"{dtype}"
                    )
                for target, source in zip(targets, pieces(row, end - start), strict=True):
                    target[:, i] = source[:, 0]
    index = torch.tensor(columns, device=first.device)
    return Segment(tuple(columns), index, layout.to(first.device), base, deltas)
