"""What a run is: one documented schema, checked before any work, in YAML and on the command line.

A `Run` learns (or searches, or only measures) once. An `Experiment` is a table of runs: arms, the
values of one axis, targets and seeds. A `Suite` is a file of experiments on one source of models
and images. Unknown fields, wrong types and fields that do not go together are refused in words.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ..files import write_atomically

if TYPE_CHECKING:
    from ..learn import Recipe

Vectors = Literal["standard", "linear", "lora-product", "lora-factorwise"]
Model = TypeVar("Model", bound="Schema")


class Schema(BaseModel):
    """Frozen, and strict about names."""

    # Built when it is used: the help of a command looks at fields alone.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Embedded(Schema):
    """The model, task vectors and tasks that come with the package."""

    kind: Literal["embedded"] = "embedded"
    assets: Path | None = Field(
        default=None,
        description="a model and vectors that demo --from-scratch made, in place of them",
    )


class Own(Schema):
    """A bank and folders of images of one's own."""

    kind: Literal["own"] = "own"
    bank: Path = Field(
        description="made by atlas-kernels bank from full open_clip checkpoints with --include "
        "'visual.*'"
    )
    images: tuple[Path, ...] = Field(
        description="folders with train/CLASS/*.jpg, and val and test likewise; a part that is "
        "missing is split off train"
    )
    model: str = Field(description="open_clip's name, such as ViT-B-32")
    template: tuple[str, ...] = Field(
        ("a photo of a {}.",), description="prompts with {} for the class"
    )
    text: Path | None = Field(
        None, description="the full base checkpoint, for a bank of an image encoder alone"
    )


class Checkpoints(Schema):
    """Base and fine-tuned checkpoints of the published layout, and data sets on disk."""

    kind: Literal["checkpoints"] = "checkpoints"
    model: str = Field("ViT-B-32", description="open_clip's name, such as ViT-B-32")
    checkpoints: Path = Field(
        Path("checkpoints"), description="MODEL/zeroshot.* and MODEL/TASK/finetuned.* below it"
    )
    data: Path = Field(
        Path("data"), description="the data sets, in the layouts of torchvision or by class"
    )
    allow_pickle: bool = Field(False, description="read whole pickled modules (.pt) as well")


Source = Annotated[Embedded | Own | Checkpoints, Field(discriminator="kind")]


class Run(Schema):
    """The fields that all methods share.

    ``epochs`` to ``accumulate`` come from the ``recipe`` where they are not given.
    """

    recipes: ClassVar[dict[str, dict[str, Any]]]

    target: str | None = Field(None, description="the task to learn")
    seed: int = Field(0, description="of images, order and everything else that is random")
    vectors: Vectors = Field("standard", description="how task vectors were made, and are composed")
    sources: tuple[str, ...] = Field((), description="the task vectors to use; all by default")
    strict: bool = Field(
        False, description="leave out all vectors of the target's own images, whatever their shift"
    )
    granularity: Literal["block", "task", "partition"] = Field(
        "block", description="a coefficient per vector and block, per vector, or per random group"
    )
    partitions: int | None = Field(
        None, ge=1, description="groups of every block's elements (granularity partition)"
    )
    memory: Literal["whole", "recompute", "stream"] = Field(
        "whole", description="when blocks are composed"
    )
    codec: str = Field("bf16", description="how deltas are stored")
    recipe: Literal["paper", "ours"] = Field(
        "paper", description="what the fields below are by default"
    )
    epochs: int | None = Field(None, ge=0)
    lr: float | None = Field(None, gt=0, description="learning rate")
    weight_decay: float | None = Field(None, ge=0)
    schedule: Literal["cosine", "constant"] | None = None
    preset: Literal["clean", "official"] | None = Field(None, description="of the gradient's norm")
    warmup: int | None = Field(None, ge=0, description="steps of rising learning rate")
    batch: int | None = Field(None, ge=1, description="images at a time")
    accumulate: int | None = Field(
        None, ge=1, description="batches per step, whose losses are averaged"
    )

    @field_validator("codec")
    @classmethod
    def _known_codec(cls, name: str) -> str:
        from ..ops import parse_codec

        parse_codec(name)
        return name

    @model_validator(mode="after")
    def _goes_together(self) -> Run:
        if (self.granularity == "partition") != (self.partitions is not None):
            raise ValueError("granularity 'partition' and a number of partitions go together")
        if self.vectors == "linear" and self.granularity == "partition":
            raise ValueError("linear vectors have coefficients per block or per task")
        if self.memory != "whole" and self.vectors in ("linear", "lora-factorwise"):
            raise ValueError(f"{self.vectors} vectors are composed with memory 'whole' only")
        return self

    @property
    def tasks_needed(self) -> tuple[str, ...]:
        """The tasks whose images the run sees, apart from those it selects vectors by."""
        return () if self.target is None else (self.target,)

    @property
    def images_per_class(self) -> int | None:
        """How many labelled images the run draws; None where it takes what there is."""
        return None

    def resolved(self, name: str) -> Any:
        """A field of the recipe: its own value, or the recipe's."""
        value = getattr(self, name)
        return self._defaults()[name] if value is None else value

    def training(self) -> Recipe:
        """How parameters learn."""
        from ..learn import Recipe

        names = ("epochs", "lr", "weight_decay", "schedule", "preset", "warmup", "accumulate")
        return Recipe(seed=self.seed, **{name: self.resolved(name) for name in names})

    def _defaults(self) -> dict[str, Any]:
        return {"weight_decay": 0.1, "warmup": 0, "accumulate": 1, **self.recipes[self.recipe]}


class FewShotRun(Run):
    """A few labelled images per class (aTLAS, section 5.1), its baselines, adapters, selection."""

    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"epochs": 10, "lr": 0.1, "schedule": "cosine", "preset": "official"}
        | {"batch": 128},
        "ours": {"epochs": 10, "lr": 0.1, "schedule": "cosine", "preset": "clean", "batch": 32},
    }

    method: Literal["few-shot"] = "few-shot"
    shots: int = Field(16, ge=1, description="images per class")
    how: Literal[
        "coefficients", "search", "single", "zero-shot", "fine-tune", "own", "gradient-free"
    ] = Field(
        "coefficients",
        description="learn coefficients; search one factor, or the best single vector; measure "
        "the base; fine-tune all weights; measure the target's own fine-tuned model; learn "
        "coefficients without gradients",
    )
    factors: tuple[float, ...] = Field(
        (), description="what search and single try; 21 points of [0, 1] by default"
    )
    adapter: Literal["none", "tip", "lp++"] = Field("none", description="on top of the features")
    select: Literal["all", "random", "features", "whole", "block"] = Field(
        "all", description="which vectors learn: all, or a budget of them chosen in this way"
    )
    budget: int | None = Field(None, ge=0, description="vectors to select")
    bases: Literal["vectors", "random", "matched"] = Field(
        "vectors",
        description="task vectors, or noise in their place: as large as the base, or as they are",
    )
    weights_only: bool = Field(False, description="leave biases and normalisation as in the base")
    out_of_domain: bool = Field(False, description="test under the images' other shifts as well")
    peak_memory: bool = Field(
        False,
        description="measure the tensors of a learning step as well; of evaluating a batch, if "
        "there are no gradients",
    )

    @property
    def images_per_class(self) -> int | None:
        """See `Run`."""
        return self.shots

    @model_validator(mode="after")
    def _selection(self) -> FewShotRun:
        if (self.select == "all") != (self.budget is None):
            raise ValueError("select and a budget go together")
        if self.adapter != "none" and self.how not in ("coefficients", "zero-shot"):
            raise ValueError(f"an adapter goes with coefficients or zero-shot, not {self.how!r}")
        return self


class AdditionRun(Run):
    """Several tasks in one model (aTLAS, section 4.2)."""

    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"epochs": 20, "lr": 1e-3, "schedule": "constant", "preset": "official"}
        | {"batch": 16},
        "ours": {"epochs": 10, "lr": 2e-2, "schedule": "constant", "preset": "clean", "batch": 16},
    }

    method: Literal["addition"] = "addition"
    tasks: tuple[str, ...] = Field((), description="the tasks to add; all of the source by default")
    how: Literal["coefficients", "search", "zero-shot"] = Field(
        "coefficients", description="learn coefficients, search one factor, or measure the base"
    )
    penalty: Literal[0, 1, 2] = Field(0, description="order of the regulariser; 0 for none")
    weights_only: bool = Field(False, description="leave biases and normalisation as in the base")
    disentanglement: bool = Field(False, description="measure the disentanglement error as well")

    @property
    def tasks_needed(self) -> tuple[str, ...]:
        """See `Run`."""
        return self.tasks


class NegationRun(Run):
    """Forget the target, keep the control task (aTLAS, section 4.1)."""

    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"epochs": 10, "lr": 5e-3, "schedule": "constant", "preset": "official"}
        | {"batch": 64},
        "ours": {"epochs": 10, "lr": 2e-2, "schedule": "constant", "preset": "clean", "batch": 32},
    }

    method: Literal["negation"] = "negation"
    control: str | None = Field(None, description="the task to keep")
    how: Literal["coefficients", "search", "zero-shot"] = Field(
        "coefficients", description="learn coefficients, search one factor, or measure the base"
    )
    threshold: float = Field(
        0.95, ge=0, le=1, description="share of the control's zero-shot accuracy to keep"
    )
    penalty: Literal[0, 1, 2] = Field(0, description="order of the regulariser; 0 for none")
    weights_only: bool = Field(False, description="leave biases and normalisation as in the base")

    @property
    def tasks_needed(self) -> tuple[str, ...]:
        """See `Run`."""
        return (*super().tasks_needed, *(() if self.control is None else (self.control,)))


class TestTimeRun(Run):
    """Adaptation on unlabelled test images (aTLAS, section 5.3)."""

    # No test, whatever its name looks like to pytest.
    __test__: ClassVar[bool] = False
    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"epochs": 10, "lr": 1e-2, "schedule": "cosine", "preset": "official"}
        | {"batch": 128},
        "ours": {"epochs": 10, "lr": 1e-2, "schedule": "cosine", "preset": "clean", "batch": 64},
    }

    method: Literal["test-time"] = "test-time"
    how: Literal["coefficients", "layer-norms", "zero-shot"] = Field(
        "coefficients", description="learn coefficients, tune LayerNorms, or measure the base"
    )
    objective: Literal["ufm", "simclr", "entropy", "sar"] = Field(
        "ufm", description="what is learned without labels"
    )
    divisor: int = Field(
        1, ge=1, description="UFM trusts a share 1/divisor of as many images per class as there are"
    )

    @model_validator(mode="after")
    def _unclipped(self) -> TestTimeRun:
        if self.objective == "sar" and self.preset is not None:
            raise ValueError("SAR has no preset: its gradients are not clipped, as published")
        return self


class PeftRun(Run):
    """A share of the training data, coefficients per random group (aTLAS x K, section 6.2)."""

    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"epochs": 10, "lr": 0.1, "schedule": "cosine", "preset": "official"}
        | {"batch": 128},
        "ours": {"epochs": 10, "lr": 0.05, "schedule": "cosine", "preset": "clean", "batch": 32},
    }

    method: Literal["peft"] = "peft"
    percent: float = Field(100, gt=0, le=100, description="of the training images")
    how: Literal["coefficients", "lora", "fine-tune", "zero-shot"] = Field(
        "coefficients",
        description="learn coefficients, train LoRA or all weights directly, or measure the base",
    )
    rank: int = Field(16, ge=1, description="of LoRA trained directly")


class PerInstanceRun(Run):
    """Coefficients predicted from every batch of test images (in the published code only)."""

    recipes: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"epochs": 1, "lr": 1e-4, "schedule": "cosine", "preset": "clean"}
        | {"warmup": 500, "batch": 128},
        "ours": {"epochs": 3, "lr": 1e-4, "schedule": "cosine", "preset": "clean"}
        | {"warmup": 0, "batch": 64},
    }

    method: Literal["per-instance"] = "per-instance"
    granularity: Literal["task"] = "task"


class CosineRun(Run):
    """How alike the task vectors are: all pairs."""

    recipes: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}, "ours": {}}
    method: Literal["cosine"] = "cosine"


AnyRun = Annotated[
    FewShotRun | AdditionRun | NegationRun | TestTimeRun | PeftRun | PerInstanceRun | CosineRun,
    Field(discriminator="method"),
]
_RUN: TypeAdapter[Any] = TypeAdapter(AnyRun, config=ConfigDict(defer_build=True))
METHODS: dict[str, type[Run]] = {
    "few-shot": FewShotRun,
    "addition": AdditionRun,
    "negation": NegationRun,
    "test-time": TestTimeRun,
    "peft": PeftRun,
    "per-instance": PerInstanceRun,
}
"""What ``atlas-kernels learn`` offers."""


class Single(Schema):
    """One run, with where its model and images come from: the file that every run stores."""

    source: Source = Embedded()
    run: AnyRun

    @model_validator(mode="after")
    def _a_bank_is_taken_as_it_is(self) -> Single:
        if not isinstance(self.source, Own):
            return self
        fields = self.run.model_dump()
        if fields.get("weights_only"):
            raise ValueError(
                "weights_only chooses blocks while a bank is packed, and this one is: pack it with "
                "--exclude for biases and normalisation, or leave weights_only out"
            )
        plain = {"sources": (), "strict": False, "select": "all", "bases": "vectors"}
        asked = [name for name, value in plain.items() if fields.get(name, value) != value]
        if fields.get("how") == "own":
            asked.append("how 'own'")
        if asked:
            raise ValueError(
                f"{asked[0]} needs the task vectors one by one, and a bank has them packed: pack "
                "one of those that are to learn, or give checkpoints"
            )
        return self


class Arm(Schema):
    """A row of an experiment's table, or a line of its picture."""

    label: str
    settings: dict[str, Any] = Field({}, description="fields of the run that make it this arm")
    fixed: bool = Field(False, description="does not depend on the axis: run once")
    seeded: bool = Field(True, description="depends on the seed: run for each")


class Axis(Schema):
    """What varies along an experiment's table."""

    field: str
    values: tuple[float | str, ...]
    label: str


class Published(Schema):
    """What the paper says of an arm, in per cent."""

    arm: str
    model: str = "ViT-B-32"
    metric: str = "test"
    means: tuple[float | None, ...] = Field(
        (), description="its headline numbers, by value of the axis; one without an axis"
    )
    rows: dict[str, float] = Field({}, description="its own rows behind a headline, by task")

    @property
    def headline(self) -> float | None:
        """The number to compare with, without an axis: the mean of the rows, if there are any."""
        return self.row_mean or next(iter(self.means), None)

    @property
    def row_mean(self) -> float | None:
        """The mean of the paper's own rows, if it prints any."""
        return statistics.fmean(self.rows.values()) if self.rows else None


class Experiment(Schema):
    """A table of runs.

    Every arm runs for every value of the axis, every target and every seed.
    """

    name: str
    title: str
    question: str = Field("", description="what it is to show, for the report")
    settings: dict[str, Any] = Field(description="fields that all runs share, method included")
    per_target: dict[str, dict[str, Any]] = Field({}, description="further fields by target")
    per_model: dict[str, dict[str, Any]] = Field({}, description="further fields by model")
    arms: tuple[Arm, ...]
    axis: Axis | None = None
    targets: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (0,)
    metric: str = Field("test", description="of the run's results, in table and picture")
    also: tuple[str, ...] = Field((), description="further metrics in the table")
    picture: Literal["lines", "bars", "none"] = Field(
        "bars", description="of the metric; a matrix, if there is one, is drawn besides"
    )
    matrix: str = Field("", description="what a value of the matrix is")
    published: tuple[Published, ...] = ()
    answer: str = Field("", description="what was found when this file was written")

    @model_validator(mode="after")
    def _every_run_is_valid(self) -> Experiment:
        for _ in self.runs(None):
            pass
        arms = [arm.label for arm in self.arms]
        for published in self.published:
            if published.arm not in arms:
                raise ValueError(f"published numbers of {published.arm!r}, which is no arm")
        return self

    def runs(self, model: str | None) -> Iterator[tuple[Cell, Run]]:
        """All runs with a model, each with its place in the table."""
        values = self.axis.values if self.axis else (None,)
        shared = {**self.settings, **self.per_model.get(model or "", {})}
        for arm in self.arms:
            where = itertools.product(
                (None,) if arm.fixed else values,
                self.targets or (None,),
                self.seeds if arm.seeded else self.seeds[:1],
            )
            for value, target, seed in where:
                fields = {**shared, **self.per_target.get(target or "", {}), **arm.settings}
                fields |= {"seed": seed}
                if target is not None:
                    fields["target"] = target
                if self.axis and value is not None:
                    fields[self.axis.field] = value
                yield (
                    Cell(
                        experiment=self.name,
                        arm=arm.label,
                        value=value,
                        target=target,
                        seed=seed if arm.seeded else None,
                    ),
                    _RUN.validate_python(fields),
                )


class Suite(Schema):
    """A file of experiments."""

    name: str
    version: int
    title: str
    about: str = ""
    source: Source = Embedded()
    experiments: tuple[Experiment, ...]

    @property
    def model(self) -> str | None:
        """Whose published numbers stand beside ours; None for the embedded model."""
        return self.source.model if isinstance(self.source, Checkpoints) else None

    def runs(self) -> Iterator[tuple[Cell, Run]]:
        """All runs of all experiments."""
        for experiment in self.experiments:
            yield from experiment.runs(self.model)


class Cell(Schema):
    """The place of a run in the tables; None where it does not matter."""

    experiment: str
    arm: str
    value: float | str | None = None
    target: str | None = None
    seed: int | None = None


def read_yaml(path: Path, schema: type[Model], **overrides: Any) -> Model:
    """A checked object from a YAML file, its top-level fields overridden.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, or does not fit the schema: the first field that does not, why.
    """
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds no fields, expected those of a {schema.__name__.lower()}")
    return checked(schema, {**contents, **overrides}, str(path))


def checked(
    schema: type[Model],
    fields: Mapping[str, Any],
    where: str,
    called: Callable[[str], str] | None = None,
) -> Model:
    """An object of the schema; ValueError names the first field that does not fit.

    ``called`` maps a field to what the user knows it by; its path in the file by default.
    """
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        # Of a run as a whole, the last part is the name of its method.
        option = called is not None and bool(path) and path[-1] not in METHODS
        place = called(path[-1]) if called and option else "" if called else ".".join(path)
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f", got {first['input']!r}"
        raise ValueError(f"{where}: {place + ': ' if place else ''}{message}{got}") from None


def write_yaml(path: Path, contents: Schema) -> None:
    """Writes an object as YAML, in one step; `read_yaml` gives it back."""
    text = yaml.safe_dump(contents.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
