import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from strategies import same_bits
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.cli import main
from atlas_kernels.files.errors import FileFormatError

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "init_lora_weights": True}


def pair(module: str, out: int, width: int, rank: int = 4, name: str = "") -> dict[str, Tensor]:
    name = f".{name}" if name else ""
    return {
        f"{PREFIX}{module}.lora_A{name}.weight": torch.randn(rank, width),
        f"{PREFIX}{module}.lora_B{name}.weight": torch.randn(out, rank),
    }


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def factors(tensors: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    return tuple(tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_adapter(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {**pair("layers.0.query", 5, 7), **pair("head", 3, 5)}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    vector = ak.TaskVector.from_peft(write(tmp_path / "cars", tensors))
    assert (vector.name, vector.base, vector.statistics) == ("cars", {}, {})
    assert vector.deltas.keys() == {"layers.0.query.weight", "head.weight"}
    for module in ("layers.0.query", "head"):
        down, up = factors(tensors, module)
        delta = vector.deltas[f"{module}.weight"]
        assert same_bits(delta.up, up)
        assert same_bits(delta.down, down)
        assert delta.scale == 2.0
    assert ak.TaskVector.from_peft(tmp_path / "cars", name="mine").name == "mine"


def test_an_adapter_s_name_in_the_keys(tmp_path: Path) -> None:
    named = pair("fc", 5, 7, name="default")
    vector = ak.TaskVector.from_peft(write(tmp_path, named))
    assert list(vector.deltas) == ["fc.weight"]
    with pytest.raises(FileFormatError, match="several adapters for 'fc'"):
        ak.TaskVector.from_peft(write(tmp_path, {**named, **pair("fc", 5, 7, name="other")}))


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_patterns_of_ranks_and_alphas(rank_stabilised: bool, tmp_path: Path) -> None:
    tensors = {
        **pair("layers.0.query", 5, 7),
        **pair("layers.1.query", 5, 7, rank=2),
        **pair("layers.1.value", 5, 7, rank=2),
        **pair("layers.10.value", 5, 7),
        **pair("layers.11.query", 5, 7),
        **pair("value", 5, 7),
    }
    folder = write(
        tmp_path,
        tensors,
        use_rslora=rank_stabilised,
        rank_pattern={r"layers\.1\..*": 2},
        # The first that matches counts, and only whole names of modules match.
        alpha_pattern={"1.query": 6, "query": 10, "value": 3, "layers.10.value": 99},
    )
    alphas = {
        "layers.0.query": (10, 4), "layers.1.query": (6, 2), "layers.1.value": (3, 2),
        "layers.10.value": (3, 4), "layers.11.query": (10, 4), "value": (3, 4),
    }  # fmt: skip
    deltas = ak.TaskVector.from_peft(folder).deltas
    assert len(deltas) == len(alphas)
    for module, (alpha, rank) in alphas.items():
        expected = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        assert deltas[f"{module}.weight"].scale == pytest.approx(expected, rel=1e-15)
        assert deltas[f"{module}.weight"].rank == rank


def test_weights_that_are_stored_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds (in, out)."""
    tensors = pair("c_attn", 15, 5)
    vector = ak.TaskVector.from_peft(write(tmp_path, tensors, fan_in_fan_out=True))
    down, up = factors(tensors, "c_attn")
    assert torch.allclose(vector.deltas["c_attn.weight"].dense(), 2 * (up @ down).T, atol=1e-5)
    bank = ak.TaskVectorBank.from_task_vectors({"c_attn.weight": torch.zeros(5, 15)}, [vector])
    assert bank.blocks == ("c_attn.weight",)


def test_the_forward_pass_of_a_convolution_and_an_embedding(tmp_path: Path) -> None:
    """As PEFT computes it: the adapter's own layers, one after the other."""
    down, up = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 1, bias=False)
    rows, columns = torch.randn(4, 11), torch.randn(5, 4)
    tensors = {
        f"{PREFIX}conv.lora_A.weight": down.weight.detach(),
        f"{PREFIX}conv.lora_B.weight": up.weight.detach(),
        f"{PREFIX}embed.lora_embedding_A": rows,
        f"{PREFIX}embed.lora_embedding_B": columns,
    }
    deltas = ak.TaskVector.from_peft(write(tmp_path, tensors)).deltas
    images, tokens = torch.randn(2, 3, 8, 8), torch.tensor([0, 3, 10])
    ours = nn.functional.conv2d(images, deltas["conv.weight"].dense())
    assert torch.allclose(ours, 2 * up(down(images)), atol=1e-4)
    ours = nn.functional.embedding(tokens, deltas["embed.weight"].dense())
    assert torch.allclose(ours, 2 * rows.T[tokens] @ columns.T, atol=1e-4)


def test_attention_of_open_clip(tmp_path: Path) -> None:
    """PEFT adapts in_proj_weight and out_proj of an nn.MultiheadAttention together."""
    block = "transformer.resblocks.0"
    tensors = {
        **pair(f"{block}.attn", 24, 8),
        **pair(f"{block}.attn.base_layer.out_proj", 8, 8, rank=4),
        **pair(f"{block}.mlp.c_fc", 32, 8),
    }
    folder = write(tmp_path, tensors, r=2, lora_alpha=2, rank_pattern={"attn": 4, "c_fc": 4})
    vector = ak.TaskVector.from_peft(folder, "t")
    base = {
        f"{block}.{name}": parameter.detach()
        for name, parameter in nn.ModuleDict(
            {
                "attn": nn.MultiheadAttention(8, 2),
                "mlp": nn.ModuleDict({"c_fc": nn.Linear(8, 32)}),
            }
        ).named_parameters()
    }
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector])
    assert bank.blocks == tuple(
        f"{block}.{name}"
        for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight")
    )
    down, up = factors(tensors, f"{block}.attn")
    delta = vector.deltas[f"{block}.attn.in_proj_weight"]
    assert torch.allclose(delta.dense(), 0.5 * up @ down, atol=1e-5)


def test_an_adapter_for_another_model(tmp_path: Path) -> None:
    vector = ak.TaskVector.from_peft(write(tmp_path / "t", pair("fc", 5, 7)))
    with pytest.raises(ValueError, match=r"'t', block 'fc.weight' has shape \(5, 7\).*\(7, 5\)"):
        ak.TaskVectorBank.from_task_vectors({"fc.weight": torch.zeros(7, 5)}, [vector])
    with pytest.raises(
        ValueError, match=r"'t' has the block 'fc.weight', but the base has no such"
    ):
        ak.TaskVectorBank.from_task_vectors({"fd.weight": torch.zeros(5, 7)}, [vector])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, r"use_dora\): DoRA .* not linear .*merge_and_unload"),
        ({"use_qalora": True}, "quantised layout"),
        ({"lora_bias": True}, "biases"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "tokens of the embedding"),
        ({"alora_invocation_tokens": [1]}, "some tokens only"),
        ({"layer_replication": [[0, 1]]}, "number of layers"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa_niter_16' changed the base"),
        ({"init_lora_weights": "loftq"}, "merge_and_unload"),
        ({"r": "many"}, "r or rank_pattern is damaged"),
        ({"r": None}, "r or rank_pattern is damaged"),
        ({"alpha_pattern": ["fc"]}, "lora_alpha or alpha_pattern is damaged"),
        ({"alpha_pattern": {"(": 1}}, "lora_alpha or alpha_pattern is damaged"),
        ({"lora_alpha": float("nan")}, "lora_alpha of 'fc' is nan, expected more than 0"),
        ({"r": 8}, r"'fc' have shapes A \(4, 7\) and B \(5, 4\), .* rank 8 as adapter_config.json"),
    ],
)
def test_configurations_that_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, pair("fc", 5, 7), **config)
    with pytest.raises(FileFormatError, match=message) as raised:
        ak.TaskVector.from_peft(folder)
    assert "adapter_" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva"])
def test_initialisations_that_leave_the_base(start: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, pair("fc", 5, 7), init_lora_weights=start)
    assert list(ak.TaskVector.from_peft(folder).deltas) == ["fc.weight"]


A, B = f"{PREFIX}fc.lora_A.weight", f"{PREFIX}fc.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{PREFIX}fc.bias": torch.ones(5)}, "fc.bias' is no LoRA factor"),
        ({f"{PREFIX}fc.lora_B.bias": torch.ones(5)}, "is no LoRA factor"),
        ({f"{PREFIX}head.modules_to_save.weight": torch.ones(5)}, "a module to save"),
        ({f"{PREFIX}fc.lora_magnitude_vector": torch.ones(5)}, "a DoRA magnitude"),
        ({A: None}, "factors of 'fc' are no pair"),
        ({B: None}, "factors of 'fc' are no pair"),
        ({A: None, B: None}, "holds no LoRA factors"),
        ({A: torch.ones(3, 7)}, r"shapes A \(3, 7\) and B \(5, 4\)"),
        ({A: torch.ones(4)}, "no pair of rank 4"),
        ({B: torch.ones(5, 4, 3, 3), A: torch.ones(4, 7, 3, 3)}, "no pair of rank 4"),
        ({B: torch.ones(5, 2, 1, 1), A: torch.ones(4, 7, 3, 3)}, "no pair of rank 4"),
        ({B: torch.ones(5, 4).half()}, "no pair of rank 4"),
        ({A: torch.ones(4, 7).to(torch.int8)}, "lora_A.weight' has dtype torch.int8"),
        ({f"{PREFIX}fc.lora_embedding_A": torch.ones(4, 7)}, "factors of 'fc' are no pair"),
    ],
)
def test_factors_that_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor | None] = {**pair("fc", 5, 7), **change}
    folder = write(tmp_path, {key: t for key, t in tensors.items() if t is not None})
    with pytest.raises(FileFormatError, match=message) as raised:
        ak.TaskVector.from_peft(folder)
    assert "adapter_model.safetensors: " in str(raised.value)


def test_factors_that_are_not_finite(tmp_path: Path) -> None:
    tensors = pair("fc", 5, 7)
    tensors[A][2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"finite.*\n.*fc.weight"):
        ak.TaskVector.from_peft(write(tmp_path, tensors))


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder that PEFT saved"):
        ak.TaskVector.from_peft(tmp_path / "nowhere")
    folder = write(tmp_path / "t", pair("fc", 5, 7))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file"):
        ak.TaskVector.from_peft(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(FileFormatError, match="not a readable safetensors file"):
        ak.TaskVector.from_peft(folder)
    for content in (b"{", b"\xff\xfe\x00", b""):
        (folder / "adapter_config.json").write_bytes(content)
        with pytest.raises(FileFormatError, match=r"adapter_config\.json: not readable as JSON"):
            ak.TaskVector.from_peft(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(FileFormatError, match="expected a JSON object"):
        ak.TaskVector.from_peft(folder)


def test_the_command_line_packs_a_folder(tmp_path: Path) -> None:
    tensors = pair("layer", 6, 4)
    folder = write(tmp_path / "cars", tensors)
    torch.save({"layer.weight": torch.zeros(6, 4)}, tmp_path / "base.pt")
    bank = tmp_path / "bank.safetensors"
    picture = tmp_path / "bank.png"
    packing = ["bank", str(tmp_path / "base.pt"), str(folder), "-o", str(bank), "--codec", "fp32"]
    assert main(packing) == 0
    assert main(["inspect", str(bank), "--picture", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    composed = ak.TaskVectorBank.load(bank).compose(torch.ones(1))["layer.weight"]
    down, up = (factor.double() for factor in factors(tensors, "layer"))
    # Four products and their sums, each rounding by half a unit of at most their magnitude.
    bound = 4 * 2**-23 * 2 * (up.abs() @ down.abs())
    assert bool(((composed - 2 * up @ down).abs() <= bound).all())


# With the base.


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)
        self.head = nn.Linear(6, 11, bias=False)


def test_dora_is_an_exact_delta_of_its_base(tmp_path: Path) -> None:
    module = Adapted()
    tensors = pair("first", 8, 6)
    down, up = factors(tensors, "first")
    magnitude = torch.rand(8) + 0.5
    tensors[f"{PREFIX}first.lora_magnitude_vector"] = magnitude
    folder = write(tmp_path, tensors, use_dora=True)
    with pytest.raises(FileFormatError, match=r"use_dora.*give the base \(base=\.\.\.\)"):
        ak.TaskVector.from_peft(folder)
    vector = ak.TaskVector.from_peft(folder, base=module)
    start = module.first.weight.detach()
    moved = start + 2.0 * up @ down
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True) - start
    # A product of rank 4, a norm of 6 terms, and a difference: roundings at magnitude one.
    torch.testing.assert_close(vector.deltas["first.weight"], expected, rtol=1e-5, atol=1e-5)
    assert set(vector.base) == {"first.weight"}
    ak.TaskVectorBank.from_task_vectors(module, [vector])


def test_what_was_trained_besides_is_a_delta_of_the_base(tmp_path: Path) -> None:
    module = Adapted()
    tensors = {
        **pair("first", 8, 6),
        f"{PREFIX}first.base_layer.bias": torch.ones(8),
        f"{PREFIX}second.bias": torch.ones(6),
        f"{PREFIX}head.modules_to_save.weight": torch.ones(11, 6),
    }
    folder = write(tmp_path, tensors, bias="all", modules_to_save=["head"])
    with pytest.raises(FileFormatError, match=r"trained besides.*give the base"):
        ak.TaskVector.from_peft(folder)
    vector = ak.TaskVector.from_peft(folder, base=module.state_dict())
    names = ["first.weight", "first.bias", "second.bias", "head.weight"]
    assert set(vector.deltas) == set(names)
    assert isinstance(vector.deltas["first.weight"], ak.LowRank)
    for name in names[1:]:
        applied = module.get_parameter(name) + vector.deltas[name]
        assert torch.allclose(applied, torch.ones_like(applied), atol=1e-6)
    wrong = {key: value for key, value in module.state_dict().items() if key != "second.bias"}
    with pytest.raises(FileFormatError, match=r"'second\.bias', which the base has not"):
        ak.TaskVector.from_peft(folder, base=wrong)


def test_biases_of_factors(tmp_path: Path) -> None:
    tensors = {**pair("first", 8, 6), f"{PREFIX}first.lora_B.bias": torch.ones(8)}
    vector = ak.TaskVector.from_peft(write(tmp_path, tensors, lora_bias=True), base=Adapted())
    assert vector.deltas["first.bias"].tolist() == [2.0] * 8


def test_copies_of_the_base_beside_the_factors_are_left_out(tmp_path: Path) -> None:
    """PEFT stores them for embeddings and heads."""
    tensors = {**pair("head", 11, 6), f"{PREFIX}head.base_layer.weight": torch.randn(11, 6)}
    vector = ak.TaskVector.from_peft(write(tmp_path, tensors))
    assert list(vector.deltas) == ["head.weight"]
    assert isinstance(vector.deltas["head.weight"], ak.LowRank)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["first"], "bias": "all"},
        {"target_modules": ["first", "second"], "use_dora": True},
        {"target_modules": ["embed", "head", "first"]},
        {"target_modules": ["first"], "lora_bias": True},
        {"target_modules": ["first"], "modules_to_save": ["head"]},
        {"target_modules": ["first", "second"], "rank_pattern": {"second": 3}, "use_rslora": True},
    ],
    ids=str,
)
def test_against_peft_itself(options: Any, tmp_path: Path) -> None:
    """The base with the vector is what PEFT's own merge gives."""
    peft = pytest.importorskip("peft")
    base = Adapted()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path, save_embedding_layers="embed" in options["target_modules"])
    merged = adapted.merge_and_unload().state_dict()
    vector = ak.TaskVector.from_peft(tmp_path, base=state)
    applied = vector.apply_to(state)
    assert set(applied) == set(merged)
    changed = 0
    for name, value in merged.items():
        torch.testing.assert_close(applied[name], value, rtol=1e-4, atol=1e-5)
        changed += not torch.equal(value, state[name])
    assert changed == len(vector.deltas)
