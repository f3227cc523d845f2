"""Inputs of the operator tests: every shape, memory form and dtype that a caller may bring."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import on_gpu
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atlas_kernels.ops.layout import TILE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("plain", "offset", "sliced", "transposed", "expanded")
# Backends that run on CPU tensors; triton does so in its interpreter, at 2-5 ms per program.
CPU_BACKENDS = ("torch", "cpp", *(on_gpu.BACKENDS if on_gpu.ENABLED else ("triton",)))
# Those whose time per element makes tests small, and those that may fuse a product and a sum.
INTERPRETED = () if on_gpu.ENABLED else ("triton",)
FUSED = ("triton", "cuda")
EXAMPLES = {"torch": 60, "cpp": 120, "triton": 40 if on_gpu.ENABLED else 8, "cuda": 120}

Shape = tuple[int, ...]


def need(backend: str) -> None:
    """Skips the test if a backend cannot run on CPU tensors here; "torch" always must."""
    name = f"atlas_kernels.ops.backends.{backend}"
    if importlib.util.find_spec(name) is None:
        reason: str | None = f"{name} does not exist"
    else:
        module = importlib.import_module(name)
        reason = module.unavailable()
        if reason is None and "cpu" not in (module.devices() or ("cpu",)):
            reason = f"backend {backend!r} does not run on the CPU"
    if reason is not None:
        # A CI that lost its extension must not stay green by skipping.
        required = os.environ.get("ATLAS_KERNELS_REQUIRED_BACKENDS", "torch").split(",")
        (pytest.fail if backend == "torch" or backend in required else pytest.skip)(reason)


def on_each_backend(test: Callable[..., None]) -> Any:
    """Runs a test that takes `backend` once for each backend that runs on CPU tensors here."""

    @functools.wraps(test)
    def wrapped(*args: Any, backend: str, **kwargs: Any) -> None:
        need(backend)
        test(*args, backend=backend, **kwargs)

    return pytest.mark.parametrize("backend", CPU_BACKENDS)(wrapped)


def for_examples(
    backend: str, *strategies: st.SearchStrategy[Any], divide: int = 1
) -> Callable[[Callable[..., None]], None]:
    """Runs the decorated function on examples at once, as many as the backend's speed allows."""

    def run(check: Callable[..., None]) -> None:
        count = max(1, EXAMPLES[backend] // divide)
        settings(max_examples=count, deadline=None, derandomize=True)(given(*strategies)(check))()

    return run


@dataclass(frozen=True)
class Case:
    """Arguments of the operator, and in words how they lie in memory."""

    base: list[Tensor]
    deltas: list[list[Tensor | None]]
    coef: Tensor
    description: str

    @property
    def per_block(self) -> Tensor:
        """coef as (N, B) in float64, rounded to float32 as the operator does."""
        coef = self.coef.detach().float().double()
        return coef if coef.dim() == 2 else coef.unsqueeze(1).expand(-1, len(self.base))

    def tensors(self) -> list[Tensor]:
        """All that the caller owns."""
        present = [delta for vector in self.deltas for delta in vector if delta is not None]
        return [*self.base, *present, self.coef]

    def column(self, b: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Base, present deltas and their coefficients of one block."""
        present = [i for i, vector in enumerate(self.deltas) if vector[b] is not None]
        deltas = [delta for vector in self.deltas if (delta := vector[b]) is not None]
        return self.base[b], deltas, self.per_block[present, b]


def shapes(largest: int = 3 * TILE) -> st.SearchStrategy[Shape]:
    """Scalars, nothing, one, primes, around 16, around a tile, several tiles."""
    notable: list[Shape] = [
        (), (0,), (3, 0, 2), (1,), (1, 1, 1), (13,), (15,), (16,), (17,), (5, 7), (31, 33),
        (TILE - 1,), (TILE,), (TILE + 1,), (2, TILE), (2 * TILE + 13,), (3, 5, TILE // 7),
    ]  # fmt: skip
    random = st.lists(st.integers(1, 19), min_size=1, max_size=3).map(tuple)
    fitting = [shape for shape in notable if prod(shape) <= largest]
    return st.one_of(st.sampled_from(fitting), random.filter(lambda shape: prod(shape) <= largest))


def make(
    shape: Shape, dtype: torch.dtype, form: str, generator: torch.Generator, scale: float = 1.0
) -> Tensor:
    """A normally distributed tensor that lies in memory as `form` says, NaN in between."""

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    if form == "offset" or (form == "sliced" and not shape):
        # One element off: aligned for its own type only.
        buffer = torch.full((prod(shape) + 1,), torch.nan, dtype=dtype)
        buffer[1:] = normal(prod(shape))
        return buffer[1:].view(shape)
    if form == "sliced":
        buffer = torch.full((*shape[:-1], 2 * shape[-1]), torch.nan, dtype=dtype)
        buffer[..., ::2] = normal(*shape)
        return buffer[..., ::2]
    if form == "transposed":
        return normal(*reversed(shape)).permute(tuple(reversed(range(len(shape)))))
    if form == "expanded":
        return normal(1).expand(shape) if shape else normal(1)[0]
    return normal(*shape)


@st.composite
def cases(draw: st.DrawFn, largest: int = 3 * TILE, most: int = 4) -> Case:
    """Up to `most` blocks and task vectors; any dtype, memory form and missing block."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtypes, forms = st.sampled_from(DTYPES), st.sampled_from(FORMS)
    block_shapes = draw(st.lists(shapes(largest), max_size=most))
    count = draw(st.integers(0, most))
    described = []
    base, deltas = [], []
    for b, shape in enumerate(block_shapes):
        dtype, form = draw(dtypes), draw(forms)
        base.append(make(shape, dtype, form, generator))
        described.append(f"base[{b}]: {shape} {dtype} {form}")
    for i in range(count):
        vector: list[Tensor | None] = []
        for b, shape in enumerate(block_shapes):
            if draw(st.integers(0, 5)) == 0:
                vector.append(None)
                described.append(f"deltas[{i}][{b}]: None")
                continue
            dtype, form = draw(dtypes), draw(forms)
            vector.append(make(shape, dtype, form, generator, scale=0.1))
            described.append(f"deltas[{i}][{b}]: {dtype} {form}")
        deltas.append(vector)
    coef_shape = draw(st.sampled_from([(count, len(base)), (count,)]))
    coef_dtype = draw(st.sampled_from([torch.float32, *DTYPES, torch.float64]))
    coef_form = draw(forms)
    coef = make(coef_shape, torch.float32, coef_form, generator).to(coef_dtype)
    described.append(f"coef: {coef_shape} {coef_dtype} {coef_form}")
    return Case(base, deltas, coef, "; ".join(described))


def float32_sum(base: Tensor, deltas: Sequence[Tensor], coef: Tensor) -> Tensor:
    """The operator's definition, again and in NumPy: every product and sum rounds to float32."""
    total = base.detach().float().numpy().copy()
    for c, delta in zip(coef.tolist(), deltas, strict=True):
        total = total + np.float32(c) * delta.detach().float().numpy()
    return torch.from_numpy(np.asarray(total, dtype=np.float32)).to(base.dtype)


def float64_sum(base: Tensor, deltas: Sequence[Tensor], coef: Tensor) -> Tensor:
    """The oracle in float64, not rounded."""
    total = base.detach().double()
    for c, delta in zip(coef.double(), deltas, strict=True):
        total = total + c * delta.detach().double()
    return total


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal in dtype, shape and every bit, the sign of zero and NaN included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.dtype.itemsize]
    flat = (left.detach().contiguous().flatten(), right.detach().contiguous().flatten())
    return torch.equal(flat[0].view(integer), flat[1].view(integer))


def present(tensors: Sequence[Sequence[Tensor | None]]) -> Iterator[tuple[int, int, Tensor]]:
    """(i, b, delta) of every block that is there."""
    for i, vector in enumerate(tensors):
        for b, delta in enumerate(vector):
            if delta is not None:
                yield i, b, delta
