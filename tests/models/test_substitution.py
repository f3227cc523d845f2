"""Modules that run with other tensors than their own."""

import copy

import pytest
import torch
from strategies import same_bits
from test_recompute import Regions, assert_close, models
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import atlas_kernels as ak
from atlas_kernels.models.planning import activation_bytes
from atlas_kernels.models.substitution import call_with


class Shared(nn.Module):
    """A module in two places, a weight in two modules, a buffer, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.shift = nn.Parameter(torch.randn(4))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.again(self.first(x).tanh()).tanh()) * self.scale + self.shift


def test_every_place_is_swapped_and_put_back() -> None:
    module, other = Shared(), Shared()
    other.scale.fill_(-3)
    own = [*map(id, (*module.parameters(), *module.buffers()))]
    tensors = {
        n: t.detach().clone() for n, t in (*other.named_parameters(), *other.named_buffers())
    }
    x = torch.randn(2, 4)
    for _ in range(2):
        assert same_bits(call_with(module, tensors, (x,)), other(x))
        assert [*map(id, (*module.parameters(), *module.buffers()))] == own
    assert not same_bits(module(x), other(x))


def test_a_module_in_two_places_keeps_its_parameters() -> None:
    module = Shared()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    activation_bytes(module, [torch.randn(2, 4)])
    model, recompute = models(module)
    x = torch.randn(2, 4)
    model(x)
    assert all(type(p) is nn.Parameter for p in model.module.parameters())
    assert len(list(model.module.parameters())) == 3
    for name, value in model.module.state_dict().items():
        assert same_bits(value, state[name])
    with torch.no_grad():
        assert same_bits(model.merge()(x), recompute(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    """Runs parts again in the backward pass, where they find the same composed weights."""
    checkpointed, recompute = models(Regions(reentrant))
    module = Regions()
    module.load_state_dict(checkpointed.module.state_dict())
    plain = ak.ComposedModel(module, checkpointed.bank)
    for model in (plain, copy.deepcopy(checkpointed), checkpointed.to("cpu"), recompute):
        with torch.no_grad():
            model.coef.copy_(checkpointed.coef)
    x = torch.randn(5, 6, requires_grad=True)
    plain(x).square().sum().backward()
    for model in (copy.deepcopy(checkpointed), checkpointed, recompute):
        model(x).square().sum().backward()
        assert_close(model.coef.grad, plain.coef.grad)
    for other in (checkpointed.merge(), copy.deepcopy(checkpointed.module).requires_grad_(True)):
        other(x).square().sum().backward()
        assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_around_the_whole_model(reentrant: bool) -> None:
    """Runs it again with its composed weights."""
    model, _ = models(Regions())
    x = torch.randn(5, 6, requires_grad=True)
    model(x).square().sum().backward()
    expected, model.coef.grad = model.coef.grad, None
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert_close(model.coef.grad, expected)
