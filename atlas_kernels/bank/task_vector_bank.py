"""TaskVectorBank: a base and N task vectors, packed once, laid out for the kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import Origin, digest, map_tensors, parsed, parts_of, write_mapped, write_tensors
from ..ops import check_coef, codec_named, compose_blocks_with, per_block, tile_keys
from ..vectors import TaskVector
from .blocks import Blocks
from .building import Lora, Packing, Patterns
from .factorwise import factor_names, multiply
from .header import BankHeader
from .low_rank_segment import LowRankSegment
from .segment import Segment

_KIND = "bank"
# Tensors that have a checksum for every chunk.
_GUARDED = ("deltas.", "scales.", "factors.")


class TaskVectorBank:
    """A base model and N task vectors in one arena per base dtype and codec.

    ``compose(coef)[block] = base[block] + sum_i coef[i, block] * delta_i[block]``

    Blocks whose deltas are low-rank (LoRA) are kept and composed as factors. With
    ``lora="factorwise"`` each factor is a block of its own, and the weights that the model uses,
    ``weights``, are ``base[w] + scale * composed[w + ".lora_B"] @ composed[w + ".lora_A"]``.

    Blocks that no task vector changes are not stored as deltas; they, the buffers and whatever
    ``include`` and ``exclude`` leave out stay in ``constants``.

    Attributes:
        names: the N task vectors.
        blocks: the B composed parameters (or factors), in the order of ``coef``'s columns.
        weights: the parameters that `compose` returns: ``blocks``, unless some are factors.
        shapes: their shapes.
        codec: how deltas are stored, as it was asked for.
        codecs: the codec of each block.
        errors: float32 (N, B), ``|stored - delta| / |delta|`` of each vector's block.
        base_digests: fingerprint of each block's base.
        products: of weights that are products of factors (``lora="factorwise"``), the scale.
        constants: all other tensors of the base, by name.
        fields: what its files say of it, as JSON has it.
        origin: the file that it was loaded from, or None.
        checksums: what that holds, by segment: of every chunk of deltas, or of the factors.
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
        self, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor], fields: dict[str, Any]
    ) -> None:
        """Internal: use `from_task_vectors`, `pack` or `load`.

        ``tensors`` and ``fields`` are what `Packing` makes and `save` writes.
        """
        self.fields = fields
        self.names: tuple[str, ...] = tuple(fields["names"])
        self.blocks: tuple[str, ...] = tuple(fields["blocks"])
        self.shapes: tuple[tuple[int, ...], ...] = tuple(map(tuple, fields["shapes"]))
        self.codec: str = fields["codec"]
        self.base_digests: tuple[str, ...] = tuple(fields["base_digests"])
        self.aliases: dict[str, str] = dict(fields["aliases"])
        self.constants = dict(constants)
        self.errors = tensors["errors"]
        self.origin: Origin | None = None
        self.checksums: dict[str, list[int]] = {}
        codecs = [self.codec] * len(self.blocks)
        segments = []
        for index, (columns, codec) in enumerate(fields["segments"]):
            segments.append(self._segment(tensors, index))
            for column in columns:
                codecs[column] = codec
        self.segments = tuple(segments)
        self._blocks = tuple(map(Blocks, self.segments))
        self.codecs = tuple(codecs)
        self._keys: dict[int, list[Tensor]] = {}
        self.products: dict[str, float] = fields.get("products", {})
        factors = {name for weight in self.products for name in factor_names(weight)}
        self.weights = (*(b for b in self.blocks if b not in factors), *self.products)

    @classmethod
    def from_task_vectors(
        cls,
        base: Mapping[str, Tensor] | nn.Module,
        vectors: Mapping[str, TaskVector] | Sequence[TaskVector],
        *,
        codec: str = "bf16",
        include: Patterns = None,
        exclude: Patterns = None,
        lora: Lora = "product",
        progress: bool = False,
    ) -> TaskVectorBank:
        """Packs a bank, on the device of ``base``, one block of one vector at a time.

        Args:
            base: the pre-trained state dict or module.
            vectors: by name, or a sequence of vectors that carry their names.
            codec: "fp32", "bf16", "fp16"; "int8", "int4", "int3", "int2", "sign" (packed, see
                `codecs.packed`); or "auto:<bits>", for example "auto:3.5": every block gets the
                smallest codec with a relative error of at most e, and e is the least for which
                the average bits per weight, scales included, are within the budget. The factors
                of low-rank blocks stay floating point: in bf16, if the codec packs.
            include: shell-style patterns of the blocks to compose, for example ``"visual.*"``; all
                by default.
            exclude: patterns of blocks to keep as in the base.
            lora: how low-rank deltas are composed. "product" adds ``coef * scale * up @ down``,
                one coefficient per vector and block. "factorwise" (what aTLAS did, arXiv
                2407.02880) adds the factors, each with coefficients of its own, to a random A_0 and
                to zero, and multiplies the sums: the result is not linear in ``coef``, and at zero
                only the coefficients of ``lora_B`` have a gradient. It takes equal ranks and
                scales; the factors are stored by ``codec`` like other blocks.
            progress: shows a progress bar on standard error.

        Raises:
            ValueError: an unknown codec or ``lora``, names that are not unique, a vector with a
                block that the base lacks or shapes differently, that changes tied parameters apart
                or is not finite in the codec's dtype, one that was made from another base, a block
                that is low-rank in one vector and dense in another, or a base spread over several
                devices.
            TypeError: a block of the base is neither float32, bfloat16 nor float16.
        """
        packing = Packing.of(base, vectors, codec, include, exclude, lora, progress)
        tensors = {
            name: torch.zeros(shape, dtype=dtype, device=packing.device)
            for name, (dtype, shape) in packing.specs().items()
        }
        packing.fill(tensors, progress)
        # The bank's own, like the base of other blocks.
        weights = {weight: packing.constants[weight].clone() for weight in packing.products}
        return cls(tensors, packing.constants | weights, packing.fields())

    @classmethod
    def pack(
        cls,
        path: str | Path,
        base: Mapping[str, Tensor] | nn.Module,
        vectors: Mapping[str, TaskVector] | Sequence[TaskVector],
        *,
        codec: str = "bf16",
        include: Patterns = None,
        exclude: Patterns = None,
        lora: Lora = "product",
        progress: bool = False,
    ) -> TaskVectorBank:
        """`from_task_vectors` into a file, which is then loaded: for banks larger than memory.

        With a base and vectors that are themselves mapped from files (`read_state_dict` and
        `TaskVector.load` do that), no more than one block of all vectors has to be in memory.

        Raises:
            ValueError: besides, no chosen block is changed by any of the vectors.
            OSError: the file cannot be written, or the disk has no room for it; nothing is changed.
        """
        packing = Packing.of(base, vectors, codec, include, exclude, lora, progress)
        if not packing.blocks:
            raise ValueError(
                "nothing to pack: no chosen block is changed by any of the task vectors"
            )
        fields = packing.fields()
        constants = {f"constant.{name}": tensor for name, tensor in packing.constants.items()}
        specs = packing.specs()
        for index, arena in enumerate(packing.arenas):
            specs[f"checksums.{index}"] = (torch.int64, (arena.num_checksums,))
        specs |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in constants.items()}

        guarded = [name for name in specs if name.startswith(_GUARDED)]

        def fill(tensors: dict[str, Tensor]) -> None:
            for name, constant in constants.items():
                tensors[name].copy_(constant)
            packing.fill(tensors, progress)
            for index, segment in enumerate(cls(tensors, packing.constants, fields).segments):
                tensors[f"checksums.{index}"].copy_(segment.checksums())

        write_mapped(path, specs, fill, _KIND, guarded, **fields)
        return cls.load(path)

    def __deepcopy__(self, memo: dict[int, object]) -> TaskVectorBank:
        # Nothing changes a bank: a copied model shares it.
        return self

    def __repr__(self) -> str:
        return (
            f"TaskVectorBank({len(self.names)} vectors, {len(self.blocks)} blocks, "
            f"codec={self.codec!r}, {self.nbytes / 1e6:.1f} MB on {self.device})"
        )

    @property
    def path(self) -> Path | None:
        """The file that it was loaded from."""
        return None if self.origin is None else self.origin.path

    @property
    def nbytes(self) -> int:
        """Bytes of base, deltas and scales (or factors) together, without ``constants``."""
        return sum(tensor.nbytes for s in self.segments for tensor in s.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element of a delta, scales included, padding not: the average."""
        elements = sum(map(prod, self.shapes))
        return float(sum(segment.bits for segment in self.segments)) / max(1, elements)

    @property
    def device(self) -> torch.device:
        """Where the base lives, and what is composed from it."""
        return self.segments[0].base.device if self.segments else torch.device("cpu")

    @property
    def base(self) -> dict[str, Tensor]:
        """The base of ``weights``: views of the arena, or of ``constants``."""
        found: dict[str, Tensor] = {}
        for segment in self.segments:
            views = segment.layout.split(segment.base)
            found |= zip((self.blocks[j] for j in segment.columns), views, strict=True)
        found |= {weight: self.constants[weight] for weight in self.products}
        return {name: found[name] for name in self.weights}

    def compose(
        self, coef: Tensor, *, backend: str = "auto", seed: int = 0, factors: bool = False
    ) -> dict[str, Tensor]:
        """``base[block] + sum_i coef[i, block] * delta_i[block]``, all blocks in one pass.

        With coefficients of K groups, element e of a block has ``coef[i, block, group(e)]``: aTLAS
        x K (arXiv 2407.02880, section 6.2). Groups are random, about equal in size, the same for
        all task vectors, and follow from ``seed``, the block's name and e (see `partition`).

        Args:
            coef: (N, B), (N,) or (N, B, K), 1 <= K <= 4096; floating point, on the bank's device.
            backend: as for `atlas_kernels.compose`.
            seed: of the partition; any integer.
            factors: whether to return them too, where weights are products.

        Returns:
            The composed ``weights`` by name, in the base's dtypes, differentiable (twice) in coef.
            They are views of one arena: while gradients are recorded, clone one before changing it
            in place.

        Raises:
            TypeError, ValueError: ``coef`` does not fit the bank.
            BackendUnavailableError: the backend asked for cannot run here.
        """
        composed = self._of_segments(coef, backend, seed, based=True)
        if not self.products:
            return composed
        weights = multiply(composed, self.constants, self.products)
        return {**composed, **weights} if factors else weights

    def combine(self, coef: Tensor, *, backend: str = "auto", seed: int = 0) -> dict[str, Tensor]:
        """``sum_i coef[i, block] * delta_i[block]``: what `compose` adds to the base.

        Args:
            coef: as for `compose`.
            backend: likewise.
            seed: likewise.

        Returns:
            The sums by block, in the base's dtypes, differentiable (twice) in coef. No base is
            added and taken off again: sums much smaller than the base keep all their digits.

        Raises:
            TypeError, ValueError: ``coef`` does not fit the bank, or the bank multiplies factors
                (``lora="factorwise"``), so that there is no such sum.
            BackendUnavailableError: the backend asked for cannot run here.
        """
        if self.products:
            raise ValueError(
                "weights of this bank are products of blocks (lora='factorwise'), which are not "
                "linear in coef: pack it with lora='product'"
            )
        return self._of_segments(coef, backend, seed, based=False)

    def state_dict(self, coef: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
        """The complete composed state dict: composed blocks, constants and tied names.

        Raises:
            FileFormatError: a checksum of the file that the bank was loaded from fails.
        """
        self.verify()
        with torch.no_grad():
            composed = self.compose(coef, seed=seed)
        return {
            **self.constants,
            **composed,
            **{
                alias: composed[block] for alias, block in self.aliases.items() if block in composed
            },
        }

    def to(self, device: torch.device | str, *, deltas: bool = True) -> TaskVectorBank:
        """A bank on ``device`` (this one, if it is there already).

        Without ``deltas``, they stay where they are, low-rank ones aside: such a bank can be
        streamed, not composed.
        """
        if torch.device(device) == self.device:
            return self
        if torch.device(device).type != "meta":
            self.verify(deltas=deltas)
        tensors = {
            name: tensor.to(device)
            if deltas or not name.startswith(("deltas.", "scales."))
            else tensor
            for name, tensor in self._tensors().items()
        }
        constants = {name: tensor.to(device) for name, tensor in self.constants.items()}
        moved = TaskVectorBank(tensors, constants, self.fields)
        if not deltas:
            moved.origin, moved.checksums = self.origin, self.checksums
        return moved

    def verify(self, *, deltas: bool = True) -> None:
        """Compares what was loaded with its file's checksums, all of it or all but the deltas.

        `load` without ``mmap``, `save`, `state_dict` and `to` another device do so, because they
        read all anyway. Where all lies in memory that was never a file, there is nothing to do.

        Raises:
            FileFormatError: a checksum fails.
        """
        if self.origin is None:
            return
        constants = {f"constant.{name}": tensor for name, tensor in self.constants.items()}
        sums = {name: torch.tensor(its) for name, its in self.checksums.items()}
        self.origin.verify({**constants, **self._tensors(), **sums})
        with parts_of(self.origin.path):
            for segment, expected in zip(self.segments, sums.values(), strict=True):
                if deltas or "deltas" not in segment.tensors:
                    segment.verify(expected)
            if not self.origin.checksums:
                self._verify_base()

    def check_unchanged(self) -> None:
        """Raises FileFormatError if the file that is mapped was overwritten in place (``cp``)."""
        if self.origin is not None and not torch.compiler.is_compiling():
            self.origin.check_unchanged()

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with checksums of all of it.

        Raises:
            FileFormatError: a checksum of the file that the bank was loaded from fails.
            OSError: the file cannot be written; nothing is changed.
        """
        self.verify()
        constants = {f"constant.{name}": tensor for name, tensor in self.constants.items()}
        checksums = {
            f"checksums.{index}": segment.checksums() for index, segment in enumerate(self.segments)
        }
        tensors = {**constants, **self._tensors(), **checksums}
        guarded = [name for name in tensors if name.startswith(_GUARDED)]
        write_tensors(path, tensors, _KIND, guarded, **self.fields)

    def _of_segments(self, coef: Tensor, backend: str, seed: int, based: bool) -> dict[str, Tensor]:
        """The blocks that the segments compose, with the base or without, in the bank's order."""
        check_coef(coef, len(self.names), len(self.blocks), self.device, partitions=True)
        self.check_unchanged()
        # Here, so that a gradient from several segments is summed before it is rounded.
        coef = coef.to(torch.float32)
        groups = coef.shape[2] if coef.dim() == 3 else 0
        composed: dict[str, Tensor] = {}
        keys = self._tile_keys(seed) if groups else [None] * len(self.segments)
        alone = len(self.segments) == 1
        for segment, blocks, key in zip(self.segments, self._blocks, keys, strict=True):
            part = coef if alone or coef.dim() == 1 else coef.index_select(1, segment.index)
            part = per_block(part, len(segment.columns))
            members = (self.blocks[j] for j in segment.columns)
            composition = blocks.with_coef(len(self.names), backend, key, groups)
            composed |= zip(members, compose_blocks_with(composition, part, based), strict=True)
        return composed if alone else {block: composed[block] for block in self.blocks}

    def _tile_keys(self, seed: int) -> list[Tensor]:
        """Every segment's, made once."""
        if seed not in self._keys:
            self._keys[seed] = [
                tile_keys([self.blocks[j] for j in segment.columns], segment.layout, seed)
                for segment in self.segments
            ]
        return self._keys[seed]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"errors": self.errors}
        for index, segment in enumerate(self.segments):
            tensors |= {f"{name}.{index}": tensor for name, tensor in segment.tensors.items()}
        return tensors

    def _segment(self, tensors: Mapping[str, Tensor], index: int) -> Segment | LowRankSegment:
        columns, codec = self.fields["segments"][index]
        low_rank = self.fields.get("low_rank", {}).get(str(index))
        shapes = [self.shapes[j] for j in columns]
        base = tensors[f"base.{index}"]
        if low_rank is None:
            return Segment.of(
                columns,
                shapes,
                codec_named(codec),
                len(self.names),
                base,
                tensors[f"deltas.{index}"],
                tensors.get(f"scales.{index}"),
            )
        return LowRankSegment.of(
            columns,
            shapes,
            codec_named(codec),
            low_rank["ranks"],
            low_rank["scales"],
            base,
            tensors[f"factors.{index}"],
        )

    @classmethod
    def load(cls, path: str | Path, mmap: bool = True) -> TaskVectorBank:
        """Reads what `save` wrote, on the CPU.

        With ``mmap``, pages are read when they are used; without, all is read at once and every
        checksum verified (see `verify`). The file must not be overwritten in place while it is
        mapped (``cp`` does that): replace it with ``mv``, as `save` does.

        Raises:
            FileNotFoundError, FileFormatError: there is no such file, it is no bank, its parts do
                not fit together, or a checksum fails.
        """
        tensors, fields, origin = map_tensors(path, _KIND)
        if not mmap:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            origin = replace(origin, state=())
        with parts_of(path):
            parsed(BankHeader, fields).check(tensors)
            constants = {name: tensors[f"constant.{name}"] for name in fields["constants"]}
            bank = cls(tensors, constants, fields)
        names = [f"checksums.{index}" for index in range(len(bank.segments))]
        bank.checksums = {name: tensors[name].tolist() for name in names}
        bank.origin = origin
        if not mmap:
            bank.verify()
        return bank

    def _verify_base(self) -> None:
        """Against the fingerprints, in files from before there were checksums of all."""
        digests = dict(zip(self.blocks, self.base_digests, strict=True))
        for weight, tensor in self.base.items():
            # A product's factors have the fingerprint of what they are added to.
            if digest(tensor) != digests[weight if weight in digests else factor_names(weight)[0]]:
                raise ValueError(f"the base of {weight!r} is not what its fingerprint says")
