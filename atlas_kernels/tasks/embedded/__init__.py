"""What comes with the package: image tasks, a CLIP model, its task vectors, their loaders.

What made them stands in `experiments.embedded`. Stands on `files`, `vectors` and the tasks beside
it; used by `experiments` and above.
"""

from .image_task import embedded_task
from .model import build_embedded_model, load_embedded_model, load_model, save_embedded_model
from .out_of_domain import embedded_out_of_domain
from .paths import MODEL_FILE, WEIGHTS
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
from .vectors import fingerprint, load_task_vectors, save_task_vector, vector_path

__all__ = [
    "MODEL_FILE",
    "SHIFTS",
    "WEIGHTS",
    "Split",
    "Task",
    "augment",
    "build_embedded_model",
    "dataset_names",
    "embedded_out_of_domain",
    "embedded_task",
    "fingerprint",
    "load_embedded_model",
    "load_model",
    "load_task",
    "load_task_vectors",
    "preprocess",
    "pretraining_split",
    "save_embedded_model",
    "save_task_vector",
    "task_names",
    "vector_path",
]
