"""The demo's embedded default: a small CLIP model, its task vectors, and how they were made."""

from .assets import asset_folder, fingerprint, load_model, load_task_vectors, task_vector_names

__all__ = [
    "asset_folder",
    "fingerprint",
    "load_model",
    "load_task_vectors",
    "task_vector_names",
]
