"""The trainer that every method uses: an objective in, the best coefficients out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..files import read_tensors, write_tensors
from ..models import ComposedModel

_KIND = "training"

# The published scripts clip the joint gradient norm to 1 while gradients still carry the loss scale
# of 2^16, so that almost every gradient is normalised (atlas.md 1.3).
_LOSS_SCALE = {"clean": 1.0, "official": 65536.0}

Objective = Callable[[nn.Module, Any], Tensor]


class Step(Protocol):
    """What batches do to the parameters, in one run."""

    optimizer: torch.optim.Optimizer
    """Of `parameter_groups`; rates are set before every step, its state is kept with the run."""

    state: dict[str, Any]
    """What else a resumed run needs, as JSON has it."""

    def __call__(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """Changes the parameters once, unless the loss is not finite; the loss."""


class Batches(Protocol):
    """Training data by epoch: each is a function of its index, and perhaps of the model then."""

    def __len__(self) -> int:
        """Batches of an epoch: of the one that began last, if they differ."""

    def epoch(self, index: int) -> Iterable[Any]:
        """The batches of one epoch, the same on every call with the same index."""


@dataclass(frozen=True)
class Recipe:
    """How parameters learn: AdamW (betas 0.9, 0.999; eps 1e-8), decoupled weight decay.

    Attributes:
        epochs: passes over the batches.
        lr: learning rate at the start.
        weight_decay: pulls coefficients to 0, that is to the base.
        schedule: "cosine", ``lr/2 * (1 + cos(pi * t / T))`` at step t of T, or "constant".
        warmup: steps before the schedule begins, in which the rate grows linearly to ``lr``; t and
            T do not count them.
        lrs: (pattern, rate) pairs: parameters whose name matches a shell-style pattern learn at
            this rate in place of ``lr``, under the same schedule; the first match counts.
        accumulate: batches per step, whose losses are averaged: where the loss is a mean over
            images, k batches of b stand for one of k * b in the memory of one of b, up to the
            rounding of float32 (sums are taken in another order). What an epoch leaves over makes a
            step of fewer.
        preset: the gradient handed to AdamW, with the joint norm ``|g|`` over all parameters:
            "clean" is ``g * min(1, 1 / |g|)``; "official" is ``g * min(1, 1 / (2^16 * |g|))``, the
            dynamics of the published runs.
        seed: of everything random inside the model (dropout). Batches have their own.

    Source: aTLAS (arXiv 2407.02880), appendix B to D.
    """

    epochs: int = 10
    lr: float = 0.1
    weight_decay: float = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    preset: Literal["clean", "official"] = "clean"
    seed: int = 0
    warmup: int = 0
    lrs: tuple[tuple[str, float], ...] = ()
    accumulate: int = 1

    def __post_init__(self) -> None:
        rates = [self.lr, *(rate for _, rate in self.lrs)]
        if min(rates) <= 0 or min(self.epochs, self.weight_decay, self.warmup) < 0:
            raise ValueError(f"epochs, weight_decay and warmup must be >= 0 and lr > 0, got {self}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1 batch per step, got {self}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"unknown schedule {self.schedule!r}: expected 'cosine' or 'constant'")
        if self.preset not in _LOSS_SCALE:
            raise ValueError(f"unknown preset {self.preset!r}: expected 'clean' or 'official'")


@dataclass(frozen=True)
class Learned:
    """What `learn` found.

    Attributes:
        parameters: the best parameters by name (without scores the last), as the model holds them
            after `learn`.
        epoch: the epoch they come from, counted from 1; 0 if no epoch beat the start.
        score: their validation score; NaN if nothing was scored.
        history: one record per epoch, the start first: {"loss": mean, "score", "seconds"}.
    """

    parameters: dict[str, Tensor]
    epoch: int
    score: float
    history: list[dict[str, float]]

    @property
    def improved(self) -> bool:
        """Whether any epoch beat the start; without scores, whether there was one."""
        return self.epoch > 0


class AdamWStep:
    """AdamW along the gradient of the objective, as the recipe's preset scales it."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], objective: Objective, recipe: Recipe
    ) -> None:
        self.parameters = list(parameters.values())
        self.objective = objective
        self.loss_scale = _LOSS_SCALE[recipe.preset]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameter_groups(parameters, recipe), weight_decay=recipe.weight_decay
        )
        self.state: dict[str, Any] = {}

    def __call__(self, model: nn.Module, batches: Sequence[Any]) -> float:
        """One step; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        value = backward(model, self.objective, batches)
        if not math.isfinite(value):
            return value
        scale_gradients(self.parameters, self.loss_scale)
        self.optimizer.step()
        return value


def backward(model: nn.Module, objective: Objective, batches: Sequence[Any]) -> float:
    """The mean loss of some batches, whose gradients are added up; if not finite, not all are."""
    value = 0.0
    with composed_once(model, accumulate=len(batches) > 1):
        for batch in batches:
            loss = objective(model, batch) / len(batches)
            value += loss.item()
            if not math.isfinite(value):
                break
            loss.backward()
    return value


def learn(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    recipe: Recipe,
    *,
    evaluate: Callable[[nn.Module], float] | None,
    resume: str | Path | None = None,
    progress: bool = True,
    description: str = "learning",
    step: Callable[[dict[str, nn.Parameter], Objective, Recipe], Step] = AdamWStep,
) -> Learned:
    """Trains every parameter of ``model`` that requires gradients; keeps the best epoch.

    One step is ``objective(model, batch).backward()``, of ``recipe.accumulate`` batches, and an
    AdamW step. Each `ComposedModel` in ``model`` composes once per step, however often the
    objective calls it, and once per evaluation.
    Its layers with running statistics (BatchNorm) keep and use those of the base while it learns.
    The start is scored first and an epoch must beat it, so the result is never worse than the start
    on ``evaluate``; ties keep the earlier epoch. Without ``evaluate`` nothing is chosen: the last
    epoch is kept.

    Args:
        model: holds the best parameters afterwards; in eval mode.
        objective: (model, batch) to a scalar loss.
        batches: the training data.
        recipe: learning rate, epochs and so on.
        evaluate: the validation score of the model, higher is better; -inf ends the run. None
            where there is nothing to validate on.
        resume: a file that is written after every epoch; if it exists, its run goes on, and ends
            with the same bits as one that was never interrupted.
        progress: shows a progress bar on standard error.
        description: the bar's text.
        step: (parameters by name, objective, recipe) to another step than the one above.

    Raises:
        ValueError: nothing in ``model`` requires gradients, a pattern of ``recipe.lrs`` matches no
            parameter that does, or ``resume`` is another run's file.
        FloatingPointError: a loss is not finite.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to learn: no parameter of the model requires gradients")
    stepping = step(parameters, objective, recipe)
    chooses = evaluate is not None
    run = _Run(parameters, stepping, recipe, chooses, Path(resume) if resume else None)
    if not run.load():
        run.record({"loss": math.nan, "score": _score(model, evaluate), "seconds": 0.0})
    steps = _steps(batches, recipe)
    with tqdm(
        total=recipe.epochs * steps,
        initial=run.epoch * steps,
        desc=description,
        disable=not progress,
        leave=False,
    ) as bar:
        while run.epoch < recipe.epochs and run.history[-1]["score"] != -math.inf:
            started = time.perf_counter()
            loss = _train_epoch(model, batches, stepping, recipe, run.epoch, bar)
            score = _score(model, evaluate)
            seconds = time.perf_counter() - started
            run.record({"loss": loss, "score": score, "seconds": seconds})
            run.save()
            best = {"best": f"{run.best_score:.3f}"} if chooses else {}
            bar.set_postfix(loss=f"{loss:.3f}", **best)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(run.best[name])
    model.eval()
    return Learned(run.best, run.best_epoch, run.best_score, run.history)


def cosine(step: int, steps: int) -> float:
    """``(1 + cos(pi * step / steps)) / 2``: the factor of the learning rate at a step."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def rate_factor(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of the learning rate at a step of all steps, by schedule and warm-up."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    return cosine(step - recipe.warmup, steps - recipe.warmup)


def scale_gradients(parameters: Iterable[Tensor], loss_scale: float) -> None:
    """``g * min(1, 1 / (loss_scale * |g|))`` in place, ``|g|`` the joint norm of all gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    # A zero norm divides to infinity, and the minimum is 1.
    factor = (1 / (loss_scale * norm)).clamp(max=1)
    torch._foreach_mul_(gradients, factor)


@contextmanager
def composed_once(model: nn.Module, *, accumulate: bool = False) -> Iterator[None]:
    """Inside, each `ComposedModel` in ``model`` composes once (see its own `composed_once`)."""
    with ExitStack() as stack:
        for module in _composed(model):
            stack.enter_context(module.composed_once(accumulate=accumulate))
        yield


def parameter_groups(parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """An optimizer's groups: the parameters of each rate."""
    for pattern, _ in recipe.lrs:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(
                f"a rate is given for {pattern!r}, but no parameter that learns has such a name: "
                f"they are {', '.join(list(parameters)[:5])}"
            )
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        its = (rate for pattern, rate in recipe.lrs if fnmatchcase(name, pattern))
        rates.setdefault(next(its, recipe.lr), []).append(parameter)
    return [{"params": members, "lr": rate, "initial_lr": rate} for rate, members in rates.items()]


def _train_mode(model: nn.Module) -> None:
    """Training mode, except for layers of composed models that would change their buffers."""
    model.train()
    for module in _composed(model):
        for part in module.module.modules():
            if getattr(part, "running_mean", None) is not None:
                part.eval()


def _composed(model: nn.Module) -> list[ComposedModel]:
    return [module for module in model.modules() if isinstance(module, ComposedModel)]


def _train_epoch(
    model: nn.Module, batches: Batches, step: Step, recipe: Recipe, epoch: int, bar: Any
) -> float:
    losses: list[float] = []
    _train_mode(model)
    # Seeded by epoch: a resumed run repeats. Forked: the caller's random state does not move.
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed * 1_000_003 + epoch)
        of_epoch = iter(batches.epoch(epoch))
        while together := list(islice(of_epoch, recipe.accumulate)):
            # Asked for only now: batches that follow the model are counted when their epoch begins.
            steps = _steps(batches, recipe)
            factor = rate_factor(recipe, epoch * steps + len(losses), recipe.epochs * steps)
            for group in step.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            losses.append(step(model, together))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss is {losses[-1]} at step {len(losses)} of epoch {epoch + 1}: lower "
                    f"lr (now {recipe.lr}), or check the images and labels of its batches"
                )
            bar.update()
    return math.fsum(losses) / max(len(losses), 1)


def _steps(batches: Batches, recipe: Recipe) -> int:
    return -(-len(batches) // recipe.accumulate)


def _score(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float:
    if evaluate is None:
        return math.nan
    model.eval()
    with torch.no_grad():
        return float(evaluate(model))


class _Run:
    """The state of a run between epochs, in memory and on disk."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        step: Step,
        recipe: Recipe,
        chooses: bool,
        path: Path | None,
    ) -> None:
        self.parameters = parameters
        self.step = step
        self.recipe = recipe
        self.chooses = chooses
        self.path = path
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.best_score = -math.inf

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history) - 1

    def record(self, entry: dict[str, float]) -> None:
        """Adds an epoch (or the start) and keeps its parameters if they are to be returned."""
        self.history.append(entry)
        if entry["score"] > self.best_score or not self.best or not self.chooses:
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
            self.best_epoch, self.best_score = self.epoch, entry["score"]

    def save(self) -> None:
        """Writes the state, if the run has a file."""
        if self.path is None:
            return
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            tensors[f"current.{name}"] = parameter
            for key, value in self.step.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        write_tensors(
            self.path,
            tensors,
            _KIND,
            recipe=asdict(self.recipe),
            chooses=self.chooses,
            step=self.step.state,
            history=self.history,
            best_epoch=self.best_epoch,
        )

    def load(self) -> bool:
        """Goes on from the run's file; False if there is none."""
        if self.path is None or not self.path.is_file():
            return False
        tensors, fields = read_tensors(self.path, _KIND, mmap=False)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        found = {
            name.removeprefix("current."): tensor.shape
            for name, tensor in tensors.items()
            if name.startswith("current.")
        }
        # As it comes back from JSON: tuples are lists.
        settings = json.loads(json.dumps([asdict(self.recipe), self.chooses]))
        if [fields["recipe"], fields["chooses"]] != settings or found != shapes:
            raise ValueError(
                f"{self.path} is the state of another run (its recipe, parameters or choice of the "
                "epoch differ): repeat the call that began it, or delete the file to start anew"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"current.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(parameter.device)
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, what, name = key.split(".", 2)
                parameter = self.parameters[name]
                # AdamW keeps its step count on the host.
                place = value.device if what == "step" else parameter.device
                self.step.optimizer.state[parameter][what] = value.to(place)
        self.step.state.update(fields["step"])
        self.history = fields["history"]
        self.best_epoch = fields["best_epoch"]
        self.best_score = self.history[self.best_epoch]["score"]
        return True
