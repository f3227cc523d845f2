from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import (
    FUSED,
    INTERPRETED,
    cases,
    float32_sum,
    float64_sum,
    for_examples,
    make,
    need,
    on_each_backend,
    present,
    same_bits,
)
from tolerances import EPS, compose_error, dot_error
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.files.tensors import write_tensors
from atlas_kernels.models import PeakMemory
from atlas_kernels.ops.layout import TILE

DTYPE_OF_CODEC = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"stem.weight": (3, 5), "stem.bias": (), "body.weight": (TILE + 17,), "head": (2, 31)}


def make_base() -> dict[str, Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def make_vectors(base: dict[str, Tensor], count: int = 3) -> list[ak.TaskVector]:
    return [
        ak.TaskVector.from_state_dicts(
            base,
            {name: block + 0.1 * torch.randn(block.shape) for name, block in base.items()},
            dtype=torch.float32,
            name=f"task-{i}",
        )
        for i in range(count)
    ]


def make_bank(codec: str = "fp32") -> tuple[dict[str, Tensor], list[ak.TaskVector], Any]:
    base = make_base()
    vectors = make_vectors(base)
    return base, vectors, ak.TaskVectorBank.from_task_vectors(base, vectors, codec=codec)


def expect_composed(
    composed: dict[str, Tensor],
    base: dict[str, Tensor],
    vectors: list[ak.TaskVector],
    coef: Tensor,
    blocks: tuple[str, ...],
    dtype: torch.dtype,
    exact: bool = True,
) -> None:
    assert tuple(composed) == blocks
    for b, block in enumerate(blocks):
        # A vector that lacks the block is a zero in the bank, which float32 sums do not feel.
        deltas = [
            vector.deltas.get(block, torch.zeros(base[block].shape)).to(dtype) for vector in vectors
        ]
        column = base[block], deltas, coef.detach().float()[:, b]
        error = (composed[block].double() - float64_sum(*column)).abs()
        assert (error <= compose_error(*column)).all(), block
        if exact:
            assert torch.equal(composed[block], float32_sum(*column)), block
        assert composed[block].dtype == base[block].dtype


@on_each_backend
def test_compose_against_float64(backend: str) -> None:
    size = (TILE + 20, 3) if backend in INTERPRETED else (3 * TILE, 4)

    @for_examples(backend, cases(*size))
    def check(case: Any) -> None:
        base = {f"block.{b}": block for b, block in enumerate(case.base)}
        vectors = [
            ak.TaskVector(
                {f"block.{b}": d for b, d in enumerate(vector) if d is not None}, name=str(i)
            )
            for i, vector in enumerate(case.deltas)
        ]
        # Narrower codecs round the deltas, which the oracle repeats.
        codec, dtype = ("bf16", torch.bfloat16) if len(base) % 2 else ("fp32", torch.float32)
        bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec=codec)
        columns = [list(base).index(block) for block in bank.blocks]
        coef = case.coef.detach() if case.coef.dim() == 1 else case.coef.detach()[:, columns]
        coef.requires_grad_()
        composed = bank.compose(coef, backend=backend)
        per_block = case.per_block[:, columns]
        expect_composed(
            composed, base, vectors, per_block, bank.blocks, dtype, exact=backend not in FUSED
        )
        if not bank.blocks:
            return

        generator = torch.Generator().manual_seed(1)
        cotangents = [
            make(tuple(base[block].shape), base[block].dtype, "plain", generator)
            for block in bank.blocks
        ]
        (gradient,) = torch.autograd.grad(list(composed.values()), coef, cotangents)
        expected = torch.zeros(len(vectors), len(bank.blocks), dtype=torch.float64)
        bound = torch.zeros_like(expected)
        for i, b, delta in present([[v.deltas.get(k) for k in bank.blocks] for v in vectors]):
            expected[i, b] = (cotangents[b].double() * delta.to(dtype).double()).sum()
            bound[i, b] = dot_error(cotangents[b], delta.to(dtype))
        if coef.dim() == 1:
            bound = bound.sum(1) + len(bank.blocks) * EPS / 2 * expected.abs().sum(1)
            expected = expected.sum(1)
        info = torch.finfo(coef.dtype)
        allowed = bound + info.eps / 2 * (expected.abs() + bound) + info.smallest_normal * info.eps
        assert ((gradient.double() - expected).abs() <= allowed)[expected.abs() < info.max].all()


@pytest.mark.parametrize("codec", DTYPE_OF_CODEC)
def test_dense_codecs(codec: str) -> None:
    base, vectors, bank = make_bank(codec)
    dtype = DTYPE_OF_CODEC[codec]
    assert (bank.codec, bank.names, bank.blocks) == (
        codec,
        ("task-0", "task-1", "task-2"),
        tuple(SHAPES),
    )
    assert bank.shapes == tuple(SHAPES.values())
    assert [segment.deltas.dtype for segment in bank.segments] == [dtype]
    padded = 16 + 16 + TILE + 32 + 64
    assert bank.nbytes == padded * 4 + 3 * padded * dtype.itemsize
    coef = torch.randn(3, 4)
    expect_composed(bank.compose(coef), base, vectors, coef, bank.blocks, dtype)
    assert all(same_bits(block, base[name]) for name, block in bank.base.items())


@pytest.mark.parametrize("codec", ["bf17", "", "int5", "BF16", "float32"])
def test_unknown_codec(codec: str) -> None:
    base = make_base()
    with pytest.raises(ValueError, match=f"unknown codec '{codec}': expected one of 'fp32'"):
        ak.TaskVectorBank.from_task_vectors(base, make_vectors(base), codec=codec)


@pytest.mark.parametrize("codec", ["auto", "auto:", "auto:1", "auto:nan", "auto:four"])
def test_budget_out_of_reach(codec: str) -> None:
    base = make_base()
    with pytest.raises(ValueError, match=f"codec '{codec}': .*at least 1.125 bits"):
        ak.TaskVectorBank.from_task_vectors(base, make_vectors(base), codec=codec)


def test_every_delta_lies_where_the_layout_documents_it() -> None:
    base, vectors, bank = make_bank("fp32")
    (segment,) = bank.segments
    layout, count = segment.layout, len(vectors)
    seen = torch.zeros(segment.deltas.numel(), dtype=torch.bool)
    for b, block in enumerate(bank.blocks):
        flat = [vector.deltas[block].flatten() for vector in vectors]
        for e in range(base[block].numel()):
            position = layout.offsets[b] + e
            t = int(torch.searchsorted(layout.tile_offset, position, right=True)) - 1
            start, end = layout.tile_offset[t : t + 2].tolist()
            assert layout.tile_block[t] == b
            assert segment.base[position] == base[block].flatten()[e]
            for i in range(count):
                address = count * start + i * (end - start) + position - start
                assert segment.deltas[address] == flat[i][e]
                seen[address] = True
    # All that is left is padding.
    assert segment.deltas[~seen].eq(0).all()
    assert segment.base.numel() - sum(t.numel() for t in base.values()) == (~seen).sum() // count
    assert segment.base.count_nonzero() == sum(int(t.count_nonzero()) for t in base.values())


def test_isotropic_coefficients_are_tied_rows_and_their_gradient_the_sum_over_blocks() -> None:
    _, _, bank = make_bank()
    task = torch.randn(3, requires_grad=True)
    rows = task.detach().unsqueeze(1).repeat(1, 4).requires_grad_()
    cotangents = [torch.randn(shape) for shape in SHAPES.values()]
    results = [bank.compose(coef) for coef in (task, rows)]
    assert all(same_bits(results[0][block], results[1][block]) for block in bank.blocks)
    gradients = [
        torch.autograd.grad(list(result.values()), coef, cotangents)[0]
        for result, coef in zip(results, (task, rows), strict=True)
    ]
    assert torch.allclose(gradients[0], gradients[1].sum(1), rtol=4 * EPS, atol=0)
    assert gradients[0].abs().min() > 1e-3


def test_blocks_that_no_vector_changes_are_constants() -> None:
    base = make_base()
    vectors = make_vectors(base)
    for vector in vectors:
        vector.deltas["body.weight"].zero_()
    vectors[0].deltas["head"].zero_()
    del vectors[1].deltas["head"]
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32")
    assert bank.blocks == ("stem.weight", "stem.bias", "head")
    assert bank.constants.keys() == {"body.weight"}
    coef = torch.randn(3, 3)
    expect_composed(bank.compose(coef), base, vectors, coef, bank.blocks, torch.float32)
    # The same as with the zeros kept: the operator on lists.
    full = torch.zeros(3, 4)
    full[:, [0, 1, 3]] = coef
    listed = ak.compose(
        list(base.values()), [[v.deltas.get(name) for name in base] for v in vectors], full
    )
    state = bank.state_dict(coef)
    assert all(torch.equal(state[name], t) for name, t in zip(base, listed, strict=True))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("stem.*", None, ("stem.weight", "stem.bias")),
        (None, "stem.*", ("body.weight", "head")),
        (["stem.*", "head"], "*.bias", ("stem.weight", "head")),
        (None, ["stem.?eight", "head"], ("stem.bias", "body.weight")),
        ("STEM.*", None, ()),
        ("stem", None, ()),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, expected: tuple[str, ...]) -> None:
    base = make_base()
    vectors = make_vectors(base)
    bank = ak.TaskVectorBank.from_task_vectors(
        base, vectors, codec="fp32", include=include, exclude=exclude
    )
    assert bank.blocks == expected
    coef = torch.randn(3, len(expected))
    expect_composed(bank.compose(coef), base, vectors, coef, expected, torch.float32)
    state = bank.state_dict(coef)
    assert state.keys() == base.keys()
    assert all(torch.equal(state[name], base[name]) for name in base if name not in expected)


def test_blocks_of_several_dtypes_keep_their_columns() -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32]
    base = {f"b{j}": torch.randn(j + 2, 3).to(dtype) for j, dtype in enumerate(dtypes)}
    tuned = {name: block + 0.1 * torch.randn(block.shape).to(block) for name, block in base.items()}
    vector = ak.TaskVector.from_state_dicts(base, tuned, name="t")
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector, vector * 2][:1])
    assert [segment.base.dtype for segment in bank.segments] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    assert bank.shapes == tuple(tuple(block.shape) for block in base.values())
    coef = torch.randn(1, 5, requires_grad=True)
    composed = bank.compose(coef)
    expect_composed(composed, base, [vector], coef, tuple(base), torch.bfloat16)
    assert [block.dtype for block in composed.values()] == dtypes
    (gradient,) = torch.autograd.grad([block.float().sum() for block in composed.values()], coef)
    for j, name in enumerate(base):
        delta = vector.deltas[name]
        error = abs(gradient[0, j].double() - delta.double().sum())
        assert error <= dot_error(torch.ones_like(delta), delta)


def test_gradients_of_several_segments_are_summed_before_they_are_rounded() -> None:
    """bfloat16 steps by 2 at 257, by 4 from 512: 257 + 258 + 257 is 772, not 768."""
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}
    base = {name: torch.zeros(3, dtype=dtype) for name, dtype in dtypes.items()}
    vector = ak.TaskVector({name: torch.tensor([1.0, 0.0, 0.0]) for name in base}, name="t")
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector])
    coef = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    composed = bank.compose(coef)
    # What the bfloat16 block receives, its own dtype must hold: 258.
    scales = zip((257.0, 258.0, 257.0), composed.values(), strict=True)
    sum(scale * block.float().sum() for scale, block in scales).backward()
    assert coef.grad is not None
    assert coef.grad.tolist() == [772.0]


@pytest.mark.parametrize("per_block", [True, False])
def test_combine_is_the_sum_of_deltas_to_its_own_last_digit(per_block: bool) -> None:
    """On a base so large that adding it and taking it off again would leave nothing."""
    base = {name: 1e8 * torch.ones(shape) for name, shape in SHAPES.items()}
    base[next(iter(SHAPES))] = base[next(iter(SHAPES))].bfloat16()
    vectors = [
        ak.TaskVector({name: torch.randn(shape) for name, shape in SHAPES.items()}, name=f"t{i}")
        for i in range(3)
    ]
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp32")
    assert len(bank.segments) == 2
    coef = torch.randn(3, len(SHAPES)) if per_block else torch.randn(3)
    coef.requires_grad_()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    columns = coef if per_block else coef.unsqueeze(1).expand(-1, len(SHAPES))
    combined = bank.combine(coef)
    expect_composed(combined, zeros, vectors, columns, bank.blocks, torch.float32)
    # The same derivative as of the composition, bit for bit.
    cotangents = [torch.randn_like(combined[block]) for block in bank.blocks]
    gradients = [
        torch.autograd.grad([result[block] for block in bank.blocks], coef, cotangents)[0]
        for result in (combined, bank.compose(coef))
    ]
    assert same_bits(*gradients)
    assert gradients[0].abs().min() > 0
    with pytest.raises(ValueError, match="coef has shape"):
        bank.combine(torch.zeros(2))


def test_order_of_the_tensors_does_not_matter_by_name() -> None:
    base, vectors, bank = make_bank()
    shuffled = {name: base[name] for name in ("head", "body.weight", "stem.bias", "stem.weight")}
    reversed_vectors = [
        ak.TaskVector(dict(reversed(vector.deltas.items())), name=vector.name) for vector in vectors
    ]
    other = ak.TaskVectorBank.from_task_vectors(shuffled, reversed_vectors, codec="fp32")
    assert other.blocks == tuple(shuffled)
    coef = torch.randn(3, 4)
    expected = bank.compose(coef)
    composed = other.compose(coef[:, [bank.blocks.index(block) for block in other.blocks]])
    assert all(same_bits(composed[block], expected[block]) for block in bank.blocks)


def test_no_vectors_and_vectors_without_change() -> None:
    base = make_base()
    empty = ak.TaskVectorBank.from_task_vectors(base, [])
    assert (empty.names, empty.blocks, empty.compose(torch.zeros(0, 0))) == ((), (), {})
    idle = ak.TaskVectorBank.from_task_vectors(base, [ak.TaskVector({}, name="idle")])
    assert idle.compose(torch.ones(1)) == {}
    for bank, coef in ((empty, torch.zeros(0)), (idle, torch.ones(1, 0))):
        state = bank.state_dict(coef)
        assert state.keys() == base.keys()
        assert all(torch.equal(state[name], base[name]) for name in base)


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too, and a BatchNorm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(self.embed(x)))
        return result


def tied_vector(module: nn.Module, name: str = "t") -> ak.TaskVector:
    base = module.state_dict()
    tuned = {
        key: value + 0.1 * torch.randn(value.shape) if value.is_floating_point() else value
        for key, value in base.items()
    }
    if "out.weight" in tuned:
        tuned["out.weight"] = tuned["embed.weight"]
    return ak.TaskVector.from_state_dicts(base, tuned, torch.float32, name)


@pytest.mark.parametrize("as_module", [True, False])
def test_tied_weights_are_one_block_and_statistics_are_constants(as_module: bool) -> None:
    module = Tied()
    vector = tied_vector(module)
    base = module if as_module else module.state_dict()
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector], codec="fp32")
    assert bank.blocks == ("embed.weight", "norm.weight", "norm.bias", "out.bias")
    assert bank.aliases == {"out.weight": "embed.weight"}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert bank.constants.keys() == statistics
    state = bank.state_dict(torch.ones(1))
    assert state.keys() == module.state_dict().keys()
    assert torch.equal(state["out.weight"], state["embed.weight"])
    expected = module.embed.weight + vector.deltas["embed.weight"]
    assert torch.equal(state["embed.weight"], expected)
    for name in statistics:
        assert torch.equal(state[name], module.state_dict()[name])


def test_tied_names_that_a_vector_changes_apart_are_refused() -> None:
    module = Tied()
    vector = tied_vector(module)
    vector.deltas["out.weight"] = vector.deltas["out.weight"] + 1
    with pytest.raises(ValueError, match=r"'t'.*'out\.weight'.*'embed\.weight'"):
        ak.TaskVectorBank.from_task_vectors(module, [vector])
    del vector.deltas["embed.weight"]
    with pytest.raises(ValueError, match=r"'t'.*'out\.weight'.*'embed\.weight'"):
        ak.TaskVectorBank.from_task_vectors(module, [vector])


def test_names_of_vectors() -> None:
    base = make_base()
    first, second, _ = make_vectors(base)
    with pytest.raises(ValueError, match=r"several task vectors are called task-0.*unique"):
        ak.TaskVectorBank.from_task_vectors(base, [first, second, first])
    bank = ak.TaskVectorBank.from_task_vectors(base, {"a": first, "b": first})
    assert bank.names == ("a", "b")
    unnamed = [ak.TaskVector(first.deltas), ak.TaskVector(second.deltas)]
    assert ak.TaskVectorBank.from_task_vectors(base, unnamed).names == ("vector-0", "vector-1")


def altered(vector: ak.TaskVector, **deltas: Tensor) -> ak.TaskVector:
    renamed = {key.replace("_", "."): delta for key, delta in deltas.items()}
    return ak.TaskVector({**vector.deltas, **renamed}, {}, vector.base, vector.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": torch.ones(2)}, "'task-1' has the block 'tail', but the base has no such"),
        ({"head": torch.ones(31, 2)}, r"'task-1', block 'head' .*\(31, 2\), expected \(2, 31\)"),
        ({"head": torch.full((2, 31), torch.nan)}, "'task-1', block 'head'.*finite"),
        # 1e5 is a float32 that float16 does not hold.
        ({"head": torch.full((2, 31), 1e5)}, "'task-1', block 'head'.*finite.*fp16"),
    ],
)
def test_vectors_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    base = make_base()
    vectors = make_vectors(base)
    vectors[1] = altered(vectors[1], **change)
    with pytest.raises(ValueError, match=message):
        ak.TaskVectorBank.from_task_vectors(base, vectors, codec="fp16")


def test_another_base_is_refused() -> None:
    base = make_base()
    vectors = make_vectors(base)
    other = {**base, "head": base["head"].clone()}
    other["head"][1, 30] += 1e-6
    with pytest.raises(ValueError, match="'task-0' was made from another base: block 'head'"):
        ak.TaskVectorBank.from_task_vectors(other, vectors)
    # Equal values of another object are the same base.
    same = {name: block.clone() for name, block in base.items()}
    assert ak.TaskVectorBank.from_task_vectors(same, vectors).blocks == tuple(base)


def test_base_dtypes_and_devices() -> None:
    base = {"a": torch.randn(3), "b": torch.randn(3, dtype=torch.float64)}
    vector = ak.TaskVector({name: torch.ones(3) for name in base}, name="t")
    with pytest.raises(TypeError, match=r"'b' has dtype torch.float64"):
        ak.TaskVectorBank.from_task_vectors(base, [vector])
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector], exclude="b")
    assert bank.blocks == ("a",)
    assert bank.constants["b"] is not None


def test_packing_copies_the_base() -> None:
    base, _, bank = make_bank()
    before = base["head"].clone()
    base["head"].zero_()
    assert torch.equal(bank.base["head"], before)


@pytest.mark.parametrize(
    ("coef", "exception", "message"),
    [
        (torch.zeros(3, 3), ValueError, r"\(3, 3\), expected \(3, 4\)"),
        (torch.zeros(4, 3), ValueError, r"\(4, 3\), expected \(3, 4\)"),
        (torch.zeros(4), ValueError, r"\(4,\), expected .*\(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(3, 4, device="meta"), ValueError, "meta"),
        ([[0.0] * 4] * 3, TypeError, "list"),
    ],
)
def test_bad_coefficients(coef: Any, exception: type[Exception], message: str) -> None:
    with pytest.raises(exception, match=message):
        make_bank()[2].compose(coef)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        make_bank()[2].compose(torch.zeros(3), backend="fast")


@on_each_backend
@pytest.mark.parametrize("mmap", [True, False])
def test_save_and_load(backend: str, mmap: bool, tmp_path: Path) -> None:
    module = Tied().half()
    module.norm.float()
    vectors = [tied_vector(module, name) for name in ("bus", "café")]
    bank = ak.TaskVectorBank.from_task_vectors(module, vectors, exclude="norm.bias")
    path = tmp_path / "all.bank"
    bank.save(path)
    loaded = ak.TaskVectorBank.load(path, mmap=mmap)
    for attribute in ("names", "blocks", "shapes", "codec", "nbytes", "base_digests", "aliases"):
        assert getattr(loaded, attribute) == getattr(bank, attribute), attribute
    assert loaded.constants.keys() == bank.constants.keys()
    for name, constant in bank.constants.items():
        assert torch.equal(loaded.constants[name], constant)
        assert loaded.constants[name].dtype == constant.dtype
    # A mapped file aligns its tensors to 8 bytes at best, less than the arena's own 64.
    coef = torch.randn(2, len(bank.blocks), requires_grad=True)
    expected, composed = bank.compose(coef), loaded.compose(coef, backend=backend)
    for block in bank.blocks:
        if backend in FUSED:
            assert torch.allclose(composed[block], expected[block], rtol=1e-3, atol=1e-3)
        else:
            assert same_bits(composed[block], expected[block])
    sums = [sum(t.float().sum() for t in result.values()) for result in (expected, composed)]
    gradients = [torch.autograd.grad(total, coef)[0] for total in sums]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)
    # Nothing that is done to a loaded bank reaches its file.
    content = path.read_bytes()
    loaded.segments[0].base.zero_()
    assert path.read_bytes() == content


def test_saved_over_itself_while_mapped(tmp_path: Path) -> None:
    base, _, bank = make_bank()
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    mapped = ak.TaskVectorBank.load(path)
    mapped.save(path)
    for loaded in (mapped, ak.TaskVectorBank.load(path)):
        assert all(same_bits(block, base[name]) for name, block in loaded.base.items())


@pytest.mark.parametrize("kept", [0, 4, 7, 100, -1, -5000])
def test_truncated_file(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    make_bank()[2].save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileFormatError, match=r"bank.safetensors: "):
        ak.TaskVectorBank.load(path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    base, vectors, _ = make_bank()
    path = tmp_path / "file.safetensors"
    with pytest.raises(FileNotFoundError, match=r"file.safetensors: no such file"):
        ak.TaskVectorBank.load(path)
    path.write_bytes(b"\x89PNG and some bytes")
    with pytest.raises(FileFormatError, match="not a readable safetensors file"):
        ak.TaskVectorBank.load(path)
    vectors[0].save(path)
    with pytest.raises(FileFormatError, match=r"of atlas_kernels.bank, found atlas_kernels.task_v"):
        ak.TaskVectorBank.load(path)
    save_file(base, path)
    with pytest.raises(FileFormatError, match="found nothing that names its format"):
        ak.TaskVectorBank.load(path)
    save_file(base, path, {"format": "atlas_kernels.bank", "version": "99"})
    with pytest.raises(FileFormatError, match=r"newer atlas_kernels.*99.*upgrade"):
        ak.TaskVectorBank.load(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"version": "one"},
        {"version": "1"},
        {"version": "1", "names": "[", "blocks": "[]"},
    ],
)
def test_damaged_metadata(metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    save_file({"x": torch.ones(2)}, path, {"format": "atlas_kernels.bank", **metadata})
    with pytest.raises(FileFormatError, match=r"bank.safetensors: .*damaged"):
        ak.TaskVectorBank.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"deltas.0": torch.zeros(32)}, r"damaged.*the deltas of 1 task vectors.*\(32, "),
        ({"base.0": torch.zeros(16)}, r"damaged.*the base of 1 task vectors.*\(16, "),
        ({"deltas.0": None}, "damaged"),
        ({"constant.step": None}, "damaged"),
    ],
)
def test_parts_that_do_not_fit(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base = {**make_base(), "step": torch.tensor(3)}
    bank = ak.TaskVectorBank.from_task_vectors(base, make_vectors(make_base())[:0])
    vectors = [ak.TaskVector({"head": torch.ones(2, 31)}, name="t")]
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors)
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    from atlas_kernels.files.tensors import read_tensors

    tensors, fields = read_tensors(path, "bank", mmap=False)
    tensors = {key: change.get(key, tensor) for key, tensor in tensors.items()}
    write_tensors(path, {k: t for k, t in tensors.items() if t is not None}, "bank", **fields)
    with pytest.raises(FileFormatError, match=message):
        ak.TaskVectorBank.load(path)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    bank = make_bank("bf16")[2]
    path = tmp_path / "bank.safetensors"
    bank.save(path)
    tensors = load_file(path)
    assert same_bits(tensors["deltas.0"], bank.segments[0].deltas)
    assert same_bits(tensors["base.0"], bank.segments[0].base)


def test_to_another_device() -> None:
    bank = make_bank()[2]
    assert bank.to("cpu") is bank
    assert bank.to(torch.device("cpu")) is bank
    moved = bank.to("meta")
    assert moved.device == torch.device("meta")
    assert bank.device == torch.device("cpu")
    assert (moved.names, moved.blocks, moved.nbytes) == (bank.names, bank.blocks, bank.nbytes)
    for segment in moved.segments:
        for part in (segment.base, segment.deltas, segment.layout.tile_offset):
            assert part.device == torch.device("meta")


def test_compiled_bank() -> None:
    """With several segments: one gather of coef's columns for each."""
    base = {"a": torch.randn(20), "b": torch.randn(3, 5).bfloat16(), "c": torch.randn(7)}
    vector = ak.TaskVector({k: torch.randn(t.shape) for k, t in base.items()}, name="t")
    bank = ak.TaskVectorBank.from_task_vectors(base, [vector])
    torch._dynamo.reset()
    compiled = torch.compile(bank.compose, fullgraph=True, backend="aot_eager")
    coef = torch.randn(1, 3, requires_grad=True)
    results = [function(coef) for function in (bank.compose, compiled)]
    assert all(same_bits(results[0][block], results[1][block]) for block in base)
    gradients = [
        torch.autograd.grad(sum(t.float().square().sum() for t in result.values()), coef)[0]
        for result in results
    ]
    assert torch.allclose(*gradients, rtol=1e-5)
    assert gradients[0].abs().min() > 0


def test_backends_agree_on_one_bank() -> None:
    need("cpp")
    bank = make_bank("fp16")[2]
    coef = torch.randn(3, 4)
    results = [bank.compose(coef, backend=backend) for backend in ("torch", "cpp", "auto")]
    for result in results[1:]:
        assert all(same_bits(result[block], results[0][block]) for block in bank.blocks)


def test_gradients_of_blocks_are_reduced_where_they_lie() -> None:
    """No copy of a long one, none of those that have none: not the bank's way of old, gathering."""
    base = {f"long.{k}": torch.randn(600, 512) for k in range(4)} | {"short": torch.randn(7)}
    vectors = [
        ak.TaskVector({k: torch.randn(t.shape) for k, t in base.items()}, name=name)
        for name in "ab"
    ]
    bank = ak.TaskVectorBank.from_task_vectors(base, vectors)
    (segment,) = bank.segments
    coef = torch.randn(2, len(base), requires_grad=True)
    composed = bank.compose(coef)
    used = ["long.0", "long.2", "short"]
    grads = {name: torch.randn_like(composed[name]) for name in used}
    outputs = [composed[name] for name in used]
    gathered = segment.layout.join([grads.get(name) for name in bank.blocks], segment.base)
    with PeakMemory() as memory:
        (grad,) = torch.autograd.grad(outputs, coef, list(grads.values()))
    assert memory.peak < 64 * 1024
    assert same_bits(grad, segment.coef_grad(gathered))
    assert grad[:, [bank.blocks.index(name) for name in used]].abs().min() > 0
    assert grad[:, bank.blocks.index("long.1")].eq(0).all()


def test_combined_gradients_of_gradients() -> None:
    bank = make_bank("fp32")[2]
    coef = torch.randn(3, 4, requires_grad=True)

    def loss(coef: torch.Tensor) -> torch.Tensor:
        return sum((t.float().square().sum() for t in bank.combine(coef).values()), coef.sum())

    (grad,) = torch.autograd.grad(loss(coef), coef, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), coef)
    hessian = torch.autograd.functional.hessian(loss, coef.detach())
    expected = 2 * (hessian * grad.detach()[..., None, None]).sum((0, 1))
    assert torch.allclose(second, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
