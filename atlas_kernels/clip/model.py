"""Zero-shot heads and image classifiers on open_clip models; the embedded model and its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..checkpoints import read_tensors, write_tensors
from ..embedded import MODEL_FILE, WEIGHTS

Tokenizer = Callable[[list[str]], Tensor]

_CLIP_ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")
_KIND = "embedded_model"
_TOKEN_TABLE = "token_embedding.weight"
_TOKEN_IDS = "token_ids"


def _open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "CLIP models need open_clip, which is not installed: run"
            " pip install 'atlas_kernels[clip]'"
        ) from error
    return cast(ModuleType, open_clip)


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
    open_clip = _open_clip()
    config = embedded_model_config()
    if vocab_size is not None:
        config["text_cfg"]["vocab_size"] = vocab_size
    return cast(nn.Module, open_clip.CLIP(**config))


def build_model(architecture: str) -> nn.Module:
    """An open_clip ``CLIP`` of a named architecture, randomly initialised, in training mode.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: it knows no such architecture, or its text tower is not CLIP's own.
    """
    config = _config(architecture)
    text = config["text_cfg"]
    if config.get("custom_text") or "hf_model_name" in text or "hf_tokenizer_name" in text:
        raise ValueError(
            f"{architecture} reads text by another tower or tokenizer than CLIP's: "
            "choose an architecture such as ViT-B-32"
        )
    return _built(config)


def image_encoder(architecture: str) -> nn.Module:
    """The image encoder of an open_clip architecture ("ViT-B-32", ...), randomly initialised.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: it knows no such architecture.
    """
    return _built(_config(architecture)).get_submodule("visual")


def _config(architecture: str) -> dict[str, Any]:
    open_clip = _open_clip()
    config = open_clip.get_model_config(architecture)
    if config is None or "text_cfg" not in config:
        close = get_close_matches(architecture, open_clip.list_models(), 3, 0.4)
        raise ValueError(
            f"open_clip has no architecture {architecture!r}"
            + (f": did you mean {' or '.join(close)}?" if close else "")
        )
    return cast(dict[str, Any], config)


def _built(config: Mapping[str, Any]) -> nn.Module:
    arguments = {key: value for key, value in config.items() if key in _CLIP_ARGUMENTS}
    return cast(nn.Module, _open_clip().CLIP(**arguments))


def tokenizer_for(model: nn.Module) -> Tokenizer:
    """CLIP's byte-pair tokenizer with the context length of an open_clip model."""
    return cast(Tokenizer, _open_clip().SimpleTokenizer(context_length=model.context_length))


def preprocess_for(model: nn.Module) -> tuple[tuple[int, int], Callable[[Any], Tensor]]:
    """(height, width) of an open_clip model's input, and what makes it of an RGB image.

    The second resizes, crops the centre and normalises as for OpenAI's CLIP.
    """
    size = cast(Any, model.get_submodule("visual")).image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return (height, width), _open_clip().image_transform((height, width), is_train=False)


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


@torch.no_grad()
def zero_shot_head(
    model: nn.Module,
    classnames: Sequence[str],
    templates: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> Tensor:
    """Frozen linear head of a CLIP model: row c = exp(logit_scale) * t_c.

    t_c is the mean over templates of the class's unit text features, normalised again.

    Args:
        model: an open_clip ``CLIP``.
        classnames: C of them.
        templates: each contains ``{}`` once, where the class name goes.
        tokenizer: texts to int64 [n, context_length], by default CLIP's.

    Returns:
        [C, d], dtype and device of the model.

    Raises:
        ValueError: no class names or templates, a template without ``{}``, or a prompt with words
            that the model has never seen (embedded model only).
    """
    if not classnames or not templates:
        raise ValueError("a zero-shot head needs at least one class name and one template")
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise ValueError(f"a template must contain {{}} exactly once, unlike {wrong[0]!r}")
    device = cast(Tensor, model.logit_scale).device
    prompts = [template.format(name) for name in classnames for template in templates]
    tokens = (tokenizer or tokenizer_for(model))(prompts).to(device)
    _check_known(model, prompts, tokens)
    was_training = model.training
    # What a model does in training only (dropout, say) has no place in a head.
    model.eval()
    try:
        features = cast(Any, model).encode_text(tokens)
    finally:
        model.train(was_training)
    features = normalize(features, dim=-1).view(len(classnames), len(templates), -1)
    return cast(Tensor, model.logit_scale).exp() * normalize(features.mean(1), dim=-1)


def _check_known(model: nn.Module, prompts: Sequence[str], tokens: Tensor) -> None:
    known = getattr(model, "known_tokens", None)
    if known is None:
        return
    for prompt, row in zip(prompts, tokens, strict=True):
        # 0 is the padding behind the end of the text: no token looks at it.
        if not bool((known[row] | (row == 0)).all()):
            raise ValueError(
                f"the embedded model has never seen some words of the prompt {prompt!r}:"
                " use the words of the embedded tasks, or another CLIP model"
            )


class ImageClassifier(nn.Module):
    """An image encoder under a frozen zero-shot head: logits = normalise(encoder(images)) @ head.T.

    Args:
        encoder: images to features [n, d]; trained, or composed, under its own parameter names.
        head: [C, d], kept as a buffer: never trained, not part of a task vector.
    """

    head: Tensor

    def __init__(self, encoder: nn.Module, head: Tensor) -> None:
        super().__init__()
        if head.ndim != 2:
            raise ValueError(
                f"expected a head of shape [classes, features], got {tuple(head.shape)}"
            )
        self.encoder = encoder
        self.register_buffer("head", head.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, C] of preprocessed images [n, 3, h, w]."""
        return normalize(self.encoder(images), dim=-1) @ self.head.T
