"""The file of learned coefficients: named, bound to the base they were learned on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from ..bank import TaskVectorBank
from ..files import parts_of, read_tensors, write_tensors

_KIND = "coefficients"


def write_coefficients(path: str | Path, coef: Tensor, bank: TaskVectorBank, seed: int = 0) -> None:
    """Writes coefficients (N, B), (N,) or (N, B, K) of a bank, by name (safetensors).

    Those of partitions with the seed.
    """
    partition = {"seed": seed} if coef.dim() == 3 else {}
    write_tensors(
        path,
        {"coef": coef},
        _KIND,
        names=bank.names,
        blocks=bank.blocks,
        base=_fingerprint(bank),
        **partition,
    )


def read_coefficients(path: str | Path, bank: TaskVectorBank) -> tuple[Tensor, int]:
    """Coefficients in the bank's order of vectors and blocks, on its device; and their seed.

    The seed is that of the partition, 0 if there is none.

    Raises:
        FileNotFoundError, FileFormatError: there is no such file, or it holds no coefficients.
        ValueError: they were learned on another base, or on other task vectors or blocks.
    """
    tensors, fields = read_tensors(path, _KIND, mmap=False)
    for what, theirs, ours in (
        ("task vectors", fields["names"], bank.names),
        ("blocks", fields["blocks"], bank.blocks),
    ):
        lacking = [name for name in theirs if name not in ours]
        extra = [name for name in ours if name not in theirs]
        if lacking or extra:
            raise ValueError(
                f"{path} belongs to another bank, its {what} differ: "
                f"not in this bank: {listed(lacking)}; only in this bank: {listed(extra)}"
            )
    if fields["base"] != _fingerprint(bank):
        raise ValueError(
            f"{path} belongs to another bank: its coefficients were learned on another base model"
        )
    coef = tensors["coef"][[fields["names"].index(name) for name in bank.names]]
    if coef.dim() > 1:
        coef = coef[:, [fields["blocks"].index(block) for block in bank.blocks]]
    with parts_of(path):
        return coef.to(bank.device), fields["seed"] if coef.dim() == 3 else 0


def _fingerprint(bank: TaskVectorBank) -> str:
    pairs = sorted(zip(bank.blocks, bank.base_digests, strict=True))
    return hashlib.blake2b(repr(pairs).encode(), digest_size=16).hexdigest()


def listed(names: list[str]) -> str:
    """The first few names in words."""
    first = ", ".join(names[:5]) or "none"
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first
