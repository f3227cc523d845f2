"""TaskVector: what fine-tuning changed, by name."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..files import (
    check_unique,
    digest,
    map_tensors,
    parsed,
    parts_of,
    write_tensors,
)
from ..ops import check_coef, compose
from .low_rank import Delta, LowRank, to_dense
from .matching import match, raise_if, state_of
from .peft import read_adapter

_KIND = "task_vector"

Target = TypeVar("Target", nn.Module, Mapping[str, Tensor])


@dataclass(frozen=True)
class _Header:
    """What a file says beside the tensors."""

    blocks: tuple[str, ...]
    base: dict[str, str]
    name: str
    # Files from before there were low-rank deltas have none.
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_unique("blocks", self.blocks)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless there are the blocks' tensors, and nothing else but statistics.

        And unless they are floating point.
        """
        needed = {f"delta.{key}" for key in self.blocks if key not in self.scales}
        needed |= {f"factor.{side}.{key}" for key in self.scales for side in ("up", "down")}
        found = {name for name in tensors if not name.startswith("statistic.")}
        wrong = [name.removeprefix("delta.") for name in sorted(needed ^ found)]
        wrong += sorted(self.scales.keys() - {*self.blocks})
        wrong += [f"{n} ({t.dtype})" for n, t in tensors.items() if not t.is_floating_point()]
        if wrong:
            raise ValueError(f"these do not belong together: {wrong[:5]}")


@dataclass(frozen=True, eq=False)
class TaskVector:
    """The difference that fine-tuning made: ``deltas[name] = finetuned[name] - pretrained[name]``.

    Attributes:
        deltas: by parameter name; a low-rank one stays as its factors (`LowRank`).
        statistics: the same for floating-point buffers (BatchNorm), which no composition touches.
        base: fingerprint of every pre-trained parameter; {} if unknown. A bank compares it with its
            own base.
        name: what the vector is called in banks and pictures; results of arithmetic have none.

    Example:
        >>> import torch, atlas_kernels as ak
        >>> pretrained = {"weight": torch.zeros(2, 2)}
        >>> vector = ak.TaskVector.from_state_dicts(pretrained, {"weight": torch.ones(2, 2)})
        >>> (0.5 * vector).apply_to(pretrained)["weight"][0, 0].item()
        0.5
    """

    deltas: dict[str, Delta]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    name: str = ""

    @classmethod
    def from_state_dicts(
        cls,
        pretrained: Mapping[str, Tensor] | nn.Module,
        finetuned: Mapping[str, Tensor] | nn.Module,
        dtype: torch.dtype = torch.bfloat16,
        name: str = "",
    ) -> TaskVector:
        """The task vector between two state dicts or modules, matched by name.

        Differences are taken in float32 and stored in ``dtype``. Integer tensors are left out. Of a
        module all buffers are known, and kept apart; of a state dict only BatchNorm's. A tied
        weight may have one of its names alone.

        Raises:
            TypeError: one of the two is neither.
            ValueError: names are missing or extra, shapes differ, or a difference is not finite (as
                happens if it exceeds the range of ``dtype``); all of them are listed. Or one is
                quantised, or holds no floating-point tensor.
        """
        matched = match(pretrained, finetuned)
        base, tuned = matched.pretrained, matched.finetuned
        changes = {
            key: (tuned[key].detach().float() - base[key].detach().float()).to(dtype)
            for key in (*matched.parameters, *matched.statistics)
        }
        _check_finite(changes)
        return cls(
            deltas={key: changes[key] for key in matched.parameters},
            statistics={key: changes[key] for key in matched.statistics},
            base={key: digest(base[key]) for key in matched.parameters},
            name=name,
        )

    @classmethod
    def from_peft(
        cls,
        folder: str | Path,
        name: str = "",
        base: Mapping[str, Tensor] | nn.Module | None = None,
    ) -> TaskVector:
        """A LoRA adapter that PEFT saved: ``deltas[module + ".weight"] = scale * B @ A``.

        The deltas stay factors. Without ``base`` it is unknown: names and shapes are compared when
        a bank is packed. See `vectors.peft` for what is read.

        Args:
            folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
            name: the folder's by default.
            base: the model that was adapted. With it trained biases, whole modules and DoRA become
                deltas as well, dense ones.

        Raises:
            FileNotFoundError, FileFormatError: a file is missing or damaged, or the adapter is more
                than a plain LoRA, and there is no base, or it is more than that too.
            ValueError: a factor is not finite.
        """
        tensors = None if base is None else state_of("the base", base)[0]
        deltas = read_adapter(folder, tensors)
        _check_finite(deltas)
        known = {key: digest(tensors[key]) for key in deltas if key in tensors} if tensors else {}
        return cls(deltas, base=known, name=name or Path(folder).resolve().name)

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, operator.add)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._combine(other, operator.sub)

    def __mul__(self, factor: float) -> TaskVector:
        return self._map(lambda delta: _scaled(delta, factor))

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self._map(operator.neg)

    def dot(self, other: TaskVector) -> float:
        """``sum over blocks of <self, other>``, accumulated in float64."""
        self._check_alike(other)
        return float(sum(_dot(delta, other.deltas[key]) for key, delta in self.deltas.items()))

    def norm(self) -> float:
        """Euclidean length over all blocks, accumulated in float64."""
        # Rounding may take a low-rank vector's below zero.
        return float(max(0.0, self.dot(self)) ** 0.5)

    def cosine(self, other: TaskVector) -> float:
        """``dot / (norm * norm)``; 0.0 if either vector is zero."""
        lengths = self.norm() * other.norm()
        return self.dot(other) / lengths if lengths else 0.0

    def changes(self, block: str) -> bool:
        """Whether there is a delta of this name, and it is not zero."""
        delta = self.deltas.get(block)
        if delta is None:
            return False
        return not delta.is_zero() if isinstance(delta, LowRank) else bool(delta.count_nonzero())

    def dense(self) -> TaskVector:
        """The same vector with low-rank deltas as tensors, in float32."""
        return replace(self, deltas={key: to_dense(delta) for key, delta in self.deltas.items()})

    def apply_to(self, target: Target, coef: float | Tensor = 1.0) -> Target:
        """``theta + coef * delta`` for every block, in a copy of ``target``; the rest is shared.

        Args:
            target: a module (a deep copy is returned) or a state dict (a new dict is returned).
            coef: one number, or a tensor (B,) in the order of ``deltas``.

        Raises:
            ValueError: a block is missing in ``target`` or shaped differently; all are listed.
        """
        if isinstance(target, nn.Module):
            module = copy.deepcopy(target)
            tensors: dict[str, Tensor] = dict(module.named_buffers(remove_duplicate=False))
            tensors |= module.named_parameters(remove_duplicate=False)
            with torch.no_grad():
                for key, value in self._composed(tensors, coef).items():
                    tensors[key].copy_(value)
            return module
        return {**target, **self._composed(target, coef)}

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with the base's fingerprint in its metadata."""
        tensors = {f"statistic.{key}": value for key, value in self.statistics.items()}
        scales = {}
        for key, delta in self.deltas.items():
            if isinstance(delta, LowRank):
                tensors |= {f"factor.up.{key}": delta.up, f"factor.down.{key}": delta.down}
                scales[key] = delta.scale
            else:
                tensors[f"delta.{key}"] = delta
        blocks = list(self.deltas)
        write_tensors(
            path, tensors, _KIND, name=self.name, base=self.base, blocks=blocks, scales=scales
        )

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Reads what `save` wrote; a vector that has no name takes the file's.

        Raises:
            FileNotFoundError, FileFormatError: there is no such file, or it is not a task vector.
            ValueError: a delta is not finite.
        """
        tensors, fields, origin = map_tensors(path, _KIND)
        # Whether they are finite is seen by reading all of them.
        origin.verify(tensors)
        with parts_of(path):
            header = parsed(_Header, fields)
            header.check(tensors)
            # safetensors sorts by size of element; the base's order is the model's.
            deltas: dict[str, Delta] = {
                key: LowRank(
                    tensors[f"factor.up.{key}"], tensors[f"factor.down.{key}"], header.scales[key]
                )
                if key in header.scales
                else tensors[f"delta.{key}"]
                for key in header.blocks
            }
        _check_finite(deltas)
        return cls(
            deltas,
            statistics={
                key.removeprefix("statistic."): tensor
                for key, tensor in tensors.items()
                if key.startswith("statistic.")
            },
            base=header.base,
            name=header.name or Path(path).stem,
        )

    def _composed(self, target: Mapping[str, Tensor], coef: float | Tensor) -> dict[str, Tensor]:
        problems = [f"missing: {key}" for key in self.deltas if key not in target]
        problems += [
            f"{key}: shape {tuple(target[key].shape)}, expected {tuple(delta.shape)}"
            for key, delta in self.deltas.items()
            if key in target and target[key].shape != delta.shape
        ]
        raise_if(problems, "the task vector does not fit the model")
        factors = torch.as_tensor(coef, dtype=torch.float32)
        factors = factors.reshape(1, -1) if factors.dim() else factors.reshape(1)
        check_coef(factors, 1, len(self.deltas), factors.device)
        factors = factors.reshape(-1).expand(len(self.deltas))
        composed = {}
        # One by one, so that no more than one low-rank delta is dense at a time.
        for (key, delta), factor in zip(self.deltas.items(), factors, strict=True):
            base = target[key].detach()
            tensor = to_dense(delta).to(base.device)
            (composed[key],) = compose([base], [[tensor]], factor.reshape(1).to(base.device))
        return composed

    def _map(self, function: Callable[[Any], Any]) -> TaskVector:
        return replace(
            self,
            name="",
            deltas={key: function(delta) for key, delta in self.deltas.items()},
            statistics={key: function(delta) for key, delta in self.statistics.items()},
        )

    def _combine(self, other: TaskVector, function: Callable[[Any, Any], Any]) -> TaskVector:
        self._check_alike(other)

        def combined(mine: Mapping[str, Delta], theirs: Mapping[str, Delta]) -> dict[str, Any]:
            return {key: _combined(delta, theirs[key], function) for key, delta in mine.items()}

        return replace(
            self,
            name="",
            deltas=combined(self.deltas, other.deltas),
            statistics=combined(self.statistics, other.statistics),
        )

    def _check_alike(self, other: TaskVector) -> None:
        pairs: tuple[tuple[Mapping[str, Delta], Mapping[str, Delta]], ...] = (
            (self.deltas, other.deltas),
            (self.statistics, other.statistics),
        )
        for mine, theirs in pairs:
            problems = [f"only in one of the two: {key}" for key in mine.keys() ^ theirs.keys()]
            problems += [
                f"{key}: shapes {tuple(delta.shape)} and {tuple(theirs[key].shape)}"
                for key, delta in mine.items()
                if key in theirs and theirs[key].shape != delta.shape
            ]
            raise_if(sorted(problems), "the task vectors do not match")
        if self.base and other.base and self.base != other.base:
            raise ValueError(
                "the task vectors come from different pre-trained models: only vectors of one base "
                "can be combined"
            )


def _scaled(delta: Delta, factor: float) -> Delta:
    if isinstance(delta, LowRank):
        return delta * factor
    return (delta.float() * factor).to(delta.dtype)


def _combined(mine: Delta, theirs: Delta, function: Callable[[Any, Any], Any]) -> Any:
    if isinstance(mine, LowRank) and isinstance(theirs, LowRank):
        return function(mine, theirs)
    mine, theirs = to_dense(mine), to_dense(theirs)
    dtype = torch.promote_types(mine.dtype, theirs.dtype)
    return function(mine.float(), theirs.float()).to(dtype)


def _dot(mine: Delta, theirs: Delta) -> float:
    if isinstance(mine, LowRank):
        return mine.dot(theirs)
    if isinstance(theirs, LowRank):
        return theirs.dot(mine)
    return torch.dot(mine.double().flatten(), theirs.double().flatten()).item()


def _is_finite(delta: Delta) -> bool:
    return delta.is_finite() if isinstance(delta, LowRank) else bool(torch.isfinite(delta).all())


def _check_finite(deltas: Mapping[str, Delta]) -> None:
    raise_if(
        [f"{key} ({delta.dtype})" for key, delta in deltas.items() if not _is_finite(delta)],
        "a task vector must be finite, but these blocks hold infinities or NaN",
    )
