"""LoRA adapters as the PEFT library saves them: a folder with a configuration and factors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import FileFormatError, read_state_dict
from ..ops import STORAGE_DTYPES
from .low_rank import Delta, LowRank, to_dense

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    # PEFT leaves the adapter's name out of its files; other writers keep it.
    r"(?:lora_(?P<linear>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?")
_BIAS = re.compile(r"(?P<module>.+)\.lora_B(?:\.[^.]+)?\.bias")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.")
# PEFT wraps nn.MultiheadAttention as a whole, factors of in_proj_weight, and its out_proj inside.
_INNER = ".base_layer.out_proj"
# What makes an adapter more than base + scale * B @ A, but an exact delta of a known base.
_WITH_BASE = {
    "use_dora": "DoRA rescales the adapted weights, which is not linear in the factors",
    "lora_bias": "its factors have biases",
}
# What is neither.
_BEYOND = {
    "use_qalora": "QA-LoRA's factors belong to a quantised layout",
    "alora_invocation_tokens": "aLoRA adapts some tokens only",
    "trainable_token_indices": "it replaces tokens of the embedding",
    "target_parameters": "it adapts parameters that are no module's weight",
    "layer_replication": "it changes the number of layers",
}
# Other initialisations take B @ A out of the base, so that the adapter no longer adds to it.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_REMEDY = (
    "merge it into its base with PEFT's merge_and_unload() and use TaskVector.from_state_dicts"
)
_ASK = f"give the base (base=...), or {_REMEDY}"


def read_adapter(folder: str | Path, base: Mapping[str, Tensor] | None = None) -> dict[str, Delta]:
    """The deltas ``scale * B @ A`` of a LoRA adapter by the names of the base's parameters.

    Reads ``adapter_config.json`` and ``adapter_model.safetensors``: ranks and alphas with their
    patterns, rank-stabilised scales (alpha / sqrt r), weights that are stored transposed
    (``fan_in_fan_out``, embeddings), convolutions, and ``nn.MultiheadAttention``. Copies of the
    base's own weights, which PEFT puts beside the factors of embeddings and heads, are left out.

    With a base, what was trained besides becomes a delta too, exact and dense: biases, modules to
    save, and the weights that DoRA rescales, ``m * V / |V| - W`` by rows of ``V = W + scale B A``
    (arXiv 2402.09353, equation 5).

    Raises:
        FileNotFoundError: one of the files is missing.
        FileFormatError: one is damaged, they do not fit together, or the adapter is more than a
            plain LoRA; the message says what, and what to do.
    """
    path = Path(folder) / "adapter_config.json"
    config = _read_config(path, base is not None)
    tensors = Path(folder) / "adapter_model.safetensors"
    pairs, others = _pairs(tensors, read_state_dict(tensors))
    if base is None and others:
        raise FileFormatError(
            f"{tensors}: {next(iter(others))!r} is no LoRA factor, but something trained besides "
            f"(a bias, a module to save, a DoRA magnitude, a quantised weight); {_ASK}"
        )
    attentions = {module.removesuffix(_INNER) for module in pairs if module.endswith(_INNER)}
    deltas: dict[str, Delta] = {}
    scales = {}
    for module, (down, up, embedding) in pairs.items():
        owner = module.removesuffix(_INNER)
        if owner != module:
            name = f"{owner}.out_proj.weight"
        else:
            name = f"{module}.in_proj_weight" if module in attentions else f"{module}.weight"
        rank = _setting(path, config, "r", "rank_pattern", owner)
        alpha = _setting(path, config, "lora_alpha", "alpha_pattern", owner)
        if not _fits(up, down, rank):
            raise FileFormatError(
                f"{tensors}: the factors of {module!r} have shapes A {tuple(down.shape)} and B "
                f"{tuple(up.shape)}, which are no pair of rank {rank:g} as {path.name} has it"
            )
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        up = up.flatten(1)
        if embedding or config.get("fan_in_fan_out"):
            up, down = down.flatten(1).T, up.T
        deltas[name] = LowRank(up, down, scale)
        scales[module] = name, scale
    if base is not None:
        transposed = bool(config.get("fan_in_fan_out"))
        deltas |= _trained_besides(tensors, others, base, deltas, scales, transposed)
    return deltas


def _trained_besides(
    path: Path,
    others: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    deltas: Mapping[str, Delta],
    scales: Mapping[str, tuple[str, float]],
    transposed: bool,
) -> dict[str, Delta]:
    """Dense deltas of what is no factor, for a known base; ``scales``: name and scale by module."""

    def weight(name: str, key: str) -> Tensor:
        if name not in base:
            raise FileFormatError(f"{path}: {key!r} belongs to {name!r}, which the base has not")
        return base[name].detach().float().cpu()

    found: dict[str, Delta] = {}
    for key, tensor in others.items():
        magnitude, bias = _MAGNITUDE.fullmatch(key), _BIAS.fullmatch(key)
        module = (magnitude or bias or {"module": ""})["module"]
        if (magnitude or bias) and module not in scales:
            raise FileFormatError(f"{path}: {key!r} belongs to no pair of factors")
        if magnitude:
            name, _ = scales[module]
            start, factors = weight(name, key), deltas[name]
            if start.dim() != 2 or start.shape != factors.shape:
                raise FileFormatError(f"{path}: DoRA of {name!r}, which is no matrix; {_REMEDY}")
            moved = start + to_dense(factors)
            axis = 0 if transposed else 1
            lengths = moved.norm(dim=axis, keepdim=True)
            found[name] = tensor.float().reshape(lengths.shape) * moved / lengths - start
        elif bias:
            found[f"{module}.bias"] = scales[module][1] * tensor.float()
        else:
            name = _SAVED.sub(".", key).replace(".base_layer.", ".")
            start = weight(name, key)
            if start.shape != tensor.shape:
                raise FileFormatError(
                    f"{path}: {key!r} has shape {tuple(tensor.shape)}, in the base "
                    f"{tuple(start.shape)}"
                )
            found[name] = tensor.float() - start
    return found


def _read_config(path: Path, with_base: bool) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a folder that PEFT saved")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{path}: expected a JSON object, the configuration of an adapter")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FileFormatError(f"{path}: peft_type is {kind!r}, but only 'LORA' is a task vector")
    for key, reason in _BEYOND.items():
        if config.get(key):
            raise FileFormatError(f"{path}: not a plain LoRA ({key}): {reason}; {_REMEDY}")
    for key, reason in {} if with_base else _WITH_BASE.items():
        if config.get(key):
            raise FileFormatError(f"{path}: not a plain LoRA ({key}): {reason}; {_ASK}")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_INITIALISATIONS:
        raise FileFormatError(
            f"{path}: init_lora_weights={start!r} changed the base, so the factors do not add to "
            f"the original one; {_REMEDY}"
        )
    return config


def _pairs(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor, bool]], dict[str, Tensor]]:
    """A, B, and whether they are an embedding's, by module; and whatever else was trained."""
    others: dict[str, Tensor] = {}
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            others[key.removeprefix(_PREFIX)] = tensor
            continue
        if tensor.dtype not in STORAGE_DTYPES:
            raise FileFormatError(
                f"{path}: {key!r} has dtype {tensor.dtype}, expected float32, bfloat16 or float16"
            )
        pair = found.setdefault((match["module"], match["embedding"] is not None), {})
        side = match["linear"] or match["embedding"]
        if side in pair:
            raise FileFormatError(f"{path}: holds several adapters for {match['module']!r}")
        pair[side] = tensor
    pairs = {}
    for (module, embedding), pair in found.items():
        if len(pair) < 2 or module in pairs:
            raise FileFormatError(
                f"{path}: the factors of {module!r} are no pair of one lora_A and one lora_B"
            )
        pairs[module] = pair["A"], pair["B"], embedding
    if not pairs:
        raise FileFormatError(f"{path}: holds no LoRA factors")
    copies = {f"{module}.base_layer.weight" for module in pairs}
    return pairs, {key: tensor for key, tensor in others.items() if key not in copies}


def _setting(path: Path, config: Mapping[str, Any], key: str, pattern: str, module: str) -> float:
    """What the configuration says for a module: the first pattern that its name ends with."""
    value: Any = config.get(key)
    patterns = config.get(pattern) or {}
    try:
        for ending, special in patterns.items():
            if re.fullmatch(rf"(.*\.)?({ending})", module):
                value = special
                break
        number = float(value)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise FileFormatError(f"{path}: {key} or {pattern} is damaged ({error})") from error
    if not number > 0:
        raise FileFormatError(f"{path}: {key} of {module!r} is {number:g}, expected more than 0")
    return number


def _fits(up: Tensor, down: Tensor, rank: float) -> bool:
    """Whether B is (out, r) or (out, r, 1, ...), and A (r, in) or (r, in, ...)."""
    return (
        up.dim() == down.dim() >= 2
        and up.shape[1] == down.shape[0] == rank
        and all(size == 1 for size in up.shape[2:])
        and up.dtype == down.dtype
    )
