"""The embedded tasks under every other shift, as tests out of their domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..images import OutOfDomain
from .image_task import embedded_task
from .tasks import SHIFTS

if TYPE_CHECKING:
    pass


def embedded_out_of_domain(name: str) -> tuple[OutOfDomain, ...]:
    """The test images of an embedded task's set under every other shift.

    They show the objects of the task's own test images, none of which it learns from.

    Raises:
        ValueError: there is no task of this name.

    Example:
        >>> from atlas_kernels.tasks.embedded import embedded_out_of_domain
        >>> [other.name for other in embedded_out_of_domain("digits-clean")][:2]
        ['digits-inverted', 'digits-rotated']
    """
    task = embedded_task(name)
    dataset, shift = name.rsplit("-", 1)
    rows = torch.arange(len(task.classnames))
    others = [f"{dataset}-{other}" for other in SHIFTS if other != shift]
    return tuple(OutOfDomain(other, rows, embedded_task(other).test) for other in others)
