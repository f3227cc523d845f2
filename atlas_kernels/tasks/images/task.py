"""A task of image classification, wherever its images lie: what every method is given."""

from __future__ import annotations

from dataclasses import dataclass

from .images import LabelledImages


@dataclass(frozen=True)
class ImageTask:
    """Labelled images in three disjoint parts, with the words that name their classes.

    Attributes:
        name: what the task is called in tables and pictures.
        classnames: C of them; a label is an index into them.
        templates: prompts, each with one ``{}`` for the class name.
        train: what is learned from.
        validation: what everything is chosen by.
        test: what nothing but the final result sees.
    """

    name: str
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
