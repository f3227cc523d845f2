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
from arena import arena_coef_grad, arena_compose
from tolerances import compose_error, dot_error, dot_errors
from torch import Tensor

from atlas_kernels.ops import reference
from atlas_kernels.ops.backends import cuda
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.codecs.packed import GROUP, Packed
from atlas_kernels.ops.groups import group_of, slots
from atlas_kernels.ops.layout import CHUNK_TILES, TILE, Layout

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
SHIM = Path(__file__).parent / "cuda_shim"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of kernels.h
OPS = ("arena_compose", "arena_coef_grad", "compose", "coef_grad")
PACKED_OPS = ("packed_compose", "packed_coef_grad")
PARTITION_OPS = ("group_compose", "group_coef_grad")
OP_NUMBERS = (*OPS, *PACKED_OPS, *PARTITION_OPS)  # in the order of main.cpp
SIZES = (0, 1, 13, 16, TILE, TILE + 1, 2 * TILE + 37)


def constant(name: str) -> int:
    sources = (SOURCES / "kernels.h").read_text() + (SOURCES / "packed.cuh").read_text()
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
        if op.startswith("arena"):
            lay, far = self.layout, self.far
            header += [DTYPES.index(self.base[0].dtype), DTYPES.index(self.delta_dtype), lay.numel]
            header += [len(lay.tile_block), len(self.base), len(self.deltas), self.skew, far]
            parts = [self.arena(self.base), self.interleaved(), lay.tile_block]
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

    @property
    def delta_dtype(self) -> torch.dtype:
        return self.deltas[0][0].dtype if self.deltas else torch.float32

    def arena(self, blocks: list[Tensor]) -> Tensor:
        flat = torch.zeros(self.layout.numel, dtype=blocks[0].dtype)
        for start, block in zip(self.layout.offsets, blocks, strict=False):
            flat[start : start + block.numel()] = block
        return flat

    def interleaved(self) -> Tensor:
        rows = [self.arena(vector) for vector in self.deltas]
        bounds = self.layout.tile_offset.tolist()
        chunks = [row[start:end] for start, end in pairwise(bounds) for row in rows]
        return torch.cat(chunks) if chunks else torch.empty(0, dtype=self.delta_dtype)

    def decode(self, op: str, content: memoryview) -> tuple[list[Tensor], int]:
        """The result as one tensor per block, composed or [N], and the bytes that it took."""
        if op.endswith("coef_grad"):
            size = 4 * self.coef.numel()
            values = unraw(content[:size], torch.float32).view(self.coef.shape)
            return list(values.T), size
        dtype = self.base[0].dtype
        if op == "arena_compose":
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
        packed = (self.words, self.scales, self.codec.bits)
        return arena_compose(reference, nothing, packed, chosen, self.layout)

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


@dataclass(frozen=True)
class PartitionCase:
    """The tensors of another case in the bank form, with a coefficient per group of elements.

    Tiles have random keys.
    """

    plain: Case | PackedCase
    coef: Tensor
    tile_key: Tensor
    ops = PARTITION_OPS

    @classmethod
    def random(cls, plain: Case | PackedCase, groups: int) -> PartitionCase:
        # One group has the coefficients of the other case.
        coef = torch.randn(*plain.coef.shape, groups) if groups > 1 else plain.coef.unsqueeze(2)
        tile_key = torch.randint(-(2**31), 2**31, (len(plain.layout.tile_block),)).int()
        return cls(plain, coef, tile_key)

    @property
    def base(self) -> Tensor:
        return self.arena(self.plain.base)

    def arena(self, blocks: Tensor | list[Tensor]) -> Tensor:
        if isinstance(self.plain, Case):
            return self.plain.arena(blocks)
        return torch.cat(blocks) if isinstance(blocks, list) else blocks

    def stored(self) -> tuple[Tensor, Tensor | None, int]:
        """Deltas, scales and bits."""
        plain = self.plain
        if isinstance(plain, PackedCase):
            return plain.words, plain.scales, plain.codec.bits
        return plain.interleaved(), None, 0

    def encode(self, op: str) -> bytes:
        lay, far = self.plain.layout, self.plain.far
        deltas, scales, bits = self.stored()
        header = [OP_NUMBERS.index(op), DTYPES.index(self.base.dtype)]
        header += [0 if bits else DTYPES.index(deltas.dtype), bits, lay.numel]
        header += [len(self.tile_key), len(lay.shapes), len(self.coef), len(lay.chunk_tile) - 1]
        header += [self.coef.shape[2], getattr(self.plain, "skew", 0), far]
        parts = [self.base, deltas, torch.empty(0) if scales is None else scales]
        parts += [lay.tile_block, lay.tile_offset + far, lay.block_tile, self.coef]
        parts += [self.tile_key, lay.chunk_tile, lay.block_chunk]
        return struct.pack(f"{len(header)}q", *header) + b"".join(map(raw, parts))

    def decode(self, op: str, content: memoryview) -> tuple[list[Tensor], int]:
        """What is composed, as the other case has it, or the gradient; and the bytes it took."""
        if op == "group_compose":
            packed = isinstance(self.plain, PackedCase)
            return self.plain.decode("packed_compose" if packed else "arena_compose", content)
        size = 4 * self.coef.numel()
        return [unraw(content[:size], torch.float32).view(self.coef.shape)], size

    def slots(self) -> Tensor:
        """Of every element of an arena row."""
        lengths = self.plain.layout.tile_offset.diff().tolist()
        found = slots(self.tile_key, TILE)
        return torch.cat(
            [row[:n] for row, n in zip(found, lengths, strict=True)] or [found.flatten()]
        )

    def composed(self, base: Tensor, coef: Tensor) -> Tensor:
        """By the reference, in float64."""
        arguments = (base.double(), self.stored(), coef.double(), self.plain.layout, self.tile_key)
        return arena_compose(reference, *arguments)

    def check(self, op: str, result: list[Tensor]) -> None:
        """Every value against the reference in float64."""
        num_vectors, num_blocks, groups = self.coef.shape
        lay, base = self.plain.layout, self.base
        lengths = torch.tensor(lay.offsets).diff()
        block = torch.repeat_interleave(torch.arange(num_blocks), lengths)
        index = block * groups + group_of(self.slots(), groups)
        units = torch.eye(num_vectors).view(num_vectors, num_vectors, 1, 1)
        deltas = [
            self.composed(torch.zeros(lay.numel), unit.expand(-1, num_blocks, 1)) for unit in units
        ]
        if op == "group_compose":
            bound = compose_error(base, deltas, self.coef.flatten(1)[:, index])
            error = self.arena(result).double() - self.composed(base, self.coef)
            assert (error.abs() <= bound).all(), op
            return
        arguments = (self.stored(), lay, num_vectors, self.tile_key, groups, torch.float64)
        exact = arena_coef_grad(reference, base.double(), *arguments)
        for i, delta in enumerate(deltas):
            bound = dot_errors(base.double() * delta, index, num_blocks * groups)
            error = (result[0][i].double() - exact[i]).abs().flatten()
            assert (error <= bound).all(), f"{op}, vector {i}"


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


GROUPS = (1, 5, 80, 1200, TILE)


def make_partition_cases(others: dict[str, Case | PackedCase]) -> dict[str, PartitionCase]:
    packed = [codec.name for codec in CODECS.values() if isinstance(codec, Packed)]
    names = ["float32-float32-1", "bfloat16-float16-1", "float16-bfloat16-1"]
    names += [f"{name}-bfloat16-3" for name in packed]
    chosen = list(product(names, GROUPS))
    chosen += [("full-tiles", 5), ("21-vectors", 80), ("no-vectors", 5), ("empty-blocks", 5)]
    chosen += [(f"unaligned-{dtype}", 5) for dtype in DTYPES] + [("unaligned-full", 5)]
    chosen += [("far-bank", 5), ("sign-far", 5), ("sign-float16-9", 80)]
    cases = {
        f"{name}-in-{groups}": PartitionCase.random(others[name], groups) for name, groups in chosen
    }
    # Two chunks, the second one short.
    size, bf16 = (CHUNK_TILES + 1) * TILE + 13, torch.bfloat16
    chunks = Case.random((5, size), 1, torch.float32, bf16)
    cases |= {f"chunks-in-{groups}": PartitionCase.random(chunks, groups) for groups in (1, 80)}
    chunks = PackedCase.random(CODECS["sign"], (size,), 1, bf16)
    cases |= {
        f"sign-chunks-in-{groups}": PartitionCase.random(chunks, groups) for groups in (5, 80)
    }
    shown = {name: others[name] for name in others if name.endswith("-shown")}
    for dtype in DTYPES:
        base = [torch.zeros(size) for size in (2 * TILE + 13, 5)]
        deltas = [[torch.ones(len(block)).to(dtype) for block in base]]
        shown[f"{dtype}-shown".replace("torch.", "")] = Case(base, deltas, torch.ones(1, 2))
    for name, case in shown.items():
        parted = PartitionCase.random(case, TILE)
        parted.coef[:] = torch.arange(1, TILE + 1)
        cases[f"{name}-slots"] = parted
    return cases


def make_cases() -> dict[str, Case | PackedCase | PartitionCase]:
    torch.manual_seed(0)
    cases: dict[str, Case | PackedCase | PartitionCase] = {}
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
    cases |= make_packed_cases()
    return cases | make_partition_cases(cases)


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
        """The objects; of kernels that have no planted fault, those of the product."""
        texts = {path.name: path.read_text() for path in SOURCES.iterdir()}
        changed = set()
        for old, new in substitutions:
            found = [file for file, text in texts.items() for _ in range(text.count(old))]
            assert len(found) == 1, f"the planted fault must have one place to go: {old}"
            texts[found[0]] = texts[found[0]].replace(old, new)
            changed.add(found[0])

        def is_changed(file: str) -> bool:
            headers = re.findall(r'#include "(\w+\.cuh)"', texts[file])
            return file in changed or any(map(is_changed, headers))

        copy = self.folder / f"{name}-sources"
        copy.mkdir()
        for file, text in texts.items():
            (copy / file).write_text(text)
        return [
            self.compile(f"{name}-{path.stem}", path, "-include", "shim.h", "-x", "c++")
            if name == "product" or is_changed(path.name)
            else self.folder / f"product-{path.stem}.o"
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
# Each shows with one kind of deltas or one number of groups.
FAULTY_PARTITION = (
    (
        "    __syncthreads();\n    add(",
        "    if (tile % 64 == 0 || groups.num_groups != 5) __syncthreads();\n    add(",
    ),
    ("  __syncthreads();\n  for", "  if (groups.num_groups != 80) __syncthreads();\n  for"),
    ("tile < end; ++tile", "tile < end - (groups.num_groups == 4096); ++tile"),
    (
        "(group + 1) * kTile + num_groups - 1",
        "(group + 1) * kTile + (num_groups == 1200 ? 0 : num_groups - 1)",
    ),
    ("found[pass][k] = slots(first + k)", "found[pass][k] = slots(first + (k ^ 1))"),
    ("    first_ += stride_;\n", ""),
)
FAULTY_LOGIC = (
    ("    __syncthreads();\n    const int i", "    const int i"),
    (
        "bank.tile_block[blockIdx.x], bank.num_blocks};\n  const Dtype",
        "bank.tile_block[0], bank.num_blocks};\n  const Dtype",
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
            "groups": pool.submit(shim.compile_kernels, "groups", *FAULTY_PARTITION),
        }
    # The product's objects are complete by now.
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
        assert bits(results[0][name, op]) == bits(results[0][name, f"arena_{op}"])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-shown")])
def test_every_code_decodes_exactly(results, name):
    case = CASES[name]
    decoded = case.codec.decode(case.words, case.scales)
    assert torch.equal(torch.cat(results[0][name, "packed_compose"]), decoded)


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-in-1")])
def test_one_group_is_composed_as_a_block_is(results, name):
    plain = name.removesuffix("-in-1")
    if plain in CASES:
        op = "packed_compose" if isinstance(CASES[plain], PackedCase) else "arena_compose"
        assert bits(results[0][name, "group_compose"]) == bits(results[0][plain, op])


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-slots")])
def test_slots_are_those_of_the_partition(results, name):
    """A coefficient is its slot's number, from one: whatever the delta, that is found again."""
    case = CASES[name]
    delta = case.composed(case.base, torch.ones_like(case.coef))
    composed = case.arena(results[0][name, "group_compose"])
    inside = delta != 0
    assert inside.sum() >= TILE
    found = (composed / delta).round().long() - 1
    assert torch.equal(found[inside], case.slots()[inside])


def test_tiles_and_groups_are_those_of_the_layout():
    assert constant("kTile") == TILE
    assert constant("kScaleGroup") == GROUP


MEMORY_REPORTS = {
    "dropped mask": ("float32-float32-1", "compose", r"heap-buffer-overflow.*\nWRITE"),
    "misaligned vector": ("unaligned-full", "compose", "misaligned .* requires 16 byte alignment"),
    "32-bit offset in a list": ("far-list", "compose", "signed integer overflow"),
    "32-bit offset in a bank": ("far-bank", "arena_compose", "SEGV|heap-buffer-overflow"),
    "32-bit offset and groups": (
        "far-bank-in-5",
        "group_coef_grad",
        "SEGV|heap-buffer-overflow",
    ),
}


@pytest.mark.parametrize("fault", MEMORY_REPORTS)
def test_a_faulty_memory_access_is_found(programs, fault):
    shim, built = programs
    case, op, report = MEMORY_REPORTS[fault]
    done, _ = shim.run(built["memory"], [(case, op)], "forward", f"-{case}-{op}")
    assert done.returncode != 0
    assert re.search(report, done.stderr), done.stderr


@pytest.mark.parametrize("op", ["arena_coef_grad", "coef_grad"])
def test_a_missing_barrier_is_found(programs, op):
    shim, built = programs
    call = [("full-tiles", op)]
    done = [shim.run(built["logic"], call, order, f"-{op}") for order in ("forward", "reverse")]
    forward, reverse = (bits(values[call[0]]) for _, values in done)
    assert forward != reverse


@pytest.mark.parametrize("op", ["arena_compose", "compose"])
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


def test_a_missing_barrier_between_tiles_is_found(programs):
    """The order of sums, and nothing else, then depends on that of threads."""
    shim, built = programs
    name, op = call = "sign-chunks-in-5", "group_coef_grad"
    done = [
        shim.run(built["groups"], [call], order, f"-{name}") for order in ("forward", "reverse")
    ]
    forward, reverse = (values[call] for _, values in done)
    CASES[name].check(op, forward)
    assert bits(forward) != bits(reverse)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        pytest.param("sign-chunks-in-80", "group_coef_grad", id="no barrier before groups"),
        pytest.param("int8-bfloat16-3-in-4096", "group_coef_grad", id="dropped tail"),
        pytest.param("int8-bfloat16-3-in-1200", "group_coef_grad", id="wrong bounds of a group"),
        pytest.param("bfloat16-shown-slots", "group_compose", id="wrong slots"),
        pytest.param("float32-float32-1-in-5", "group_coef_grad", id="wrong slots of a gradient"),
        pytest.param("int4-bfloat16-3-in-5", "group_compose", id="coefficients of another vector"),
    ],
)
def test_a_faulty_partition_is_found(programs, name, op):
    shim, built = programs
    done, values = shim.run(built["groups"], [(name, op)], "forward", f"-{name}-{op}")
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
    """The extension as `setup.py` builds it, and what it says about its kernels."""

    path: Path
    usage: str
    machine_code: str


ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
KERNELS = 43


def max_registers(kernel: str) -> int:
    """As many as let 768 threads share the 65,536 of a multiprocessor, handed out in eights.

    Or 512 threads, where each remembers the groups or slots of 32 elements.
    """
    return 128 if "packed_group" in kernel else 80


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc (CUDA toolkit) is needed to compile the extension")
    if torch.version.cuda is None:
        pytest.skip("the CUDA extension links against a CUDA build of PyTorch; this is a CPU build")
    path = cuda.EXTENSION.path
    if not is_current(path):
        path = build(tmp_path_factory.mktemp("extension"))
    usage, code = (
        subprocess.run([cuobjdump(), shown, path], capture_output=True, text=True, check=True)
        for shown in ("-res-usage", "-sass")
    )
    return Binary(path, usage.stdout, code.stdout)


def is_current(path: Path) -> bool:
    """Whether the installed extension is what `setup.py` would build now."""
    if not path.exists() or "TORCH_CUDA_ARCH_LIST" in os.environ:
        return False
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    return path.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def build(folder: Path) -> Path:
    command = [sys.executable, "setup.py", "build_ext", "-b", folder, "-t", folder / "temporary"]
    environment = {**os.environ, "ATLAS_KERNELS_CPP": "0", "ATLAS_KERNELS_CUDA": "1"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "atlas_kernels/ops/backends" / "_cuda.abi3.so"


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
    reports = [
        (architecture, *report)
        for architecture, kernels in re.findall(
            r"arch = (sm_\d+)\n(.*?)(?=\nFatbin|\Z)", binary.usage, re.DOTALL
        )
        for report in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", kernels)
    ]
    assert {report[0] for report in reports} == set(ARCHITECTURES)
    assert len(reports) == KERNELS * len(ARCHITECTURES)
    for architecture, name, registers, stack, local in reports:
        # Spilled registers lie on the stack; that nothing loads or stores there is shown below.
        assert (stack, local) == ("0", "0"), f"{name} spills on {architecture}"
        assert int(registers) <= max_registers(name), f"{name} takes {registers} on {architecture}"


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
        assert not any(re.search(r"\b(ATOM|RED)", line) for line in code), f"{name} has atomics"
        # Coefficients of groups are gathered through the read-only path, nothing else is.
        gathers = any("LDG.E.CONSTANT" in line for line in code)
        assert gathers == ("group_compose" in name), f"{name} gathers"
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
        if re.search("total_kernel|Lb0E|packed|group", name):
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
    """The innermost loop that streams deltas."""
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


# The same where every element has its group's coefficient: a 64-bit address and a load more. Packed
# deltas are multiplied by the coefficient and the scale as well.
MAX_GATHERING = {8: 9.7, 4: 8.6, 3: 12.2, 2: 8.4, 1: 8.4}


def test_gathering_is_cheap(binary):
    checked = 0
    for (architecture, name), code in kernels_of(binary.machine_code).items():
        packed = re.search(r"packed_group_compose_kernelILi(\d)E", name)
        if not packed:
            continue
        loop = loop_over_vectors(code)
        gathers = sum("LDG.E.CONSTANT" in line for line in loop)
        assert gathers in (32, 64), "one for each of a thread's elements, of one or two vectors"
        ceiling = MAX_GATHERING[int(packed[1])]
        assert len(loop) / gathers <= ceiling, f"{name} on {architecture}: {len(loop) / gathers}"
        checked += 1
    assert checked == len(MAX_GATHERING) * len(ARCHITECTURES)


def test_ptx_is_there_for_newer_devices(binary):
    shown = subprocess.run(
        [cuobjdump(), "-lptx", binary.path], capture_output=True, text=True, check=True
    )
    assert "sm_100" in shown.stdout


def test_the_extension_loads_and_implements_every_operator(binary):
    code = (
        "import torch; from atlas_kernels.ops import schema as ops\n"
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
    monkeypatch.setattr(cuda.EXTENSION, "path", tmp_path / "_cuda.abi3.so")
    reason = cuda.unavailable()
    assert reason.startswith("the CUDA extension is not built")
    assert "ATLAS_KERNELS_CUDA=1 pip install" in reason


@pytest.fixture
def broken_binary(monkeypatch, tmp_path):
    path = tmp_path / "_cuda.abi3.so"
    path.write_bytes(b"not a library")
    monkeypatch.setattr(cuda.EXTENSION, "path", path)


def test_built_but_pytorch_without_cuda(monkeypatch, broken_binary):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "a build without CUDA" in cuda.unavailable()


def test_built_but_no_gpu(monkeypatch, broken_binary):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no GPU" in cuda.unavailable()


def test_built_for_other_gpus(monkeypatch, broken_binary):
    class Library:
        def atlas_kernels_cuda_error():
            return b"no kernel image is available for execution on the device"

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda path: Library)
    reason = cuda.unavailable()
    assert "does not run on NVIDIA T4" in reason
    assert "no kernel image is available" in reason
    assert "TORCH_CUDA_ARCH_LIST" in reason


def test_does_not_load(monkeypatch, broken_binary):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = cuda.unavailable()
    assert "does not load" in reason
    assert re.search("file too short|invalid ELF", reason), "the loader's own words"
