"""Images: the embedded tasks, and those on the user's disk; preprocessing and augmentation."""

from .catalog import CATALOG, load_images
from .folder import load_folder
from .images import Images, LabelledImages
from .task import ImageTask, embedded_task
from .tasks import (
    SHIFTS,
    Split,
    Task,
    augment,
    dataset_names,
    load_task,
    preprocess,
    pretraining_split,
    task_names,
)

__all__ = [
    "CATALOG",
    "SHIFTS",
    "ImageTask",
    "Images",
    "LabelledImages",
    "Split",
    "Task",
    "augment",
    "dataset_names",
    "embedded_task",
    "load_folder",
    "load_images",
    "load_task",
    "preprocess",
    "pretraining_split",
    "task_names",
]
