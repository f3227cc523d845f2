import copy
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from arena import arena_compose
from strategies import same_bits
from tolerances import EPS
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import atlas_kernels as ak
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.ops import reference


class Net(nn.Module):
    """Tied embedding and output, BatchNorm, a block that the bank leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.frozen(torch.tanh(self.hidden(self.embed(tokens))))
        result: Tensor = scale * self.out(self.norm(hidden))
        return result


GRANULARITIES = ("block", "task", "partition")
BLOCKS = ("embed.weight", "hidden.weight", "hidden.bias", "norm.weight", "norm.bias", "out.bias")
TOKENS = torch.arange(9)


def make_vectors(
    module: nn.Module, names: tuple[str, ...] = ("a", "b", "c")
) -> list[ak.TaskVector]:
    base = module.state_dict()
    vectors = []
    for name in names:
        tuned = {
            key: value + 0.1 * torch.randn(value.shape).to(value)
            if value.is_floating_point() and not key.startswith("frozen")
            else value
            for key, value in base.items()
        }
        tuned["out.weight"] = tuned["embed.weight"]
        vectors.append(ak.TaskVector.from_state_dicts(base, tuned, name=name))
    return vectors


def make_model(**kwargs: Any) -> tuple[Net, ak.ComposedModel]:
    """The original module and a model composed on a copy of it."""
    if kwargs.get("granularity") == "partition":
        kwargs = {"partitions": 2, "seed": 5, **kwargs}
    module = Net()
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module))
    return module, ak.ComposedModel(copy.deepcopy(module), bank, **kwargs)


def module_of(bank: ak.TaskVectorBank) -> Net:
    """A module that holds the bank's base, as far as the bank knows it."""
    module = Net()
    module.load_state_dict(bank.state_dict(torch.zeros(len(bank.names))), strict=False)
    return module


def randomise(model: ak.ComposedModel) -> None:
    with torch.no_grad():
        model.coef.normal_()


class Count(TorchDispatchMode):
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("atlas_kernels_"):
            self.calls[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with Count() as count:
        yield count.calls


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("train", [True, False])
def test_starts_as_the_base_bit_for_bit(granularity: Any, train: bool) -> None:
    module, model = make_model(granularity=granularity)
    module.train(train), model.train(train)
    assert same_bits(model(TOKENS), module(TOKENS))
    for name, weight in model.weights().items():
        assert same_bits(weight, module.get_parameter(name))
    assert tuple(model.weights()) == BLOCKS


@pytest.mark.parametrize("granularity", ["block", "task"])
def test_forward_is_the_module_with_composed_weights(granularity: Any) -> None:
    module, model = make_model(granularity=granularity)
    randomise(model)
    expected = dict(module.state_dict())
    for b, name in enumerate(BLOCKS):
        coef = model.coef if granularity == "task" else model.coef[:, b]
        listed = [[v.deltas[name]] for v in vectors_of(model)]
        (expected[name],) = ak.compose([expected[name]], listed, coef.detach())
    expected["out.weight"] = expected["embed.weight"]
    output = model(TOKENS, scale=2.0)
    assert same_bits(output, functional_call(module, expected, (TOKENS,), {"scale": 2.0}))
    assert not torch.allclose(output, module(TOKENS, scale=2.0), atol=1e-3)
    # The weights stand in the module: it needs no detour.
    assert same_bits(output, model.module(TOKENS, scale=2.0))


def vectors_of(model: ak.ComposedModel) -> list[ak.TaskVector]:
    """The deltas that a bank holds, by composing unit coefficients on a zero base."""
    bank = model.bank
    (segment,) = bank.segments
    vectors = []
    for i, name in enumerate(bank.names):
        unit = torch.zeros(len(bank.names))
        unit[i] = 1
        flat = arena_compose(
            reference,
            torch.zeros_like(segment.base),
            (segment.deltas, None, 0),
            unit.unsqueeze(1).expand(-1, len(bank.blocks)),
            segment.layout,
        )
        views = segment.layout.split(flat)
        vectors.append(ak.TaskVector(dict(zip(bank.blocks, views, strict=True)), name=name))
    return vectors


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradient_against_finite_differences(granularity: Any) -> None:
    _, model = make_model(granularity=granularity)
    model.eval()
    randomise(model)
    target = torch.randint(0, 11, (9,))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(TOKENS), target)

    loss().backward()
    assert model.coef.grad is not None
    step = 1e-2
    for index in list(
        torch.cartesian_prod(*map(torch.arange, model.coef.shape)).reshape(-1, model.coef.dim())
    )[::3]:
        place = tuple(index.tolist())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                model.coef[place] += sign * step
                values.append(loss().item())
                model.coef[place] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        # Truncation step^2 and rounding eps / step are both about 1e-4 here.
        assert model.coef.grad[place].item() == pytest.approx(slope, abs=1e-3, rel=1e-2)
    assert model.coef.grad.abs().max() > 1e-2


def test_isotropic_is_tied_rows_and_its_gradient_their_sum() -> None:
    module = Net().eval()
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module))
    by_task, by_block = (
        ak.ComposedModel(copy.deepcopy(module), bank, granularity=granularity)  # type: ignore[arg-type]
        for granularity in ("task", "block")
    )
    with torch.no_grad():
        by_task.coef.normal_()
        by_block.coef.copy_(by_task.coef.unsqueeze(1).expand(-1, 6))
    outputs = [model(TOKENS) for model in (by_task, by_block)]
    assert same_bits(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert by_task.coef.grad is not None
    assert by_block.coef.grad is not None
    summed = by_block.coef.grad.double().sum(1)
    size = by_block.coef.grad.abs().sum(1)
    assert ((by_task.coef.grad - summed).abs() <= 6 * EPS * size).all()


def test_only_coef_learns() -> None:
    module, model = make_model()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["coef"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(TOKENS), TOKENS).backward()
        optimizer.step()
    assert model.coef.detach().abs().min() > 0
    for name, parameter in model.module.named_parameters():
        assert parameter.grad is None
        assert same_bits(parameter, module.get_parameter(name))
    assert all(same_bits(b, module.get_parameter(name)) for name, b in model.bank.base.items())


def test_learning_lowers_the_loss_in_both_modes() -> None:
    _, model = make_model()
    model.eval()
    optimizer = torch.optim.SGD([model.coef], lr=0.5)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS), TOKENS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():  # an evaluation in between sees the new coefficients
            assert nn.functional.cross_entropy(model(TOKENS), TOKENS).item() < losses[-1]
    assert losses == sorted(losses, reverse=True)


def test_batch_norm_statistics_are_the_module_s_own() -> None:
    module, model = make_model()
    for train in (True, False, True):
        module.train(train), model.train(train)
        assert same_bits(model(TOKENS), module(TOKENS))
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, model.module.get_buffer(name)), name
    assert model.module.norm.num_batches_tracked == 2
    with torch.no_grad(), model.composed_once():
        model(TOKENS)
    assert model.module.norm.num_batches_tracked == 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_merge_equals_the_composed_forward(granularity: Any) -> None:
    _, model = make_model(granularity=granularity)
    randomise(model)
    model(TOKENS)
    model.eval()
    merged = model.merge()
    assert type(merged) is Net
    assert not merged.training
    assert same_bits(merged(TOKENS), model(TOKENS))
    assert merged.out.weight is merged.embed.weight
    assert merged.state_dict().keys() == model.module.state_dict().keys()
    expected = model.bank.state_dict(model.coef, seed=model.seed)
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        assert same_bits(parameter, expected[name]), name
    # Its own copies: a change of either leaves the other as it is.
    with torch.no_grad():
        before = model(TOKENS)
        for parameter in model.merge().parameters():
            parameter.zero_()
        assert same_bits(model(TOKENS), before)
    assert not any("coef" in name for name, _ in merged.named_parameters())


def test_composed_once_until_coef_changes() -> None:
    _, model = make_model()
    model.eval()
    with counted() as calls:
        for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            for train in (False, True):
                with context():
                    first = model.train(train)(TOKENS)
                    for _ in range(3):
                        assert same_bits(model(TOKENS), first)
        assert calls["arena_compose"] == 1
    model.eval()
    with torch.no_grad(), counted() as calls:
        for step in range(3):
            model.coef.add_(0.5)
            for _ in range(2):
                changed = model(TOKENS)
            assert calls["arena_compose"] == step + 1
            assert not torch.allclose(changed, first, atol=1e-3)
    # A step of an optimiser counts as a change.
    model(TOKENS).sum().backward()
    torch.optim.SGD([model.coef], lr=1.0).step()
    with torch.no_grad():
        assert not torch.allclose(model(TOKENS), changed, atol=1e-3)


def test_what_is_cached_without_gradients_is_not_used_with_them() -> None:
    _, model = make_model()
    for context in (torch.no_grad, torch.inference_mode):
        with torch.no_grad():
            # Composed anew, in this mode.
            model.coef.add_(0.1)
        with context():
            model(TOKENS)
        model(TOKENS).square().sum().backward()
        assert model.coef.grad is not None
        assert model.coef.grad.abs().max() > 0
        model.coef.grad = None
    with torch.inference_mode():
        model(TOKENS)
    with torch.no_grad():
        assert not model(TOKENS).is_inference()


def test_a_frozen_coef_is_composed_once() -> None:
    _, model = make_model()
    model.requires_grad_(False)
    with counted() as calls:
        for _ in range(3):
            model(TOKENS)
    assert calls["arena_compose"] == 1


def test_one_composition_per_step_and_one_for_several_losses() -> None:
    _, model = make_model()
    model.eval()
    randomise(model)
    other = torch.arange(9).flip(0)
    separate = []
    for compositions, tokens in ((1, TOKENS), (0, other)):
        with counted() as calls:
            model(tokens).square().mean().backward()
        assert (calls["arena_compose"], calls["arena_coef_grad"]) == (compositions, 1)
        assert model.coef.grad is not None
        separate.append(model.coef.grad.clone())
        model.coef.grad = None
    with counted() as calls:
        with model.composed_once():
            loss = model(TOKENS).square().mean() + model(other).square().mean()
        loss.backward()
    assert (calls["arena_compose"], calls["arena_coef_grad"]) == (0, 1)
    assert torch.allclose(model.coef.grad, separate[0] + separate[1], rtol=1e-4, atol=1e-6)
    assert separate[0].abs().min() > 1e-5
    # Outside again, nothing is kept: a second step must not use a graph that is gone.
    model(TOKENS).sum().backward()
    with pytest.raises(ZeroDivisionError), model.composed_once():
        1 / 0  # noqa: B018
    model(TOKENS).sum().backward()
    model(TOKENS).sum().backward()


def coefficients(tmp_path: Path) -> tuple[ak.ComposedModel, Path]:
    _, model = make_model()
    randomise(model)
    path = tmp_path / "coef.safetensors"
    model.save_coefficients(path)
    return model, path


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_coefficients_round_trip(granularity: Any, tmp_path: Path) -> None:
    _, model = make_model(granularity=granularity)
    randomise(model)
    model.save_coefficients(tmp_path / "c.safetensors")
    before, parameter = model.coef.detach().clone(), model.coef
    with torch.no_grad():
        model.coef.zero_()
        model(TOKENS)
    model.load_coefficients(tmp_path / "c.safetensors")
    assert same_bits(model.coef, before)
    assert model.coef is parameter
    with torch.no_grad():
        found = model(TOKENS)
        model.coef.zero_()
        assert not torch.allclose(found, model(TOKENS), atol=1e-3)


def test_coefficients_follow_their_names(tmp_path: Path) -> None:
    model, path = coefficients(tmp_path)
    base = model.bank.base
    shuffled = {name: base[name] for name in ("norm.bias", *BLOCKS[:4], "out.bias")}
    vectors = {vector.name: vector for vector in vectors_of(model)}
    bank = ak.TaskVectorBank.from_task_vectors(shuffled, [vectors[name] for name in "cab"])
    assert bank.blocks != model.bank.blocks
    assert bank.names == ("c", "a", "b")
    other = ak.ComposedModel(module_of(bank), bank)
    other.load_coefficients(path)
    for name, coef in zip("cab", other.coef, strict=True):
        for block, value in zip(bank.blocks, coef, strict=True):
            place = model.bank.names.index(name), model.bank.blocks.index(block)
            assert value == model.coef[place] != 0
    # Another order of the vectors is another order of the sum.
    for block, weight in other.weights().items():
        assert torch.allclose(weight, model.weights()[block], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ["whole", "recompute"])
@pytest.mark.parametrize("way", ["coefficients", "state dict", "pickle", "copy"])
def test_partitions_go_with_their_coefficients(way: str, memory: Any, tmp_path: Path) -> None:
    _, model = make_model(granularity="partition", memory=memory)
    randomise(model)
    model.eval()
    other = ak.ComposedModel(
        module_of(model.bank), model.bank, granularity="partition", partitions=2, memory=memory
    ).eval()
    other.module.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        expected = model(TOKENS)
        other.coef.copy_(model.coef)
        # Composed, and kept, by another partition.
        assert not torch.equal(other(TOKENS), expected)
    if way == "coefficients":
        model.save_coefficients(tmp_path / "c.safetensors")
        other.load_coefficients(tmp_path / "c.safetensors")
    elif way == "state dict":
        assert other.load_state_dict(model.state_dict()) == ([], [])
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        other = copy.deepcopy(model)
    assert other.seed == model.seed == 5
    with torch.no_grad():
        assert same_bits(other(TOKENS), expected)


@pytest.mark.parametrize("memory", ["whole", "recompute"])
def test_another_seed_composes_anew(memory: Any) -> None:
    _, model = make_model(granularity="partition", memory=memory)
    randomise(model)
    model.eval()
    with torch.no_grad():
        before = model(TOKENS)
        model.seed = 6
        assert not torch.equal(model(TOKENS), before)
        model.seed = 5
        assert same_bits(model(TOKENS), before)


def test_a_state_dict_without_the_seed_of_its_partition_is_incomplete() -> None:
    _, model = make_model(granularity="partition")
    state = model.state_dict()
    assert state.pop("seed") == 5
    with pytest.raises(RuntimeError, match=r'Missing key.*"seed"'):
        model.load_state_dict(state)
    assert "seed" not in make_model()[1].state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "partition"}, "needs partitions, the number of groups"),
        ({"partitions": 5}, "partitions=5 with granularity='block'.* take granularity='partition'"),
        ({"granularity": "partition", "partitions": 0}, "0 groups .* expected 1 to 4096"),
        ({"granularity": "partition", "partitions": 4097}, "4097 groups"),
        ({"granularity": "partition", "partitions": 5, "seed": 2**63}, "integer of 64 bits"),
    ],
)
def test_partitions_that_are_refused(options: dict[str, Any], message: str) -> None:
    module = Net()
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module))
    with pytest.raises(ValueError, match=message):
        ak.ComposedModel(module, bank, **options)


def test_coefficients_of_another_bank_are_refused(tmp_path: Path) -> None:
    model, path = coefficients(tmp_path)
    vectors = vectors_of(model)
    base = dict(model.bank.base)

    def refused(bank: ak.TaskVectorBank, message: str, **kwargs: Any) -> None:
        other = ak.ComposedModel(module_of(bank), bank, **kwargs)
        with pytest.raises(ValueError, match=message):
            other.load_coefficients(path)
        assert other.coef.count_nonzero() == 0

    renamed = {"a": vectors[0], "b": vectors[1], "d": vectors[2]}
    pack = ak.TaskVectorBank.from_task_vectors
    refused(
        pack(base, renamed),
        "another bank, its task vectors differ: not in this bank: c; only in this bank: d",
    )
    refused(pack(base, vectors[:2]), "not in this bank: c; only in this bank: none")
    refused(
        pack(base, vectors, exclude="norm.*"),
        r"its blocks differ: not in this bank: norm\.weight, norm\.bias; only in this bank: none",
    )
    changed = {**base, "out.bias": base["out.bias"] + 1e-3}
    refused(pack(changed, vectors), "learned on another base model")
    refused(pack(base, vectors), r"\(3, 6\).*granularity='task'.*\(3,\)", granularity="task")
    parted = {"granularity": "partition", "partitions": 5}
    refused(pack(base, vectors), r"\(3, 6\).*granularity='partition'.*\(3, 6, 5\)", **parted)
    vectors[0].save(path)
    with pytest.raises(FileFormatError, match=r"atlas_kernels\.coefficients, found"):
        model.load_coefficients(path)
    with pytest.raises(FileNotFoundError):
        model.load_coefficients(tmp_path / "none")


def test_deepcopy_is_independent() -> None:
    _, model = make_model()
    model.eval()
    randomise(model)
    with torch.no_grad():
        before = model(TOKENS)
        twin = copy.deepcopy(model)
        assert same_bits(twin(TOKENS), before)
        twin.coef.zero_()
        assert same_bits(model(TOKENS), before)
        assert same_bits(twin(TOKENS), twin.module(TOKENS))
    # A deep copy in the middle of recorded weights: they are no leaves and cannot be copied.
    with model.composed_once():
        model(TOKENS)
        copy.deepcopy(model)


def test_state_dict_round_trip() -> None:
    _, model = make_model()
    _, other = make_model()
    randomise(model)
    model(TOKENS)  # moves the statistics
    other.bank = model.bank
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    assert same_bits(model(TOKENS), other(TOKENS))
    assert same_bits(other.coef, model.coef)


def test_to_a_device() -> None:
    _, model = make_model()
    with torch.no_grad():
        model(TOKENS)
    assert model.to(torch.device("cpu")) is model
    assert model.bank.device == torch.device("cpu")
    moved = copy.deepcopy(model).to("meta")
    assert moved.coef.device == moved.bank.device == torch.device("meta")
    assert all(weight.device == torch.device("meta") for weight in moved.weights().values())


@pytest.mark.parametrize("what", ["model", "its module", "a part before", "a part after"])
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_compiled_module(what: str) -> None:
    module, model = make_model()
    if what == "a part before":
        model.module.hidden.compile(backend="aot_eager")
        model = ak.ComposedModel(model.module, model.bank)
    randomise(model)
    model.eval()
    torch._dynamo.reset()
    plain = model.merge().eval()
    with torch.no_grad():
        expected = plain(TOKENS)
    weights = {name: w.clone() for name, w in model.bank.compose(model.coef).items()}
    output = functional_call(plain, weights, (TOKENS,))
    (gradient,) = torch.autograd.grad(output.square().sum(), model.coef)
    compiled: Any = model
    if what == "model":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif what == "its module":
        compiled = torch.compile(model.module, backend="aot_eager")
    elif what == "a part after":
        model.module.hidden.compile(backend="aot_eager")
    output = compiled(TOKENS)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)
    (compiled_gradient,) = torch.autograd.grad(output.square().sum(), model.coef)
    assert torch.allclose(compiled_gradient, gradient, rtol=1e-4, atol=1e-4)
    # A change of coef reaches what was compiled, with and without gradients.
    with torch.no_grad():
        model.coef.zero_()
        assert torch.allclose(compiled(TOKENS), module.eval()(TOKENS), rtol=1e-5, atol=1e-5)
        model.coef.fill_(0.5)
        assert torch.allclose(compiled(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(TOKENS), module(TOKENS), atol=1e-3)


def test_modules_that_do_not_fit() -> None:
    module = Net()
    bank = ak.TaskVectorBank.from_task_vectors(module, make_vectors(module))

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(6, 7)

    for other, message in (
        (nn.Linear(2, 2), r"no parameter 'embed\.weight'.*another architecture.*weight, bias"),
        (Wide(), r"'hidden\.weight' has shape \(7, 6\), but the bank's base has \(6, 6\)"),
        (Net().half(), r"'embed\.weight' has dtype torch\.float16, but .* torch\.float32"),
        (Net().to("meta"), r"'embed\.weight' has device meta, but .* cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            ak.ComposedModel(other, bank)
    with pytest.raises(
        ValueError, match="unknown granularity 'layer': expected 'task', 'block' or"
    ):
        ak.ComposedModel(module, bank, granularity="layer")  # type: ignore[arg-type]


def test_tied_parameters_that_the_bank_holds_twice_are_refused() -> None:
    module = Net()
    copies = {name: value.clone() for name, value in module.state_dict().items()}
    bank = ak.TaskVectorBank.from_task_vectors(copies, make_vectors(module))
    assert "out.weight" in bank.blocks
    with pytest.raises(ValueError, match=r"'embed\.weight' and 'out\.weight' are one tied"):
        ak.ComposedModel(module, bank)


def test_a_refused_module_stays_as_it_was() -> None:
    module = nn.Linear(2, 2)
    bank = make_model()[1].bank
    with pytest.raises(ValueError, match="no parameter"):
        ak.ComposedModel(module, bank)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_half_precision_module() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).bfloat16()
    tuned = {key: value + 0.5 for key, value in module.state_dict().items()}
    vector = ak.TaskVector.from_state_dicts(module.state_dict(), tuned, name="t")
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector])
    model = ak.ComposedModel(module, bank)
    x = torch.randn(7, 5).bfloat16()
    assert same_bits(model(x), module(x))
    model(x).float().sum().backward()
    # Coefficients learn in float32, whatever the weights are stored in.
    assert model.coef.dtype == torch.float32
    assert model.coef.grad is not None
    assert model.coef.grad.abs().min() > 0


def test_a_bank_without_blocks() -> None:
    module = Net().eval()
    bank = ak.TaskVectorBank.from_task_vectors(module, [])
    model = ak.ComposedModel(module, bank)
    assert same_bits(model(TOKENS), module(TOKENS))
    assert same_bits(model.merge()(TOKENS), module(TOKENS))


@pytest.mark.parametrize("name", ["hidden.bias", "frozen.weight"])
def test_a_module_with_other_weights_than_the_base_is_refused(name: str) -> None:
    _, model = make_model()
    module = module_of(model.bank)
    with torch.no_grad():
        dict(module.named_parameters())[name].view(-1)[0] += 1e-3
    with pytest.raises(ValueError, match=f"'{name}' differs from the bank's base"):
        ak.ComposedModel(module, model.bank)


@pytest.mark.parametrize("train", [False, True])
def test_recorded_weights_serve_any_number_of_backward_passes(train: bool) -> None:
    _, model = make_model()
    randomise(model)
    model.train(train)
    first = model.weights()
    assert all(weight is first[name] for name, weight in model.weights().items())
    gradients = []
    with counted() as calls:
        for _ in range(2):
            model.coef.grad = None
            model(TOKENS).square().sum().backward()
            gradients.append(model.coef.grad)
        for _ in range(2):
            sums = sum((k + 1) * w.square().sum() for k, w in enumerate(first.values()))
            gradients.append(torch.autograd.grad(sums, model.coef)[0])
    assert calls["arena_compose"] == 0
    assert gradients[0].count_nonzero()
    assert gradients[2].count_nonzero()
    assert torch.equal(*gradients[2:])
    gradients = gradients[:2]
    assert torch.equal(*gradients)


def test_two_backwards_inside_composed_once_add_up() -> None:
    _, model = make_model()
    randomise(model)
    (model(TOKENS).sum() + model(TOKENS, scale=2.0).square().sum()).backward()
    expected, model.coef.grad = model.coef.grad, None
    with model.composed_once():
        model(TOKENS).sum().backward()
        model(TOKENS, scale=2.0).square().sum().backward()
    # Two sums of two float32 gradients, each over at most 11 * 6 products per block.
    torch.testing.assert_close(model.coef.grad, expected, rtol=1e-4, atol=1e-4)


def test_another_bank_is_noticed() -> None:
    _, model = make_model()
    randomise(model)
    model.eval()
    with torch.no_grad():
        before = model.weights()["hidden.bias"].clone()
        scaled = [2 * vector for vector in vectors_of(model)]
        model.bank = ak.TaskVectorBank.from_task_vectors(
            model.bank.base, dict(zip("abc", scaled, strict=True))
        )
        base = model.bank.base["hidden.bias"]
        after = model.weights()["hidden.bias"]
    torch.testing.assert_close(after - base, 2 * (before - base), rtol=1e-4, atol=1e-5)


def test_merged_weights_can_be_trained() -> None:
    _, model = make_model()
    merged = model.merge()
    merged(TOKENS).sum().backward()
    assert all(p.requires_grad for p in merged.parameters())
    assert not any(p.requires_grad for p in model.module.parameters())


def test_other_dtypes_are_refused() -> None:
    _, model = make_model()
    for convert in (model.half, model.double):
        with pytest.raises(TypeError, match="keeps the dtypes of its bank"):
            convert()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_copy_shares_the_bank() -> None:
    _, model = make_model()
    assert copy.deepcopy(model).bank is model.bank
