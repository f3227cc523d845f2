"""The CLIP model that comes with the package: its configuration and its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import read_tensors, write_tensors
from ..clip import model_from_config
from .paths import MODEL_FILE, WEIGHTS

_KIND = "embedded_model"
_TOKEN_TABLE = "token_embedding.weight"
_TOKEN_IDS = "token_ids"


def embedded_model_config() -> dict[str, Any]:
    """Arguments of open_clip's ``CLIP`` for the embedded model (477,120 image parameters)."""
    return {
        "embed_dim": 96,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": 96,
            "layers": 4,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }


def build_embedded_model(vocab_size: int | None = None) -> nn.Module:
    """A randomly initialised open_clip ``CLIP`` of the embedded configuration, in training mode.

    Args:
        vocab_size: rows of the token table, by default those of CLIP's tokenizer.

    Raises:
        ImportError: open_clip is not installed.
    """
    config = embedded_model_config()
    if vocab_size is not None:
        config["text_cfg"]["vocab_size"] = vocab_size
    return model_from_config(config)


def save_embedded_model(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    token_ids: Tensor,
    **fields: Any,
) -> None:
    """Writes a model in half precision whose token table keeps only the rows that were trained.

    Args:
        path: where to; the file is written in one step.
        state_dict: of a model built with ``vocab_size=len(token_ids)``.
        token_ids: int64 [rows], the tokenizer's id of every row, increasing.
        fields: further facts for the file's metadata, anything that JSON holds.

    Raises:
        ValueError: not one token id per row.
    """
    rows = state_dict[_TOKEN_TABLE].shape[0]
    if token_ids.shape != (rows,):
        raise ValueError(f"expected {rows} token ids, one per row, got {tuple(token_ids.shape)}")
    tensors = {name: tensor.half() for name, tensor in state_dict.items()}
    write_tensors(Path(path), {**tensors, _TOKEN_IDS: token_ids}, _KIND, **fields)


def load_embedded_model(path: str | os.PathLike[str] | None = None) -> nn.Module:
    """The embedded model as an open_clip ``CLIP`` in float32 and eval mode.

    Rows of the token table that were never trained are zero; the buffer ``known_tokens``, bool
    [vocab_size], not part of the state dict, says which were, so that `zero_shot_head` can refuse a
    prompt that this model cannot read.

    Args:
        path: a file written by `save_embedded_model`, by default the one that ships with us.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is damaged or of another kind.
    """
    state, _ = read_tensors(Path(path) if path else WEIGHTS / MODEL_FILE, _KIND)
    token_ids = state.pop(_TOKEN_IDS)
    model = build_embedded_model()
    table = torch.zeros_like(model.get_parameter(_TOKEN_TABLE))
    table[token_ids] = state[_TOKEN_TABLE].float()
    state = {name: tensor.float() for name, tensor in state.items()}
    model.load_state_dict({**state, _TOKEN_TABLE: table})
    known = torch.zeros(len(table), dtype=torch.bool)
    known[token_ids] = True
    model.register_buffer("known_tokens", known, persistent=False)
    return model.eval()


def load_model(folder: Path = WEIGHTS) -> nn.Module:
    """The base model (open_clip ``CLIP``, float32, eval mode) of a folder of assets."""
    return load_embedded_model(folder / MODEL_FILE)
