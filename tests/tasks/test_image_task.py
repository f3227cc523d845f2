"""Tasks in one form: the embedded ones."""

import pytest
import torch

from atlas_kernels.tasks.embedded.image_task import embedded_task
from atlas_kernels.tasks.embedded.tasks import augment, load_task, preprocess, task_names


@pytest.mark.parametrize("name", ["animals-noise", "digits-rotated"])
def test_an_embedded_task_is_its_images_as_the_model_takes_them(name: str) -> None:
    task, raw = embedded_task(name), load_task(name)
    assert (task.name, task.classnames, task.templates) == (name, raw.classnames, raw.templates)
    indices = torch.tensor([5, 0, 5, 17])
    for part, split in (
        (task.train, raw.train),
        (task.validation, raw.validation),
        (task.test, raw.test),
    ):
        assert len(part) == len(split)
        assert torch.equal(part.labels, split.labels)
        images = preprocess(split.images[indices])
        assert torch.equal(part.images.plain(indices), images)
        augmented = part.images.augmented(indices, torch.Generator().manual_seed(3))
        assert torch.equal(augmented, augment(images, torch.Generator().manual_seed(3)))
        # A subset of a subset counts from its own first image.
        chosen = part.subset(torch.tensor([9, 5, 7])).subset(torch.tensor([1, 1]))
        assert torch.equal(chosen.labels, split.labels[[5, 5]])
        assert torch.equal(chosen.images.plain(torch.tensor([1])), images[:1])


def test_unknown_embedded_task() -> None:
    with pytest.raises(ValueError, match=f"unknown task 'cars': .*{task_names()[0]}"):
        embedded_task("cars")
