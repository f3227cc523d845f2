"""Predictions against what packing makes and what a step needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import atlas_kernels as ak
from atlas_kernels.cli import main
from atlas_kernels.cli.plan import parse_size
from atlas_kernels.files.tensors import describe
from atlas_kernels.models.live_memory import PeakMemory
from atlas_kernels.models.planning import activation_bytes, plans


def deep(layers: int = 12, width: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Tanh())))


def packed(module: nn.Module, count: int, path: Path, codec: str) -> ak.TaskVectorBank:
    base = {name: parameter.detach() for name, parameter in module.named_parameters()}
    vectors = {
        f"task-{i}": ak.TaskVector({n: torch.randn_like(p) for n, p in base.items()})
        for i in range(count)
    }
    return ak.TaskVectorBank.pack(path, module, vectors, codec=codec)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4", "int3", "int2", "sign"])
def test_bank_and_disk_are_what_packing_makes(codec: str, tmp_path: Path) -> None:
    module = deep(3)
    module.register_buffer("running_mean", torch.zeros(7))
    path = tmp_path / "bank.safetensors"
    bank = packed(module, 5, path, codec)
    its = ak.plan(module, 5, codec=codec)
    (segment,) = bank.segments
    stored = segment.deltas.nbytes + (0 if segment.scales is None else segment.scales.nbytes)
    assert its.parts["bank"] == stored
    assert its.parts["base"] == segment.base.nbytes + 7 * 4
    assert (its.num_blocks, its.num_parameters) == (6, 3 * (96 * 96 + 96))
    header = 4096 * 2  # at most two pages of names, and the checksums
    assert its.disk <= path.stat().st_size <= its.disk + header


class Adapted(nn.Module):
    """A matrix and a convolution with adapters, a bias without, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 30)
        self.conv = nn.Conv2d(3, 8, 3, bias=False).half()
        self.last = nn.Linear(5, 5)


def adapters(count: int = 3, **dense: torch.Tensor) -> list[ak.TaskVector]:
    torch.manual_seed(0)
    return [
        ak.TaskVector(
            {
                # Ranks of their own; the last vector leaves the convolution alone.
                "first.weight": ak.LowRank(torch.randn(30, 2 + i), torch.randn(2 + i, 40), 0.5),
                **(
                    {"conv.weight": ak.LowRank(torch.randn(8, 1), torch.randn(1, 3, 3, 3))}
                    if i < count - 1
                    else {}
                ),
                "first.bias": torch.randn(30),
                **dense,
            },
            name=f"lora-{i}",
        )
        for i in range(count)
    ]


CHANGED = ("first.weight", "first.bias", "conv.weight")


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int4"])
def test_low_rank_vectors(codec: str, tmp_path: Path) -> None:
    module = Adapted()
    path = tmp_path / "bank.safetensors"
    bank = ak.TaskVectorBank.pack(path, module, adapters(), codec=codec)
    ranks = {"first.weight": 2 + 3 + 4, "conv.weight": 2}
    plans_of = {
        memory: ak.plan(module, 3, codec=codec, memory=memory, include=CHANGED, ranks=ranks)
        for memory in ("whole", "recompute", "stream")
    }
    its = plans_of["whole"]
    constants = sum(t.nbytes for t in bank.constants.values())
    factors = (9 * (30 + 40) + 2 * (8 + 27)) * (4 if codec == "fp32" else 2)
    assert its.parts["bank"] + its.parts["base"] == bank.nbytes + constants
    assert factors < its.parts["bank"] <= factors + 3 * 128 * 4
    assert (its.num_blocks, its.num_parameters) == (3, 40 * 30 + 30 + 8 * 27)
    assert its.parts["composed"] == its.parts["base"] - constants
    header = 4096 * 2
    assert its.disk - header <= path.stat().st_size <= its.disk + header
    # What is small anyway stays in memory, and the largest block is one that is composed.
    assert plans_of["stream"].parts["bank"] >= factors
    assert plans_of["recompute"].parts["gradients"] == 40 * 30 * 4


@pytest.mark.parametrize("memory", ["whole", "recompute", "stream"])
def test_peak_of_a_step(memory: str, tmp_path: Path) -> None:
    """Counted tensors lie below the prediction, and by no more than what it rounds up to.

    In "whole" all blocks share one bucket: gradients grow while activations go, so their sum is
    less than both together, by at most the gradients. In the others, two blocks and a gradient are
    counted in full, though a Linear holds one block and one gradient. Small tensors (biases, loss,
    coefficients) come to less than 64 KiB.
    """
    module = deep()
    bank = packed(module, 3, tmp_path / "bank.safetensors", "bf16")
    images = torch.randn(64, 96)
    its = ak.plan(module, 3, memory=memory, activations=activation_bytes(module, [images]))
    model = ak.ComposedModel(module, bank, memory=memory)
    # The first step opens the file; what it composed goes when the coefficients change.
    model(images)
    with torch.no_grad():
        model.coef.add_(0.5)
    with PeakMemory() as counted, model.composed_once():
        model(images).sum().backward()
    # The base, and the bank or what is read ahead of it.
    there = its.parts["base"] + its.parts["bank"]
    small = 2**16
    assert counted.peak <= its.peak - there + small
    largest = 96 * 96 * 4
    slack = {"whole": 12 * largest, "recompute": 2 * largest, "stream": 2 * largest}
    assert counted.peak >= its.peak - there - slack[memory] - small


def test_activations_are_what_autograd_saves() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(512, 9)
    )
    images = torch.randn(5, 3, 8, 8)
    saved: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or pack(t), lambda t: t):
        output = module(images)
    assert output.requires_grad
    assert activation_bytes(module, [images]) == sum(saved.values())


def test_activations_of_what_depends_on_data() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="cannot be predicted from shapes alone"):
        activation_bytes(Branch(), [torch.ones(3)])


def test_a_model_without_memory() -> None:
    """A trillion parameters: nothing is allocated."""
    with torch.device("meta"):
        module = nn.ModuleList([nn.Linear(10**6, 10**6, bias=False) for _ in range(2)])
    its = ak.plan(module, 20, codec="int4", memory="recompute")
    assert its.parts["bank"] == 2 * 20 * 10**12 * 4.125 / 8
    assert its.parts["composed"] == 2 * 4 * 10**12
    tied = nn.ModuleList([module[0], module[0]])
    assert ak.plan(tied, 1).num_blocks == 1


def test_streaming_does_not_depend_on_the_number_of_vectors() -> None:
    with torch.device("meta"):
        module = nn.Linear(10**4, 10**5)
    few, many = (ak.plan(module, n, memory="stream") for n in (16, 1600))
    assert few.peak == pytest.approx(many.peak, rel=0.05)
    assert many.disk > 50 * few.disk


def test_budgets_and_names() -> None:
    module = deep(2)
    assert (
        ak.plan(module, 4, codec="auto:3.5").parts["bank"]
        <= ak.plan(module, 4, codec="int4").parts["bank"]
    )
    peaks = {(p.codec, p.memory): p.peak for p in plans(module, 64)}
    assert peaks["sign", "whole"] < peaks["int2", "whole"] < peaks["bf16", "whole"]
    assert peaks["bf16", "recompute"] < peaks["bf16", "whole"]
    for options, message in (
        ({"codec": "int5"}, "unknown codec"),
        ({"codec": "auto:1"}, "at least 1.125"),
        ({"memory": "swap"}, "unknown memory 'swap'"),
        ({"include": "nothing"}, "nothing to compose"),
        ({"ranks": {"0.bias": 1}}, "ranks of what is no matrix to compose: 0.bias"),
        ({"ranks": {"9.weight": 1}}, "ranks of what is no matrix to compose: 9.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            ak.plan(module, 3, **options)


def test_dtypes_that_cannot_be_composed() -> None:
    with pytest.raises(TypeError, match=r"'0.weight' has dtype torch.float64, expected float32"):
        ak.plan(deep(1).double(), 3)


def test_no_number_of_vectors() -> None:
    with pytest.raises(TypeError, match=r"num_vectors is 1\.5, expected a whole number"):
        ak.plan(deep(1), 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_vectors is -1"):
        ak.plan(deep(1), -1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("1.5 GiB", 3 * 2**29), ("500M", 5 * 10**8), ("7", 7), ("2kB", 2000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "3XB", "1..2G", "16 gigs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def run(*arguments: object) -> int:
    return main(["plan", *map(str, arguments)])


def test_command_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = deep(2)
    path = tmp_path / "bank.safetensors"
    bank = packed(module, 3, path, "int4")
    assert run(path) == 0
    printed = capsys.readouterr().out
    assert "codec int4, memory whole" in " ".join(printed.split())
    assert "3 task vectors, 4 blocks" in " ".join(printed.split())
    base = tmp_path / "base.pt"
    torch.save(module.state_dict(), base)
    vector = tmp_path / "v.safetensors"
    ak.TaskVector({"0.weight": torch.ones(96, 96)}).save(vector)
    assert run(base, vector, vector, "--codec", "sign") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 task vectors, 1 blocks, 9,216 parameters; codec sign" in printed
    assert run(base, "--vectors", 3, "--fit", "1MB") == 0
    printed = capsys.readouterr().out
    assert "Take --codec fp32 --memory whole." in printed
    assert run(base, "--vectors", 3, "--fit", "300kB") == 0
    printed = capsys.readouterr().out
    assert "fp32" not in printed
    assert "Take --codec" in printed
    assert bank.names == tuple(describe(path)[1]["names"])


def test_command_on_low_rank_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, path = tmp_path / "base.pt", tmp_path / "bank.safetensors"
    module = Adapted()
    torch.save(module.state_dict(), base)
    files = []
    for vector in adapters():
        files.append(tmp_path / f"{vector.name}.safetensors")
        vector.save(files[-1])
    ak.TaskVectorBank.pack(path, module, adapters(), codec="int4")
    printed = []
    for arguments in ((base, *files, "--codec", "int4"), (path,), (path, "--codec", "int4")):
        assert run(*arguments, "--memory", "recompute") == 0
        printed.append(capsys.readouterr().out)
    assert "3 task vectors, 3 blocks, 1,446 parameters; codec int4" in " ".join(printed[0].split())
    # From the vectors' names and shapes the same as from the bank that is made of them.
    assert printed[0] == printed[1] == printed[2]
    ak.TaskVectorBank.from_task_vectors(module, adapters(1), lora="factorwise").save(path)
    assert run(path) == 2
    assert "lora='factorwise'" in capsys.readouterr().err
    adapters(1)[0].dense().save(files[1])
    ak.TaskVector({"last.weight": ak.LowRank(torch.ones(5, 1), torch.ones(1, 6))}).save(files[2])
    assert run(base, *files) == 2
    printed_error = capsys.readouterr().err
    assert "'first.weight' is low-rank in" in printed_error
    assert f"but dense in {files[1]}" in printed_error
    assert "'last.weight' has shape (5, 6), in the base (5, 5)" in printed_error


def test_command_finds_every_mistake_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base.pt"
    torch.save(deep(2).state_dict(), base)
    for name, delta in (("a", {"9.weight": torch.ones(2)}), ("b", {"0.weight": torch.ones(3)})):
        ak.TaskVector(delta).save(tmp_path / f"{name}.safetensors")
    assert run(base, tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 2
    printed = capsys.readouterr().err
    assert "a.safetensors: the base has no parameter '9.weight'" in printed
    assert "b.safetensors: '0.weight' has shape (3,), in the base (96, 96)" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to plan"),
        (("none.pt",), "no such file"),
        (("--model", "ViT-B-32"), "how many task vectors"),
        (("--model", "ViT-B32", "--vectors", "3"), "did you mean ViT-B-32"),
        (("--model", "ViT-B-32", "--vectors", "3", "--fit", "1MB"), "nothing fits 1MB: the least"),
        (("--model", "ViT-B-32", "--vectors", "3", "--fit", "much"), "'much' is no size"),
        (("--model", "ViT-B-32", "--vectors", "3", "--batch", "0"), "--batch is 0"),
    ],
)
def test_command_on_bad_input(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
