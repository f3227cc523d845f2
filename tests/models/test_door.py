"""Composed weights stand in the module: every entrance, every thread, and nothing to put back."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from typing import Any

import pytest
import torch
from strategies import same_bits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import atlas_kernels as ak

MEMORY = ("whole", "recompute", "stream")


class Text(nn.Module):
    """A module with several entrances."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.tower = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def encode(self, tokens: Tensor) -> Tensor:
        encoded: Tensor = self.tower(self.embed(tokens))
        return encoded

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encode(tokens))
        return logits


TOKENS = torch.arange(7)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ak.TaskVectorBank:
    torch.manual_seed(0)
    module = Text()
    vectors = [
        ak.TaskVector({name: torch.randn_like(p) for name, p in module.named_parameters()}, name=n)
        for n in "ab"
    ]
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    return ak.TaskVectorBank.pack(path, module, vectors, codec="fp32")


def make(
    bank: ak.TaskVectorBank, memory: Any, values: float = 0.5
) -> tuple[ak.ComposedModel, nn.Module]:
    """A composed model, and the plain module that it should be."""
    module = Text()
    module.load_state_dict(bank.state_dict(torch.zeros(2)))
    model = ak.ComposedModel(module, bank, memory=memory).eval()
    with torch.no_grad():
        model.coef.fill_(values)
    plain = Text()
    plain.load_state_dict(bank.state_dict(model.coef.detach()))
    return model, plain.eval()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("gradients", [True, False])
def test_every_entrance(bank: ak.TaskVectorBank, memory: str, gradients: bool) -> None:
    model, plain = make(bank, memory)
    with torch.set_grad_enabled(gradients):
        # Before any forward pass of the model itself.
        assert same_bits(model.module.encode(TOKENS), plain.encode(TOKENS))
        assert same_bits(model.module.tower(torch.ones(2, 5)), plain.tower(torch.ones(2, 5)))
        assert same_bits(model.module(TOKENS), plain(TOKENS))
        if memory == "whole":
            assert model.module.head.weight is model.module.embed.weight
        with torch.no_grad():
            model.coef.add_(0.25)
        changed = model.merge().eval()
        # A change of coef needs no call of the model to arrive.
        assert same_bits(model.module.encode(TOKENS), changed.encode(TOKENS))
        assert not torch.allclose(model.module.encode(TOKENS), plain.encode(TOKENS), atol=1e-3)


@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_by_another_entrance(bank: ak.TaskVectorBank, memory: str) -> None:
    model, _ = make(bank, memory)
    for train in (False, True):
        model.train(train)
        gradients = []
        for run in (lambda: model(TOKENS), lambda: model.module(TOKENS)) * 2:
            (gradient,) = torch.autograd.grad(run().square().sum(), model.coef)
            gradients.append(gradient)
        assert gradients[0].abs().min() > 1e-3
        # The same products, summed in the same order; uses of a tied block in another.
        for other in gradients[1:]:
            assert torch.allclose(other, gradients[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_of_a_part(bank: ak.TaskVectorBank, memory: str) -> None:
    """Blocks that it does not use have none, though they share a bucket with its own."""
    model, plain = make(bank, memory)
    inputs = torch.randn(4, 5)
    (found,) = torch.autograd.grad(model.module.tower(inputs).square().sum(), model.coef)
    weights = bank.compose(model.coef)
    tower = {
        name.removeprefix("tower."): weight for name, weight in weights.items() if "tower" in name
    }
    output = functional_call(plain.tower, tower, (inputs,))
    (expected,) = torch.autograd.grad(output.square().sum(), model.coef)
    # The same products, summed in the same order.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    unused = torch.tensor([not block.startswith("tower.") for block in bank.blocks])
    assert torch.equal(found == 0, unused.expand(2, -1))


def test_lists_of_parameters_show_the_base(bank: ak.TaskVectorBank) -> None:
    model, plain = make(bank, "whole")
    base = model.bank.base
    assert all(same_bits(value, base[name]) for name, value in model.module.named_parameters())
    for name, value in model.module.state_dict().items():
        assert same_bits(value, base.get(name, base["embed.weight"]))
    assert not torch.equal(plain.embed.weight, base["embed.weight"])


def in_threads(count: int, work: Any) -> None:
    """Runs work(k) in as many threads at once; raises what any of them raised."""
    barrier, errors = threading.Barrier(count), []

    def run(k: int) -> None:
        barrier.wait()
        try:
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    interval = sys.getswitchinterval()
    # Threads take turns as often as can be.
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("memory", MEMORY)
def test_concurrent_evaluation(bank: ak.TaskVectorBank, memory: str) -> None:
    """While another thread copies and merges the model."""
    model, plain = make(bank, memory)
    expected = plain(TOKENS).detach()
    base = {name: value.clone() for name, value in model.module.state_dict().items()}

    def work(k: int) -> None:
        for _ in range(100 if memory == "whole" else 20):
            with torch.no_grad():
                if k:
                    assert same_bits(model(TOKENS), expected)
                    assert same_bits(model.module(TOKENS), expected)
                else:
                    assert same_bits(model.merge()(TOKENS), expected)
                    assert same_bits(copy.deepcopy(model)(TOKENS), expected)

    in_threads(4, work)
    for name, value in model.module.state_dict().items():
        assert same_bits(value, base[name])


@pytest.mark.parametrize("memory", MEMORY)
def test_concurrent_training(bank: ak.TaskVectorBank, memory: str) -> None:
    """Every thread has a graph of its own, whether or not it shares that of its own passes."""
    model, _ = make(bank, memory)
    model.train()
    (expected,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)

    def work(k: int) -> None:
        for _ in range(25 if memory == "whole" else 5):
            with model.composed_once() if k % 2 else contextlib.nullcontext():
                outputs = [model(TOKENS), model.module(TOKENS)]
                loss = sum(output.square().sum() for output in outputs)
                (gradient,) = torch.autograd.grad(loss, model.coef)
            assert torch.allclose(gradient, 2 * expected, rtol=1e-5, atol=1e-5)

    in_threads(4, work)


def test_accumulating_in_one_thread_is_nothing_to_another(bank: ak.TaskVectorBank) -> None:
    model, _ = make(bank, "whole")
    (expected,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)
    with model.composed_once(accumulate=True):
        for run in (model, model.module.forward):
            run(TOKENS).square().sum().backward()

        def work(k: int) -> None:
            (gradient,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)
            assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)

        in_threads(1, work)
        assert model.coef.grad is None
    assert torch.allclose(model.coef.grad, 2 * expected, rtol=1e-5, atol=1e-5)


def test_models_that_share_a_module_do_not_run_at_once(bank: ak.TaskVectorBank) -> None:
    first, plain = make(bank, "whole")
    second = ak.ComposedModel(first.module, bank, memory="recompute")
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(10)

    handle = first.module.tower.register_forward_pre_hook(wait)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(first(TOKENS)))
    thread.start()
    inside.wait(10)
    try:
        for other in (second, lambda _: ak.ComposedModel(first.module, bank)):
            with pytest.raises(RuntimeError, match=r"take turns: give .* a copy of the module"):
                other(TOKENS)
    finally:
        go_on.set()
        thread.join()
    handle.remove()
    assert same_bits(outputs[0], plain(TOKENS))
    # Afterwards they take turns again.
    assert not same_bits(second(TOKENS), outputs[0])
    assert same_bits(first(TOKENS), outputs[0])


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("gradients", [False, True])
def test_an_interrupt_at_any_line_leaves_the_module_as_it_was(
    bank: ak.TaskVectorBank, memory: str, gradients: bool
) -> None:
    model, plain = make(bank, memory)
    expected = plain(TOKENS).detach()
    base = {name: value.clone() for name, value in model.module.state_dict().items()}
    (gradient,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)

    def work() -> None:
        with torch.set_grad_enabled(gradients), model.composed_once(accumulate=gradients):
            output = model(TOKENS)
            if gradients:
                output.square().sum().backward()

    def interrupted(after: int) -> bool:
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if "atlas_kernels/models" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines > after:
                    raise KeyboardInterrupt
            return trace

        with torch.no_grad():
            # Composes anew.
            model.coef.fill_(0.5)
        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)
        return False

    def all_lines(_: int) -> None:
        after = 0
        while interrupted(after):
            for name, value in model.module.state_dict().items():
                assert same_bits(value, base[name])
            with torch.no_grad():
                assert same_bits(model.module(TOKENS), expected)
                assert same_bits(model(TOKENS), expected)
            (again,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)
            assert torch.allclose(again, gradient, rtol=1e-5, atol=1e-5)
            after += 1
        assert after > 50

    # An interrupt between the end of a `with` block and its exit leaves PyTorch's own modes behind.
    # Hooks for saved tensors do no harm to these passes, and end with their thread.
    in_threads(1, all_lines)


def test_function_transforms(bank: ak.TaskVectorBank) -> None:
    model, plain = make(bank, "whole")
    model.train()
    inputs = torch.randn(4, 5)
    (expected,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)

    def loss(coef: Tensor) -> Tensor:
        output: Tensor = functional_call(model, {"coef": coef}, (TOKENS,))
        return output.square().sum()

    found = vmap(grad(loss))(model.coef.detach().expand(2, -1, -1))
    assert torch.allclose(found, expected.expand(2, -1, -1), rtol=1e-5, atol=1e-5)
    # Of the inputs, with coefficients that require gradients.
    tower = model.module.tower
    assert torch.allclose(vmap(tower)(inputs), plain.tower(inputs), atol=1e-5)
    found, wanted = (
        grad(lambda x, part=part: part(x).square().sum())(inputs) for part in (tower, plain.tower)
    )
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_models_take_turns_on_one_module(bank: ak.TaskVectorBank) -> None:
    first, plain = make(bank, "whole")
    second = ak.ComposedModel(first.module, first.bank)
    with torch.no_grad():
        base = second(TOKENS)
        assert same_bits(first(TOKENS), plain(TOKENS))
        assert same_bits(second(TOKENS), base)
        assert not torch.allclose(base, plain(TOKENS), atol=1e-3)
