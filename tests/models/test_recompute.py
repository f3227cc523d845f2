"""memory="recompute" beside memory="whole": the same losses and gradients, far less memory."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import same_bits
from test_composed_model import counted
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

import atlas_kernels as ak
from atlas_kernels.bank.stream import Stream
from atlas_kernels.files import FileFormatError
from atlas_kernels.models.live_memory import PeakMemory
from atlas_kernels.models.recompute import ResidentBlocks
from atlas_kernels.tasks.embedded.model import load_model


class Tied(nn.Module):
    """One matrix as embedding and output, an unaligned hidden layer, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.hidden = nn.Linear(7, 7)
        self.out = nn.Linear(7, 11, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.scale * self.out(torch.tanh(self.hidden(self.embed(tokens))))
        return result


class Conv(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2)
        )


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(5, 7, num_layers=2, bidirectional=True)
        self.out = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.rnn(x)[0])
        return result


class Regions(nn.Module):
    """Layers whose activations can be computed again in the backward."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.layers.append(self.layers[0])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            again = self.reentrant is not None
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if again else layer(x)
        return x


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 17)
        self.second = nn.Linear(17, 3).bfloat16()
        self.third = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.third(self.second(self.first(x).bfloat16()).float())
        return result


class OddShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = [(0, 3), (), (1,), (17,), (4099,), (2, 0), (13, 641)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(x * weight.sin()).sum() for weight in self.weights])


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 3, dim_feedforward=17, dropout=0.0, batch_first=True)


def image_encoder() -> nn.Module:
    return load_model().get_submodule("visual")


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "tied": (Tied, lambda: torch.arange(9)),
    "transformer": (transformer, lambda: torch.randn(2, 5, 12)),
    "conv": (Conv, lambda: torch.randn(4, 3, 8, 8)),
    "recurrent": (Recurrent, lambda: torch.randn(4, 2, 5)),
    "mixed": (MixedDtypes, lambda: torch.randn(4, 5)),
    "odd": (OddShapes, lambda: torch.tensor(0.5)),
    "clip": (image_encoder, lambda: torch.randn(2, 3, 32, 32)),
}


def bank_of(module: nn.Module, count: int = 3, **options: Any) -> ak.TaskVectorBank:
    base = module.state_dict(keep_vars=True)
    vectors = []
    for index in range(count):
        tuned: dict[int, Tensor] = {}
        for value in base.values():
            if isinstance(value, nn.Parameter):
                noise = 0.1 * torch.randn(value.shape).to(value)
                tuned.setdefault(id(value), value.detach() + noise)
        changed = {name: tuned.get(id(value), value) for name, value in base.items()}
        state = module.state_dict()
        vectors.append(ak.TaskVector.from_state_dicts(state, changed, name=f"v{index}"))
    return ak.TaskVectorBank.from_task_vectors(module, vectors, **options)


def models(module: nn.Module, count: int = 3, **options: Any) -> list[ak.ComposedModel]:
    """The same composed model with memory="whole" and "recompute"."""
    bank = bank_of(module, count)
    if options.get("granularity") == "partition":
        options = {"partitions": 5, "seed": 1, **options}
    made = [
        ak.ComposedModel(copy.deepcopy(module), bank, memory=memory, **options)
        for memory in ("whole", "recompute")
    ]
    values = 0.3 * torch.randn(made[0].coef.shape)
    for model in made:
        with torch.no_grad():
            model.coef.copy_(values)
    return made


def loss_of(output: Tensor) -> Tensor:
    factors = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
    return (output.float() * factors).square().sum()


def step(model: ak.ComposedModel, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that no symmetry makes zero, and its gradient."""
    loss = loss_of(model(*inputs))
    (gradient,) = torch.autograd.grad(loss, model.coef)
    return loss.detach(), gradient


def assert_close(gradient: Tensor, expected: Tensor) -> None:
    # The same products of the same numbers, added up in another order where a block is used more
    # than once: a few eps (1e-7) of the largest terms. A lost use, or a base weight where a
    # composed one belongs, changes a gradient by a tenth of its size.
    assert expected.abs().max() > 0
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("granularity", ["block", "task", "partition"])
@pytest.mark.parametrize("name", MODULES)
def test_losses_and_gradients_are_those_of_whole(name: str, granularity: str) -> None:
    """And those of `functional_call` on what the bank composes."""
    make, inputs = MODULES[name]
    plain = make()
    whole, recompute = models(plain, granularity=granularity)
    x = inputs()
    for train in (True, False):
        whole.train(train), recompute.train(train), plain.train(train)
        loss, expected = step(whole, x)
        again, gradient = step(recompute, x)
        assert same_bits(loss, again)
        assert_close(gradient, expected)
        weights = whole.bank.compose(whole.coef, seed=whole.seed)
        loss = loss_of(functional_call(plain, weights, (x,)))
        assert same_bits(loss, again)
        assert_close(gradient, torch.autograd.grad(loss, whole.coef)[0])
        for buffer, other in zip(whole.buffers(), recompute.buffers(), strict=True):
            assert torch.equal(buffer, other)
    assert all(map(same_bits, step(recompute, x), step(recompute, x)))


@pytest.mark.parametrize("name", MODULES)
def test_without_gradients_it_composes_at_every_use(name: str) -> None:
    make, inputs = MODULES[name]
    whole, recompute = (model.eval() for model in models(make()))
    x = inputs()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            expected = whole(x)
            for _ in range(2):
                with counted() as calls:
                    assert same_bits(recompute(x), expected)
                assert calls["arena_compose"] >= len(recompute.bank.blocks)
    # Nothing that was composed above stays in the way of gradients.
    expected = step(whole, x)[1]
    assert_close(step(recompute, x)[1], expected)
    for context in (torch.no_grad, torch.inference_mode):
        with recompute.composed_once():
            with context():
                recompute(x)
            assert_close(step(recompute, x)[1], expected)


def test_without_task_vectors() -> None:
    module = Tied()
    whole, recompute = models(module, count=0)
    assert same_bits(recompute(torch.arange(9)), whole(torch.arange(9)))
    assert same_bits(recompute(torch.arange(9)), module(torch.arange(9)))
    recompute.merge()(torch.arange(9)).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    whole, recompute = models(Regions())
    recompute.module.reentrant = reentrant
    # The re-entrant kind sees only what it is called with.
    x = torch.randn(5, 6, requires_grad=True)
    whole(x).square().sum().backward()
    expected, x.grad = x.grad, None
    for context in (contextlib.nullcontext, recompute.composed_once):
        recompute.coef.grad = None
        with context():
            recompute(x).square().sum().backward()
        assert_close(recompute.coef.grad, whole.coef.grad)
        assert_close(x.grad, expected)
        x.grad = None


def test_checkpointed_regions_of_one_pass_reach_accumulated_gradients() -> None:
    whole, recompute = models(Regions())
    recompute.module.reentrant = True
    x = torch.randn(5, 6, requires_grad=True)
    whole(x).square().sum().backward()
    with recompute.composed_once(accumulate=True):
        recompute(x).square().sum().backward()
    assert_close(recompute.coef.grad, whole.coef.grad)


def test_autocast() -> None:
    whole, recompute = models(transformer())
    x = torch.randn(2, 5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = step(whole, x)
        again, gradient = step(recompute, x)
    assert same_bits(loss, again)
    assert_close(gradient, expected)
    assert not same_bits(loss, step(whole, x)[0])


@pytest.mark.parametrize("name", ["tied", "conv", "transformer", "mixed"])
def test_double_backward(name: str) -> None:
    make, inputs = MODULES[name]
    x = inputs()
    second = []
    for model in models(make().train()):
        # The fused attention of the CPU has no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(x).float().square().mean()
        (gradient,) = torch.autograd.grad(loss, model.coef, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), model.coef)[0])
    assert_close(second[1], second[0])


def test_gradients_of_the_input_through_frozen_coefficients() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    found = []
    for model in models(Regions()):
        model.coef.requires_grad_(False)
        found.append(torch.autograd.grad(model(x).square().sum(), x)[0])
    assert same_bits(*found)


def test_one_composition_backward_per_block_and_backward() -> None:
    whole, recompute = models(Tied())
    first, second = torch.arange(9), torch.arange(9).flip(0)
    blocks = len(recompute.bank.blocks)
    expected = step(whole, first)[1] + step(whole, second)[1]
    with counted() as calls:
        separate = step(recompute, first)[1] + step(recompute, second)[1]
    assert calls["arena_coef_grad"] == 2 * blocks
    assert_close(separate, expected)
    for passes in (contextlib.nullcontext, recompute.composed_once):
        recompute.coef.grad = None
        with counted() as calls:
            with passes():
                weights = torch.linspace(0.5, 1.5, 99).view(9, 11)
                loss = sum((recompute(x) * weights).square().sum() for x in (first, second))
            loss.backward()
        shared = passes == recompute.composed_once
        assert calls["arena_coef_grad"] == (1 if shared else 2) * blocks
        assert_close(recompute.coef.grad, expected)


@pytest.mark.parametrize("memory", [0, 1])
@pytest.mark.parametrize("granularity", ["block", "task"])
def test_accumulated_gradients_take_one_composition_backward(memory: int, granularity: str) -> None:
    model = models(Tied(), granularity=granularity)[memory]
    batches = [torch.arange(9), torch.arange(5), torch.tensor([3])]
    expected = sum(step(model, x)[1] for x in batches)

    def backward(x: Tensor) -> None:
        output = model(x)
        weights = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
        (output * weights).square().sum().backward()

    with counted() as calls, model.composed_once(accumulate=True):
        for x in batches:
            backward(x)
        assert model.coef.grad is None
        assert calls["arena_coef_grad"] == 0
    whole = model.memory == "whole"
    assert calls["arena_coef_grad"] == (1 if whole else len(model.bank.blocks))
    if whole:
        # The steps before have composed these weights.
        assert calls["arena_compose"] == 0
    assert_close(model.coef.grad, expected)
    # An exception drops what has come so far.
    model.coef.grad = None
    with pytest.raises(IndexError), model.composed_once(accumulate=True):
        [backward(x) for x in (batches[0], torch.tensor([11]))]
    assert model.coef.grad is None
    backward(batches[0])
    assert_close(model.coef.grad, step(model, batches[0])[1])


@pytest.mark.parametrize("memory", [0, 1])
def test_accumulating_over_a_change_of_coef(memory: int) -> None:
    model = models(Tied())[memory]
    x = torch.arange(9)
    separate = []
    start = model.coef.detach().clone()
    for k in (1, 2):
        with torch.no_grad():
            model.coef.copy_(k * start)
        separate.append(torch.autograd.grad(model(x).square().sum(), model.coef)[0])
    with model.composed_once(accumulate=True):
        for k in (1, 2):
            with torch.no_grad():
                model.coef.copy_(k * start)
            model(x).square().sum().backward()
    assert_close(model.coef.grad, separate[0] + separate[1])


def test_coefficients_that_change_before_the_backward() -> None:
    expected, found = [], []
    for model, change in zip(models(Tied()), (False, True), strict=True):
        loss = model(torch.arange(9)).square().sum()
        if change:
            with torch.no_grad():
                model.coef.zero_()
        (found if change else expected).append(torch.autograd.grad(loss, model.coef)[0])
    assert_close(found[0], expected[0])


def test_an_interrupted_step_leaves_the_model_usable() -> None:
    whole, recompute = models(Tied())
    tokens = torch.arange(9)
    outside = torch.tensor([11])
    for context in (contextlib.nullcontext, recompute.composed_once):
        with pytest.raises(IndexError), context():
            recompute(outside)
        assert_close(step(recompute, tokens)[1], step(whole, tokens)[1])


def test_a_block_is_composed_once_while_it_is_alive() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            assert self.weight is weight
            return torch.tanh(x @ self.weight) @ self.weight

    whole, recompute = models(Twice())
    x = torch.randn(3, 5)
    with torch.no_grad(), counted() as calls:
        recompute(x)
    assert calls["arena_compose"] == 1
    assert_close(step(recompute, x)[1], step(whole, x)[1])


@pytest.mark.parametrize("memory", ["recompute", "stream"])
def test_a_block_that_a_module_looks_at_repeatedly_is_composed_once(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nn.MultiheadAttention asks for its weight three times before it uses it."""
    module = transformer()
    path = tmp_path / "bank.safetensors"
    bank_of(module).save(path)
    model = ak.ComposedModel(module, ak.TaskVectorBank.load(path), memory=memory)
    source = {"recompute": ResidentBlocks, "stream": Stream}[memory]
    calls: list[tuple[str, str]] = []
    for method in ("compose", "coef_grad"):

        def counting(
            self: Any, column: int, tensor: Tensor, method: str = method, original: Any = None
        ) -> Tensor:
            calls.append((method, model.bank.blocks[column]))
            result: Tensor = original(self, column, tensor)
            return result

        original = getattr(source, method)
        monkeypatch.setattr(source, method, partialmethod(counting, original=original))
    matrices = [name for name, p in module.named_parameters() if p.dim() == 2]
    assert len(matrices) == 4
    x = torch.randn(2, 5, 12, requires_grad=True)
    output = model(x)
    forward = [call for call in calls if call[1] in matrices]
    assert sorted(forward) == sorted(("compose", name) for name in matrices)
    calls.clear()
    output.square().sum().backward()
    backward = [call for call in calls if call[1] in matrices]
    assert sorted(backward) == sorted((m, n) for m in ("compose", "coef_grad") for n in matrices)


def test_nothing_composed_outlives_the_forward_pass() -> None:
    _, model = models(nn.Linear(64, 64, bias=False))
    x = torch.ones(1, 64)
    for context in (contextlib.nullcontext, model.composed_once):
        with context(), PeakMemory() as memory:
            output = model(x)
            # The output, the coefficients' copies; the block has 16 KiB.
            assert memory.live < 4096
        assert output.requires_grad


class OtherUses(nn.Module):
    """Weights read as complex numbers, changed in place, in part, and while gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(3, 4, 2))
        self.table = nn.Parameter(3 * torch.randn(7, 5))
        self.part = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        # A parameter that is read here has gradients all the same.
        with torch.inference_mode():
            first = self.part
        with torch.no_grad():
            second = self.part
        mixed = first - 0.5 * second
        spectrum = torch.view_as_complex(self.spectrum)
        signal = (torch.fft.rfft(x) * spectrum).real
        # A view of the block with its sign turned around.
        signal = signal + x[:, :4] * spectrum.conj().imag
        table = self.table
        # Scales the rows that it looks up down to length 1, in place.
        rows = embedding(torch.tensor([1, 3, 3]), table, max_norm=1.0)
        parts = x[:, :3] @ mixed[1:4, ::2].mT + x @ self.part[1:4].mT
        return torch.cat([signal, rows @ table.t(), parts], dim=1)


@pytest.mark.parametrize("memory", [0, 1])
def test_other_uses_than_plain_ones(memory: int) -> None:
    model = models(OtherUses())[memory]
    x = torch.randn(3, 6, requires_grad=True)
    # With clones, because a block of an arena must not be changed in place.
    weights = {name: w.clone() for name, w in model.bank.compose(model.coef).items()}
    plain = copy.deepcopy(model.module)
    losses, gradients = [], []
    for output in (functional_call(plain, weights, (x,)), model(x)):
        factors = torch.linspace(0.5, 1.5, output.numel()).view_as(output)
        losses.append((output * factors).square().sum())
        gradients.append(torch.autograd.grad(losses[-1], (model.coef, x)))
    assert same_bits(*losses)
    for expected, found in zip(*gradients, strict=True):
        assert_close(found, expected)


def test_what_autograd_needs_is_still_guarded_against_changes() -> None:
    class Careless(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x).exp()
            return hidden.mul_(2)

    _, recompute = models(Careless(3, 3))
    output = recompute(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="modified in place"):
        output.sum().backward()


def deep_stack(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def test_peak_memory() -> None:
    # Blocks of 1 MiB, none of which shares a bucket with another.
    width, depth, batch = 512, 12, 4
    whole, recompute = models(deep_stack(width, depth))
    x = torch.randn(batch, width)
    block, activation = 4 * width**2, 4 * batch * width
    weights = depth * block
    peaks = {}
    for model in (whole, recompute):
        for accumulate in (False, True):
            with PeakMemory() as memory:
                if accumulate:
                    with model.composed_once(accumulate=True):
                        model(x).square().sum().backward()
                else:
                    model(x).square().sum().backward()
            peaks[model.memory, accumulate] = memory.peak
            # "whole" keeps what it composed until the coefficients change.
            kept = weights + 4 * depth * width if model is whole else 0
            assert memory.live < kept + block
            model.coef.grad = None
            model._source.forget()
    # Alive in a layer's backward: a composed matrix, its gradient, the activations (two per layer
    # at most: the output, its gradient, the loss's square), the biases with their gradients.
    # The third block is for what an operation of PyTorch may copy.
    bound = 3 * block + 2 * (depth + 2) * activation
    assert bound < weights / 3
    assert peaks["recompute", False] <= bound
    # No model of gradients is ever alive.
    small = 8 * depth * width
    assert weights + block <= peaks["whole", False] <= weights + small + bound
    # The sums of gradients stay until the context ends.
    assert weights <= peaks["recompute", True] <= weights + small + bound
    assert 2 * weights <= peaks["whole", True] <= 2 * weights + small + bound
    with torch.no_grad(), PeakMemory() as memory:
        recompute(x)
    assert memory.peak <= 2 * block + 2 * (depth + 2) * activation


def test_the_weights_of_an_rnn_do_not_outlive_the_pass() -> None:
    for model in models(Recurrent()):
        with torch.no_grad(), PeakMemory() as memory:
            output = model.train()(torch.randn(4, 2, 5))
            model._source.forget()
            # Two states of two layers come with the output; the weights have 14,000 bytes.
            assert memory.live <= output.nbytes + 1024
        copy.deepcopy(model)
        assert same_bits(model.merge().eval()(torch.ones(4, 2, 5)), model(torch.ones(4, 2, 5)))


def shares_the_base(model: ak.ComposedModel) -> bool:
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    return all(
        parameters[block].data_ptr() == base.data_ptr() for block, base in model.bank.base.items()
    )


@pytest.mark.parametrize("memory", [0, 1])
def test_the_base_is_held_once(memory: int) -> None:
    model = models(Tied())[memory]
    assert shares_the_base(model)
    model(torch.arange(9))
    assert shares_the_base(model.to("cpu"))
    assert shares_the_base(copy.deepcopy(model))
    before = model.bank.state_dict(torch.zeros(3))
    merged = model.merge()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    for name, value in model.bank.state_dict(torch.zeros(3)).items():
        assert same_bits(value, before[name])


@pytest.mark.parametrize("memory", [0, 1])
def test_a_state_dict_of_another_base_is_refused(memory: int) -> None:
    model = models(Tied())[memory]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.coef.data.zero_()
    model.load_state_dict(state)
    assert same_bits(model.coef, state["coef"])
    state["module.out.weight"] += 1
    before = model.bank.base["embed.weight"].clone()
    with pytest.raises(ValueError, match=r"another base than the bank in module\.out\.weight"):
        model.load_state_dict(state)
    assert same_bits(model.bank.base["embed.weight"], before)


@pytest.mark.parametrize("name", ["tied", "recurrent", "conv"])
def test_copies(name: str) -> None:
    make, inputs = MODULES[name]
    _, model = models(make())
    x = inputs()
    loss, gradient = step(model.eval(), x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert all(map(same_bits, step(twin, x), (loss, gradient)))
        with torch.no_grad():
            twin.coef.zero_()
        assert not same_bits(step(twin, x)[0], loss)
        assert same_bits(step(model, x)[0], loss)
    merged = model.merge()
    assert same_bits(merged(x), model(x))
    assert not any(b"atlas_kernels" in pickle.dumps(m._parameters) for m in merged.modules())
    state = model.module.state_dict()
    for block, base in model.bank.base.items():
        assert same_bits(state[block], base)
    assert all(type(p) is nn.Parameter for p in model.module.parameters())
    # A copy of the module alone is an ordinary module with the base's weights.
    with torch.no_grad():
        plain = copy.deepcopy(model.module)
        assert same_bits(plain(x), make_like(plain, state)(x))


def make_like(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    fresh = type(module)().train(module.training)
    fresh.load_state_dict(state)
    return fresh


@pytest.mark.parametrize("memory", ["whole", "recompute"])
def test_a_mapped_bank_that_is_overwritten_in_place_is_noticed(memory: Any, tmp_path: Path) -> None:
    module, path = Tied(), tmp_path / "bank.safetensors"
    bank_of(module).save(path)
    model = ak.ComposedModel(module, ak.TaskVectorBank.load(path), memory=memory)
    loss = model(torch.arange(9)).square().sum()
    path.write_bytes(path.read_bytes())
    with pytest.raises(FileFormatError, match="overwritten in place"):
        loss.backward()
    with torch.no_grad():
        model.coef.add_(1)
    with pytest.raises(FileFormatError, match="overwritten in place"):
        model(torch.arange(9))


def test_models_that_take_turns_on_one_module() -> None:
    module = Tied()
    bank = bank_of(module)
    tokens = torch.arange(9)
    first, second = (ak.ComposedModel(module, bank, memory="recompute") for _ in range(2))
    with torch.no_grad():
        first.coef.fill_(0.5)
        for _ in range(2):
            outputs = [model(tokens) for model in (first, second)]
            assert same_bits(outputs[0], first.merge()(tokens))
            assert same_bits(outputs[1], second.merge()(tokens))
            assert not same_bits(*outputs)
        # The next one finds an ordinary module.
        third = ak.ComposedModel(module, bank)
        assert same_bits(module.hidden.weight, bank.base["hidden.weight"])
        assert same_bits(third(tokens), outputs[1])
        assert same_bits(first(tokens), outputs[0])


def test_another_bank_is_noticed() -> None:
    _, model = models(Tied())
    tokens = torch.arange(9)
    with torch.no_grad():
        before = model(tokens)
        model.bank = bank_of(model.merge())
        assert not same_bits(model(tokens), before)
        assert same_bits(model(tokens), model.merge()(tokens))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_modules_that_cannot_compose_on_use() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    bank = bank_of(module)
    inner = copy.deepcopy(module)
    inner[0].compile()
    for other, where in (
        (torch.compile(module), "the module itself"),
        (torch.jit.trace(module, torch.ones(1, 3)), "the module itself"),
        (inner, r"\(0\)"),
    ):
        with pytest.raises(TypeError, match=f"compiled or scripted module.*{where}"):
            ak.ComposedModel(other, bank, memory="recompute")
    with pytest.raises(ValueError, match="unknown memory 'none'"):
        ak.ComposedModel(module, bank, memory="none")  # type: ignore[arg-type]
    model = ak.ComposedModel(module, bank, memory="recompute")
    model(torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"'weight' is composed on use and cannot be replaced"):
        functional_call(module, {"0.weight": torch.ones(3, 3)}, torch.ones(1, 3))
    assert same_bits(model(torch.ones(1, 3)), model.merge()(torch.ones(1, 3)))
