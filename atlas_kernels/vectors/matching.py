"""Two models of one architecture, brought together by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..files import check_dequantised, printable

# What BatchNorm keeps in a state dict: statistics of the data, not weights that were learned.
_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Matched:
    """What two models have in common.

    Attributes:
        parameters: names of what is learned, in the order of the pre-trained model.
        statistics: names of floating-point buffers.
        pretrained: tensors by name.
        finetuned: likewise.
    """

    parameters: tuple[str, ...]
    statistics: tuple[str, ...]
    pretrained: dict[str, Tensor]
    finetuned: dict[str, Tensor]


def match(
    pretrained: Mapping[str, Tensor] | nn.Module, finetuned: Mapping[str, Tensor] | nn.Module
) -> Matched:
    """Matches two state dicts, or modules, by name; integer tensors are left out.

    A module says which of its tensors are buffers; in a state dict only BatchNorm's are known. A
    name that one of the two leaves out, as safetensors does with tied weights, is no difference if
    the other has its tensor under a second name too, with the same values.

    Raises:
        TypeError: one of them is neither.
        ValueError: they do not match; all that differs is listed. Or one is quantised, or holds no
            floating-point tensor.
    """
    base, buffers = state_of("the pre-trained model", pretrained)
    tuned, more = state_of("the fine-tuned model", finetuned)
    statistics = buffers | more
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    problems = [
        *_lacking("missing in the fine-tuned model", base, tuned),
        *_lacking("not in the pre-trained model", tuned, base),
    ]
    names = [name for name in names if name in tuned]
    problems += [
        f"{name}: shape {tuple(tuned[name].shape)}, expected {tuple(base[name].shape)}"
        for name in names
        if tuned[name].shape != base[name].shape
    ]
    raise_if(problems, "the two state dicts do not match")
    if not names:
        raise ValueError("the two hold no floating-point tensors: there is nothing to compare")
    return Matched(
        parameters=tuple(name for name in names if name not in statistics),
        statistics=tuple(name for name in names if name in statistics),
        pretrained=base,
        finetuned=tuned,
    )


def raise_if(problems: list[str], headline: str) -> None:
    """One ValueError that lists the problems, the first twenty of them in words."""
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise ValueError("\n  ".join([f"{headline}:", *map(printable, problems[:20]), *more]))


def state_of(
    what: str, model: Mapping[str, Tensor] | nn.Module
) -> tuple[dict[str, Tensor], set[str]]:
    """A model's tensors, and the names of its buffers, as far as they are known.

    Raises:
        TypeError: it is neither a state dict nor a module.
        ValueError: it is quantised.
    """
    if isinstance(model, nn.Module):
        tensors: dict[str, Tensor] = model.state_dict()
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    elif isinstance(model, Mapping):
        tensors = dict(model)
        buffers = {name for name in tensors if name.rsplit(".", 1)[-1] in _STATISTICS}
    else:
        raise TypeError(f"{what} is a {type(model).__name__}, expected a state dict or a module")
    check_dequantised(what, tensors)
    return tensors, buffers


def _lacking(headline: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """The floating-point tensors of the one model that the other lacks, or has as integers."""
    problems = []
    for name, tensor in there.items():
        if not tensor.is_floating_point():
            continue
        if name not in here:
            if not _second_name(name, there, here):
                problems.append(f"{headline}: {name}{_tie(name, there, here)}")
        elif not here[name].is_floating_point():
            problems.append(f"{name}: {tensor.dtype} in one model, {here[name].dtype} in the other")
    return problems


def _second_name(name: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the one model is one under another name, which the other model has."""
    tensor = there[name]
    return any(
        other in here and _alike(tensor, its) for other, its in there.items() if other != name
    )


def _tie(name: str, there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    """Which tensor of the same shape a name that is missing may have been tied to."""
    shape = there[name].shape
    partner = next((n for n, t in here.items() if t.shape == shape and n in there), None)
    if partner is None:
        return ""
    return (
        f" (of the shape of {partner}: if one model ties the two, the other trained them apart; "
        "give the first a copy of its own under both names)"
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and one.numel() > 0
        and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))
    )
