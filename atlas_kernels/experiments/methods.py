"""What every method does with a run: from a workspace to numbers, and perhaps to a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..learn import (
    SAR,
    UFM,
    Adaptation,
    Entropy,
    JointTask,
    LoraTuning,
    Outcome,
    Penalty,
    PerInstance,
    SimCLR,
    adapt,
    add,
    cosines,
    disentanglement_error,
    layer_norms,
    negate,
    off_diagonal_mean,
    search_addition,
    search_negation,
)
from ..vectors import TaskVector
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
from .few_shot import few_shot
from .setting import Result, Setting


def perform(setting: Setting[Any]) -> Result:
    """Does what a run says.

    Raises:
        ValueError, OSError: something is missing or does not fit; the message says what.
    """
    return _PERFORMERS[type(setting.run)](setting)


def _peft(setting: Setting[PeftRun]) -> Result:
    run = setting.run
    train = setting.space.task(setting.target).train
    generator = torch.Generator().manual_seed(run.seed)
    count = max(1, round(len(train) * run.percent / 100))
    images = train.subset(torch.randperm(len(train), generator=generator)[:count])
    if run.how == "coefficients":
        encoder: nn.Module = setting.compose()
    elif run.how == "lora":
        encoder = LoraTuning(setting.space.encoder(), rank=run.rank, seed=run.seed)
    else:
        encoder = setting.space.encoder().requires_grad_(run.how == "fine-tune")
    model = setting.classifier(encoder)
    if run.how == "zero-shot":
        return setting.result(model)
    return setting.result(model, setting.learn(model, setting.repeated(images)))


def _test_time(setting: Setting[TestTimeRun]) -> Result:
    run = setting.run
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
    return setting.result(model, learned)


def _addition(setting: Setting[AdditionRun]) -> Result:
    run = setting.run
    space = setting.space
    names = run.tasks or space.tasks
    vectors = setting.vectors_of(names)
    # Accuracies of the tasks' own models, by which those of the sum are divided.
    tuned = [_finetuned(setting, name, vectors.get(name)) for name in names]
    encoder = setting.compose(vectors)
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


def _finetuned(
    setting: Setting[AdditionRun], name: str, vector: TaskVector | None
) -> dict[str, float]:
    """Accuracies of a task's own fine-tuned model; 1 where that is not known."""
    if vector is None:
        return {"validation": 1.0, "test": 1.0}
    model = setting.classifier(setting.finetuned({name: vector}), name)
    task = setting.space.task(name)
    return {
        "validation": setting.score(model, task.validation),
        "test": setting.score(model, task.test),
    }


def _negation(setting: Setting[NegationRun]) -> Result:
    run = setting.run
    space, target = setting.space, setting.target
    if run.control is None:
        raise ValueError("negation needs a control task to keep")
    encoder = setting.compose(setting.vectors_of([target]))
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


def _joint_task(setting: Setting[Any], name: str, finetuned: float = 1.0) -> JointTask:
    part = setting.space.task(name).validation
    evaluate: Callable[[nn.Module], float] = lambda model: setting.score(model, part)  # noqa: E731
    return JointTask(setting.space.head(name), setting.batches(part), evaluate, finetuned)


def _penalty(run: AdditionRun | NegationRun) -> Penalty | None:
    return Penalty(run.penalty) if run.penalty else None


def _per_instance(setting: Setting[PerInstanceRun]) -> Result:
    run = setting.run
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


def _cosine(setting: Setting[CosineRun]) -> Result:
    vectors = setting.vectors()
    matrix = cosines(list(vectors.values()))
    return Result(
        {
            "matrix": matrix.tolist(),
            "names": list(vectors),
            "cosine": off_diagonal_mean(matrix),
        }
    )


_PERFORMERS: dict[type[Run], Callable[[Setting[Any]], Result]] = {
    FewShotRun: few_shot,
    AdditionRun: _addition,
    NegationRun: _negation,
    TestTimeRun: _test_time,
    PeftRun: _peft,
    PerInstanceRun: _per_instance,
    CosineRun: _cosine,
}
