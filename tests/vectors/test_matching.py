"""Two checkpoints of one model, as people have them: buffers, ties, codes in place of weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import same_bits
from torch import Tensor, nn

import atlas_kernels as ak


class Router(nn.Module):
    """A parameter, a buffer that training changes, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.register_buffer("score_correction_bias", torch.zeros(3))
        self.register_buffer("logits_bias", torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.gate(x) + self.score_correction_bias + self.logits_bias
        return result


def tuned(module: nn.Module) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["gate.weight"] += 1
    state["score_correction_bias"] += 0.5
    return state


def test_buffers_of_a_module_are_kept_apart() -> None:
    module = Router()
    other = Router()
    other.load_state_dict(tuned(module))
    vector = ak.TaskVector.from_state_dicts(module, other, dtype=torch.float32)
    assert list(vector.deltas) == ["gate.weight", "gate.bias"]
    assert list(vector.statistics) == ["score_correction_bias", "logits_bias"]
    assert vector.statistics["score_correction_bias"].tolist() == [0.5] * 3


def test_a_vector_of_state_dicts_with_buffers_fits_the_module() -> None:
    module = Router()
    state = tuned(module)
    vector = ak.TaskVector.from_state_dicts(module.state_dict(), state, torch.float32, "v")
    bank = ak.TaskVectorBank.from_task_vectors(module, [vector], codec="fp32")
    assert bank.blocks == ("gate.weight",)
    assert {"score_correction_bias", "logits_bias"} <= set(bank.constants)
    model = ak.ComposedModel(module, bank)
    with torch.no_grad():
        model.coef.fill_(1.0)
    x = torch.randn(2, 4)
    expected = x @ state["gate.weight"].T + state["gate.bias"]
    assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    applied = vector.apply_to(Router())
    assert applied.score_correction_bias.tolist() == [0.5] * 3
    # A bank of the state dict alone does not know: the model says what to do.
    bank = ak.TaskVectorBank.from_task_vectors(Router().state_dict(), {}, codec="fp32")
    plain = {name: value.clone() for name, value in module.state_dict().items()}
    bank = ak.TaskVectorBank.from_task_vectors(plain, [vector], codec="fp32")
    with pytest.raises(ValueError, match=r"'score_correction_bias' is a buffer.*exclude="):
        ak.ComposedModel(Router(), bank)


def test_a_tied_head_that_one_file_leaves_out() -> None:
    embedding = torch.randn(5, 4)
    both = {"embed.weight": embedding, "head.weight": embedding, "bias": torch.zeros(5)}
    one = {"embed.weight": embedding + 1, "bias": torch.ones(5)}
    for pretrained, finetuned in (
        (both, one),
        (
            {"embed.weight": embedding, "bias": torch.zeros(5)},
            {**one, "head.weight": embedding + 1},
        ),
        # The same values in memory of their own.
        ({**both, "head.weight": embedding.clone()}, one),
    ):
        vector = ak.TaskVector.from_state_dicts(pretrained, finetuned, torch.float32)
        assert list(vector.deltas) == ["embed.weight", "bias"]
        assert torch.allclose(vector.deltas["embed.weight"], torch.ones(5, 4), atol=1e-6)
    apart = {**one, "head.weight": embedding + 2}
    del both["head.weight"]
    with pytest.raises(ValueError, match=r"not in the pre-trained model: head.weight.*embed"):
        ak.TaskVector.from_state_dicts(both, apart)


WEIGHT = {"a.weight": torch.randn(4, 8)}


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"a.weight": torch.randn(4, 8).to(torch.float8_e4m3fn)}, "float8_e4m3fn codes"),
        ({"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.weight_scale": torch.ones(4)},
         "8-bit codes with scales"),
        ({"a.qweight": torch.zeros(4, 8).int(), "a.scales": torch.ones(4), **WEIGHT},
         "GPTQ or AWQ"),
        ({"a.weight": torch.zeros(16, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(4)},
         "bitsandbytes"),
        ({"a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4)},
         "bitsandbytes"),
    ],
)  # fmt: skip
def test_quantised_checkpoints_are_refused(state: Any, kind: str) -> None:
    message = rf"quantised \({kind}, in 'a.*dequantise it first"
    with pytest.raises(ValueError, match=message):
        ak.TaskVector.from_state_dicts(WEIGHT, state)
    with pytest.raises(ValueError, match=message):
        ak.TaskVector.from_state_dicts(state, WEIGHT)
    with pytest.raises(ValueError, match=message):
        ak.TaskVectorBank.from_task_vectors(state, {})


def test_an_integer_tensor_in_place_of_a_float_is_listed() -> None:
    integers = {"a.weight": torch.zeros(4, 8).long(), "b": torch.ones(2)}
    with pytest.raises(ValueError, match=r"a.weight: torch.float32 in one model, torch.int64"):
        ak.TaskVector.from_state_dicts({**WEIGHT, "b": torch.ones(2)}, integers)


@pytest.mark.parametrize("state", [{}, {"steps": torch.tensor(3)}])
def test_nothing_to_learn_from(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="hold no floating-point tensors"):
        ak.TaskVector.from_state_dicts(state, state)


def test_other_things_than_models_and_vectors() -> None:
    with pytest.raises(TypeError, match="the fine-tuned model is a list, expected a state dict"):
        ak.TaskVector.from_state_dicts(WEIGHT, [WEIGHT])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a task vector is a dict, expected a TaskVector"):
        ak.TaskVectorBank.from_task_vectors(WEIGHT, [WEIGHT])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="codec is a NoneType"):
        ak.TaskVectorBank.from_task_vectors(WEIGHT, {}, codec=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the base is a list"):
        ak.TaskVectorBank.from_task_vectors([WEIGHT], {})  # type: ignore[arg-type]


def test_the_vector_of_a_module_is_that_of_its_state_dict() -> None:
    module = nn.Linear(3, 2)
    other = nn.Linear(3, 2)
    of_modules = ak.TaskVector.from_state_dicts(module, other)
    of_states = ak.TaskVector.from_state_dicts(module.state_dict(), other.state_dict())
    assert of_modules.base == of_states.base
    for name, delta in of_states.deltas.items():
        assert isinstance(delta, Tensor)
        assert same_bits(of_modules.deltas[name], delta)
