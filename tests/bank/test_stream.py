"""Banks that are read chunk by chunk from their file."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import dot_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import atlas_kernels as ak
from atlas_kernels.bank import segment as segment_module
from atlas_kernels.bank import stream as stream_module
from atlas_kernels.bank.segment import chunks
from atlas_kernels.bank.stream import Stream
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.files.tensors import data_offsets
from atlas_kernels.models.live_memory import PeakMemory
from atlas_kernels.ops.layout import TILE

SHAPES = {"one": (3 * TILE + 7,), "two": (5,), "three": (2, TILE), "four": (0, 3), "five": (9, 99)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two tiles of three signs: small blocks have several chunks in any codec.
    monkeypatch.setattr(segment_module, "CHUNK", TILE)


def make_file(path: Path, codec: str = "bf16", count: int = 3) -> ak.TaskVectorBank:
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["half"] = torch.randn(700, generator=generator).half()
    vectors = {
        f"task-{i}": ak.TaskVector(
            {name: torch.randn(t.shape, generator=generator).to(t) for name, t in base.items()}
        )
        for i in range(count)
    }
    return ak.TaskVectorBank.pack(path, base, vectors, codec=codec)


def whole(bank: ak.TaskVectorBank, column: int) -> segment_module.Segment:
    for segment in bank.segments:
        for block in segment.blocks():
            if block.columns == (column,):
                return block
    raise AssertionError(column)


def check(stream: Stream, bank: ak.TaskVectorBank, column: int, seed: int = 0) -> None:
    block = whole(bank, column)
    generator = torch.Generator().manual_seed(seed)
    coef = torch.randn(len(bank.names), generator=generator)
    assert torch.equal(stream.compose(column, coef), block.compose(coef))
    grad = torch.zeros_like(block.base)
    size = block.layout.shapes[0]
    (live,) = block.layout.split(grad)
    live.copy_(torch.randn(size, generator=generator))
    expected = block.coef_grad(grad)[:, 0]
    found = stream.coef_grad(column, grad)
    for i in range(len(bank.names)):
        one = torch.zeros(len(bank.names))
        one[i] = 1
        delta = block.compose(one).double() - block.base.double()
        # Both sum the same partial sums of tiles, in groups of their own.
        assert abs(found[i] - expected[i]) <= dot_error(grad, delta)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int4", "int3", "sign", "auto:3"])
def test_blocks_are_those_of_the_bank(codec: str, tmp_path: Path) -> None:
    bank = make_file(tmp_path / "bank.safetensors", codec)
    stream = Stream(bank)
    cuts = sum(len(chunks(s.layout, s.codec, s.num_vectors)) for s in bank.segments)
    assert cuts > len(bank.blocks)
    for column in range(len(bank.blocks)):
        check(stream, bank, column)


def test_derivatives_of_any_order_save_nothing_that_is_overwritten(tmp_path: Path) -> None:
    bank = make_file(tmp_path / "bank.safetensors")
    stream = Stream(bank)
    block = whole(bank, 0)

    def hessian(compose: Any) -> Tensor:
        def loss(coef: Tensor) -> Tensor:
            (flat,) = block.layout.split(compose(coef))
            return (flat**3).sum()

        coef = torch.full((3,), 0.1, requires_grad=True)
        (first,) = torch.autograd.grad(loss(coef), coef, create_graph=True)
        # Every buffer is read into again before the second derivative is taken.
        for column in range(len(bank.blocks)):
            stream.compose(column, torch.zeros(3))
        rows = [torch.autograd.grad(entry, coef, retain_graph=True)[0] for entry in first]
        return torch.stack(rows)

    expected = hessian(block.compose)
    # Both sum 12,295 terms of size 6 * |theta| * delta^2 in float32, in another order.
    bound = 8 * 2**-23 * (12295 * 14) ** 0.5 * 40
    assert bool((hessian(lambda coef: stream.compose(0, coef)) - expected).abs().max() <= bound)
    assert bool((expected.abs() > 100 * bound).any())


def test_any_order(tmp_path: Path) -> None:
    bank = make_file(tmp_path / "bank.safetensors")
    stream = Stream(bank)
    choose = random.Random(2)
    for step in range(60):
        check(stream, bank, choose.randrange(len(bank.blocks)), step)


def test_copies_read_for_themselves(tmp_path: Path) -> None:
    bank = make_file(tmp_path / "bank.safetensors", count=1)
    stream = Stream(bank)
    other = copy.deepcopy(stream)
    assert other._source is not stream._source
    for column in range(len(bank.blocks)):
        check(stream, bank, column)
        check(other, bank, column)


def test_the_next_blocks_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second pass on, whatever the caller asks for has been requested before."""
    bank = make_file(tmp_path / "bank.safetensors")
    # Enough to hold all of this small bank.
    monkeypatch.setattr(stream_module, "SLOTS", 100)
    stream = Stream(bank)
    columns = list(range(len(bank.blocks)))
    coef = torch.ones(3)

    def step() -> int:
        late = 0
        for column in [*columns, *reversed(columns)]:
            first = stream._pieces[column][:1]
            late += any(piece not in stream._pending for piece in first)
            stream.compose(column, coef)
        return late

    assert step() > 3
    # What follows the end of a step is known once a step has followed another.
    assert step() <= 3
    assert step() == 0


def test_memory_does_not_grow_with_the_number_of_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_module, "CHUNK", 3 * 2 * TILE)
    sizes = []
    for count in (1, 3, 9):
        stream = Stream(make_file(tmp_path / f"{count}.safetensors", count=count))
        buffers = [stream._buffers.get() for _ in range(stream._buffers.qsize())]
        sizes.append(max(buffer._bytes.numel() for buffer in buffers))
    # Chunks of 3 tiles of one vector, 1 tile of three; a single tile of nine is larger than that.
    tile = TILE * 2
    for size, chunk in zip(sizes, [3 * tile, 3 * tile, 9 * tile], strict=True):
        assert chunk <= size <= chunk + 5 * stream_module.BLOCK


@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_changed_bytes_are_found(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank = make_file(path, codec)
    stream = Stream(bank)
    offsets = data_offsets(path)
    column = bank.blocks.index("three")
    check(stream, bank, column)
    names = [n for n in offsets if n.startswith("scales" if codec == "int4" else "deltas")]
    with open(path, "r+b") as file:
        for name in names:
            start, end = offsets[name]
            file.seek(start)
            content = bytearray(file.read(end - start))
            file.seek(start)
            file.write(bytes(byte ^ 1 for byte in content))
    with pytest.raises(FileFormatError, match=r"bank.safetensors: a checksum of block 'th.* fails"):
        Stream(bank).compose(column, torch.ones(3))
    with pytest.raises(FileFormatError, match="checksum"):
        ak.TaskVectorBank.load(path, mmap=False)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank = make_file(path)
    stream = Stream(bank)
    start, _ = data_offsets(path)["deltas.0"]
    os.truncate(path, start + 10)
    with pytest.raises(FileFormatError, match=r"ends at byte .* shortened"):
        # Not through the mapped bank, which a shortened file would kill the process for.
        list(stream.read(0))


def test_a_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    bank = make_file(path)
    stream = Stream(bank)
    expected = stream.compose(0, torch.ones(3))
    make_file(path, count=2)
    assert torch.equal(stream.compose(0, torch.ones(3)), expected)
    with pytest.raises(ValueError, match="replaced by another bank"):
        Stream(bank)
    # By one of the same names, shapes and base as well.
    for delta in (0.0, 1.0):
        vectors = [ak.TaskVector({"w": torch.full((30,), 1 + delta)}, name="t")]
        ak.TaskVectorBank.pack(path, {"w": torch.zeros(30)}, vectors)
        if not delta:
            bank = ak.TaskVectorBank.load(path)
            Stream(bank)
    with pytest.raises(ValueError, match="replaced by another bank"):
        Stream(bank)


def test_a_bank_in_memory_has_nothing_to_stream(tmp_path: Path) -> None:
    base = {"weight": torch.zeros(3)}
    vector = ak.TaskVector({"weight": torch.ones(3)}, name="t")
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector])
    with pytest.raises(ValueError, match="this bank is in memory"):
        Stream(bank)


def test_packed_to_a_file_equals_packed_in_memory(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    base: dict[str, Tensor] = {"w": torch.randn(40, 50, generator=generator)}
    base |= {"step": torch.tensor(7), "kept": torch.ones(3, dtype=torch.float64)}
    vector = ak.TaskVector({"w": torch.randn(40, 50, generator=generator)}, name="t")
    for codec in ("bf16", "int3"):
        memory = ak.TaskVectorBank.from_task_vectors(base, [vector], codec=codec)
        mapped = ak.TaskVectorBank.pack(tmp_path / "b.safetensors", base, [vector], codec=codec)
        saved = tmp_path / "s.safetensors"
        memory.save(saved)
        for bank in (mapped, ak.TaskVectorBank.load(saved, mmap=False)):
            assert bank.fields == memory.fields
            assert torch.equal(bank.errors, memory.errors)
            assert torch.equal(bank.compose(torch.ones(1))["w"], memory.compose(torch.ones(1))["w"])
            assert bank.constants.keys() == {"step", "kept"}
            assert all(torch.equal(bank.constants[k], base[k]) for k in ("step", "kept"))
        assert {p.name for p in tmp_path.iterdir()} == {"b.safetensors", "s.safetensors"}


@pytest.mark.parametrize("direct", [True, False])
def test_any_bytes_of_a_file_are_found(
    direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they start and end, and whether or not the file system reads whole blocks."""
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    path = tmp_path / "bank.safetensors"
    bank = make_file(path, "int4")
    file, content, offsets = stream_module._File(path, bank), path.read_bytes(), data_offsets(path)
    buffer = stream_module._Buffer(len(content), torch.device("cpu"))
    choose = random.Random(0)
    for name in ("deltas.0", "scales.0", "deltas.1"):
        start, end = offsets[name]
        cuts = [(0, end - start), (0, 1), (end - start - 1, 1), (7, 0)]
        for _ in range(40):
            first = choose.randrange(end - start)
            cuts.append((first, choose.randint(1, end - start - first)))
        for offset, count in cuts:
            buffer._bytes.fill_(255)
            room = buffer._bytes[: stream_module._room(count)]
            found = file.read(name, offset, count, room)
            assert bytes(found.tolist()) == content[start + offset : start + offset + count]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.safetensors"
    make_file(path)
    content = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        make_file(path, "int4")
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]


# -- models ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight used twice, another one unused, activation checkpointing, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 96)
        self.again = nn.Linear(96, 96)
        self.again.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(96, 4, batch_first=True)
        self.head = nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        hidden = checkpoint(lambda h: self.again(h).tanh(), hidden, use_reentrant=False)
        return self.head(self.attention(hidden, hidden, hidden, need_weights=False)[0])


def learned(codec: str, tmp_path: Path) -> tuple[nn.Module, ak.TaskVectorBank]:
    torch.manual_seed(4)
    module = Tied()
    base = {name: p.detach() for name, p in module.named_parameters()}
    vectors = {
        f"task-{i}": ak.TaskVector({n: 0.1 * torch.randn_like(p) for n, p in base.items()})
        for i in range(3)
    }
    path = tmp_path / "bank.safetensors"
    return module, ak.TaskVectorBank.pack(path, module, vectors, codec=codec)


def step(model: ak.ComposedModel, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        model.coef.copy_(torch.linspace(-1, 1, model.coef.numel()).view_as(model.coef))
    model.coef.grad = None
    loss = model(x).square().mean()
    loss.backward()
    assert model.coef.grad is not None
    return loss.detach(), model.coef.grad


@pytest.mark.parametrize("codec", ["bf16", "int4", "auto:3"])
@pytest.mark.parametrize("granularity", ["block", "task", "partition"])
def test_models_learn_alike_in_every_mode(codec: str, granularity: Any, tmp_path: Path) -> None:
    module, bank = learned(codec, tmp_path)
    x = torch.randn(4, 7, 96)
    results = {}
    options: dict[str, Any] = {"granularity": granularity}
    if granularity == "partition":
        options |= {"partitions": 3, "seed": 8}
    for memory in ("recompute", "stream"):
        model = ak.ComposedModel(module, bank, memory=memory, **options)
        results[memory] = step(model, x)
        # The same bits on repetition, when all is read ahead.
        for first, second in zip(results[memory], step(model, x), strict=True):
            assert torch.equal(first, second)
    # The same composed weights, hence the same loss; coefficients' gradients are summed in chunks:
    # at most 9,216 products each, that lie within 1 (measured), in float32.
    assert torch.equal(results["recompute"][0], results["stream"][0])
    expected = results["recompute"][1]
    bound = 8 * 2**-23 * (9216 * 14) ** 0.5
    assert bool((results["stream"][1] - expected).abs().max() <= bound)
    assert bool(expected.abs().max() > 100 * bound)
    merged = model.merge()
    whole = ak.ComposedModel(module, bank, **options)
    with torch.no_grad():
        whole.coef.copy_(model.coef)
    assert torch.equal(merged(x), whole.merge()(x))


def test_nothing_is_read_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a step has been seen, what is read ahead is what comes next."""
    torch.manual_seed(6)
    layers = (
        nn.TransformerEncoderLayer(48, 3, dim_feedforward=96, dropout=0.0, batch_first=True)
        for _ in range(3)
    )
    module = nn.Sequential(*layers)
    base = {name: p.detach() for name, p in module.named_parameters()}
    delta = ak.TaskVector({name: torch.randn_like(p) for name, p in base.items()})
    bank = ak.TaskVectorBank.pack(tmp_path / "bank.safetensors", module, {"t": delta})
    model = ak.ComposedModel(module, bank, memory="stream")
    wasted: list[object] = []
    discard = Stream._discard

    def counting(self: Stream, future: Any) -> None:
        wasted.append(future)
        discard(self, future)

    monkeypatch.setattr(Stream, "_discard", counting)
    x = torch.randn(2, 5, 48)
    # The first step teaches the order, the second what follows its end.
    for _ in range(2):
        step(model, x)
    wasted.clear()
    for _ in range(2):
        step(model, x)
    assert not wasted


def test_memory_of_a_step_is_constant_in_the_number_of_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made in a step, and alive: nothing of the order of N blocks, and not twice the same chunk."""
    monkeypatch.setattr(segment_module, "CHUNK", 1 << 16)
    torch.manual_seed(5)
    module = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    base = {name: p.detach() for name, p in module.named_parameters()}
    delta = ak.TaskVector({name: torch.randn_like(p) for name, p in base.items()})
    peaks = {}
    for memory in ("recompute", "stream"):
        for count in (2, 8):
            path = tmp_path / f"{count}.safetensors"
            bank = ak.TaskVectorBank.pack(path, module, {str(i): delta for i in range(count)})
            model = ak.ComposedModel(module, bank, memory=memory)
            # The first step opens the file and makes the buffers.
            model(torch.ones(2, 256))
            with PeakMemory() as counted:
                model(torch.ones(2, 256)).sum().backward()
            peaks[memory, count] = counted.peak
    block = 256 * 256 * 4
    # Coefficients grow by 6 * 12 numbers and their copies; tables of chunks are small.
    assert abs(peaks["stream", 8] - peaks["stream", 2]) < 0.1 * block
    # A chunk's deltas are in buffers of their own, made before; its result is a copy of a part.
    assert peaks["stream", 8] < peaks["recompute", 8] + 0.5 * block


def test_a_file_that_breaks_while_a_model_learns(tmp_path: Path) -> None:
    module, bank = learned("bf16", tmp_path)
    model = ak.ComposedModel(module, bank, memory="stream")
    x = torch.randn(4, 7, 96)
    loss, _ = step(model, x)
    assert bank.path is not None
    start, end = data_offsets(bank.path)["deltas.0"]
    content = bank.path.read_bytes()
    with open(bank.path, "r+b") as file:
        file.seek(start)
        file.write(bytes(end - start))
    # Chunks that were read ahead are as they were; at the latest the second step meets the damage.
    with pytest.raises(FileFormatError, match="checksum"):  # noqa: PT012
        step(model, x)
        step(model, x)
    bank.path.write_bytes(content)
    assert torch.equal(step(model, x)[0], loss)


def test_models_refuse_a_bank_in_memory_at_once() -> None:
    module = nn.Linear(2, 2)
    vector = ak.TaskVector({"weight": torch.ones(2, 2)}, name="t")
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector])
    with pytest.raises(ValueError, match=r"bank is in memory: save it and use TaskVectorBank.load"):
        ak.ComposedModel(module, bank, memory="stream")


def test_interrupts_lose_no_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SLOTS of them every step would wait for ever."""
    bank = make_file(tmp_path / "b.safetensors")
    stream = Stream(bank)
    coef = torch.randn(len(bank.names))
    expected = [stream.compose(column, coef) for column in range(len(bank.blocks))]
    real, slots = stream_module.Future.result, stream_module.SLOTS
    for place in ("before", "after"):
        for _ in range(2 * slots):

            def interrupted(future: Any, timeout: Any = None, place: str = place) -> Any:
                if place == "after":
                    real(future, timeout)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(stream_module.Future, "result", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    stream.compose(0, coef)
    for column, value in enumerate(expected):
        assert torch.equal(stream.compose(column, coef), value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_reads_with_threads_of_its_own(tmp_path: Path) -> None:
    bank = make_file(tmp_path / "b.safetensors")
    stream = Stream(bank)
    coef = torch.randn(len(bank.names))
    expected = stream.compose(0, coef)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if torch.equal(stream.compose(0, coef), expected) else 1)
        except BaseException:
            os._exit(2)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
