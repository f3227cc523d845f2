"""Damaged and forged files: each loads right or is refused in words, and nothing is hung or run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import atlas_kernels as ak
from atlas_kernels.files import (
    FileFormatError,
    data_offsets,
    describe,
    map_tensors,
    read_state_dict,
    read_tensors,
    write_tensors,
)
from atlas_kernels.models.coefficients import write_coefficients

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 4, bias=False))


def make_vectors(module: nn.Module) -> list[ak.TaskVector]:
    vectors = []
    for name in ("cars", "dogs"):
        deltas: dict[str, Any] = {key: torch.randn(p.shape) for key, p in module.named_parameters()}
        deltas["2.weight"] = ak.LowRank(torch.randn(4, 2), torch.randn(2, 30), 0.5)
        vectors.append(ak.TaskVector(deltas, {"1.running_mean": torch.randn(30)}, name=name))
    return vectors


def make_bank() -> ak.TaskVectorBank:
    module = make_module()
    return ak.TaskVectorBank.from_task_vectors(module, make_vectors(module), codec="int4")


def load_coefficients(path: Path) -> object:
    return ak.read_coefficients(path, make_bank())


# How files of each kind are written, and read whole.
WRITERS: dict[str, Callable[[Path], None]] = {
    "bank": lambda path: make_bank().save(path),
    "task_vector": lambda path: make_vectors(make_module())[0].save(path),
    "coefficients": lambda path: write_coefficients(path, torch.randn(2, 5), make_bank()),
}
READERS: dict[str, Callable[[Path], object]] = {
    "bank": lambda path: ak.TaskVectorBank.load(path, mmap=False),
    "task_vector": ak.TaskVector.load,
    "coefficients": load_coefficients,
}
each_kind = pytest.mark.parametrize("kind", WRITERS)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


@each_kind
def test_every_flipped_bit_is_found(kind: str, tmp_path: Path) -> None:
    """One in every tensor, and many in the header: the padding that nothing reads included."""
    path = tmp_path / "file.safetensors"
    WRITERS[kind](path)
    READERS[kind](path)
    content, offsets = path.read_bytes(), data_offsets(path)
    first = min(start for start, _ in offsets.values())
    choose = random.Random(0)
    places = [choose.randrange(start, end) for start, end in offsets.values()]
    places += [choose.randrange(first) for _ in range(150)]
    for place in places:
        path.write_bytes(flipped(content, place, choose.randrange(8)))
        with pytest.raises(FileFormatError, match=r"file\.safetensors: ") as raised:
            READERS[kind](path)
        assert "\n" not in str(raised.value)
    # Nor can a file pass for an older one, which had no checksums.
    path.write_bytes(content.replace(b'"version": "2"', b'"version": "1"'))
    with pytest.raises(FileFormatError, match="the checksum of its header fails"):
        READERS[kind](path)


def test_what_reads_a_whole_bank_verifies_it(tmp_path: Path) -> None:
    path = tmp_path / "bank.safetensors"
    make_bank().save(path)
    content, offsets = path.read_bytes(), data_offsets(path)
    module = make_module()
    for name in ("base.0", "deltas.0", "scales.0", "factors.1", "constant.1.running_var", "errors"):
        path.write_bytes(flipped(content, offsets[name][0], 0))
        bank = ak.TaskVectorBank.load(path)
        for use in (
            bank.verify,
            lambda bank=bank: bank.save(tmp_path / "other.safetensors"),
            lambda bank=bank: bank.state_dict(torch.zeros(2)),
        ):
            with pytest.raises(FileFormatError, match=r"bank\.safetensors: .*checksum"):
                use()
        if name.split(".")[0] not in ("deltas", "scales"):
            with pytest.raises((FileFormatError, ValueError)):
                ak.ComposedModel(module, bank, memory="stream").weights()
        assert not (tmp_path / "other.safetensors").exists()
    path.write_bytes(content)
    ak.TaskVectorBank.load(path).state_dict(torch.zeros(2))


def test_files_of_version_1_are_verified_by_what_they_hold(tmp_path: Path) -> None:
    content = (Path(__file__).parents[1] / "fixtures" / "bank-0.1.safetensors").read_bytes()
    path = tmp_path / "bank.safetensors"
    path.write_bytes(content)
    ak.TaskVectorBank.load(path, mmap=False)
    offsets = data_offsets(path)
    for name in ("base.0", "deltas.0"):
        path.write_bytes(flipped(content, offsets[name][0], 3))
        with pytest.raises(FileFormatError, match="fingerprint" if name == "base.0" else "deltas"):
            ak.TaskVectorBank.load(path, mmap=False)


def test_a_mapped_bank_that_is_overwritten_in_place(tmp_path: Path) -> None:
    path, other = tmp_path / "bank.safetensors", tmp_path / "other.safetensors"
    make_bank().save(path)
    bank = ak.TaskVectorBank.load(path)
    coef = torch.ones(2)
    expected = bank.compose(coef)
    # Replaced by another file, or moved away: what is mapped is what it was.
    make_bank().save(path)
    path.rename(other)
    assert all(torch.equal(expected[k], t) for k, t in bank.compose(coef).items())
    bank, kept = ak.TaskVectorBank.load(other), ak.TaskVectorBank.load(other, mmap=False)
    other.write_bytes(other.read_bytes())
    with pytest.raises(FileFormatError, match=r"other.* overwritten in place.* with mv, never"):
        bank.compose(coef)
    kept.compose(coef)


def replaced_fields(**fields: Any) -> Change:
    return lambda _, old: old.update(fields)


def without_field(name: str) -> Change:
    return lambda _, fields: fields.pop(name)


def with_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


def without_tensor(name: str) -> Change:
    return lambda tensors, _: tensors.pop(name)


def low_rank(**parts: Any) -> Change:
    return lambda _, fields: fields["low_rank"]["1"].update(parts)


# Whole, with checksums that fit: what somebody else might write, or an older version of ours.
NONSENSE: list[tuple[str, Change, str]] = [
    ("bank", replaced_fields(names=["a", "a"]), "several of its task vectors are called"),
    ("bank", lambda _, f: f["blocks"].__setitem__(1, "0.weight"), "several of its blocks"),
    ("bank", lambda _, f: f["segments"][0][0].__setitem__(0, -1), "each of the 5 blocks once"),
    ("bank", lambda _, f: f["segments"][0][0].__setitem__(0, 1), "each of the 5 blocks once"),
    ("bank", lambda _, f: f["segments"][0][0].__setitem__(0, 2**70), "each of the 5 blocks once"),
    ("bank", lambda _, f: f["segments"][0][0].__setitem__(0, "0"), "'0', expected int"),
    ("bank", lambda _, f: f["segments"][0].__setitem__(1, "int99"), "unknown codec 'int99'"),
    ("bank", lambda _, f: f["segments"].pop(), "each of the 5 blocks once"),
    ("bank", lambda _, f: f["shapes"].__setitem__(0, [2**40]), "the base of 2 task vectors"),
    ("bank", lambda _, f: f["shapes"].__setitem__(0, [2**50, 2**50]), "the base of 2 task vectors"),
    ("bank", lambda _, f: f["shapes"].__setitem__(0, [-20, -30]), r"has the shape \(-20, -30\)"),
    ("bank", lambda _, f: f["shapes"].__setitem__(0, [True]), "True, expected int"),
    ("bank", lambda _, f: f["shapes"].__setitem__(4, [2**40, 1]), "the base of low-rank blocks"),
    ("bank", lambda _, f: f["shapes"].pop(), "5 blocks, 4 shapes"),
    ("bank", low_rank(scales=[[float("nan"), 1.0]]), "nan, expected a finite float"),
    ("bank", low_rank(scales=[[0.5]]), "do not fit its blocks"),
    ("bank", low_rank(ranks=[[2**40, 2]]), "the factors of low-rank blocks"),
    ("bank", low_rank(ranks=[[-2, 2]]), "is negative"),
    ("bank", low_rank(ranks=[[1, 1]]), "the factors of low-rank blocks"),
    ("bank", lambda _, f: f["low_rank"].update({"7": f["low_rank"]["1"]}), "segment '7'"),
    ("bank", replaced_fields(products={"2.weight": 1.0}), "it lacks .* of the product"),
    ("bank", replaced_fields(names="cars"), "names is 'cars', expected"),
    ("bank", replaced_fields(names=[["cars"], "dogs"]), "list, expected str"),
    ("bank", replaced_fields(aliases=[1]), "aliases is list"),
    ("bank", without_field("shapes"), "it lacks 'shapes'"),
    ("bank", without_tensor("errors"), "it lacks the tensors"),
    ("bank", without_tensor("checksums.0"), "it lacks the tensors"),
    ("bank", without_tensor("scales.0"), "it lacks the tensors"),
    ("bank", with_tensor("errors", lambda t: t[:1]), r"its errors are .*\(1, 5\)"),
    ("bank", with_tensor("base.0", lambda t: t.view(torch.int32)), "the base of segment 0"),
    ("bank", with_tensor("deltas.0", lambda t: t[1:]), "the deltas of 2 task vectors"),
    ("bank", with_tensor("deltas.0", lambda t: t.view(torch.float32)), "the deltas of 2 task"),
    ("bank", with_tensor("checksums.0", lambda t: t[1:]), "checksum of the deltas"),
    ("task_vector", with_tensor("delta.0.weight", lambda t: t.to(torch.int16)), "int16"),
    ("task_vector", replaced_fields(blocks=["0.weight"] * 2), "several of its blocks"),
    ("task_vector", lambda _, f: f["blocks"].pop(0), "do not belong together.*0.weight"),
    ("task_vector", without_field("base"), "it lacks 'base'"),
    ("task_vector", replaced_fields(name=7), "name is 7, expected str"),
    ("task_vector", replaced_fields(scales={"2.weight": float("nan")}), "a finite float"),
    ("task_vector", replaced_fields(scales={"2.weight": "x"}), "a finite float"),
    ("task_vector", replaced_fields(scales={"other": 1.0}), "do not belong together"),
    ("task_vector", with_tensor("factor.up.2.weight", lambda t: t[:, 1:]), "do not fit"),
    ("task_vector", with_tensor("factor.up.2.weight", lambda t: t[0]), "do not fit"),
    ("coefficients", without_field("names"), "it lacks 'names'"),
    ("coefficients", replaced_fields(blocks=3), "blocks is 3"),
    ("coefficients", replaced_fields(names=["cars", "cars"]), "several of its task vectors"),
    ("coefficients", without_tensor("coef"), "coef"),
    ("coefficients", with_tensor("coef", lambda t: t / 0), "not all finite"),
    ("coefficients", with_tensor("coef", lambda t: t.to(torch.int32)), "int32"),
    ("coefficients", with_tensor("coef", lambda t: t[:, 1:]), r"shape \(2, 4\), expected 2 task"),
    ("coefficients", with_tensor("coef", lambda t: t[0, 0]), r"shape \(\)"),
    ("coefficients", with_tensor("coef", lambda t: t.view(2, 5, 1)), "lacks the seed"),
    ("coefficients", replaced_fields(seed="one"), "seed is 'one', expected int"),
    ("coefficients", replaced_fields(seed=2**64), "no integer of 64 bits"),
]


@pytest.mark.parametrize(("kind", "change", "message"), NONSENSE, ids=range(len(NONSENSE)))
def test_nonsense_is_refused(kind: str, change: Change, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    WRITERS[kind](path)
    tensors, fields = read_tensors(path, kind, mmap=False)
    change(tensors, fields)
    write_tensors(path, tensors, kind, **fields)
    with pytest.raises(FileFormatError, match=rf"file\.safetensors: .*damaged.*{message}"):
        READERS[kind](path)


def test_coefficients_that_are_refused_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    module, bank = make_module(), make_bank()
    model = ak.ComposedModel(module, bank, granularity="partition", partitions=3, seed=4)
    write_coefficients(path, torch.ones(2, 5, 3), bank, seed=2**63)
    with pytest.raises(FileFormatError, match="no integer of 64 bits"):
        model.load_coefficients(path)
    assert (model.coef.count_nonzero(), model.seed) == (0, 4)


def test_text_of_a_file_cannot_reach_the_terminal_raw(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    name = "\x1b[2J\nforged\u202e"
    deltas = {f"delta.{name}": torch.ones(1)}
    write_tensors(path, deltas, "task_vector", name="", base={}, blocks=[])
    with pytest.raises(FileFormatError) as raised:
        ak.TaskVector.load(path)
    assert r"\x1b[2J\nforged\u202e" in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "fields",
    ["[" * 5000 + "]" * 5000, "{", '{"a": 1, "a": 2}', "1e", '"\\ud800"', "NaN,", ""],
    ids=["nested", "open", "twice", "number", "surrogate", "comma", "empty"],
)
@each_kind
def test_metadata_that_is_no_json(fields: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    metadata = {"format": f"atlas_kernels.{kind}", "version": "1", "blocks": fields}
    save_file({"x": torch.ones(1)}, path, metadata)
    with pytest.raises(FileFormatError, match=r"file\.safetensors: .*damaged"):
        READERS[kind](path)
    if fields != '"\\ud800"':
        with pytest.raises(FileFormatError, match=r"file\.safetensors: .*damaged"):
            describe(path)


def test_a_header_that_asks_for_gigabytes_is_refused_at_once(tmp_path: Path) -> None:
    """Tables of tiles are not built: the shapes of a small file would take 4 TB of them."""
    path = tmp_path / "bank.safetensors"
    make_bank().save(path)
    tensors, fields = read_tensors(path, "bank", mmap=False)
    for size in (2**40, 2**50, 2**62):
        fields["shapes"][0] = [size]
        write_tensors(path, tensors, "bank", **fields)
        with pytest.raises(FileFormatError, match=rf"expected \(\d{{{len(str(size))}}}"):
            ak.TaskVectorBank.load(path)


def mutants(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bytes changed, moved, doubled, lost, most of them where the header is."""
    choose = random.Random(seed)
    head = min(len(content), 6000)
    for _ in range(count):
        place = choose.randrange(head if choose.random() < 0.7 else len(content))
        length = choose.choice((1, 1, 2, 8, 100))
        kind = choose.randrange(5)
        piece = content[place : place + length]
        if kind == 0:
            piece = choose.randbytes(len(piece))
        elif kind == 1:
            piece = b""
        elif kind == 2:
            piece *= 2
        elif kind == 3:
            piece = choose.choice((b"-1", b"[]", b"null", b"9" * 20, b"NaN", b'"', b"\xff\x00"))
        else:
            yield content[:place]
            continue
        yield content[:place] + piece + content[place + length :]


def version_1(path: Path, kind: str) -> None:
    """The same file without a checksum: what is wrong must be found by looking at it."""
    tensors, fields = read_tensors(path, kind, mmap=False)
    metadata = {name: json.dumps(value) for name, value in fields.items()}
    save_file(tensors, path, {"format": f"atlas_kernels.{kind}", "version": "1", **metadata})


def refusal(read: Callable[[], object], path: Path) -> str:
    """In which words a file is refused; "" if it is not. Any other exception is a failure."""
    try:
        read()
    except FileFormatError as error:
        message = str(error)
    except ValueError as error:
        # A file in order, of another bank.
        message = str(error)
        assert "belongs to another bank" in message or "a task vector must be finite" in message
        return message
    else:
        return ""
    assert str(path) in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("version", [1, 2])
@each_kind
def test_mutants_load_or_are_refused(kind: str, version: int, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    WRITERS[kind](path)
    if version == 1:
        version_1(path, kind)
    content = path.read_bytes()
    READERS[kind](path)
    refused = 0
    for mutant in mutants(content, 200, seed=version):
        path.write_bytes(mutant)
        refused += bool(refusal(lambda: READERS[kind](path), path))
        refusal(lambda: describe(path), path)
    # Of version 1, what changes a number of a tensor is not seen.
    assert refused > (120 if version == 1 else 190)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_mutants_of_checkpoints(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    state = make_module().state_dict()
    (save_file if ending == ".safetensors" else torch.save)(state, path)
    for mutant in mutants(path.read_bytes(), 200, seed=3):
        path.write_bytes(mutant)
        for allow_pickle in (False, True):
            refusal(partial(read_state_dict, path, allow_pickle=allow_pickle), path)


def test_checksums_are_not_among_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": torch.ones(3)}, "thing", count=1)
    tensors, fields, origin = map_tensors(path, "thing")
    assert (tensors.keys(), fields) == ({"w"}, {"count": 1})
    assert describe(path)[2] == {"w": ("F32", [3])}
    assert load_file(path).keys() == {"w", "checksums"}
    assert origin.checksums.keys() == {"w"}
    write_tensors(path, {"w": torch.ones(3)})
    assert load_file(path).keys() == {"w"}
