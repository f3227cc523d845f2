"""Builds the optional native extensions; everything else is in pyproject.toml.

The sources use the libtorch stable ABI and no Python header, so one binary serves every PyTorch
from 2.11 and every CPython from 3.10. PyTorch is looked up, never imported: pip's isolated build,
which hides it, still finds the one in the environment that it installs into.

ATLAS_KERNELS_CPP, ATLAS_KERNELS_CUDA: 1 makes a failed build an error, 0 skips it. Unset, a failed
build is one warning and an installation without that backend; CUDA is then tried only where both
nvcc and a CUDA build of PyTorch are found.
"""

import importlib.util
import os
import platform
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

CPU_SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("arena", "dispatch", "list", "memory")]
CPU_KERNELS = "csrc/cpu/kernels.cpp"
CUDA_SOURCES = sorted(map(str, [*Path("csrc/cuda").glob("*.cu"), *Path("csrc/cuda").glob("*.cpp")]))

CXX_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
# A fused multiply-add would round differently from machine to machine. GCC's own AVX-512 header
# trips its warning.
KERNEL_FLAGS = ["-ffp-contract=off", "-Wno-maybe-uninitialized"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]  # PyTorch 2.11
INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl"]


def torch_root():
    """The folder of the installed PyTorch."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places.append(Path(sysconfig.get_path("platlib")) / "torch")
    for place in places:
        if (place / "include/torch/csrc/stable").is_dir():
            return place
    raise PlatformError("PyTorch 2.11 or later must be installed first")


def find_nvcc():
    """The CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def cuda_is_usable():
    """Whether a CUDA extension has a chance to compile."""
    try:
        return find_nvcc() is not None and (torch_root() / "lib/libtorch_cuda.so").exists()
    except PlatformError:
        return False


def architecture_flags():
    """Nvcc's -gencode flags for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0;10.0+PTX"."""
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class Build(build_ext):
    """Compiles what setuptools cannot: one object per instruction set, and CUDA."""

    def build_extension(self, ext):
        torch = torch_root()
        if ext.name.endswith("._cuda"):
            self.build_cuda(ext, torch)
            return
        ext.include_dirs = [str(torch / "include")]
        ext.library_dirs = [str(torch / "lib")]
        ext.extra_objects = [
            obj
            for name, flags in INSTRUCTION_SETS.items()
            for obj in self.compiler.compile(
                [CPU_KERNELS],
                output_dir=str(Path(self.build_temp) / name),
                extra_postargs=[*CXX_FLAGS, *KERNEL_FLAGS, *flags],
                macros=[("ATLAS_CAPABILITY", name)],
            )
        ]
        super().build_extension(ext)

    def build_cuda(self, ext, torch):
        nvcc = find_nvcc()
        if nvcc is None:
            raise PlatformError("nvcc is not on PATH nor under CUDA_HOME")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A static CUDA runtime: the binary then runs beside whichever one PyTorch brings.
        options = ["-shared", "-cudart=static", "--threads=0", *architecture_flags()]
        options += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-std=c++17", "-O3"]
        options += [*STABLE_ABI, "-DUSE_CUDA", f"-I{torch / 'include'}", f"-L{torch / 'lib'}"]
        self.spawn([nvcc, *options, *ext.sources, "-ltorch_cpu", "-ltorch_cuda", "-o", str(target)])


def extension(name, switch, **arguments):
    """A stable-ABI extension whose failure to build is a warning unless its switch is 1."""
    return Extension(
        f"atlas_kernels.ops.backends.{name}",
        language="c++",
        optional=os.environ.get(switch) != "1",
        py_limited_api=True,
        **arguments,
    )


extensions = []
if os.environ.get("ATLAS_KERNELS_CPP") != "0":
    extensions.append(
        extension(
            "_cpp",
            "ATLAS_KERNELS_CPP",
            sources=CPU_SOURCES,
            depends=sorted(map(str, [*Path("csrc").glob("*.h"), *Path("csrc/cpu").iterdir()])),
            extra_compile_args=[*CXX_FLAGS, *STABLE_ABI],
            libraries=["torch_cpu"],
        )
    )
if CUDA_SOURCES and os.environ.get("ATLAS_KERNELS_CUDA", "1" if cuda_is_usable() else "0") != "0":
    extensions.append(extension("_cuda", "ATLAS_KERNELS_CUDA", sources=CUDA_SOURCES))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    options={
        "build_ext": {"parallel": True},
        **({"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {}),
    },
)
