"""What every method does with a run: from a workspace to numbers, and perhaps to a model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..clip import ImageClassifier
from ..composed import ComposedModel
from ..data import LabelledImages
from ..learn import (
    SAR,
    TIP_JOINT,
    UFM,
    Adaptation,
    Entropy,
    ImageBatches,
    JointTask,
    Learned,
    LoraTuning,
    Outcome,
    Penalty,
    PerInstance,
    SimCLR,
    accuracy,
    adapt,
    add,
    classify,
    cosines,
    disentanglement_error,
    features,
    gradient_scores,
    isotropic,
    layer_norms,
    learn,
    learn_gradient_free,
    lp_plus_plus,
    negate,
    norm_matched,
    off_diagonal_mean,
    oversample,
    random_basis,
    sample_shots,
    search,
    search_addition,
    search_negation,
    select_blocks,
    select_by_features,
    select_random,
    select_vectors,
    single_vector,
    summed_cross_entropy,
    tip_adapter,
    virtual_vectors,
    weights_only,
)
from ..linearized import LinearizedModel
from ..task_vector import TaskVector
from .config import (
    AdditionRun,
    CosineRun,
    FewShotRun,
    NegationRun,
    PeftRun,
    PerInstanceRun,
    Run,
    TestTimeRun,
)
from .workspace import OwnWorkspace, Workspace


@dataclass
class Result:
    """What a run ended with.

    Attributes:
        metrics: numbers, and lists and dictionaries of numbers; accuracies in [0, 1].
        model: what was learned, if anything: an encoder under a head, or under an adapter.
        learned: the run behind it.
    """

    metrics: dict[str, Any]
    model: nn.Module | None = None
    learned: Learned | None = None

    @property
    def encoder(self) -> ComposedModel | None:
        """The composed encoder in ``model``, if there is one."""
        if self.model is None:
            return None
        return next((m for m in self.model.modules() if isinstance(m, ComposedModel)), None)


class Rows(nn.Module):
    """The logits of some of a model's classes: as if all others had the logit -inf."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        super().__init__()
        self.model = model
        self.rows = rows

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, K] for K rows."""
        logits: Tensor = self.model(images)
        return logits[:, self.rows.to(logits.device)]


@dataclass
class Setting:
    """One run and what it works with.

    Attributes:
        space: where models and images come from.
        run: what to do.
        folder: where files go that a run needs, such as a bank that is streamed; None for none.
        state: the file of an interruptible run; None for none.
        progress: whether progress bars are shown.
    """

    space: Workspace
    run: Run
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
            if isinstance(run, FewShotRun):
                counts = task.train.labels.bincount(minlength=len(task.classnames)).tolist()
                for label, count in zip(task.classnames, counts, strict=True):
                    if count < run.shots:
                        raise ValueError(
                            f"--shots is {run.shots}, but class {label!r} has {count} images to "
                            "learn from"
                        )

    @property
    def title(self) -> str:
        """What a picture of the run is called."""
        run = self.run
        what = f"{run.shots} images per class" if isinstance(run, FewShotRun) else ""
        return ", ".join(part for part in (*run.tasks_needed, what) if part)

    @property
    def target(self) -> str:
        """The task to learn."""
        if self.run.target is None:
            raise ValueError("this method needs a target task")
        return self.run.target

    def vectors(self) -> dict[str, TaskVector]:
        """The task vectors that the run may use: never the target's own."""
        run, space = self.run, self.space
        names = [
            name
            for name in run.sources or space.vector_names(run.vectors)
            if name != run.target and not (run.strict and space.related(name, self.target))
        ]
        return space.vectors(run.vectors, names)

    def compose(
        self, vectors: Mapping[str, TaskVector] | None = None, **choice: Any
    ) -> ComposedModel:
        """The base's encoder, to be composed of task vectors as the run says."""
        if isinstance(self.space, OwnWorkspace):
            bank = self.space.packed
        else:
            chosen = self.vectors() if vectors is None else vectors
            bank = self.space.bank(self.run, chosen, self.folder, **choice)
        run, encoder = self.run, self.space.encoder()
        if run.vectors == "linear":
            granularity = cast(Any, run.granularity)
            return LinearizedModel(encoder, bank, granularity=granularity).to(self.space.device)
        options: dict[str, Any] = {}
        if run.granularity == "partition":
            options = {"partitions": run.partitions, "seed": run.seed}
        return ComposedModel(
            encoder, bank, granularity=run.granularity, memory=run.memory, **options
        ).to(self.space.device)

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

    def result(self, model: nn.Module, learned: Learned | None = None, **metrics: Any) -> Result:
        """The model's accuracies on validation and test."""
        # What the kept epoch was chosen by need not be measured again.
        known = learned is not None and math.isfinite(learned.score)
        validation = learned.score if learned is not None and known else self.validate(model)
        scores = {"validation": validation, "test": self.test(model)}
        return Result({**scores, **metrics}, model, learned)


def perform(setting: Setting) -> Result:
    """Does what a run says.

    Raises:
        ValueError, OSError: something is missing or does not fit; the message says what.
    """
    return _PERFORMERS[type(setting.run)](setting)


def _few_shot(setting: Setting) -> Result:
    run = cast(FewShotRun, setting.run)
    task = setting.space.task(setting.target)
    shots = sample_shots(task.train.labels.cpu(), run.shots, run.seed)
    few = task.train.subset(shots)
    if run.how == "own":
        encoder = setting.compose(setting.space.vectors(run.vectors, [setting.target]))
        with torch.no_grad():
            encoder.coef.fill_(1)
        return _with_shifts(setting, setting.result(setting.classifier(encoder)))
    if run.how == "fine-tune":
        tuned = _supervised(setting, setting.space.encoder().requires_grad_(), few)
        return _with_shifts(setting, tuned)
    if run.how == "zero-shot":
        model = setting.classifier(setting.space.encoder().requires_grad_(False))
        return _with_shifts(setting, _adapted(setting, model, few))
    vectors = None if isinstance(setting.space, OwnWorkspace) else _chosen(setting, few)
    encoder = setting.compose(vectors)
    model = setting.classifier(encoder)
    if run.how in ("search", "single"):
        candidates = isotropic if run.how == "search" else single_vector
        search(encoder, candidates(encoder.coef), lambda: setting.validate(model))
        return _with_shifts(setting, setting.result(model))
    if run.how == "gradient-free":
        learn_gradient_free(
            encoder,
            lambda: summed_cross_entropy(model, few),
            seed=run.seed,
            progress=setting.progress,
        )
        return _with_shifts(setting, setting.result(model))
    result = _supervised(setting, encoder, few)
    if run.adapter != "none":
        adapted = _adapted(setting, model, few)
        result = Result({**result.metrics, **adapted.metrics}, adapted.model, result.learned)
    return _with_shifts(setting, result)


def _supervised(setting: Setting, encoder: nn.Module, images: LabelledImages) -> Result:
    model = setting.classifier(encoder)
    repeated = oversample(torch.arange(len(images)), setting.run.resolved("batch"))
    learned = setting.learn(model, setting.batches(images, repeated))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return setting.result(model, learned, epoch=learned.epoch, parameters=trained)


def _adapted(setting: Setting, model: ImageClassifier, few: LabelledImages) -> Result:
    run = cast(FewShotRun, setting.run)
    validation = setting.space.task(setting.target).validation
    if run.adapter == "none":
        return setting.result(model)
    if run.adapter == "tip":
        joint = run.how == "coefficients"
        adapted = tip_adapter(
            model,
            few,
            validation,
            # As published: twice the epochs of the coefficients alone.
            replace(TIP_JOINT, epochs=2 * run.resolved("epochs"), seed=run.seed) if joint else None,
            joint=joint,
            batch_size=run.resolved("batch"),
            progress=setting.progress,
        )
    else:
        adapted = lp_plus_plus(model, few, validation, seed=run.seed, progress=setting.progress)
    return setting.result(adapted.model)


def _chosen(setting: Setting, few: LabelledImages) -> dict[str, TaskVector]:
    """The vectors that learn: all, a budget of them, or noise in their place."""
    run = cast(FewShotRun, setting.run)
    vectors = setting.vectors()
    if run.select != "all":
        vectors = _selected(setting, vectors, few)
    if run.bases == "matched":
        noise = (norm_matched(vector, run.seed + i) for i, vector in enumerate(vectors.values()))
        return {vector.name: vector for vector in noise}
    if run.bases == "random":
        base = dict(setting.space.encoder().named_parameters())
        return {vector.name: vector for vector in random_basis(base, len(vectors), run.seed)}
    return vectors


def _selected(
    setting: Setting, vectors: Mapping[str, TaskVector], few: LabelledImages
) -> dict[str, TaskVector]:
    run, space = cast(FewShotRun, setting.run), setting.space
    budget, names = cast(int, run.budget), list(vectors)
    if run.select == "random":
        chosen = select_random(len(names), budget, run.seed)
    elif run.select == "features":
        base = space.encoder()
        theirs = [space.features(name) for name in names]
        chosen = select_by_features(features(base, few.images), theirs, budget)
    else:
        encoder = setting.compose(vectors)
        scores = gradient_scores(setting.classifier(encoder), encoder, setting.batches(few))
        if run.select == "block":
            blocks = encoder.bank.blocks
            table = select_blocks(scores, blocks, budget)
            virtual = virtual_vectors(list(vectors.values()), table, blocks)
            return {vector.name: vector for vector in virtual}
        chosen = select_vectors(scores, budget)
    return {names[i]: vectors[names[i]] for i in chosen.tolist()}


def _with_shifts(setting: Setting, result: Result) -> Result:
    """With the mean accuracy under the images' other shifts, if the run asks for it."""
    run = cast(FewShotRun, setting.run)
    if run.out_of_domain and result.model is not None:
        shifts = {
            other.name: setting.score(Rows(result.model, other.rows), other.test)
            for other in setting.space.out_of_domain(setting.target)
        }
        result.metrics["shifts"] = shifts
        result.metrics["shifted"] = statistics.fmean(shifts.values())
    return result


def _peft(setting: Setting) -> Result:
    run = cast(PeftRun, setting.run)
    train = setting.space.task(setting.target).train
    generator = torch.Generator().manual_seed(run.seed)
    count = max(1, round(len(train) * run.percent / 100))
    images = train.subset(torch.randperm(len(train), generator=generator)[:count])
    if run.how == "zero-shot":
        return setting.result(setting.classifier(setting.space.encoder()))
    if run.how == "fine-tune":
        return _supervised(setting, setting.space.encoder().requires_grad_(), images)
    if run.how == "lora":
        tuning = LoraTuning(setting.space.encoder(), rank=run.rank, seed=run.seed)
        return _supervised(setting, tuning, images)
    return _supervised(setting, setting.compose(), images)


def _test_time(setting: Setting) -> Result:
    run = cast(TestTimeRun, setting.run)
    task = setting.space.task(setting.target)
    if run.how == "coefficients":
        encoder: nn.Module = setting.compose()
    else:
        encoder = setting.space.encoder().requires_grad_(False)
        for parameter in layer_norms(encoder) if run.how == "layer-norms" else ():
            parameter.requires_grad_()
    model = setting.classifier(encoder)
    if run.how == "zero-shot":
        return setting.result(model)
    adaptation: Adaptation = {
        "ufm": UFM(divisor=run.divisor),
        "simclr": SimCLR(),
        "entropy": Entropy(),
        "sar": SAR() if run.recipe == "paper" else SAR.for_classes(len(task.classnames)),
    }[run.objective]
    # The images without their labels.
    learned = adapt(
        model,
        task.test.images,
        adaptation,
        run.training(),
        batch_size=run.resolved("batch"),
        description=f"{setting.target}, {run.objective}",
        **setting.options,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return setting.result(model, learned, parameters=trained)


def _addition(setting: Setting) -> Result:
    run = cast(AdditionRun, setting.run)
    space = setting.space
    names = run.tasks or space.tasks
    own = isinstance(space, OwnWorkspace)
    vectors = {} if own else space.vectors(run.vectors, names)
    choice = {"include": weights_only(space.encoder())} if run.weights_only else {}
    # Accuracies of the tasks' own models, by which those of the sum are divided.
    tuned = [{"validation": 1.0, "test": 1.0} for _ in names]
    if not own:
        tuned = [_finetuned(setting, name, vectors[name]) for name in names]
    encoder = setting.compose(vectors, **choice)
    tasks = [
        _joint_task(setting, name, its["validation"])
        for name, its in zip(names, tuned, strict=True)
    ]
    if run.how == "coefficients":
        outcome: Outcome | None = add(
            encoder, tasks, run.training(), penalty=_penalty(run), **setting.options
        )
    elif run.how == "search":
        outcome = search_addition(encoder, tasks)
    else:
        outcome = None
    tests = [setting.score(setting.classifier(encoder, n), space.task(n).test) for n in names]
    metrics: dict[str, Any] = {
        "test": statistics.fmean(tests),
        "relative": statistics.fmean(a / t["test"] for a, t in zip(tests, tuned, strict=True)),
        "tasks": dict(zip(names, tests, strict=True)),
        "finetuned": {n: t["test"] for n, t in zip(names, tuned, strict=True)},
    }
    if run.disentanglement:
        images = [space.task(name).test.images for name in names]
        heads = [space.head(name) for name in names]
        errors = disentanglement_error(encoder, encoder.coef, heads, images)
        metrics |= {"matrix": errors.tolist(), "names": list(names)}
        metrics["disentanglement"] = off_diagonal_mean(errors)
    return Result(metrics, encoder, outcome.learned if outcome else None)


def _finetuned(setting: Setting, name: str, vector: TaskVector) -> dict[str, float]:
    """Accuracies of a task's own fine-tuned model."""
    encoder = setting.compose({name: vector})
    with torch.no_grad():
        encoder.coef.fill_(1)
    model, task = setting.classifier(encoder, name), setting.space.task(name)
    return {
        "validation": setting.score(model, task.validation),
        "test": setting.score(model, task.test),
    }


def _negation(setting: Setting) -> Result:
    run = cast(NegationRun, setting.run)
    space, target = setting.space, setting.target
    if run.control is None:
        raise ValueError("negation needs a control task to keep")
    choice = {"include": weights_only(space.encoder())} if run.weights_only else {}
    own = isinstance(space, OwnWorkspace)
    encoder = setting.compose(None if own else space.vectors(run.vectors, [target]), **choice)
    tasks = [_joint_task(setting, name) for name in (target, run.control)]
    outcome: Outcome | None = None
    if run.how == "coefficients":
        outcome = negate(
            encoder,
            tasks[0],
            tasks[1],
            run.training(),
            threshold=run.threshold,
            penalty=_penalty(run),
            **setting.options,
        )
    elif run.how == "search":
        outcome = search_negation(encoder, tasks[0], tasks[1], threshold=run.threshold)
    tests = [
        setting.score(setting.classifier(encoder, name), space.task(name).test)
        for name in (target, run.control)
    ]
    metrics = {"test": tests[0], "control": tests[1]}
    if outcome:
        metrics |= {"validation": outcome.accuracies[0], "kept": outcome.accuracies[1]}
    return Result(metrics, encoder, outcome.learned if outcome else None)


def _joint_task(setting: Setting, name: str, finetuned: float = 1.0) -> JointTask:
    part = setting.space.task(name).validation
    evaluate: Callable[[nn.Module], float] = lambda model: setting.score(model, part)  # noqa: E731
    return JointTask(setting.space.head(name), setting.batches(part), evaluate, finetuned)


def _penalty(run: AdditionRun | NegationRun) -> Penalty | None:
    return Penalty(run.penalty) if run.penalty else None


def _per_instance(setting: Setting) -> Result:
    run = cast(PerInstanceRun, setting.run)
    composed = setting.compose()
    head = setting.space.head(setting.target)
    model = setting.classifier(PerInstance(composed, head.shape[1]))
    learned = adapt(
        model,
        setting.space.task(setting.target).test.images,
        Entropy(),
        run.training(),
        batch_size=run.resolved("batch"),
        description=f"{setting.target}, per instance",
        **setting.options,
    )
    return setting.result(model, learned)


def _cosine(setting: Setting) -> Result:
    vectors = setting.vectors()
    matrix = cosines(list(vectors.values()))
    return Result(
        {
            "matrix": matrix.tolist(),
            "names": list(vectors),
            "cosine": off_diagonal_mean(matrix),
        }
    )


_PERFORMERS: dict[type[Run], Callable[[Setting], Result]] = {
    FewShotRun: _few_shot,
    AdditionRun: _addition,
    NegationRun: _negation,
    TestTimeRun: _test_time,
    PeftRun: _peft,
    PerInstanceRun: _per_instance,
    CosineRun: _cosine,
}
