"""Every Triton kernel and configuration, compiled ahead of time for GPUs that are not here.

Run as a script, this file compiles for the architectures of its arguments and prints what it found
in the machine code: pytest runs Triton in its interpreter, so compilation needs another process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from arena import arena_coef_grad, arena_compose

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
COUNTS = (1, 8, 21, 64)
NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAIRS = (
    ("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("mixed", "mixed"),
)  # fmt: skip
RARE_PAIRS = (("bf16", "fp32"), ("bf16", "fp16"), ("fp16", "fp16"))
CODECS = ("sign", "int2", "int3", "int4", "int8")
PACKED_PAIRS = (*(("fp32", codec) for codec in CODECS), ("bf16", "sign"), ("bf16", "int8"))
# Per thread. 72 leave 28 of the 64 warps of an NVIDIA multiprocessor, 96 five of the eight of a
# gfx942 SIMD: with 16 bytes per thread in flight, 14 and 20 KB per multiprocessor for each vector.
# Kernels for mixed dtypes have a branch per dtype and may take 96 on either.
# Packed kernels keep the words of four vectors in flight: half the warps then keep as many bytes.
CEILING = {"sm": 72, "gfx": 96, "mixed": 96, "packed sm": 120, "packed gfx": 124}
PARTITION = ("group_compose_kernel", "group_partial_kernel", "group_sum_kernel")
# Elements of which a thread holds a float32 in the loop of a packed kernel.
HELD = 32
# In that loop, per element and vector, at most 5 % above the most found. Three are the decoding and
# the multiply-add, for three bits five; the rest is split among the elements that are held.
INSTRUCTIONS = {
    ("packed_compose_kernel", "sm_80"): (4.4, 4.4, 6.9, 4.4, 5.0),
    ("packed_compose_kernel", "sm_90"): (4.6, 4.4, 6.9, 4.6, 5.0),
    ("packed_compose_kernel", "sm_100"): (4.2, 4.2, 5.8, 4.1, 4.5),
    ("packed_compose_kernel", "gfx942"): (3.2, 3.2, 5.2, 3.3, 3.9),
    ("packed_partial_kernel", "sm_80"): (4.9, 4.9, 7.6, 4.9, 5.4),
    ("packed_partial_kernel", "sm_90"): (4.9, 4.9, 7.6, 4.9, 5.4),
    ("packed_partial_kernel", "sm_100"): (4.4, 4.4, 6.6, 4.3, 4.8),
    ("packed_partial_kernel", "gfx942"): (5.1, 4.9, 7.1, 4.9, 5.6),
}
# The same for partitioned coefficients: floating-point deltas, three bits, all other codecs. A slot
# takes about five in each of four rounds, in the sums anew for every vector.
PARTITIONED = {
    ("group_compose_kernel", "sm_80"): (6.2, 19.6, 16.1),
    ("group_compose_kernel", "sm_90"): (6.2, 19.7, 16.3),
    ("group_compose_kernel", "sm_100"): (6.5, 19.1, 16.3),
    ("group_compose_kernel", "gfx942"): (4.5, 16.3, 12.9),
    ("group_partial_kernel", "sm_80"): (34.0, 49.1, 47.2),
    ("group_partial_kernel", "sm_90"): (34.0, 49.8, 45.9),
    ("group_partial_kernel", "sm_100"): (34.6, 49.8, 45.5),
    ("group_partial_kernel", "gfx942"): (35.1, 50.4, 46.0),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@dataclass
class Compiled:
    """What the machine code of one kernel contains, and what it was compiled for."""

    architecture: str
    kernel: str
    count: int
    base: str
    delta: str
    hash: str
    tile: int
    unroll: int
    threads: int
    registers: int
    spilled_bytes: int
    accesses: dict[str, int]
    loop: dict[str, int]
    products_32: int
    conversions_in_loops: int
    rounds_to_nearest: bool

    def wide(self, kind: str) -> int:
        """128-bit loads or stores in global memory."""
        return moving(self.accesses, kind, 128)

    def narrow(self, kind: str) -> int:
        """All other loads or stores, those of the scalar unit excepted."""
        pattern = PATTERNS[kind]
        every = sum(n for name, n in self.accesses.items() if re.fullmatch(pattern, name))
        return every - self.wide(kind)

    def per_thread(self, dtype: str) -> int:
        """128-bit accesses in which a thread moves its share of a tile."""
        return self.tile * NAMES[dtype].itemsize // (16 * self.threads)


def moving(names: dict[str, int], kind: str, bits: int) -> int:
    """How many of the instructions load or store so many bits, 64 or 128, in global memory."""
    width = {64: r"\.64|dwordx2", 128: r"128|dwordx4"}[bits]
    return sum(
        number
        for name, number in names.items()
        if re.fullmatch(PATTERNS[kind], name) and re.search(width, name)
    )


PATTERNS = {
    "load": r"LDG\S*|(global|buffer|flat)_load_\w+",
    "store": r"STG\S*|(global|buffer|flat)_store_\w+",
}

# ---- compilation, in a process of its own -------------------------------------------------------


def products_32(ttir: str) -> int:
    """32-bit products, but for those of indices within a tile (a tensor) and a constant, and those
    of hashes (%h_), which wrap on purpose.
    """
    constants = set(re.findall(r"(%\w+) = arith\.constant dense", ttir))
    products = re.findall(
        r"%(?!h_)\w+ = arith\.muli (%[\w#]+), (%[\w#]+)\b.*: (?:tensor<[\dx]+)?i32\b", ttir
    )
    return sum(constants.isdisjoint(factors) for factors in products)


def in_loops(ttgir: str, operation: str) -> int:
    """Occurrences of an operation between the braces of `scf.for`."""
    depth, loops, found = 0, [], 0
    for line in ttgir.splitlines():
        found += bool(loops) and operation in line
        if "scf.for" in line:
            loops.append(depth)
        depth += line.count("{") - line.count("}")
        if loops and depth <= loops[-1]:
            loops.pop()
    return found


@dataclass
class Code:
    """Registers, bytes of stack, memory instructions, all instructions of the longest loop."""

    registers: int
    stack: int
    accesses: dict[str, int]
    loop: dict[str, int]


def nvidia_code(cubin: bytes) -> Code:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, *flags, file.name], capture_output=True, text=True).stdout
            for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c", "-ndf"]))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    names = re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?((?:LDG|STG|LDL|STL|LD|ST)(?:\.\S+)?)\s", sass)
    loop = longest_loop(sass, r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)(.*)")
    return Code(int(registers), int(stack), dict(Counter(names)), loop)


def amd_code(assembly: str) -> Code:
    numbers = dict(re.findall(r"\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE))
    scratch = int(numbers["private_segment_fixed_size"]) + int(numbers["vgpr_spill_count"])
    names = re.findall(r"^\s+((?:global|buffer|scratch|flat)_\w+)", assembly, re.MULTILINE)
    loop = longest_loop(assembly, r"^\s+([a-z]+_\w+)(.*)")
    return Code(int(numbers["vgpr_count"]), scratch, dict(Counter(names)), loop)


def longest_loop(assembly: str, instruction: str) -> dict[str, int]:
    """The instructions from a label to the last branch back to it, of the longest such stretch."""
    labels: dict[str, int] = {}
    names: list[str] = []
    longest: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(instruction, line):
            names.append(found[1])
            target = re.search(r"\.L\w+", found[2]) if re.search("BRA|branch", found[1]) else None
            # nvdisasm ends every kernel with a branch to itself.
            first = labels.get(target[0], len(names)) if target else len(names)
            longest = max(longest, names[first:], key=len)
    return dict(Counter(longest))


@dataclass(frozen=True)
class Job:
    """What to compile: for an architecture, numbers of vectors and pairs of dtypes.

    Deltas of a pair are of a dtype or packed. `source` replaces the `module` of kernels, `launch`
    the forward configuration.
    """

    architecture: str
    counts: tuple[int, ...] = COUNTS
    pairs: tuple[tuple[str, str], ...] = PAIRS
    source: str | None = None
    module: str = "kernels"
    launch: tuple[int, int, int] | None = None


def compile_all(job: Job) -> list[Compiled]:
    """What the host functions would launch for every number of vectors and pair of dtypes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from atlas_kernels.ops.backends.triton import config, groups, kernels, ops, packed
    from atlas_kernels.ops.codecs import CODECS as BY_NAME

    modules = {"kernels": kernels, "packed": packed, "groups": groups}
    if job.source is not None:
        modules[job.module] = module_from(Path(job.source))
    if job.launch is not None:
        config.forward = lambda *_: config.Launch(*job.launch)  # type: ignore[assignment,misc]
    architecture = job.architecture
    lanes = 64 if architecture.startswith("gfx") else 32
    target = (
        GPUTarget("hip", architecture, 64)
        if lanes == 64
        else GPUTarget("cuda", int(architecture[3:]), 32)
    )

    class Driver:
        """As much of a driver as compilation needs."""

        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    driver.set_active(Driver())
    launched: list[tuple[str, Any, dict[str, Any]]] = []

    class Recorder:
        """Stands for a kernel: compiles it for its arguments instead of launching it."""

        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                binary = self.kernel.warmup(*args, grid=grid, **kwargs)
                names = dict(zip(self.kernel.arg_names, args, strict=True))
                launched.append((self.kernel.__name__, binary, {**names, **kwargs}))

            return launch

    class Recorders:
        def __init__(self, module: Any) -> None:
            self.module = module

        def __getattr__(self, name: str) -> Any:
            value = getattr(self.module, name)
            return Recorder(value) if name.endswith("_kernel") else value

    for name, module in modules.items():
        setattr(ops, name, Recorders(module))
    ops._architecture = lambda device: architecture  # type: ignore[assignment]
    results = []
    code: dict[str, Code] = {}
    for count in job.counts:
        for base, delta in job.pairs:
            launched.clear()
            if delta in CODECS:
                launch_packed(ops, NAMES[base], BY_NAME[delta], count)
            else:
                launch_dense(ops, base, delta, count)
            for name, binary, arguments in launched:
                if binary.hash not in code:
                    code[binary.hash] = (
                        nvidia_code(binary.asm["cubin"])
                        if lanes == 32
                        else amd_code(binary.asm["amdgcn"])
                    )
                found = code[binary.hash]
                spills = [key for key in found.accesses if re.match("LDL|STL|scratch", key)]
                results.append(
                    Compiled(
                        architecture,
                        name,
                        count,
                        base,
                        delta,
                        binary.hash,
                        arguments.get("TILE", 0),
                        arguments.get("UNROLL", 0),
                        lanes * arguments["num_warps"],
                        found.registers,
                        found.stack + len(spills),
                        found.accesses,
                        found.loop,
                        products_32(binary.asm["ttir"]),
                        in_loops(binary.asm["ttgir"], "convert_layout"),
                        "cvt.rn.bf16" in binary.asm.get("ptx", ""),
                    )
                )
    return results


def launch_dense(ops: Any, base: str, delta: str, count: int) -> None:
    """Every operator on dense deltas; the bank's only where all dtypes are one."""
    from atlas_kernels.ops.layout import Layout

    coef = torch.zeros(count, 2)
    first, second = ("fp32", "bf16") if base == "mixed" else (base, base)
    third, fourth = ("fp16", "bf16") if base == "mixed" else (delta, delta)
    blocks = [torch.zeros(5000, dtype=NAMES[name]) for name in (first, second)]
    deltas = [torch.zeros(5000, dtype=NAMES[name]) for name in (third, fourth)] * count
    ops.compose(blocks, deltas, coef)
    ops.coef_grad(blocks, deltas, torch.float32)
    if base != "mixed":
        layout = Layout.from_shapes([(5000,), (5000,)])
        wide = torch.zeros(layout.numel, dtype=NAMES[base])
        stored = (torch.zeros(count * layout.numel, dtype=NAMES[delta]), None, 0)
        arena_compose(ops, wide, stored, coef, layout)
        arena_coef_grad(ops, wide, stored, layout, count)
        if "fp16" not in (base, delta):
            launch_groups(ops, layout, wide, stored, count)


def launch_packed(ops: Any, dtype: torch.dtype, codec: Any, count: int) -> None:
    """Both operators on packed deltas."""
    from atlas_kernels.ops.layout import Layout

    layout = Layout.from_shapes([(5000,), (5000,)], codec.alignment)
    wide = torch.zeros(layout.numel, dtype=dtype)
    words = torch.zeros(codec.items(count * layout.numel), dtype=torch.int32)
    scales = torch.zeros(codec.scales(count * layout.numel), dtype=torch.bfloat16)
    stored = (words, scales, codec.bits)
    arena_compose(ops, wide, stored, torch.zeros(count, 2), layout)
    arena_coef_grad(ops, wide, stored, layout, count)
    launch_groups(ops, layout, wide, stored, count)


def launch_groups(ops: Any, layout: Any, wide: Any, stored: Any, count: int) -> None:
    """Both operators on partitioned coefficients, with groups that are no power of two."""
    groups, keys = 80, torch.zeros_like(layout.tile_block)
    arena_compose(ops, wide, stored, torch.zeros(count, 2, groups), layout, keys)
    arena_coef_grad(ops, wide, stored, layout, count, keys, groups)


def module_from(path: Path) -> Any:
    """The module in a file: Triton reads the source of kernels from where they were defined."""
    # A member of the package of kernels, for the sake of its relative imports.
    name = f"atlas_kernels.ops.backends.triton.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def compiled_elsewhere(*jobs: Job) -> list[list[Compiled]]:
    """`compile_all` for every job, in a process where Triton compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    folders = [str(root), str(root / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    arguments = json.dumps([asdict(job) for job in jobs])
    run = subprocess.run(
        [sys.executable, __file__, arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    return [[Compiled(**entry) for entry in result] for result in results]


# ---- the checks: each takes one kernel, so that test_triton_broken.py can show that it fails -----


def check_spills(it: Compiled) -> None:
    assert it.spilled_bytes == 0, it
    family = "gfx" if it.architecture.startswith("gfx") else "sm"
    family = f"packed {family}" if it.kernel.startswith("packed") else family
    assert it.registers <= CEILING["mixed" if it.base == "mixed" else family], it


def check_widths(it: Compiled) -> None:
    """Tiles of the base, of every delta and of the output move 128 bits per access."""
    if it.base == "mixed" or it.delta in CODECS or it.kernel in ("sum_tiles_kernel", *PARTITION):
        return
    rows, rest = divmod(it.wide("load") - it.per_thread(it.base), it.per_thread(it.delta))
    # A compiler may unroll or peel the loop over vectors of a kernel that is not.
    assert rest == 0, it
    assert rows > 0, it
    assert rows == it.unroll or not it.unroll, it
    composes = it.kernel in ("arena_compose_kernel", "compose_kernel")
    assert it.wide("store") == (it.per_thread(it.base) if composes else 0), it
    if it.kernel.startswith("arena"):
        # Two offsets, a block, and a coefficient per vector.
        assert it.narrow("load") <= 3 + rows, it
        assert it.narrow("store") == (0 if composes else 1), it


def check_packed_widths(it: Compiled) -> None:
    """Words move 128 bits per access, the base and the output four elements."""
    if not it.kernel.startswith("packed"):
        return
    composes = it.kernel == "packed_compose_kernel"
    vectors = moving(it.loop, "load", 128) / words_per_vector(it)
    assert vectors == (it.unroll if composes else 4), it
    # Those, and one at a time what is left.
    vectors += vectors > 1
    words = vectors * words_per_vector(it)
    assert it.wide("load") - words == (HELD // 4 if it.base == "fp32" else 0), it
    bits = 32 * NAMES[it.base].itemsize
    assert moving(it.accesses, "store", bits) == (HELD // 4 if composes else 0), it
    # Two offsets, a block, and for every vector a scale and a coefficient.
    planes = moving(it.accesses, "load", bits) - (words if bits == 128 else 0)
    assert planes >= HELD // 4, it
    every = it.wide("load") + it.narrow("load")
    assert every <= words + HELD // 4 + 3 + 2 * vectors, it
    others = it.wide("store") + it.narrow("store") - (HELD // 4 if composes else 0)
    assert others == (0 if composes else vectors), it


def words_per_vector(it: Compiled) -> int:
    """128-bit loads in which a thread gets the codes of the elements it holds."""
    return 2 if it.delta in ("int3", "int8") else 1


def check_partition_widths(it: Compiled) -> None:
    """Only gathered coefficients and scales move less than 128 bits."""
    if it.kernel == "group_sum_kernel":
        assert it.wide("load") % 2 == 0, it
        assert it.wide("load") > 0, it
        # The first and the last chunk of a block.
        assert it.narrow("load") <= 2, it
    elif it.kernel in PARTITION:
        held = it.tile // it.threads
        vectors = tiles_in_loop(it)
        assert vectors == int(vectors) > 0, it
        composes = it.kernel == "group_compose_kernel"
        written = it.per_thread(it.base if composes else "fp32")
        assert it.wide("store") == written, it
        assert it.narrow("store") == 0, it
        gathers = held if composes else 0
        scales = 2 if it.delta in CODECS else 0
        # A compiler may peel what it unrolls; two offsets, a block or two chunks, a key.
        rows = it.wide("load") // wide_per_tile(it)
        assert it.narrow("load") <= rows * (gathers + scales) + 5, it


def tiles_in_loop(it: Compiled) -> float:
    """Of how many tiles, each of one vector, the loop loads the elements."""
    return moving(it.loop, "load", 128) / wide_per_tile(it)


def wide_per_tile(it: Compiled) -> int:
    """128-bit loads per thread and turn of a loop: of words once per element that they hold."""
    words = it.tile // it.threads // 4
    deltas = words * (1 + (it.delta == "int3")) if it.delta in CODECS else it.per_thread(it.delta)
    return deltas + (it.per_thread(it.base) if it.kernel == "group_partial_kernel" else 0)


def check_instructions(it: Compiled) -> None:
    """Decoding and hashing stay cheap."""
    if it.kernel in PARTITION[:2]:
        kind = (it.delta in CODECS) + (it.delta in CODECS and it.delta != "int3")
        most = PARTITIONED[it.kernel, it.architecture][kind] * it.tile / it.threads
        assert sum(it.loop.values()) <= most * tiles_in_loop(it), it
    if it.kernel.startswith("packed"):
        vectors = moving(it.loop, "load", 128) / words_per_vector(it)
        most = INSTRUCTIONS[it.kernel, it.architecture][CODECS.index(it.delta)]
        assert sum(it.loop.values()) <= most * HELD * vectors, it


def check_offsets(it: Compiled) -> None:
    """No product of the address arithmetic is computed in 32 bits: that wraps from 2^31 on."""
    assert it.products_32 == 0, it


def check_loops(it: Compiled) -> None:
    """No values change places between threads once per vector."""
    if it.base != "mixed":
        assert it.conversions_in_loops == 0, it


def check_rounding(it: Compiled) -> None:
    """Outputs in bfloat16 are rounded by the instruction for it, to nearest even."""
    if it.base == "bf16" and "compose" in it.kernel and it.architecture.startswith("sm"):
        assert it.rounds_to_nearest, it


CHECKS = (
    check_spills, check_widths, check_packed_widths, check_partition_widths, check_instructions,
    check_offsets, check_loops, check_rounding,
)  # fmt: skip


@pytest.fixture(scope="module")
def everything() -> dict[str, list[Compiled]]:
    # The binaries of neighbouring architectures differ little; the rare pairs are seen on one each.
    rare = {"sm_90": RARE_PAIRS, "gfx942": RARE_PAIRS}
    jobs = [Job(name, pairs=PAIRS + PACKED_PAIRS + rare.get(name, ())) for name in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        results = [result for (result,) in pool.map(compiled_elsewhere, jobs)]
    return dict(zip(ARCHITECTURES, results, strict=True))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_code(everything: dict[str, list[Compiled]], architecture: str, check: Any) -> None:
    kernels = everything[architecture]
    assert {it.kernel for it in kernels} == {
        "arena_compose_kernel", "arena_partial_kernel", "compose_kernel", "partial_kernel",
        "packed_compose_kernel", "packed_partial_kernel", "sum_tiles_kernel", *PARTITION,
    }  # fmt: skip
    for it in kernels:
        check(it)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_binary_for_many_vectors(
    everything: dict[str, list[Compiled]], architecture: str
) -> None:
    binaries: dict[tuple[str, str, str, int], set[str]] = {}
    for it in everything[architecture]:
        binaries.setdefault((it.kernel, it.base, it.delta, it.count), set()).add(it.hash)
    for (kernel, base, delta, _), hashes in binaries.items():
        assert len(hashes) == 1
        assert binaries[kernel, base, delta, 64] == binaries[kernel, base, delta, 21]
        if "compose" not in kernel or kernel.startswith(("packed", "group")):
            assert binaries[kernel, base, delta, 64] == binaries[kernel, base, delta, 1]


if __name__ == "__main__":
    wanted = [Job(**entry) for entry in json.loads(sys.argv[1])]
    print(json.dumps([[asdict(it) for it in compile_all(job)] for job in wanted]))
