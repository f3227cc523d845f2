"""Images: the embedded tasks, and those on the user's disk; preprocessing and augmentation."""

from .catalog import CATALOG, load_images
from .folder import load_folder
from .images import Images, LabelledImages
from .out_of_domain import OutOfDomain, embedded_out_of_domain, load_out_of_domain
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
    "OutOfDomain",
    "Split",
    "Task",
    "augment",
    "dataset_names",
    "embedded_out_of_domain",
    "embedded_task",
    "load_folder",
    "load_images",
    "load_out_of_domain",
    "load_task",
    "preprocess",
    "pretraining_split",
    "task_names",
]
