"""What only a GPU shows: graphs, streams, offsets beyond 2^31, models on the device.

The operators themselves are tested there by the tests of `on_gpu`. `make gpu` runs both.
"""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import make, same_bits
from tolerances import EPS, dot_error
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.bank.segment import Segment
from atlas_kernels.ops.codecs import CODECS
from atlas_kernels.ops.groups import tile_keys
from atlas_kernels.ops.layout import TILE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
BACKENDS = ("triton", "cuda")
GPU = "cuda"
SHAPES = ((13,), (17, 3), (), (2, TILE + 8), (0,), (TILE + 1,))

on_both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _plain_memory(_nan_poisoned_memory: None) -> Iterator[None]:
    """Models need operators that have no deterministic kernel (cuBLAS without a workspace)."""
    torch.use_deterministic_algorithms(False)
    yield
    gc.collect()
    torch.cuda.empty_cache()


def arguments(count: int = 3) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
    """Blocks, deltas and coefficients on the GPU."""
    generator = torch.Generator().manual_seed(0)
    base = [make(shape, torch.float32, "plain", generator).to(GPU) for shape in SHAPES]
    deltas = [
        [make(shape, torch.bfloat16, "plain", generator, 0.1).to(GPU) for shape in SHAPES]
        for _ in range(count)
    ]
    return base, deltas, torch.randn(count, len(SHAPES), generator=generator).to(GPU)


def bank_of(codec: str, count: int = 3) -> ak.TaskVectorBank:
    base, deltas, _ = arguments(count)
    names = [f"block.{b}" for b in range(len(base))]
    vectors = {
        f"v{i}": ak.TaskVector(dict(zip(names, vector, strict=True)))
        for i, vector in enumerate(deltas)
    }
    members = dict(zip(names, base, strict=True))
    return ak.TaskVectorBank.from_task_vectors(members, vectors, codec=codec)


Step = Callable[[Tensor], tuple[list[Tensor], Tensor]]


def list_step(backend: str) -> tuple[Step, Tensor]:
    """A function from coefficients to composed blocks and the gradient of a loss of them."""
    base, deltas, coef = arguments()

    def compose(coef: Tensor) -> list[Tensor]:
        return list(ak.compose(base, deltas, coef, backend=backend))

    return _step(compose), coef


def bank_step(backend: str, codec: str, groups: int = 0) -> tuple[Step, Tensor]:
    bank = bank_of(codec)
    shape = (len(bank.names), len(bank.blocks), *([groups] if groups else []))
    coef = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(GPU)

    def compose(coef: Tensor) -> list[Tensor]:
        return list(bank.compose(coef, backend=backend).values())

    return _step(compose), coef


def _step(compose: Callable[[Tensor], list[Tensor]]) -> Step:
    def step(coef: Tensor) -> tuple[list[Tensor], Tensor]:
        leaf = coef.detach().requires_grad_()
        composed = compose(leaf)
        (grad,) = torch.autograd.grad(sum(block.square().sum() for block in composed), leaf)
        return [block.detach() for block in composed], grad

    return step


STEPS: dict[str, Callable[[str], tuple[Step, Tensor]]] = {
    "list": list_step,
    "bank": lambda backend: bank_step(backend, "bf16"),
    "int4": lambda backend: bank_step(backend, "int4"),
    "int3": lambda backend: bank_step(backend, "int3"),
    "partition": lambda backend: bank_step(backend, "bf16", 5),
    "partition int4": lambda backend: bank_step(backend, "int4", 5),
}
on_every_step = pytest.mark.parametrize("form", STEPS)


def assert_same(result: tuple[list[Tensor], Tensor], expected: tuple[list[Tensor], Tensor]) -> None:
    pairs = zip((*result[0], result[1]), (*expected[0], expected[1]), strict=True)
    assert all(same_bits(left.cpu(), right.cpu()) for left, right in pairs)
    assert expected[1].abs().sum() > 0


@on_both
@on_every_step
def test_the_same_bits_on_every_call_and_stream(form: str, backend: str) -> None:
    step, coef = STEPS[form](backend)
    expected = step(coef)
    for _ in range(20):
        assert_same(step(coef), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = step(coef)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(result, expected)


@on_both
@on_every_step
def test_graphs_replay_with_new_coefficients(form: str, backend: str) -> None:
    step, coef = STEPS[form](backend)
    static = coef.clone()
    expected = [step(coef * factor) for factor in (1, -0.5, 3)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    # Memory that the graph would miss if it had kept an address of it.
    junk = [torch.full((2**20,), torch.nan, device=GPU) for _ in range(16)]
    for factor, its in zip((1, -0.5, 3), expected, strict=True):
        static.copy_(coef * factor)
        for block in captured[0]:
            block.fill_(torch.nan)
        graph.replay()
        assert_same(captured, its)
    del junk


@on_both
def test_no_call_waits_for_the_gpu(backend: str) -> None:
    for form in STEPS:
        step, coef = STEPS[form](backend)
        step(coef)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(coef)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_both
def test_compiled_by_inductor(backend: str) -> None:
    base, deltas, coef = arguments()

    def loss(coef: Tensor) -> Tensor:
        composed = ak.compose(base, deltas, coef, backend=backend)
        return torch.stack([block.square().sum() for block in composed]).sum()

    torch._dynamo.reset()
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaf = coef.clone().requires_grad_()
        function(leaf).backward()
        assert leaf.grad is not None
        grads.append(leaf.grad.double())
    # The squares may be summed and rounded otherwise; the terms are the same.
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-4)
    assert grads[0].abs().sum() > 0


# -- beyond 2^31 elements -------------------------------------------------------------------------


# Four tensors of 2^31 elements, and what it takes to fill them.
needs_memory = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[1] < 32e9,
    reason="the GPU has less than 32 GB",
)


def ramp(start: int, count: int) -> Tensor:
    """Integers that name their place, exact in bfloat16, on the GPU."""
    return (torch.arange(start, start + count, device=GPU) * 2654435761 % 2**32 % 251).float()


@needs_memory
@on_both
@pytest.mark.parametrize("count", [1, 2])
def test_lists_beyond_2_31_elements(backend: str, count: int) -> None:
    size = 2**31 + 3 * TILE + 5
    delta = torch.empty(size, dtype=torch.bfloat16, device=GPU)
    part = 2**27
    for start in range(0, size, part):
        delta[start : start + part] = ramp(start, min(part, size - start))
    base = torch.ones(size, dtype=torch.bfloat16, device=GPU)
    coef = torch.full((count, 1), 1.0 / count, device=GPU, requires_grad=True)
    (composed,) = ak.compose([base], [[delta]] * count, coef, backend=backend)
    for start in (0, 2**31 - 7, 2**31, size - 9):
        its = composed[start : start + 9].float()
        assert torch.equal(its, (1 + ramp(start, its.numel())).bfloat16().float())
    # A gradient that is one at a few places: their sum is exact.
    grad = torch.zeros_like(base)
    places = torch.tensor([3, 2**30 + 1, 2**31 - 1, 2**31, 2**31 + TILE, size - 1], device=GPU)
    grad[places] = 1
    (found,) = torch.autograd.grad(composed, coef, grad)
    exact = delta[places].float().sum()
    assert torch.equal(found, exact.expand(count, 1))


@needs_memory
@on_both
@pytest.mark.parametrize("codec", ["bf16", "int8", "sign"])
@pytest.mark.parametrize("groups", [0, 5])
def test_banks_beyond_2_31_elements(backend: str, codec: str, groups: int) -> None:
    """The last block of an arena so large that its deltas lie beyond 2^31 items (or bits)."""
    count, sizes = 4, (2**29, 3 * TILE)
    kind = CODECS[codec]
    layout_sizes = [(size,) for size in sizes]
    numel = sum(sizes)
    items, scales = kind.items(count * numel), kind.scales(count * numel)
    if kind.bits:
        deltas = torch.zeros(items, dtype=torch.int32, device=GPU)
        tail = kind.items(count * sizes[1])
        deltas[-tail:] = torch.randint(-(2**31), 2**31, (tail,), device=GPU).int()
        sizes_of = torch.ones(scales, dtype=torch.bfloat16, device=GPU)
    else:
        deltas = torch.zeros(items, dtype=kind.dtype, device=GPU)
        deltas[-count * sizes[1] :] = torch.randn(count * sizes[1], device=GPU).to(kind.dtype)
        sizes_of = None
    base = torch.zeros(numel, device=GPU)
    segment = Segment.of((0, 1), layout_sizes, kind, count, base, deltas, sizes_of)
    small = segment.blocks()[1]
    key = tile_keys(("large", "small"), segment.layout, 0) if groups else None
    shape = (count, 2, groups) if groups else (count, 2)
    coef = torch.randn(shape, device=GPU)
    composed = segment.compose(coef, backend, key)
    grad = torch.randn(numel, device=GPU)
    found = segment.coef_grad(grad, backend, key, groups)
    small_key = None if key is None else key[-3:]
    alone = small.compose(coef[:, 1:], backend, small_key)
    assert same_bits(composed[sizes[0] :].cpu(), alone.cpu())
    assert alone.abs().sum() > 0
    its = small.coef_grad(grad[sizes[0] :], backend, small_key, groups)
    assert same_bits(found[:, 1:].cpu(), its.cpu())
    assert its.abs().sum() > 0
    if not kind.bits:
        assert not composed[: sizes[0]].any()
        assert not found[:, 0].any()


# -- models ---------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One matrix in two places, attention, a normalisation with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.layer = nn.TransformerEncoderLayer(24, 3, dim_feedforward=70, dropout=0.0)
        self.norm = nn.BatchNorm1d(24)
        self.out = nn.Linear(24, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.layer(self.embed(tokens).unsqueeze(1)).squeeze(1)
        result: Tensor = self.out(self.norm(hidden))
        return result


def model_bank(codec: str) -> tuple[nn.Module, ak.TaskVectorBank]:
    torch.manual_seed(0)
    module = Tied()
    blocks = {name: t.detach() for name, t in module.named_parameters()}
    vectors = [
        ak.TaskVector({name: 0.05 * torch.randn_like(t) for name, t in blocks.items()}, name=str(i))
        for i in range(3)
    ]
    return module, ak.TaskVectorBank.from_task_vectors(module, vectors, codec=codec)


def losses_and_gradients(model: ak.ComposedModel, device: str) -> list[tuple[Tensor, Tensor]]:
    """Of three steps of gradient descent, two micro-batches each."""
    tokens = torch.arange(22, device=device) * 5 % 11
    results = []
    for _ in range(3):
        model.coef.grad = None
        with model.composed_once(accumulate=True):
            loss = torch.zeros((), device=device)
            for part in tokens.split(11):
                its = model(part).square().mean()
                its.backward()
                loss += its.detach()
        assert model.coef.grad is not None
        results.append((loss.double().cpu(), model.coef.grad.double().cpu()))
        with torch.no_grad():
            model.coef -= 0.05 * model.coef.grad
    return results


@pytest.mark.parametrize("memory", ["whole", "recompute", "stream"])
@pytest.mark.parametrize("codec", ["bf16", "int4"])
@pytest.mark.parametrize("granularity", ["block", "partition"])
@pytest.mark.parametrize("saved", [False, True])
def test_models_learn_on_the_gpu_as_on_the_cpu(
    memory: Any, codec: str, granularity: Any, saved: bool, tmp_path: Path
) -> None:
    module, bank = model_bank(codec)
    if saved:
        bank.save(tmp_path / "bank.safetensors")
        bank = ak.TaskVectorBank.load(tmp_path / "bank.safetensors")
    options = {"partitions": 5} if granularity == "partition" else {}
    reference = ak.ComposedModel(
        copy.deepcopy(module), bank, memory="whole", granularity=granularity, **options
    )
    expected = losses_and_gradients(reference, "cpu")
    if memory == "stream" and not saved:
        # From host memory, to which only the deltas belong.
        module, bank = module.to(GPU), bank.to(GPU, deltas=False)
    model = ak.ComposedModel(module, bank, memory=memory, granularity=granularity, **options)
    found = losses_and_gradients(model.to(GPU), GPU)
    for (loss, grad), (exact, its) in zip(found, expected, strict=True):
        # Two layers in float32 with sums of up to 70 terms in another order, twice differentiated
        # through a normalisation: thousands of roundings at most, of the largest gradient.
        assert abs(loss - exact) <= 1000 * EPS * exact.abs()
        assert (grad - its).abs().max() <= 3000 * EPS * its.abs().max()


def small_model(memory: Any) -> tuple[ak.ComposedModel, Tensor]:
    """A perceptron on the GPU with three task vectors, and its inputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 10))
    vectors = [
        ak.TaskVector({name: 0.05 * torch.randn_like(p) for name, p in module.named_parameters()})
        for _ in range(3)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors)
    bank = bank.to(GPU, deltas=memory != "stream")
    model = ak.ComposedModel(module.to(GPU), bank, memory=memory)
    return model, torch.randn(32, 64, device=GPU)


@pytest.mark.parametrize("memory", ["whole", "recompute", "stream"])
def test_threads_share_a_model(memory: Any) -> None:
    model, inputs = small_model(memory)
    with torch.no_grad():
        base = model(inputs)
        model.coef += 0.3
        expected = model(inputs)
    assert not torch.equal(base, expected)
    found: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.extend(model(inputs) for _ in range(10)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(torch.equal(output, expected) for output in found)


def test_a_graph_of_a_whole_learning_step() -> None:
    """Forward, loss, backward and optimiser, captured once and replayed."""
    pairs = []
    for _ in range(2):
        model, inputs = small_model("whole")
        model.coef.grad = torch.zeros_like(model.coef)
        pairs.append((model, torch.optim.AdamW([model.coef], lr=1e-2, capturable=True)))

    def step(model: ak.ComposedModel, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(*pairs[0])
    torch.cuda.current_stream().wait_stream(aside)
    for _ in range(3):
        step(*pairs[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*pairs[0])
    seen = set()
    for _ in range(4):
        graph.replay()
        assert torch.equal(captured, step(*pairs[1]))
        assert torch.equal(pairs[0][0].coef, pairs[1][0].coef)
        seen.add(captured.item())
    assert len(seen) == 4


def test_a_bank_moves_between_devices() -> None:
    module, bank = model_bank("int4")
    there = bank.to(GPU)
    coef = torch.randn(3, len(bank.blocks))
    composed = there.compose(coef.to(GPU))
    back = there.to("cpu").compose(coef)
    for name, block in bank.compose(coef).items():
        assert composed[name].device.type == GPU
        assert same_bits(back[name], block)
        error = (composed[name].cpu() - block).abs()
        # Five products and sums, fused or not.
        assert (error <= 8 * EPS * (block.abs() + 1)).all()
    del module


def test_low_rank_vectors() -> None:
    torch.manual_seed(0)
    base = {"w": torch.randn(70, 50), "b": torch.randn(70)}
    vectors = {
        f"v{i}": ak.TaskVector(
            {"w": ak.LowRank(torch.randn(70, 4), torch.randn(4, 50)), "b": torch.randn(70)}
        )
        for i in range(3)
    }
    coef = torch.randn(3, 2)
    results = []
    for device in ("cpu", GPU):
        bank = ak.TaskVectorBank.from_task_vectors(base, vectors).to(device)
        leaf = coef.to(device).requires_grad_()
        composed = bank.compose(leaf)
        (grad,) = torch.autograd.grad(sum(t.square().sum() for t in composed.values()), leaf)
        results.append([grad.cpu(), *(t.detach().cpu() for t in composed.values())])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_gradients_of_large_blocks() -> None:
    """Against float64, where a block has thousands of tiles."""
    torch.manual_seed(0)
    delta, grad = torch.randn(2, 5_000_011)
    for backend in BACKENDS:
        coef = torch.zeros(1, 1, device=GPU, requires_grad=True)
        base = torch.zeros_like(delta).to(GPU)
        (composed,) = ak.compose([base], [[delta.to(GPU)]], coef, backend=backend)
        (found,) = torch.autograd.grad(composed, coef, grad.to(GPU))
        assert abs(found.item() - (delta.double() @ grad.double())) <= dot_error(grad, delta)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@on_both
def test_the_device_of_the_tensors_and_not_the_current_one(backend: str) -> None:
    base, delta = torch.randn(2, TILE + 1, device="cuda:1")
    (composed,) = ak.compose([base], [[delta]], torch.ones(1, device="cuda:1"), backend=backend)
    assert torch.equal(composed, base + delta)
