"""open_clip models: zero-shot heads and image classifiers.

Stands on nothing of ours; used by `learn` and above.
"""

from .model import (
    ImageClassifier,
    build_model,
    image_encoder,
    model_from_config,
    preprocess_for,
    tokenizer_for,
    zero_shot_head,
)

__all__ = [
    "ImageClassifier",
    "build_model",
    "image_encoder",
    "model_from_config",
    "preprocess_for",
    "tokenizer_for",
    "zero_shot_head",
]
