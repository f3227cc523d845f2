"""Images: the embedded tasks of the demo, preprocessing and augmentation."""

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
    "Split",
    "Task",
    "augment",
    "dataset_names",
    "load_task",
    "preprocess",
    "pretraining_split",
    "task_names",
]
