"""open_clip models: zero-shot heads, image classifiers, the embedded model."""

from .model import (
    ImageClassifier,
    build_embedded_model,
    build_model,
    embedded_model_config,
    image_encoder,
    load_embedded_model,
    preprocess_for,
    save_embedded_model,
    tokenizer_for,
    zero_shot_head,
)

__all__ = [
    "ImageClassifier",
    "build_embedded_model",
    "build_model",
    "embedded_model_config",
    "image_encoder",
    "load_embedded_model",
    "preprocess_for",
    "save_embedded_model",
    "tokenizer_for",
    "zero_shot_head",
]
