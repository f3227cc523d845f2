"""Zero-shot heads and image classifiers on open_clip models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

Tokenizer = Callable[[list[str]], Tensor]
_CLIP_ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")


def _open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            "CLIP models need open_clip, which is not installed: run"
            " pip install 'atlas_kernels[clip]'"
        ) from error
    return cast(ModuleType, open_clip)


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
    return model_from_config(config)


def image_encoder(architecture: str) -> nn.Module:
    """The image encoder of an open_clip architecture ("ViT-B-32", ...), randomly initialised.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: it knows no such architecture.
    """
    return model_from_config(_config(architecture)).get_submodule("visual")


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


def model_from_config(config: Mapping[str, Any]) -> nn.Module:
    """An open_clip ``CLIP`` of these arguments, randomly initialised, in training mode.

    Raises:
        ImportError: open_clip is not installed.
    """
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
