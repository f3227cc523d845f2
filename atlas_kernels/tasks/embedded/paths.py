"""What comes with the package: images, a small CLIP model, its task vectors; how they were made."""

from pathlib import Path

IMAGES = Path(__file__).resolve().parent / "images"
"""A file per set of images: read by `load_task`."""

WEIGHTS = Path(__file__).resolve().parent / "weights"
"""The model and a task vector per task: read by `atlas_kernels.tasks.embedded`."""

MODEL_FILE = "model.safetensors"
"""The model's file in a folder like ``WEIGHTS``."""
