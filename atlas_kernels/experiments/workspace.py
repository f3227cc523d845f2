"""Where a run's model, task vectors and images come from: one interface, three sources."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..bank import TaskVectorBank
from ..files import digest, read_state_dict
from ..learn import features
from ..tasks.clip import build_model, preprocess_for, zero_shot_head
from ..tasks.embedded import (
    WEIGHTS,
    embedded_out_of_domain,
    embedded_task,
    load_model,
    load_task,
    load_task_vectors,
    task_names,
)
from ..tasks.images import (
    CATALOG,
    ImageTask,
    OutOfDomain,
    load_folder,
    load_images,
    load_out_of_domain,
)
from ..vectors import TaskVector
from .config import Checkpoints, Embedded, Own, Run, Source, Vectors
from .embedded.make_vectors import Kind, make_vector
from .processes import default_processes, run_jobs

_ENCODER = "visual."
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_BANK = "bank.safetensors"
_PACKED = "choosing among task vectors needs them unpacked: give checkpoints, not a bank"


class Workspace(ABC):
    """A base model with task vectors, and tasks to learn with them.

    Attributes:
        device: where models learn.
        packed: the bank to start from, if it is packed already; there are no vectors then.
    """

    device = torch.device("cpu")
    packed: TaskVectorBank | None = None

    def __init__(self) -> None:
        self._features: dict[str, Tensor] = {}

    @property
    @abstractmethod
    def description(self) -> str:
        """What it is, in a sentence for the user."""

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have images."""

    @abstractmethod
    def task(self, name: str) -> ImageTask:
        """The images of a task, on the workspace's device when they are read."""

    @abstractmethod
    def head(self, name: str) -> Tensor:
        """The zero-shot head [C, d] of a task, on the workspace's device."""

    @abstractmethod
    def encoder(self) -> nn.Module:
        """A new copy of the base's image encoder."""

    @abstractmethod
    def vector_names(self, kind: Vectors) -> tuple[str, ...]:
        """The tasks that there are vectors of."""

    @abstractmethod
    def vectors(self, kind: Vectors, names: Sequence[str]) -> dict[str, TaskVector]:
        """Task vectors by task; made first, if that is how they come about.

        Raises:
            OSError, ValueError: there are no such vectors.
        """

    def features(self, name: str) -> Tensor:
        """The base's features of a task's training images: computed once."""
        if name not in self._features:
            self._features[name] = features(self.encoder(), self.task(name).train.images)
        return self._features[name]

    def related(self, name: str, target: str) -> bool:
        """Whether a vector was made from the target's own images."""
        return name == target

    def out_of_domain(self, name: str) -> tuple[OutOfDomain, ...]:
        """Test images of a task's classes from elsewhere.

        Raises:
            ValueError: there are none.
        """
        raise ValueError(f"there are no images of {name} out of its domain")

    def bank(
        self,
        run: Run,
        vectors: Mapping[str, TaskVector],
        folder: Path | None,
        include: Sequence[str] | None,
    ) -> TaskVectorBank:
        """The bank of some vectors, stored as the run says, or the one that is packed already.

        ``folder`` is where a bank that is streamed from its file lies; ``include`` are patterns of
        the blocks that are composed, all by default.
        """
        if self.packed is not None:
            return self.packed
        lora: Literal["product", "factorwise"] = (
            "factorwise" if run.vectors == "lora-factorwise" else "product"
        )
        options: dict[str, Any] = {"codec": run.codec, "lora": lora, "include": include}
        encoder = self.encoder()
        if run.memory == "stream":
            if folder is None:
                raise ValueError("memory 'stream' needs a folder for the bank")
            return TaskVectorBank.pack(folder / _BANK, encoder, vectors, **options)
        return TaskVectorBank.from_task_vectors(encoder, vectors, **options)


def open_workspace(source: Source, cache_folder: Path | None = None) -> Workspace:
    """The workspace of a source.

    Args:
        source: checked already.
        cache_folder: where task vectors that have to be made first are kept.

    Raises:
        OSError, ValueError: files are missing or do not fit; the message says which.
    """
    if isinstance(source, Embedded):
        return EmbeddedWorkspace(cache_folder, source.assets or WEIGHTS)
    return OwnWorkspace(source) if isinstance(source, Own) else CheckpointWorkspace(source)


class EmbeddedWorkspace(Workspace):
    """The tasks that come with the package, and a model and vectors of them."""

    def __init__(self, cache_folder: Path | None = None, assets: Path = WEIGHTS) -> None:
        super().__init__()
        self._cache_folder = cache_folder
        self._assets = assets

    @property
    def description(self) -> str:
        """See `Workspace`."""
        return "The embedded model, its tasks and their vectors, on the CPU"

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Workspace`."""
        return task_names()

    def task(self, name: str) -> ImageTask:
        """See `Workspace`."""
        return _embedded_task(name)

    def head(self, name: str) -> Tensor:
        """See `Workspace`."""
        return _embedded_head(name, self._assets)

    def encoder(self) -> nn.Module:
        """See `Workspace`."""
        return copy.deepcopy(_embedded_model(self._assets).get_submodule("visual"))

    def vector_names(self, kind: Vectors) -> tuple[str, ...]:
        """See `Workspace`."""
        return task_names()

    def vectors(self, kind: Vectors, names: Sequence[str]) -> dict[str, TaskVector]:
        """See `Workspace`."""
        unknown = [name for name in names if name not in task_names()]
        if unknown:
            raise ValueError(
                f"no task vector of {unknown[0]!r}: choose of {', '.join(task_names())}"
            )
        if kind == "standard":
            return {name: _embedded_vectors(self._assets)[name] for name in names}
        if self._cache_folder is None:
            raise ValueError(f"{kind} vectors of the embedded tasks have to be made: name a folder")
        short: Kind = "linear" if kind == "linear" else "lora"
        return _made_vectors(short, names, self._cache_folder, self._assets)

    def related(self, name: str, target: str) -> bool:
        """See `Workspace`."""
        return load_task(name).dataset == load_task(target).dataset

    def out_of_domain(self, name: str) -> tuple[OutOfDomain, ...]:
        """See `Workspace`."""
        return embedded_out_of_domain(name)


class OwnWorkspace(Workspace):
    """A bank of one's own, and a folder of images per task."""

    packed: TaskVectorBank

    def __init__(self, source: Own) -> None:
        super().__init__()
        self.source = source
        self.device = _device()
        names = [folder.resolve().name for folder in source.images]
        if len(set(names)) < len(names):
            raise ValueError(f"folders of images need different names, got {', '.join(names)}")
        self.packed = TaskVectorBank.load(source.bank)
        self._clip = build_model(source.model)
        self._encoder = self._filled_encoder()
        # Listed at once: a folder that does not fit is found before anything is learned.
        self._tasks = {
            name: _on_device(
                load_folder(folder, *preprocess_for(self._clip), source.template), self.device
            )
            for name, folder in zip(names, source.images, strict=True)
        }

    @property
    def description(self) -> str:
        """See `Workspace`."""
        visual = self._clip.get_submodule("visual")
        whose = "an image encoder" if self._encoder is visual else "a full CLIP model"
        text = f"{self.packed!r}, packed from {whose}"
        for name in self.tasks:
            task = self.task(name)
            text += (
                f"; {name}: {len(task.classnames)} classes, {len(task.train)} images to learn "
                f"from, {len(task.validation)} for validation, {len(task.test)} for test"
            )
        return f"{text}; on {self.device}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Workspace`."""
        return tuple(self._tasks)

    def task(self, name: str) -> ImageTask:
        """See `Workspace`."""
        return self._tasks[name]

    def head(self, name: str) -> Tensor:
        """See `Workspace`."""
        tensors = read_state_dict(self.source.text) if self.source.text else _base(self.packed)
        where = self.source.text or self.source.bank
        clip = _with_text_tower(self._clip, tensors, where, self.source.model)
        if clip is None:
            raise ValueError(
                f"{where} holds no text tower, of which the zero-shot head is made: pack the bank "
                "from the full CLIP checkpoint with --include 'visual.*', or name that checkpoint "
                "with --text"
            )
        task = self.task(name)
        return zero_shot_head(clip, task.classnames, task.templates).to(self.device)

    def encoder(self) -> nn.Module:
        """See `Workspace`."""
        return copy.deepcopy(self._encoder)

    def vector_names(self, kind: Vectors) -> tuple[str, ...]:
        """Refused: the vectors are packed already."""
        raise ValueError(_PACKED)

    def vectors(self, kind: Vectors, names: Sequence[str]) -> dict[str, TaskVector]:
        """Refused, likewise."""
        raise ValueError(_PACKED)

    def _filled_encoder(self) -> nn.Module:
        """The image encoder with the bank's base, under the names that the bank uses."""
        bank, encoder = self.packed, self._clip.get_submodule("visual")
        if any(name.startswith(_ENCODER) for name in bank.weights):
            text = [name for name in bank.weights if not name.startswith(_ENCODER)]
            if text:
                raise ValueError(
                    f"{self.source.bank} composes {text[0]!r} too, which is no part of the image "
                    "encoder: pack it with --include 'visual.*'"
                )
            encoder = nn.Sequential()
            encoder.add_module("visual", self._clip.get_submodule("visual"))
        problem = f"{self.source.bank} does not fit {self.source.model}"
        _fill(encoder, _base(bank), problem, bank.weights)
        return encoder


class CheckpointWorkspace(Workspace):
    """Checkpoints and data sets on disk, in the layout that `describe_layout` shows."""

    def __init__(self, source: Checkpoints) -> None:
        super().__init__()
        self.source = source
        self.device = _device()
        self._folder = source.checkpoints / source.model
        self._tasks: dict[str, ImageTask] = {}
        self._clip = build_model(source.model)
        base = self._find("base")
        if base is None:
            raise FileNotFoundError(
                f"no {self._folder / 'base'}.safetensors (or .pt, .bin), the full open_clip "
                f"checkpoint of {source.model}, in this layout:\n{describe_layout(source)}"
            )
        tensors = read_state_dict(base, allow_pickle=source.allow_pickle)
        filled = _with_text_tower(self._clip, tensors, base, source.model)
        if filled is None:
            raise ValueError(f"{base} holds no text tower: a full open_clip checkpoint is needed")
        own = self._find("zeroshot")
        encoder = read_state_dict(own, allow_pickle=source.allow_pickle) if own else tensors
        visual = self._clip.get_submodule("visual")
        _fill(visual, _image_part(encoder), f"{own or base} does not fit {source.model}", ())

    @property
    def description(self) -> str:
        """See `Workspace`."""
        return f"{self.source.model} from {self._folder}; on {self.device}"

    @property
    def tasks(self) -> tuple[str, ...]:
        """See `Workspace`."""
        return tuple(CATALOG)

    def task(self, name: str) -> ImageTask:
        """See `Workspace`."""
        if name not in self._tasks:
            task = load_images(name, self.source.data, *preprocess_for(self._clip))
            self._tasks[name] = _on_device(task, self.device)
        return self._tasks[name]

    def head(self, name: str) -> Tensor:
        """See `Workspace`."""
        task = self.task(name)
        return zero_shot_head(self._clip, task.classnames, task.templates).to(self.device)

    def encoder(self) -> nn.Module:
        """See `Workspace`."""
        return copy.deepcopy(self._clip.get_submodule("visual"))

    def vector_names(self, kind: Vectors) -> tuple[str, ...]:
        """See `Workspace`."""
        found = tuple(name for name in self.tasks if self._vector_file(name, kind))
        if not found:
            raise FileNotFoundError(self._lacking(kind))
        return found

    def vectors(self, kind: Vectors, names: Sequence[str]) -> dict[str, TaskVector]:
        """See `Workspace`."""
        vectors = {}
        for name in names:
            path = self._vector_file(name, kind)
            if path is None:
                raise FileNotFoundError(f"{name}: {self._lacking(kind)}")
            vectors[name] = self._vector(name, path)
        return vectors

    def _lacking(self, kind: Vectors) -> str:
        return (
            f"no {kind} fine-tuned checkpoint below {self._folder}, in this layout:\n"
            f"{describe_layout(self.source)}"
        )

    def out_of_domain(self, name: str) -> tuple[OutOfDomain, ...]:
        """See `Workspace`."""
        data, found = self.source.data, []
        for folder in sorted(data.glob(f"{name}-*")):
            train = data / name / "train"
            other = load_out_of_domain(folder, train, *preprocess_for(self._clip))
            found.append(replace(other, test=other.test.to(self.device)))
        return tuple(found) or super().out_of_domain(name)

    def _vector_file(self, name: str, kind: Vectors) -> Path | None:
        if kind.startswith("lora"):
            folder = self._folder / name / "lora"
            return folder if folder.is_dir() else None
        return self._find(f"{name}/{'linear_' if kind == 'linear' else ''}finetuned")

    def _vector(self, name: str, path: Path) -> TaskVector:
        base = self._clip.get_submodule("visual").state_dict()
        if path.is_dir():
            vector = TaskVector.from_peft(path)
            deltas = {key.removeprefix(_ENCODER): delta for key, delta in vector.deltas.items()}
            return TaskVector(deltas, base={k: digest(base[k]) for k in deltas}, name=name)
        tuned = _image_part(read_state_dict(path, allow_pickle=self.source.allow_pickle))
        return TaskVector.from_state_dicts(base, tuned, name=name)

    def _find(self, stem: str) -> Path | None:
        candidates = (self._folder / f"{stem}{suffix}" for suffix in _SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)


def describe_layout(source: Checkpoints) -> str:
    """Where `Checkpoints` looks for its files."""
    model = source.checkpoints / source.model
    return (
        f"  {model}/base.safetensors                  the full open_clip checkpoint\n"
        f"  {model}/zeroshot.safetensors              the image encoder, if it differs (optional)\n"
        f"  {model}/TASK/finetuned.safetensors        a fine-tuned image encoder or full model\n"
        f"  {model}/TASK/linear_finetuned.safetensors the same, fine-tuned in the tangent space\n"
        f"  {model}/TASK/lora/                        a PEFT adapter folder\n"
        f"  {source.data}/TASK/                       the images of a data set\n"
        "(.pt, .pth and .bin for .safetensors; pickled modules with --allow-pickle)"
    )


@cache
def _embedded_model(assets: Path) -> nn.Module:
    return load_model(assets)


@cache
def _embedded_vectors(assets: Path) -> dict[str, TaskVector]:
    return load_task_vectors(task_names(), folder=assets, base=_embedded_model(assets))


def _made_vectors(
    kind: Kind, names: Sequence[str], folder: Path, assets: Path
) -> dict[str, TaskVector]:
    """From files, or made first: then with a progress bar, and what is finished is kept."""
    missing = [name for name in names if not (folder / f"{kind}-{name}.safetensors").exists()]
    make = partial(make_vector, kind=kind, folder=folder, assets=assets)
    made = run_jobs(make, missing, default_processes())
    bar = tqdm(made, total=len(missing), desc=f"{kind} vectors", disable=not missing, leave=False)
    for _ in bar:
        pass
    return {name: make(name) for name in names}


@cache
def _embedded_task(name: str) -> ImageTask:
    return embedded_task(name)


@cache
def _embedded_head(name: str, assets: Path) -> Tensor:
    task = load_task(name)
    return zero_shot_head(_embedded_model(assets), task.classnames, task.templates)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _on_device(task: ImageTask, device: torch.device) -> ImageTask:
    parts = (part.to(device) for part in (task.train, task.validation, task.test))
    return ImageTask(task.name, task.classnames, task.templates, *parts)


def _image_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's tensors of a full model, or of an encoder under any prefix."""
    inside = {
        name.rpartition(_ENCODER)[2]: tensor for name, tensor in tensors.items() if _ENCODER in name
    }
    return inside or dict(tensors)


def _with_text_tower(
    clip: nn.Module, tensors: Mapping[str, Tensor], where: Path, model: str
) -> nn.Module | None:
    """The model with the text tower of a state dict; None if that holds none."""
    needed = [name for name in clip.state_dict() if not name.startswith(_ENCODER)]
    if any(name not in tensors for name in needed):
        return None
    tower = {name: tensor for name, tensor in tensors.items() if not name.startswith(_ENCODER)}
    _fill(clip, {**clip.state_dict(), **tower}, f"{where} does not fit {model}", tuple(tower))
    return clip


def _base(bank: TaskVectorBank) -> dict[str, Tensor]:
    base = {**bank.constants, **bank.base}
    return {**base, **{alias: base[block] for alias, block in bank.aliases.items()}}


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], problem: str, first: tuple[str, ...]
) -> None:
    """Copies a complete state into the module; the first name that does not fit is an error."""
    state = module.state_dict()
    for name in (*first, *state):
        here, there = tensors.get(name), state.get(name)
        if here is None or there is None:
            where = "the file" if here is None else "the architecture"
            raise ValueError(f"{problem}: {name!r} is not in {where}")
        if here.shape != there.shape:
            raise ValueError(
                f"{problem}: {name!r} has shape {tuple(here.shape)} in the file, "
                f"{tuple(there.shape)} in the architecture"
            )
    module.load_state_dict({name: tensors[name] for name in state})
