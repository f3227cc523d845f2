"""One run and what it works with: models, batches and scores, for every method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from ..files import write_tensors
from ..learn import (
    ImageBatches,
    Learned,
    LPPlusPlus,
    TipAdapter,
    accuracy,
    classify,
    learn,
    oversample,
    weights_only,
)
from ..models import ComposedModel, LinearizedModel
from ..tasks.clip import ImageClassifier
from ..tasks.images import LabelledImages
from ..vectors import TaskVector
from .config import Run
from .workspace import Workspace

R = TypeVar("R", bound=Run)


@dataclass
class Result:
    """What a run ended with.

    Attributes:
        metrics: numbers, and lists and dictionaries of numbers; accuracies in [0, 1].
        model: what was learned, if anything: an encoder under a head, or under an adapter.
        learned: the run behind it.
        seconds: of learning or searching alone, without loading and testing; None where that was
            not measured.
    """

    metrics: dict[str, Any]
    model: nn.Module | None = None
    learned: Learned | None = None
    seconds: float | None = None

    @property
    def encoder(self) -> ComposedModel | None:
        """The composed encoder in ``model``, if there is one."""
        if self.model is None:
            return None
        return next((m for m in self.model.modules() if isinstance(m, ComposedModel)), None)

    def write(self, folder: Path, suffix: str = "") -> list[str]:
        """Writes what was learned; the names of the files.

        ``coefficients{suffix}.safetensors`` and ``merged{suffix}.safetensors`` of coefficients, or
        ``model{suffix}.safetensors`` of weights; ``adapter{suffix}.safetensors`` besides.
        """
        names = []

        def path(kind: str) -> Path:
            names.append(f"{kind}{suffix}.safetensors")
            return folder / names[-1]

        encoder = self.encoder
        if encoder is not None:
            encoder.save_coefficients(path("coefficients"))
            if not isinstance(encoder, LinearizedModel):
                merged = {**encoder.bank.constants, **encoder.merge().state_dict()}
                write_tensors(path("merged"), merged)
        elif self.model is not None and self.learned is not None:
            write_tensors(path("model"), self.model.state_dict())
        for part in self.model.modules() if self.model is not None else ():
            if isinstance(part, TipAdapter | LPPlusPlus):
                part.save(path("adapter"))
        return names


@dataclass
class Setting(Generic[R]):
    """One run and what it works with.

    Attributes:
        space: where models and images come from.
        run: what to do.
        folder: where files go that a run needs, such as a bank that is streamed; None for none.
        state: the file of an interruptible run; None for none.
        progress: whether progress bars are shown.
    """

    space: Workspace
    run: R
    folder: Path | None = None
    state: Path | None = None
    progress: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """What every learning function is told."""
        return {"resume": self.state, "progress": self.progress}

    def check(self) -> None:
        """Finds out before anything is written what the run needs and does not have.

        Raises:
            OSError, ValueError: as `Workspace` does; or there are too few images.
        """
        run, space = self.run, self.space
        for name in run.tasks_needed:
            task = space.task(name)
            space.head(name)
            counts = task.train.labels.bincount(minlength=len(task.classnames)).tolist()
            for label, count in zip(task.classnames, counts, strict=True):
                if count < (run.images_per_class or 0):
                    raise ValueError(
                        f"--shots is {run.images_per_class}, but class {label!r} has {count} "
                        "images to learn from"
                    )

    @property
    def title(self) -> str:
        """What a picture of the run is called."""
        run = self.run
        what = f"{run.images_per_class} images per class" if run.images_per_class else ""
        return ", ".join(part for part in (*run.tasks_needed, what) if part)

    @property
    def target(self) -> str:
        """The task to learn."""
        if self.run.target is None:
            raise ValueError("this method needs a target task")
        return self.run.target

    def vectors(self) -> dict[str, TaskVector]:
        """The task vectors that the run may use: never the target's own; none of a packed bank."""
        run, space = self.run, self.space
        if space.packed:
            return {}
        names = [
            name
            for name in run.sources or space.vector_names(run.vectors)
            if name != run.target and not (run.strict and space.related(name, self.target))
        ]
        return space.vectors(run.vectors, names)

    def vectors_of(self, names: Sequence[str]) -> dict[str, TaskVector]:
        """The task vectors of these tasks; none of a packed bank."""
        return {} if self.space.packed else self.space.vectors(self.run.vectors, names)

    def compose(self, vectors: Mapping[str, TaskVector] | None = None) -> ComposedModel:
        """The base's encoder, to be composed of task vectors as the run says.

        ``vectors`` are those of `vectors` by default; a workspace's packed bank stands for any.
        """
        chosen = self.vectors() if vectors is None else vectors
        only = getattr(self.run, "weights_only", False)
        return self._composed(chosen, weights_only(self.space.encoder()) if only else None)

    def finetuned(self, vector: Mapping[str, TaskVector]) -> ComposedModel:
        """The encoder that a task vector was taken from: all blocks of it, whichever may learn."""
        encoder = self._composed(vector, None)
        nn.init.ones_(encoder.coef)
        return encoder

    def _composed(
        self, vectors: Mapping[str, TaskVector], include: Sequence[str] | None
    ) -> ComposedModel:
        run, space = self.run, self.space
        bank, encoder = space.bank(run, vectors, self.folder, include), space.encoder()
        if run.vectors == "linear":
            granularity = cast(Any, run.granularity)
            return LinearizedModel(encoder, bank, granularity=granularity).to(space.device)
        options: dict[str, Any] = {}
        if run.granularity == "partition":
            options = {"partitions": run.partitions, "seed": run.seed}
        return ComposedModel(
            encoder, bank, granularity=run.granularity, memory=run.memory, **options
        ).to(space.device)

    def classifier(self, encoder: nn.Module, task: str | None = None) -> ImageClassifier:
        """The encoder under the zero-shot head of a task."""
        return ImageClassifier(encoder, self.space.head(task or self.target)).to(self.space.device)

    def score(self, model: nn.Module, part: LabelledImages) -> float:
        """Accuracy on some images, in [0, 1]."""
        return accuracy(model, torch.arange(len(part)), part.labels, part.images.plain)

    def validate(self, model: nn.Module) -> float:
        """Accuracy on the target's validation images, by which everything is chosen."""
        return self.score(model, self.space.task(self.target).validation)

    def test(self, model: nn.Module) -> float:
        """Accuracy on the target's test images, which nothing else sees."""
        return self.score(model, self.space.task(self.target).test)

    def batches(self, part: LabelledImages, indices: Tensor | None = None) -> ImageBatches:
        """Augmented batches of a part, or of some of its images."""
        return ImageBatches(
            torch.arange(len(part)),
            part.labels,
            self.run.resolved("batch"),
            part.images.augmented,
            self.run.seed,
            indices,
        )

    def repeated(self, few: LabelledImages) -> ImageBatches:
        """Batches of a few images, repeated so that an epoch has enough of them."""
        step = self.run.resolved("batch") * self.run.resolved("accumulate")
        return self.batches(few, oversample(torch.arange(len(few)), step))

    def learn(self, model: nn.Module, batches: ImageBatches) -> Learned:
        """Supervised learning of whatever in the model requires gradients."""
        return learn(
            model,
            classify,
            batches,
            self.run.training(),
            evaluate=self.validate,
            description=self.target,
            **self.options,
        )

    def result(self, model: nn.Module, learned: Learned | None = None) -> Result:
        """The model's accuracies on validation and test."""
        # What the kept epoch was chosen by need not be measured again.
        known = learned is not None and math.isfinite(learned.score)
        validation = learned.score if learned is not None and known else self.validate(model)
        metrics: dict[str, Any] = {"validation": validation, "test": self.test(model)}
        if learned is not None:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            metrics |= {"epoch": learned.epoch, "parameters": trained}
        return Result(metrics, model, learned)
