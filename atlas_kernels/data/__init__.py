"""Images: the embedded tasks of the demo, preprocessing and augmentation."""

from .images import Images, LabelledImages
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
    "Images",
    "LabelledImages",
    "Split",
    "Task",
    "augment",
    "dataset_names",
    "load_task",
    "preprocess",
    "pretraining_split",
    "task_names",
]
