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
from .low_rank import LowRank

_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\."
    # PEFT leaves the adapter's name out of its files; other writers keep it.
    r"(?:lora_(?P<linear>[AB])(?:\.[^.]+)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
# PEFT wraps nn.MultiheadAttention as a whole, factors of in_proj_weight, and its out_proj inside.
_INNER = ".base_layer.out_proj"
# What makes an adapter something else than base + scale * B @ A.
_BEYOND = {
    "use_dora": "DoRA rescales the adapted weights, which is not linear in the factors",
    "use_qalora": "QA-LoRA's factors belong to a quantised layout",
    "lora_bias": "its factors have biases",
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


def read_adapter(folder: str | Path) -> dict[str, LowRank]:
    """The deltas ``scale * B @ A`` of a LoRA adapter by the names of the base's parameters.

    Reads ``adapter_config.json`` and ``adapter_model.safetensors``: ranks and alphas with their
    patterns, rank-stabilised scales (alpha / sqrt r), weights that are stored transposed
    (``fan_in_fan_out``, embeddings), convolutions, and ``nn.MultiheadAttention``.

    Raises:
        FileNotFoundError: one of the files is missing.
        FileFormatError: one is damaged, they do not fit together, or the adapter is more than a
            plain LoRA; the message says what, and what to do.
    """
    path = Path(folder) / "adapter_config.json"
    config = _read_config(path)
    tensors = Path(folder) / "adapter_model.safetensors"
    pairs = _pairs(tensors, read_state_dict(tensors))
    attentions = {module.removesuffix(_INNER) for module in pairs if module.endswith(_INNER)}
    deltas = {}
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
    return deltas


def _read_config(path: Path) -> dict[str, Any]:
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
    start = config.get("init_lora_weights")
    if start not in _PLAIN_INITIALISATIONS:
        raise FileFormatError(
            f"{path}: init_lora_weights={start!r} changed the base, so the factors do not add to "
            f"the original one; {_REMEDY}"
        )
    return config


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """A, B, and whether they are an embedding's, by module."""
    found: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            raise FileFormatError(
                f"{path}: {key!r} is no LoRA factor, but something trained besides (a bias, a "
                f"module to save, a DoRA magnitude, a quantised weight); {_REMEDY}"
            )
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
    return pairs


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
