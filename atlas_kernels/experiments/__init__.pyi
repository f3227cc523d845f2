from .config import (
    METHODS,
    Arm,
    Cell,
    Checkpoints,
    Embedded,
    Experiment,
    Own,
    Published,
    Single,
    Suite,
    checked,
    read_yaml,
    write_yaml,
)
from .embedded.make_assets import make_assets
from .methods import perform
from .processes import one_thread
from .published import load_suite, read_suite, suite_names
from .results import CONFIG, RESULTS, Entry, Records, entry, standard_error, versions, write_json
from .setting import Result, Setting
from .step_timing import step_cost
from .suite import kept_file, run_suite
from .workspace import open_workspace

__all__ = [
    "CONFIG",
    "METHODS",
    "RESULTS",
    "Arm",
    "Cell",
    "Checkpoints",
    "Embedded",
    "Entry",
    "Experiment",
    "Own",
    "Published",
    "Records",
    "Result",
    "Setting",
    "Single",
    "Suite",
    "checked",
    "entry",
    "kept_file",
    "load_suite",
    "make_assets",
    "one_thread",
    "open_workspace",
    "perform",
    "read_suite",
    "read_yaml",
    "run_suite",
    "standard_error",
    "step_cost",
    "suite_names",
    "versions",
    "write_json",
    "write_yaml",
]
