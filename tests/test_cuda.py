"""The CUDA backend without a GPU.

Values, memory accesses and barriers: the product's own `.cu` files, compiled for the CPU by
`cuda_shim` under AddressSanitizer and UndefinedBehaviorSanitizer, thread by thread in both orders.
Machine code: nvcc's, for every architecture. Planted faults show that each check can fail.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from tolerances import compose_error, dot_error
from torch import Tensor

from atlas_kernels import reference
from atlas_kernels.backends import cuda
from atlas_kernels.codecs import CODECS
from atlas_kernels.codecs.packed import GROUP, Packed
from atlas_kernels.layout import TILE, Layout

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
SHIM = Path(__file__).parent / "cuda_shim"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of kernels.h
OPS = ("bank_compose", "bank_coef_grad", "compose", "coef_grad")
PACKED_OPS = ("packed_compose", "packed_coef_grad")
OP_NUMBERS = (*OPS, *PACKED_OPS)  # in the order of main.cpp
SIZES = (0, 1, 13, 16, TILE, TILE + 1, 2 * TILE + 37)


def constant(name: str) -> int:
    sources = (SOURCES / "kernels.h").read_text() + (SOURCES / "packed.cu").read_text()
    return int(re.search(rf"constexpr int {name} = (\d+);", sources)[1])


def cuda_include() -> Path | None:
    """The folder of the CUDA headers: nvcc's, or those that a CUDA build of PyTorch brings."""
    places = [Path(path) / "nvidia" / "cu13" / "include" for path in sys.path]
    if nvcc := shutil.which("nvcc"):
        shown = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        if top := re.search(r"TOP=(\S+)", shown):
            places.insert(0, Path(top[1]) / "include")
    return next((place for place in places if (place / "cuda_bf16.h").exists()), None)


def raw(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.flatten()).view(torch.uint8).numpy().tobytes()


def unraw(content: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0).to(dtype)
    )


@dataclass(frozen=True)
class Case:
    """One call in the list form and, where it has one, in the bank form.

    The base serves as the gradient, too. `skew` elements lie between a 16-byte boundary and every
    tensor's start; `far` elements, which do not exist, lie before the first one.
    """

    base: list[Tensor]
    deltas: list[list[Tensor | None]]
    coef: Tensor
    ops: tuple[str, ...] = OPS
    skew: int = 0
    far: int = 0
    layout: Layout = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "layout", Layout.from_shapes([(b.numel(),) for b in self.base]))

    @classmethod
    def random(cls, sizes, num_vectors, base_dtype, delta_dtype, **options) -> Case:
        def dtypes(given):
            while True:
                yield from given if isinstance(given, tuple) else (given,)

        base_dtypes, delta_dtypes = dtypes(base_dtype), dtypes(delta_dtype)
        base = [torch.randn(size).to(next(base_dtypes)) for size in sizes]
        deltas = [
            [(0.1 * torch.randn(size)).to(next(delta_dtypes)) for size in sizes]
            for _ in range(num_vectors)
        ]
        return cls(base, deltas, torch.randn(num_vectors, len(sizes)), **options)

    def encode(self, op: str) -> bytes:
        header = [OP_NUMBERS.index(op)]
        if op.startswith("bank"):
            delta_dtype = self.deltas[0][0].dtype if self.deltas else torch.float32
            lay, far = self.layout, self.far
            header += [DTYPES.index(self.base[0].dtype), DTYPES.index(delta_dtype), lay.numel]
            header += [len(lay.tile_block), len(self.base), len(self.deltas), self.skew, far]
            parts = [self.arena(self.base), self.interleaved(delta_dtype), lay.tile_block]
            parts += [lay.tile_offset + far, lay.block_tile, self.coef]
            return struct.pack(f"{len(header)}q", *header) + b"".join(map(raw, parts))
        header += [len(self.base), len(self.deltas), self.far]
        content = struct.pack(f"{len(header)}q", *header)
        absent = torch.empty(0)
        for tensor in [*self.base, *(delta for vector in self.deltas for delta in vector)]:
            tensor = absent if tensor is None else tensor
            content += struct.pack("3q", DTYPES.index(tensor.dtype), tensor.numel(), self.skew)
            content += raw(tensor)
        return content + raw(self.coef)

    def arena(self, blocks: list[Tensor]) -> Tensor:
        flat = torch.zeros(self.layout.numel, dtype=blocks[0].dtype)
        for start, block in zip(self.layout.offsets, blocks, strict=False):
            flat[start : start + block.numel()] = block
        return flat

    def interleaved(self, dtype: torch.dtype) -> Tensor:
        rows = [self.arena(vector) for vector in self.deltas]
        bounds = self.layout.tile_offset.tolist()
        chunks = [row[start:end] for start, end in pairwise(bounds) for row in rows]
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=dtype)

    def decode(self, op: str, content: memoryview) -> tuple[list[Tensor], int]:
        """The result as one tensor per block, composed or [N], and the bytes that it took."""
        if op.endswith("coef_grad"):
            size = 4 * self.coef.numel()
            values = unraw(content[:size], torch.float32).view(self.coef.shape)
            return list(values.T), size
        dtype = self.base[0].dtype
        if op == "bank_compose":
            size = self.layout.numel * dtype.itemsize
            flat = unraw(content[:size], dtype)
            assert flat.isfinite().all(), "padding must be written"
            return list(self.layout.split(flat)), size
        blocks, size = [], 0
        for block in self.base:
            end = size + block.numel() * block.itemsize
            blocks.append(unraw(content[size:end], block.dtype))
            size = end
        return blocks, size

    def check(self, op: str, result: list[Tensor]) -> None:
        """Every value against float64."""
        for b, (block, got) in enumerate(zip(self.base, result, strict=True)):
            present = [i for i, vector in enumerate(self.deltas) if vector[b] is not None]
            deltas = [self.deltas[i][b] for i in present]
            if op.endswith("compose"):
                coef = self.coef[present, b]
                exact = block.double()
                for c, delta in zip(coef.double(), deltas, strict=True):
                    exact = exact + c * delta.double()
                bound = compose_error(block, deltas, coef)
                assert ((got.double() - exact).abs() <= bound).all(), f"{op}, block {b}"
                continue
            for i, vector in enumerate(self.deltas):
                delta = torch.zeros_like(block) if vector[b] is None else vector[b]
                exact = (block.double() * delta.double()).sum().item()
                error = abs(got[i].item() - exact)
                assert error <= dot_error(block, delta), f"{op}, vector {i}, block {b}"


@dataclass(frozen=True)
class PackedCase:
    """One call of each operator for packed deltas, whose words are random: all codes occur.

    The blocks fill their padding. The base serves as the gradient, too. `far` is that of `Case`.
    """

    codec: Packed
    layout: Layout
    base: Tensor
    words: Tensor
    scales: Tensor
    coef: Tensor
    far: int = 0
    ops = PACKED_OPS

    @classmethod
    def random(cls, codec: Packed, sizes, num_vectors, dtype, far=0) -> PackedCase:
        lay = Layout.from_shapes([(size,) for size in sizes], codec.alignment)
        elements = num_vectors * lay.numel
        words = torch.randint(-(2**31), 2**31, (codec.items(elements),)).int()
        scales = torch.rand(codec.scales(elements)).add(0.5).bfloat16()
        coef = torch.randn(num_vectors, len(sizes))
        return cls(codec, lay, torch.randn(lay.numel).to(dtype), words, scales, coef, far)

    def encode(self, op: str) -> bytes:
        lay = self.layout
        header = [OP_NUMBERS.index(op), DTYPES.index(self.base.dtype), self.codec.bits, lay.numel]
        header += [len(lay.tile_block), len(lay.shapes), len(self.coef), self.far]
        parts = [self.base, self.words, self.scales, lay.tile_block, lay.tile_offset + self.far]
        parts += [lay.block_tile, self.coef]
        return struct.pack(f"{len(header)}q", *header) + b"".join(map(raw, parts))

    def decode(self, op: str, content: memoryview) -> tuple[list[Tensor], int]:
        """The result by block and the bytes that it took."""
        if op == "packed_coef_grad":
            size = 4 * self.coef.numel()
            return list(unraw(content[:size], torch.float32).view(self.coef.shape).T), size
        size = self.base.numel() * self.base.itemsize
        return self.blocks(unraw(content[:size], self.base.dtype)), size

    def blocks(self, arena: Tensor) -> list[Tensor]:
        return [arena[start:end] for start, end in pairwise(self.layout.offsets)]

    def delta(self, vector: int) -> Tensor:
        """Exact: an arena row in float64."""
        chosen = torch.zeros_like(self.coef, dtype=torch.float64)
        chosen[vector] = 1
        nothing = torch.zeros(self.layout.numel, dtype=torch.float64)
        tables = (self.layout.tile_block, self.layout.tile_offset)
        packed = (self.words, self.scales, self.codec.bits)
        return reference.packed_compose(nothing, *packed, chosen, *tables)

    def check(self, op: str, result: list[Tensor]) -> None:
        """Every value against float64."""
        rows = [self.blocks(self.delta(i)) for i in range(len(self.coef))]
        for b, (block, got) in enumerate(zip(self.blocks(self.base), result, strict=True)):
            deltas = [row[b] for row in rows]
            if op == "packed_compose":
                coef = self.coef[:, b]
                exact = block.double() + sum(
                    c * delta for c, delta in zip(coef.double(), deltas, strict=True)
                )
                bound = compose_error(block, deltas, coef)
                assert ((got.double() - exact).abs() <= bound).all(), f"{op}, block {b}"
                continue
            for i, delta in enumerate(deltas):
                exact = (block.double() * delta).sum().item()
                error = abs(got[i].item() - exact)
                assert error <= dot_error(block, delta), f"{op}, vector {i}, block {b}"


def with_absent(case: Case) -> Case:
    for i, vector in enumerate(case.deltas):
        for b in range(i % 3, len(vector), 3):
            vector[b] = None
    return case


def make_packed_cases() -> dict[str, PackedCase]:
    cases = {}
    packed = [codec for codec in CODECS.values() if isinstance(codec, Packed)]
    for codec, (num_vectors, dtype) in product(
        packed, [(1, torch.float32), (3, torch.bfloat16), (9, torch.float16), (0, torch.bfloat16)]
    ):
        # One unit, a short tile, an empty block, several tiles.
        sizes = (1, TILE - 3 * codec.alignment, 0, 2 * TILE + 37) if num_vectors < 9 else (TILE, 5)
        name = f"{codec.name}-{dtype}-{num_vectors}".replace("torch.", "")
        cases[name] = PackedCase.random(codec, sizes, num_vectors, dtype)
        if num_vectors == 1:
            shown = PackedCase.random(codec, sizes, 1, dtype)
            shown.base.zero_()
            shown.coef.fill_(1)
            cases[f"{codec.name}-shown"] = shown
            far = 2**30 + 512
            cases[f"{codec.name}-far"] = PackedCase.random(codec, (TILE + 5,), 3, dtype, far)
    cases["sign-three-groups"] = PackedCase.random(CODECS["sign"], (512,), 70, torch.float32)
    return cases


def make_cases() -> dict[str, Case | PackedCase]:
    torch.manual_seed(0)
    cases: dict[str, Case | PackedCase] = {}
    for base, delta in product(DTYPES, DTYPES):
        for num_vectors in (1, 8):
            name = f"{base}-{delta}-{num_vectors}".replace("torch.", "")
            sizes = SIZES if num_vectors == 1 else (TILE, TILE + 13)
            cases[name] = Case.random(sizes, num_vectors, base, delta)
    bf16, listed = torch.bfloat16, OPS[2:]
    cases["no-vectors"] = Case.random(SIZES, 0, bf16, bf16)
    cases["empty-blocks"] = Case.random((0, 0), 3, torch.float32, bf16)
    cases["full-tiles"] = Case.random((TILE, 2 * TILE), 3, torch.float32, bf16)
    cases["21-vectors"] = Case.random(SIZES, 21, torch.float32, bf16)
    cases["three-groups"] = Case.random((TILE, 17), 70, torch.float32, bf16)
    for dtype in DTYPES:
        cases[f"unaligned-{dtype}"] = Case.random((1, 7, TILE + 31), 3, dtype, dtype, skew=1)
    cases["unaligned-full"] = Case.random((TILE,), 1, torch.float32, bf16, skew=1)
    cases["mixed"] = with_absent(Case.random(SIZES, 7, DTYPES, DTYPES[::-1], ops=listed))
    cases["absent"] = with_absent(Case.random((31, 2 * TILE), 5, bf16, bf16, ops=listed))
    blocks = constant("kTableBlocks") + 9
    cases["many-blocks"] = Case.random([3, 0, 18] * (blocks // 3), 1, bf16, bf16, ops=listed)
    vectors = constant("kTableDeltas") + 9
    cases["many-vectors"] = Case.random((5,), vectors, bf16, bf16, ops=listed)
    far = {"far": 2**30 + 64, "ops": OPS[:2]}
    cases["far-bank"] = Case.random((TILE,), 3, torch.float32, bf16, **far)
    cases["far-list"] = Case.random((TILE + 5,), 1, bf16, bf16, far=2**31, ops=listed)
    return cases | make_packed_cases()


CASES = make_cases()


class Shim:
    """Builds and runs the kernels on the CPU; `substitutions` plant faults into a copy."""

    def __init__(self, folder: Path):
        self.folder = folder
        include = cuda_include()
        if include is None or shutil.which("g++") is None:
            pytest.skip("the CUDA headers (CUDA toolkit) and g++ are needed to compile the kernels")
        self.compiler = [
            *("g++", "-std=c++17", "-O0", "-g1", "-Wall", "-Wno-unknown-pragmas"),
            *("-fno-strict-aliasing", "-ffp-contract=off"),
            *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            *(f"-I{SOURCES}", f"-I{SHIM}", "-isystem", str(include)),
        ]

    def compile(self, name: str, source: Path, *options: str) -> Path:
        target = self.folder / f"{name}.o"
        command = [*self.compiler, *options, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        return target

    def compile_kernels(self, name: str, *substitutions: tuple[str, str]) -> list[Path]:
        texts = {path.name: path.read_text() for path in SOURCES.iterdir()}
        for old, new in substitutions:
            found = [file for file, text in texts.items() for _ in range(text.count(old))]
            assert len(found) == 1, f"the planted fault must have one place to go: {old}"
            texts[found[0]] = texts[found[0]].replace(old, new)
        copy = self.folder / f"{name}-sources"
        copy.mkdir()
        for file, text in texts.items():
            (copy / file).write_text(text)
        return [
            self.compile(f"{name}-{path.stem}", path, "-include", "shim.h", "-x", "c++")
            for path in sorted(copy.glob("*.cu"))
        ]

    def link(self, name: str, *objects: Path) -> Path:
        target = self.folder / name
        command = ["g++", "-fsanitize=address,undefined", *map(str, objects), "-o", str(target)]
        subprocess.run(command, check=True)
        return target

    def run(self, program: Path, cases: list[tuple[str, str]], order: str, tag: str = ""):
        """The process, and per (case, op) its result."""
        stem = self.folder / f"{program.name}-{order}{tag}"
        encoded = stem.with_suffix(".cases")
        encoded.write_bytes(b"".join(CASES[name].encode(op) for name, op in cases))
        out = stem.with_suffix(".results")
        done = subprocess.run(
            [program, encoded, out, order],
            capture_output=True,
            text=True,
            timeout=300,
        )
        results = {}
        if done.returncode == 0:
            content = memoryview(out.read_bytes())
            for name, op in cases:
                results[name, op], size = CASES[name].decode(op, content)
                content = content[size:]
            assert not content
        return done, results


FAULTY_MEMORY = (
    ("if (k < count) narrow(values[k], p + k);", "narrow(values[k], p + k);"),
    ("is_aligned(p)) {\n    load_wide", "true) {\n    load_wide"),
    ("bank.num_vectors * start", "static_cast<int32_t>(bank.num_vectors * start)"),
    (
        "static_cast<int64_t>(tile - table.first_tile[b]) * kTile",
        "(tile - table.first_tile[b]) * kTile",
    ),
)
# One fault for each number of bits, so that one copy shows all of them.
FAULTY_PACKED = (
    (
        "bank.num_vectors * at.start * kBits",
        "(kBits > 1 ? bank.num_vectors * at.start : int32_t(bank.num_vectors * at.start)) * kBits",
    ),
    ("at.exists ? sum", "at.exists || kBits == 2 ? sum"),
    ("high.load(unit + 2 * kColumns", "high.load(unit + kColumns"),
    ("return plane * kBits % 8;", "return (kBits == 4 ? plane ^ 1 : plane) * kBits % 8;"),
    ("at.start / kScaleGroup + at.group", "at.start / kScaleGroup + (kBits < 8 ? at.group : 0)"),
)
FAULTY_LOGIC = (
    ("    __syncthreads();\n", ""),
    (
        "coef + bank.tile_block[blockIdx.x];\n  const Dtype",
        "coef + bank.tile_block[0];\n  const Dtype",
    ),
    ("table.first_tile[middle] <= tile", "table.first_tile[middle] < tile"),
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    shim = Shim(tmp_path_factory.mktemp("cuda_shim"))
    with ThreadPoolExecutor() as pool:
        main = pool.submit(shim.compile, "main", SHIM / "main.cpp")
        kernels = {
            "product": pool.submit(shim.compile_kernels, "product"),
            "memory": pool.submit(shim.compile_kernels, "memory", *FAULTY_MEMORY),
            "logic": pool.submit(shim.compile_kernels, "logic", *FAULTY_LOGIC),
            "packed": pool.submit(shim.compile_kernels, "packed", *FAULTY_PACKED),
        }
    return shim, {
        name: shim.link(name, *kernel.result(), main.result()) for name, kernel in kernels.items()
    }


@pytest.fixture(scope="module")
def results(programs):
    """Of every case and operator: in both orders of threads, and once more."""
    shim, built = programs
    calls = [(name, op) for name, case in CASES.items() for op in case.ops]
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(shim.run, built["product"], calls, order, tag)
            for order, tag in (("forward", ""), ("reverse", ""), ("forward", "-again"))
        ]
    found = []
    for run in runs:
        done, values = run.result()
        assert done.returncode == 0, done.stderr
        found.append(values)
    return found


def bits(results: list[Tensor]) -> bytes:
    return b"".join(map(raw, results))


@pytest.mark.parametrize("name", CASES)
def test_values_equal_float64_within_rounding(results, name):
    for op in CASES[name].ops:
        CASES[name].check(op, results[0][name, op])


@pytest.mark.parametrize("name", CASES)
def test_bits_depend_neither_on_thread_order_nor_on_the_run(results, name):
    forward, reverse, again = results
    for op in CASES[name].ops:
        assert bits(forward[name, op]) == bits(reverse[name, op]) == bits(again[name, op])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ops == OPS])
def test_bank_and_list_give_the_same_bits(results, name):
    for op in OPS[2:]:
        assert bits(results[0][name, op]) == bits(results[0][name, f"bank_{op}"])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-shown")])
def test_every_code_decodes_exactly(results, name):
    case = CASES[name]
    decoded = case.codec.decode(case.words, case.scales)
    assert torch.equal(torch.cat(results[0][name, "packed_compose"]), decoded)


def test_tiles_and_groups_are_those_of_the_layout():
    assert constant("kTile") == TILE
    assert constant("kScaleGroup") == GROUP


MEMORY_REPORTS = {
    "dropped mask": ("float32-float32-1", "compose", r"heap-buffer-overflow.*\nWRITE"),
    "misaligned vector": ("unaligned-full", "compose", "misaligned .* requires 16 byte alignment"),
    "32-bit offset in a list": ("far-list", "compose", "signed integer overflow"),
    "32-bit offset in a bank": ("far-bank", "bank_compose", "SEGV|heap-buffer-overflow"),
}


@pytest.mark.parametrize("fault", MEMORY_REPORTS)
def test_a_faulty_memory_access_is_found(programs, fault):
    shim, built = programs
    case, op, report = MEMORY_REPORTS[fault]
    done, _ = shim.run(built["memory"], [(case, op)], "forward", f"-{case}-{op}")
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


@pytest.mark.parametrize("op", ["bank_coef_grad", "coef_grad"])
def test_a_missing_barrier_is_found(programs, op):
    shim, built = programs
    call = [("full-tiles", op)]
    done = [shim.run(built["logic"], call, order, f"-{op}") for order in ("forward", "reverse")]
    forward, reverse = (bits(values[call[0]]) for _, values in done)
    assert forward != reverse


@pytest.mark.parametrize("op", ["bank_compose", "compose"])
def test_a_wrong_tile_map_is_found(programs, op):
    shim, built = programs
    name = "full-tiles"
    done, values = shim.run(built["logic"], [(name, op)], "forward", f"-{op}")
    assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError):
        CASES[name].check(op, values[name, op])


def test_a_32_bit_offset_of_packed_deltas_is_found(programs):
    shim, built = programs
    done, _ = shim.run(built["packed"], [("sign-far", "packed_compose")], "forward")
    assert done.returncode != 0
    assert re.search("SEGV|heap-buffer-overflow", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("name", "op"),
    [
        pytest.param("int2-float32-1", "packed_coef_grad", id="threads beyond a short tile"),
        pytest.param("int3-float32-1", "packed_compose", id="wrong words of the third bit"),
        pytest.param("int4-float32-1", "packed_compose", id="wrong shift of a plane"),
        pytest.param("int8-float32-1", "packed_compose", id="wrong group of a scale"),
    ],
)
def test_a_faulty_decoding_is_found(programs, name, op):
    shim, built = programs
    done, values = shim.run(built["packed"], [(name, op)], "forward", f"-{name}")
    assert done.returncode == 0, done.stderr
    with pytest.raises(AssertionError, match=op):
        CASES[name].check(op, values[name, op])


def test_a_barrier_that_some_threads_miss_is_found(tmp_path):
    shim = Shim(tmp_path)
    source = tmp_path / "divergent.cu"
    source.write_text(
        "#include <cuda_runtime.h>\n"
        "__global__ void kernel() { if (threadIdx.x != 5) __syncthreads(); }\n"
        "int main() {\n"
        "  cudaLaunchConfig_t config = {};\n"
        "  config.gridDim = config.blockDim = dim3(32);\n"
        "  return cudaLaunchKernelEx(&config, kernel);\n"
        "}\n"
    )
    compiled = shim.compile("divergent", source, "-include", "shim.h", "-x", "c++")
    done = subprocess.run([shim.link("divergent", compiled)], capture_output=True, text=True)
    assert done.returncode == 3
    assert "threads wait at a barrier that others never reach" in done.stderr


@dataclass(frozen=True)
class Binary:
    """The extension as `setup.py` builds it, and what the assembler said about its kernels."""

    path: Path
    log: str
    machine_code: str


ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = 26
# 768 threads share the 65,536 registers of a multiprocessor, handed out in eights.
MAX_REGISTERS = 80


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc (CUDA toolkit) is needed to compile the extension")
    if torch.version.cuda is None:
        pytest.skip("the CUDA extension links against a CUDA build of PyTorch; this is a CPU build")
    folder = tmp_path_factory.mktemp("extension")
    command = [sys.executable, "setup.py", "build_ext", "-b", folder, "-t", folder / "temporary"]
    environment = {**os.environ, "ATLAS_KERNELS_CPP": "0", "ATLAS_KERNELS_CUDA": "1"}
    environment["NVCC_APPEND_FLAGS"] = "-Xptxas=-v"
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    path = folder / "atlas_kernels" / "_cuda.abi3.so"
    shown = subprocess.run([cuobjdump(), "-sass", path], capture_output=True, text=True, check=True)
    return Binary(path, log, shown.stdout)


def cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="cuobjdump is not installed")
    return str(Path(nvidia.__path__[0]) / "bin" / "cuobjdump")


def kernels_of(machine_code: str) -> dict[tuple[str, str], list[str]]:
    """Instructions by architecture and (mangled) kernel name."""
    found: dict[tuple[str, str], list[str]] = {}
    architecture, instructions = "", []
    for line in machine_code.splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            instructions = found.setdefault((architecture, match[1]), [])
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(match[1])
    return found


def test_registers_suffice(binary):
    pattern = r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, "
    pattern += r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    reports = re.findall(pattern, binary.log, re.DOTALL)
    assert {report[1] for report in reports} == set(ARCHITECTURES)
    assert len(reports) == KERNELS * len(ARCHITECTURES)
    for name, architecture, stack, stores, loads, registers in reports:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills on {architecture}"
        assert int(registers) <= MAX_REGISTERS, f"{name} takes {registers} on {architecture}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_tiles_move_16_bytes_per_access(binary, architecture):
    kernels = {
        name: code
        for (target, name), code in kernels_of(binary.machine_code).items()
        if target == architecture
    }
    assert len(kernels) == KERNELS
    for name, code in kernels.items():
        assert not any(re.search(r"\b(LDL|STL)\b", line) for line in code), f"{name} spills"
        if "total_kernel" in name:
            continue
        # Only bulk loads carry the evict-first hint (EF), so none of them may be narrow.
        loads = [line for line in code if "LDG.E.EF" in line]
        assert loads, f"{name} streams nothing"
        if "packed" in name:
            # Eight planes of four elements: 16 bytes of float32, 8 of either 16-bit dtype.
            assert sum("EF.64" in line for line in loads) == 2 * 8, f"{name} loads"
            assert sum("EF.128" in line for line in loads) == len(loads) - 2 * 8, f"{name} loads"
            assert sum("STG.E.128" in line for line in code) == ("compose" in name) * 8
            assert sum("STG.E.64" in line for line in code) == ("compose" in name) * 2 * 8
            continue
        assert all(".128" in line for line in loads), f"{name} has a narrow bulk load"
        if "compose" in name:
            # Two passes of 8 elements: four stores of float32, two of either 16-bit dtype.
            wide = sum("STG.E.128" in line for line in code)
            assert wide >= 8, f"{name} has only {wide} wide stores"


def test_several_vectors_are_in_flight(binary):
    """The loop over vectors asks for at least 96 bytes of deltas before it uses any of them.

    On 768 threads that is 72 KB per multiprocessor. Bandwidth times latency asks for less: 8 TB/s
    for 0.8 us on 148 multiprocessors (B200) is 43 KB.
    """
    for (architecture, name), code in kernels_of(binary.machine_code).items():
        if "total_kernel" in name or "Lb0E" in name or "packed" in name:
            continue
        most = flight = 0
        for line in code:
            if "LDG.E.EF.128" in line:
                flight += 1
                most = max(most, flight)
            elif re.search(r"\b(FFMA|BRA)\b", line):
                flight = 0
        assert 16 * most >= 96, f"{name} on {architecture}: {16 * most} bytes"


def loop_over_vectors(code: list[str]) -> list[str]:
    """The innermost loop that streams words."""
    loops = []
    for end, line in enumerate(code):
        # An instruction takes 16 bytes.
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", line)
        if target and int(target[1], 16) // 16 < end:
            body = code[int(target[1], 16) // 16 : end + 1]
            if any("LDG.E.EF.128" in line for line in body):
                loops.append(body)
    return min(loops, key=len)


# Per element and vector, of the forward and the backward. One instruction selects a byte, that is
# 8 / bits elements; then each is masked (but for eight bits), moved to its level and multiplied and
# added; three bits take two fields and one instruction to join them. That makes 3.0 to 3.5, or 6.4;
# the rest is addresses, scales, sums over threads and the loop itself.
MAX_INSTRUCTIONS = {8: (3.9, 4.6), 4: (4.5, 5.0), 3: (7.5, 8.3), 2: (4.2, 4.7), 1: (4.0, 4.6)}


def test_decoding_is_cheap_and_prefetched(binary):
    """Two loads of words come before the first use of one."""
    checked = 0
    for (architecture, name), code in kernels_of(binary.machine_code).items():
        packed = re.search(r"packed_(compose|partials)_kernelILi(\d)E", name)
        if not packed:
            continue
        loop, width = loop_over_vectors(code), int(packed[2])
        loads = [k for k, line in enumerate(loop) if "LDG.E.EF.128" in line]
        first_use = next(k for k, line in enumerate(loop) if "FFMA" in line)
        assert sum(k < first_use for k in loads) >= 2, f"{name} on {architecture}"
        vectors = len(loads) // (2 if width in (3, 8) else 1)
        # A thread has 32 elements of a tile.
        instructions = len(loop) / (32 * vectors)
        ceiling = MAX_INSTRUCTIONS[width][packed[1] == "partials"]
        assert instructions <= ceiling, f"{name} on {architecture}: {instructions}"
        checked += 1
    assert checked == 2 * len(MAX_INSTRUCTIONS) * len(ARCHITECTURES)


def test_ptx_is_there_for_newer_devices(binary):
    shown = subprocess.run(
        [cuobjdump(), "-lptx", binary.path], capture_output=True, text=True, check=True
    )
    assert "sm_100" in shown.stdout


def test_the_extension_loads_and_implements_every_operator(binary):
    code = (
        "import torch; from atlas_kernels import ops\n"
        f"torch.ops.load_library({str(binary.path)!r})\n"
        "for name in ops.SCHEMAS:\n"
        "    qualified = f'{ops.namespace(\"cuda\")}::{name}'\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(qualified, 'CUDA'), name\n"
        "    assert not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, 'CPU'), name\n"
    )
    # In a process of its own: what is registered once stays.
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_not_built(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "_BINARY", tmp_path / "_cuda.abi3.so")
    reason = cuda.unavailable()
    assert reason.startswith("the CUDA extension is not built")
    assert "ATLAS_KERNELS_CUDA=1 pip install" in reason


@pytest.fixture
def broken_binary(monkeypatch, tmp_path):
    path = tmp_path / "_cuda.abi3.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(cuda, "_BINARY", path)
    cuda._load.cache_clear()
    yield
    cuda._load.cache_clear()


def test_built_but_pytorch_without_cuda(monkeypatch, broken_binary):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in cuda.unavailable()


def test_built_but_no_gpu(monkeypatch, broken_binary):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in cuda.unavailable()


def test_does_not_load(monkeypatch, broken_binary):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = cuda.unavailable()
    assert "does not load" in reason
    assert re.search("file too short|invalid ELF", reason), "the loader's own words"
