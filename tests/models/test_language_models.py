"""Language models of `transformers` as composed models: any architecture, every memory mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import atlas_kernels as ak

transformers = pytest.importorskip("transformers")

MEMORY = ["whole", "recompute", "stream"]
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma": SIZES,
    "mistral": SIZES,
    "mixtral": SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "phi": SIZES | {"num_key_value_heads": 2},
    "gpt2": {
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
T5 = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BERT = SIZES | {"num_labels": 3}
MODELS = [*DECODERS, "t5", "bert"]
TOKENS = torch.tensor([[3, 5, 7, 11, 13, 17], [19, 4, 6, 8, 4, 10]])


def language_model(kind: str) -> nn.Module:
    """With weights large enough that every block has a say in the output."""
    sizes, auto = DECODERS.get(kind), transformers.AutoModelForCausalLM
    if kind == "t5":
        sizes, auto = T5, transformers.AutoModelForSeq2SeqLM
    if kind == "bert":
        sizes, auto = BERT, transformers.AutoModelForSequenceClassification
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(transformers.AutoConfig.for_model(kind, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def deltas(model: nn.Module) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [
        {name: torch.randn_like(p).mul_(0.1) for name, p in model.named_parameters()}
        for _ in range(2)
    ]


def bank_of(model: nn.Module, changes: list[dict[str, Tensor]], path: Path) -> ak.TaskVectorBank:
    """Through a file, from which a model can stream."""
    vectors = [ak.TaskVector(change, name=f"v{i}") for i, change in enumerate(changes)]
    ak.TaskVectorBank.from_task_vectors(model, vectors, codec="fp32").save(path)
    return ak.TaskVectorBank.load(path)


def logits(model: nn.Module, kind: str, **options: Any) -> Tensor:
    if kind == "t5":
        options["decoder_input_ids"] = TOKENS[:, :4]
    result: Tensor = model(input_ids=TOKENS, **options).logits
    return result


def by_hand(
    model: nn.Module,
    changes: list[dict[str, Tensor]],
    coef: Tensor,
    blocks: tuple[str, ...],
    kind: str,
) -> Tensor:
    weights = {
        name: p
        + sum(coef[i, blocks.index(name)] * change[name] for i, change in enumerate(changes))
        for name, p in model.named_parameters()
    }
    options = {"decoder_input_ids": TOKENS[:, :4]} if kind == "t5" else {}
    output = functional_call(model, weights, (), {"input_ids": TOKENS, **options}, tie_weights=True)
    result: Tensor = output.logits
    return result


def agree(found: Tensor, expected: Tensor) -> None:
    # Both are float32 and differ in the rounding of the composed weights: eps / 2 of each, and of
    # what each of some 30 matrix products of at most 40 terms makes of it.
    # 30 * sqrt(40) * eps = 2.3e-5 at the magnitude of the largest.
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-5 * max(scale, 1e-3))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients(kind: str, memory: ak.Memory, tmp_path: Path) -> None:
    module = language_model(kind)
    changes = deltas(module)
    bank = bank_of(module, changes, tmp_path / "bank.safetensors")
    plain = language_model(kind)
    model = ak.ComposedModel(module, bank, memory=memory)
    coef = torch.randn(2, len(bank.blocks), generator=torch.Generator().manual_seed(2)).mul_(0.5)
    with torch.no_grad():
        model.coef.copy_(coef)
    coef.requires_grad_()
    expected = by_hand(plain, changes, coef, bank.blocks, kind)
    assert not torch.allclose(expected, logits(plain, kind))
    found = logits(model, kind)
    agree(found, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (wanted,) = torch.autograd.grad((expected * weight).sum(), coef)
    (gradient,) = torch.autograd.grad((found * weight).sum(), model.coef)
    agree(gradient, wanted)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing(kind: str, memory: ak.Memory, tmp_path: Path) -> None:
    module = language_model(kind)
    bank = bank_of(module, deltas(module), tmp_path / "bank.safetensors")
    model = ak.ComposedModel(module, bank, memory=memory).train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        model.coef.fill_(0.3)
    (expected,) = torch.autograd.grad(logits(model, kind).square().sum(), model.coef)
    for reentrant in (False, True):
        module.gradient_checkpointing_enable({"use_reentrant": reentrant})
        module.enable_input_require_grads()
        model.coef.grad = None
        logits(model, kind, use_cache=False).square().sum().backward()
        agree(model.coef.grad, expected)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", [*DECODERS, "t5"])
def test_generation_with_a_cache(kind: str, memory: ak.Memory, tmp_path: Path) -> None:
    module = language_model(kind)
    bank = bank_of(module, deltas(module), tmp_path / "bank.safetensors")
    model = ak.ComposedModel(module, bank, memory=memory).eval()
    with torch.no_grad():
        model.coef.fill_(1.5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    merged = model.merge()
    expected = merged.generate(TOKENS, **options)
    assert not torch.equal(expected, language_model(kind).generate(TOKENS, **options))
    assert torch.equal(module.generate(TOKENS, **options), expected)
    assert torch.equal(module.generate(TOKENS, use_cache=False, **options), expected)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ["llama", "gemma", "mixtral"])
def test_bfloat16(kind: str, memory: ak.Memory, tmp_path: Path) -> None:
    """The same bits as a model that holds the composed weights."""
    module = language_model(kind).to(torch.bfloat16)
    bank = bank_of(module, deltas(module), tmp_path / "bank.safetensors")
    model = ak.ComposedModel(module, bank, memory=memory)
    with torch.no_grad():
        model.coef.fill_(0.5)
        assert torch.equal(logits(model, kind), logits(model.merge(), kind))
