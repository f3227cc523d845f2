"""Composed weights stand in the module: every entrance, every thread, and nothing to put back."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from strategies import same_bits
from torch import Tensor, nn

import atlas_kernels as ak

MEMORY = ("whole", "recompute")


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


def make(memory: Any, values: float = 0.5) -> tuple[ak.ComposedModel, nn.Module]:
    """A composed model, and the plain module that it should be."""
    torch.manual_seed(0)
    module = Text()
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    vectors = [
        ak.TaskVector({name: torch.randn_like(p) for name, p in base.items()}, name=f"v{i}")
        for i in range(2)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors, codec="fp32")
    model = ak.ComposedModel(module, bank, memory=memory).eval()
    with torch.no_grad():
        model.coef.fill_(values)
    return model, model.merge().eval()


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("gradients", [True, False])
def test_every_entrance(memory: str, gradients: bool) -> None:
    model, plain = make(memory)
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
def test_gradients_by_another_entrance(memory: str) -> None:
    model, _ = make(memory)
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


def test_lists_of_parameters_show_the_base() -> None:
    model, plain = make("whole")
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


def test_concurrent_evaluation() -> None:
    model, plain = make("whole")
    expected = plain(TOKENS).detach()
    base = {name: value.clone() for name, value in model.module.state_dict().items()}

    def work(k: int) -> None:
        for _ in range(100):
            with torch.no_grad():
                assert same_bits(model(TOKENS), expected)

    in_threads(4, work)
    for name, value in model.module.state_dict().items():
        assert same_bits(value, base[name])


def test_concurrent_training() -> None:
    """Every thread has a graph of its own: no backward pass meets another's."""
    model, _ = make("whole")
    model.train()
    (expected,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)

    def work(k: int) -> None:
        for _ in range(25):
            (gradient,) = torch.autograd.grad(model(TOKENS).square().sum(), model.coef)
            assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-5)

    in_threads(4, work)


@pytest.mark.parametrize("memory", MEMORY)
def test_an_interrupt_at_any_line_leaves_the_module_as_it_was(memory: str) -> None:
    model, plain = make(memory)
    expected = plain(TOKENS).detach()
    base = {name: value.clone() for name, value in model.module.state_dict().items()}
    interrupted = 0
    for after in range(0, 400, 3):
        lines = 0

        def trace(frame: Any, event: str, argument: Any, after: int = after) -> Any:
            nonlocal lines
            if "atlas_kernels" not in frame.f_code.co_filename:
                return None
            if event == "line":
                lines += 1
                if lines > after:
                    raise KeyboardInterrupt
            return trace

        with torch.no_grad():
            model.coef.fill_(0.5)
            sys.settrace(trace)
            try:
                model(TOKENS)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(None)
            for name, value in model.module.state_dict().items():
                assert same_bits(value, base[name])
            assert same_bits(model(TOKENS), expected)
            assert same_bits(model.module(TOKENS), expected)
    assert interrupted > 10


def test_models_take_turns_on_one_module() -> None:
    first, plain = make("whole")
    second = ak.ComposedModel(first.module, first.bank)
    with torch.no_grad():
        base = second(TOKENS)
        assert same_bits(first(TOKENS), plain(TOKENS))
        assert same_bits(second(TOKENS), base)
        assert not torch.allclose(base, plain(TOKENS), atol=1e-3)
