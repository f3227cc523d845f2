"""Files written by version 0.1 stay readable: a bank, a task vector, coefficients of partitions."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import atlas_kernels as ak

FILES = Path(__file__).parents[1] / "fixtures"
BLOCKS = ("a.weight", "a.bias", "norm.weight", "norm.bias", "b.weight")
# Of the composed blocks' bytes, as version 0.1 gave them; the low-rank block's are a matrix
# product's, which rounds differently from machine to machine.
DIGESTS = {
    "a.weight": "3db6b71b490b6089",
    "a.bias": "747d314a7bffe9d7",
    "norm.weight": "c2d71ee70b002527",
    "norm.bias": "f9d85542d6eec738",
}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(40, 12)
        self.norm = nn.BatchNorm1d(12)
        self.b = nn.Linear(12, 6, bias=False)


@pytest.mark.parametrize("mmap", [True, False])
def test_bank_and_coefficients(mmap: bool) -> None:
    bank = ak.TaskVectorBank.load(FILES / "bank-0.1.safetensors", mmap=mmap)
    assert bank.names == ("task-0", "task-1", "task-2")
    assert bank.blocks == BLOCKS
    coef, seed = ak.read_coefficients(FILES / "coefficients-0.1.safetensors", bank)
    assert coef.shape == (3, 5, 2)
    assert seed == 7
    composed = bank.compose(coef, seed=seed)
    assert {name: digest(composed[name]) for name in DIGESTS} == DIGESTS
    # Float32, sums of a few terms below 10 in magnitude.
    assert composed["b.weight"].double().sum().item() == pytest.approx(6.396910719, abs=1e-4)


def test_model() -> None:
    bank = ak.TaskVectorBank.load(FILES / "bank-0.1.safetensors")
    module = Net()
    module.load_state_dict(bank.state_dict(torch.zeros(3)), strict=False)
    model = ak.ComposedModel(module, bank, granularity="partition", partitions=2)
    model.load_coefficients(FILES / "coefficients-0.1.safetensors")
    assert model.seed == 7
    assert {name: digest(model.weights()[name].detach()) for name in DIGESTS} == DIGESTS


def test_vector() -> None:
    vector = ak.TaskVector.load(FILES / "vector-0.1.safetensors")
    assert tuple(vector.deltas) == BLOCKS
    assert isinstance(vector.deltas["b.weight"], ak.LowRank)
    assert set(vector.statistics) == {"norm.running_mean", "norm.running_var"}
    assert vector.norm() == pytest.approx(6.572472585326065, rel=1e-9)
