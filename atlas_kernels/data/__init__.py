"""Images: the embedded tasks of the demo, preprocessing and augmentation."""

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
    "SHIFTS",
    "ImageTask",
    "Images",
    "LabelledImages",
    "Split",
    "Task",
    "augment",
    "dataset_names",
    "embedded_task",
    "load_task",
    "preprocess",
    "pretraining_split",
    "task_names",
]
