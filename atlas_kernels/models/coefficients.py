"""The file of learned coefficients: named, bound to the base they were learned on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank import TaskVectorBank
from ..files import check_unique, parsed, parts_of, printable, read_tensors, write_tensors

_KIND = "coefficients"


@dataclass(frozen=True)
class Coefficients:
    """Coefficients as their file has them.

    Attributes:
        values: (N, B), (N,) or (N, B, K), finite floats.
        names: the N task vectors.
        blocks: the B blocks.
        base: a fingerprint of the base that they were learned on.
        seed: of the partition, 0 if there is none.

    Raises:
        ValueError: they contradict each other.
    """

    values: Tensor
    names: tuple[str, ...]
    blocks: tuple[str, ...]
    base: str
    seed: int = 0

    def __post_init__(self) -> None:
        check_unique("task vectors", self.names)
        check_unique("blocks", self.blocks)
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"its seed {self.seed} is no integer of 64 bits")
        values = self.values
        expected = (len(self.names), len(self.blocks))[: values.dim()]
        if values.dim() not in (1, 2, 3) or tuple(values.shape[:2]) != expected:
            raise ValueError(
                f"its coefficients have shape {tuple(values.shape)}, expected {len(self.names)} "
                f"task vectors, {len(self.blocks)} blocks"
            )
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise ValueError(f"its coefficients are not all finite, or no floats ({values.dtype})")

    @classmethod
    def load(cls, path: str | Path) -> Coefficients:
        """Reads what `write_coefficients` wrote, whatever the bank.

        Raises:
            FileNotFoundError, FileFormatError: there is no such file, or it holds no coefficients.
        """
        tensors, fields = read_tensors(path, _KIND, mmap=False)
        with parts_of(path):
            found = parsed(cls, {**fields, "values": tensors["coef"]})
            if found.values.dim() == 3 and "seed" not in fields:
                raise ValueError("it lacks the seed of its partition")
        return found


def write_coefficients(path: str | Path, coef: Tensor, bank: TaskVectorBank, seed: int = 0) -> None:
    """Writes coefficients (N, B), (N,) or (N, B, K) of a bank, by name (safetensors).

    Those of partitions with the seed.
    """
    fields: dict[str, Any] = {"names": bank.names, "blocks": bank.blocks}
    if coef.dim() == 3:
        fields["seed"] = seed
    write_tensors(path, {"coef": coef}, _KIND, base=_fingerprint(bank), **fields)


def read_coefficients(path: str | Path, bank: TaskVectorBank) -> tuple[Tensor, int]:
    """Coefficients in the bank's order of vectors and blocks, on its device; and their seed.

    The seed is that of the partition, 0 if there is none.

    Raises:
        FileNotFoundError, FileFormatError: there is no such file, or it holds no coefficients.
        ValueError: they were learned on another base, or on other task vectors or blocks.
    """
    found = Coefficients.load(path)
    for what, theirs, ours in (
        ("task vectors", found.names, bank.names),
        ("blocks", found.blocks, bank.blocks),
    ):
        lacking = [name for name in theirs if name not in ours]
        extra = [name for name in ours if name not in theirs]
        if lacking or extra:
            raise ValueError(
                f"{path} belongs to another bank, its {what} differ: "
                f"not in this bank: {listed(lacking)}; only in this bank: {listed(extra)}"
            )
    if found.base != _fingerprint(bank):
        raise ValueError(
            f"{path} belongs to another bank: its coefficients were learned on another base model"
        )
    coef = found.values[[found.names.index(name) for name in bank.names]]
    if coef.dim() > 1:
        coef = coef[:, [found.blocks.index(block) for block in bank.blocks]]
    return coef.to(bank.device), found.seed


def _fingerprint(bank: TaskVectorBank) -> str:
    pairs = sorted(zip(bank.blocks, bank.base_digests, strict=True))
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def listed(names: list[str]) -> str:
    """The first few names in words."""
    first = printable(", ".join(names[:5])) or "none"
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first
