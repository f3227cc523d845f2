"""What importing the package does: nothing. Each test in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "atlas_kernels"

# A package that is not installed: no finder knows it.
BLOCK = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: (
        None if name.partition(".")[0] in {blocked!r} else find_spec(name, *rest)
    )
)
"""

COMPOSE = """
composed = ak.compose([torch.ones(3)], [[torch.ones(3)]], torch.ones(1))
assert composed[0].tolist() == [2.0] * 3
"""


def run(program: str, folder: Path, **environment: str) -> str:
    """The program's output, run in `folder` and without a compiled cache; fails if it does."""
    result = subprocess.run(
        [sys.executable, "-B", "-c", program],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=folder,
        env={
            **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            "PYTHONPATH": str(PACKAGE.parent),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder),
            "TMPDIR": str(folder),
            **environment,
        },
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_import_touches_nothing(tmp_path: Path) -> None:
    output = run(
        """
import os
import sys
import torch
environment, threads = dict(os.environ), torch.get_num_threads()
before = set(sys.modules)
# A GPU that is hidden is no GPU: whoever asks for one all the same, stands out.
torch._C._cuda_getDeviceCount = lambda: sys.exit("a device was counted")
import atlas_kernels as ak
assert not {"atlas_kernels.ops", "atlas_kernels.learn"} & set(sys.modules)
ak.compose, ak.TaskVector, ak.TaskVectorBank, ak.ComposedModel
new = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = "triton open_clip torchvision matplotlib PIL sklearn scipy nevergrad"
assert not new & set(heavy.split()), new
assert "atlas_kernels.learn" not in sys.modules and "atlas_kernels.tasks.clip" not in sys.modules
assert not torch.cuda.is_initialized()
assert dict(os.environ) == environment and torch.get_num_threads() == threads
assert not torch.are_deterministic_algorithms_enabled()
maps = open("/proc/self/maps").read()
assert "_cpp.abi3.so" not in maps
assert [line for line in maps.splitlines() if "atlas_kernels" in line and ".so" in line] == []
import logging
assert logging.getLogger("atlas_kernels").handlers == [] and logging.getLogger().handlers == []
assert all(getattr(ak, name).__doc__ for name in ak.__all__)
print(sorted(ak.__all__), ak.__version__)
""",
        tmp_path,
    )
    names = "BackendUnavailableError ComposedModel FileFormatError LinearizedModel LowRank Plan"
    names += " TaskVector TaskVectorBank backends bank compose files learn models ops plan plans"
    names += " read_coefficients read_state_dict tasks vectors"
    assert output.startswith(repr(names.split()))
    assert list(tmp_path.iterdir()) == []


def test_without_triton_and_the_extras(tmp_path: Path) -> None:
    blocked = (
        "triton",
        "open_clip",
        "torchvision",
        "matplotlib",
        "PIL",
        "sklearn",
        "scipy",
        "nevergrad",
    )
    program = BLOCK.format(blocked=blocked) + "import torch\nimport atlas_kernels as ak\n" + COMPOSE
    output = run(program + 'print(ak.backends()["triton"])', tmp_path)
    assert "not installed" in output.lower()
    assert "pip install" in output
    assert list(tmp_path.iterdir()) == []


def test_without_gpu_and_extension(tmp_path: Path) -> None:
    """On a machine with nothing but PyTorch the reference serves, and one line says so."""
    output = run(
        """
import logging
import sys
import torch
import atlas_kernels as ak
from atlas_kernels.ops.backends import cpp
cpp.unavailable = lambda: "it was never built: build it"
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
"""
        + COMPOSE * 2
        + """
print(ak.backends())
try:
    ak.compose([torch.ones(3)], [[torch.ones(3)]], torch.ones(1), backend="cpp")
except ak.BackendUnavailableError as error:
    print(error)
""",
        tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    assert output.count("WARNING") == 1
    assert output.count("it was never built: build it") == 3
    assert "'torch': 'available'" in output


def folders(package: str) -> list[Path]:
    """Of a package that package-data names; "*" stands for every one."""
    if package == "*":
        return [path.parent for path in PACKAGE.rglob("__init__.py")]
    return [PACKAGE.parent.joinpath(*package.split("."))]


def test_every_file_of_the_package_is_installed() -> None:
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    installed = {
        path
        for package, patterns in settings["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for folder in folders(package)
        for path in folder.glob(pattern)
    }
    ours = {".npz", ".safetensors", ".md", ".yaml", ".j2", ".pyi"}
    files = {path for path in PACKAGE.rglob("*") if path.suffix in ours or path.name == "py.typed"}
    assert len(files) > 30
    assert files == installed
