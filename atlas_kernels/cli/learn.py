"""``learn``: one run of any method, on embedded tasks or on one's own model and images.

The options of a method are the fields of its schema in `experiments.config`, and the file that
every run leaves holds them all.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast, get_origin

from cyclopts import App, Group, Parameter
from pydantic import BaseModel

from ..experiments import (
    CONFIG,
    METHODS,
    RESULTS,
    Checkpoints,
    Own,
    Single,
    checked,
    read_yaml,
    versions,
    write_json,
    write_yaml,
)
from .extras import need

if TYPE_CHECKING:
    from ..experiments import Result, Setting
    from ..learn import Learned

STATE = "training.safetensors"
_TASK = "mnist-rotated"
# A related task, and an unrelated one.
_TASKS = ("mnist-rotated", "digits-inverted", "fashion-noise")
_CONTROL = "fashion-clean"
# What a base that sees nothing in its images cannot forget, or learn from without labels.
_TARGETS = {"negation": "mnist-clean", "test-time": "mnist-noise", "per-instance": "mnist-noise"}
# Fields that have another option, or none.
_RENAMED = {"target": "task"}
_INTERNAL = ("method",)

app = App(
    name="learn",
    help_epilogue="examples: atlas-kernels learn few-shot --task fashion-inverted --shots 4 -o "
    "out; atlas-kernels learn few-shot --config out/config.yaml --lr 0.05 -o again",
)
_OWN = Group("Your own bank and images (embedded tasks without)", sort_key=1)
_THEIRS = Group("Your own checkpoints and data sets", sort_key=2)
_HOW = Group("How", sort_key=3)


def _options(schema: type[BaseModel], without: tuple[str, ...] = ()) -> Any:
    """The fields of a schema as options.

    What is not given is not there, so that a file's fields, or the schema's defaults, hold.
    """
    fields: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        if name in (*_INTERNAL, "kind", *without):
            continue
        known = not field.is_required() and field.default not in (None, ())
        default = f"[default: {field.default}]" if known else ""
        several = get_origin(field.annotation) is tuple
        parameter = Parameter(
            name=_option(name),
            help=f"{field.description or ''} {default}".strip(),
            show_default=False,
            consume_multiple=several,
            negative="" if several else None,
        )
        fields[name] = Annotated[cast(Any, field.annotation), parameter]
    options: Any = TypedDict(f"{schema.__name__}Options", fields, total=False)  # type: ignore[misc]
    # Where its annotations are looked up.
    options.__module__ = __name__
    return options


def _command(method: str, schema: type[BaseModel]) -> Callable[..., dict[str, Any]]:
    """The command of a method."""

    def command(
        *,
        own: Any = None,
        theirs: Any = None,
        run: Any = None,
        config: Annotated[
            Path | None,
            Parameter(help=f"A run's {CONFIG}; other options replace its fields.", group=_HOW),
        ] = None,
        resume: Annotated[
            bool, Parameter(help="Go on with an interrupted run.", negative="", group=_HOW)
        ] = False,
        output: Annotated[
            Path, Parameter(name=["--output", "-o"], help="The folder for the files.")
        ],
    ) -> dict[str, Any]:
        checked_config = _config(method, own or {}, theirs or {}, run or {}, config)
        return _learn(method, checked_config, resume, output)

    for name, options, group in (
        ("own", _options(Own), _OWN),
        ("theirs", _options(Checkpoints, ("model",)), _THEIRS),
        ("run", _options(schema), _HOW),
    ):
        command.__annotations__[name] = Annotated[options | None, Parameter(name="*", group=group)]
    return command


def _option(name: str) -> str:
    return "--" + _RENAMED.get(name, name).replace("_", "-")


def _learn(method: str, config: Single, resume: bool, folder: Path) -> dict[str, Any]:
    need("demo", "learning")
    _check_folder(folder)
    _check_state(folder, config, resume)
    from ..experiments import Setting, open_workspace
    from ..files import in_use

    space = open_workspace(config.source, folder / "vectors")
    setting = Setting(space, config.run, folder, folder / STATE)
    setting.check()
    try:
        with in_use(folder):
            write_yaml(folder / CONFIG, config)
            print(space.description)
            return _run(setting, config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"finished epochs are kept in {folder}; the same command with --resume goes on"
        ) from None


def _config(
    method: str,
    own: dict[str, Any],
    theirs: dict[str, Any],
    run: dict[str, Any],
    file: Path | None,
) -> Single:
    """What the options and the file say together."""
    where = f"learn {method}"
    read = read_yaml(file, Single) if file else None
    if read and read.run.method != method:
        raise ValueError(f"{file} is of learn {read.run.method}, not of {where}")
    codec = "codec" in run
    run = {**(read.run.model_dump() if read else {}), **run}
    source = read.source.model_dump() if read else {"kind": "embedded"}
    if theirs and "model" in own:
        theirs["model"] = own["model"]
    source = _source(source, own, theirs)
    if source["kind"] == "own":
        _check_own(source, run)
        if codec:
            raise ValueError("--codec is for task vectors: a bank has its codec already")
    _fill_in(source, run, method)
    if run.get("control") is not None and run.get("control") == run.get("target"):
        raise ValueError(
            f"--control is {run['control']}, which is the task to forget: name another one to keep"
        )
    contents = {"source": source, "run": {**run, "method": method}}
    return checked(Single, contents, where, _option)


def _source(before: dict[str, Any], own: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Where model and images come from: as in the file, unless options say otherwise."""
    if own.keys() - {"model"} and theirs.keys() - {"model"}:
        raise ValueError("--bank and --checkpoints are two ways to give a model: choose one")
    if theirs.keys() - {"model"}:
        kind, fields = "checkpoints", theirs
    elif own.keys() - {"model"} or (own and before["kind"] == "embedded"):
        kind, fields = "own", own
    else:
        # Nothing, or another model's name for what the file has.
        return {**before, **own}
    return {**(before if before["kind"] == kind else {}), "kind": kind, **fields}


def _check_own(source: dict[str, Any], run: dict[str, Any]) -> None:
    needed = ("bank", "images", "model")
    found = [name for name in (*needed, "template", "text") if name in source]
    absent = [f"--{name}" for name in needed if name not in source]
    if absent:
        raise ValueError(f"--{found[0]} needs {' and '.join(absent)} as well")
    if run.get("target") and run["target"] not in _names(source):
        raise ValueError(
            f"--task is {run['target']}, but the folders of --images are "
            f"{', '.join(_names(source))}"
        )


def _names(source: dict[str, Any]) -> list[str]:
    return [Path(folder).resolve().name for folder in source["images"]]


def _fill_in(source: dict[str, Any], run: dict[str, Any], method: str) -> None:
    """Tasks that were not named: the first folders of images, or embedded ones."""
    embedded = source["kind"] == "embedded"
    names = _names(source) if source["kind"] == "own" else []
    if method == "addition":
        run["tasks"] = run.get("tasks") or (_TASKS if embedded else names)
    elif embedded or names:
        run["target"] = run.get("target") or (_TARGETS.get(method, _TASK) if embedded else names[0])
    if method == "negation" and (embedded or len(names) > 1):
        run["control"] = run.get("control") or (_CONTROL if embedded else names[1])


def _run(setting: "Setting[Any]", config: Single) -> dict[str, Any]:
    from ..experiments import perform, write_models

    folder = setting.folder
    assert folder is not None
    results: dict[str, Any] = {
        "settings": config.model_dump(mode="json"),
        "versions": versions(),
        "device": str(setting.space.device),
    }
    write_json(folder / RESULTS, results)
    zero_shot = _zero_shot(setting)
    result = perform(setting)
    files = [*write_models(result, folder), RESULTS, CONFIG]
    results |= {"metrics": result.metrics, "zero_shot": zero_shot}
    if result.encoder is not None:
        bank = result.encoder.bank
        results |= {"vectors": bank.names, "blocks": len(bank.blocks)}
    if result.learned is not None:
        history = result.learned.history
        results |= {"epoch": result.learned.epoch, "history": history}
        results["seconds"] = sum(entry["seconds"] for entry in history)
        files.append(_write_picture(setting, result.learned, folder))
    write_json(folder / RESULTS, results)
    _print_metrics(setting, result, zero_shot)
    print(f"Written to {folder}: {', '.join(files)}.")
    (folder / STATE).unlink(missing_ok=True)
    return {"folder": folder, "files": files, **results}


def _write_picture(setting: "Setting[Any]", learned: "Learned", folder: Path) -> str:
    from ..report import history_figure, save

    losses = [entry["loss"] for entry in learned.history[1:]]
    scores = [entry["score"] for entry in learned.history]
    save(history_figure(losses, scores, learned.epoch, title=setting.title), folder / "history.png")
    return "history.png"


def _zero_shot(setting: "Setting[Any]") -> dict[str, Any]:
    """What the base reaches, where that can be measured in the same way."""
    from ..experiments import perform

    run = setting.run
    fields = {"how": "zero-shot", "adapter": "none", "select": "all", "budget": None}
    present = {name: value for name, value in fields.items() if name in type(run).model_fields}
    if "how" not in present:
        return {}
    return perform(replace(setting, run=run.model_copy(update=present), state=None)).metrics


def _print_metrics(setting: "Setting[Any]", result: "Result", zero_shot: dict[str, Any]) -> None:
    from ..report import print_table

    before, after = _accuracies(zero_shot), _accuracies(result.metrics)
    rows = [
        (name, f"{100 * before[name]:.1f}" if name in before else "", f"{100 * value:.1f}")
        for name, value in after.items()
    ]
    print_table(("accuracy, %", "zero-shot", "learned"), rows, title=setting.title, numbers=2)
    learned = result.learned
    if learned is not None:
        kept = f"epoch {learned.epoch} was kept" if learned.improved else "no epoch is better"
        print(f"Of {len(learned.history) - 1} epochs, {kept}.")


def _accuracies(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers among metrics, nested ones by both names."""
    nested = {
        f"{outer}: {inner}": value
        for outer, its in metrics.items()
        if isinstance(its, dict)
        for inner, value in its.items()
    }
    return {name: v for name, v in (metrics | nested).items() if isinstance(v, float)}


def _check_folder(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot write to {folder}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: no permission to write in {nearest}")


def _check_state(folder: Path, config: Single, resume: bool) -> None:
    """An unfinished run goes on with the same settings, or is kept."""
    if not (folder / STATE).exists():
        return
    advice = f"choose another folder, or delete {folder / STATE} to start anew"
    if not resume:
        raise ValueError(f"{folder} holds an unfinished run: --resume goes on, or {advice}")
    try:
        theirs = read_yaml(folder / CONFIG, Single)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not say what the run was: {advice}") from error
    for old, new in ((theirs.source, config.source), (theirs.run, config.run)):
        before, now = old.model_dump(), new.model_dump()
        for name in now:
            if before.get(name) != now[name]:
                raise ValueError(
                    f"{folder} holds a run with another {_option(name)} ({before.get(name)} there, "
                    f"{now[name]} here): {advice}"
                )


def __getattr__(method: str) -> Any:
    """The command of a method, made when it is asked for: each has some forty options."""
    if method not in METHODS:
        raise AttributeError(f"module {__name__!r} has no attribute {method!r}")
    return _command(method, METHODS[method])


for _name, _schema in METHODS.items():
    _summary = (_schema.__doc__ or "").strip().splitlines()[0]
    app.command(
        f"{__name__}:{_name}",
        name=_name,
        help=f"{_summary} What is best on the validation images is kept. Runs on a GPU if your own "
        "model meets one.",
    )
