"""Whole pickled models: their tensors without their code, and no code of a file."""

import argparse
import functools
import io
import os
import pickle
import re
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from enum import Enum
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from atlas_kernels import cli
from atlas_kernels.files import pickles
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.files.state_dicts import read_state_dict


def gone(*classes: type) -> ModuleType:
    """A module with these classes, as long as it is in sys.modules."""
    module = ModuleType("long_gone")
    for cls in classes:
        cls.__module__, cls.__qualname__ = "long_gone", cls.__name__
        setattr(module, cls.__name__, cls)
    return module


class Activation(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Interpolation(Enum):
    BICUBIC = "bicubic"


class Names(OrderedDict):
    pass


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            OrderedDict(conv1=nn.Conv2d(3, 4, 2), bn=nn.BatchNorm2d(4), act=Activation())
        )
        self.positional_embedding = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("none", None)
        self.register_parameter("bias", None)
        self.absent = None
        self.tied = self.positional_embedding
        self.low = nn.Parameter(torch.randn(6).half().view(2, 3).T, requires_grad=False)
        self.low.remark = "kept beside the data"


class ImageEncoder(nn.Module):
    """As in the task-vector papers: the model beside much that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Clip()
        self.args = argparse.Namespace(lr=1e-5, device=torch.device("cpu"), dtype=torch.float16)
        self.norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.train_preprocess = [Interpolation.BICUBIC, defaultdict(list, a=[1]), {3, 4}]
        self.names = Names(a=1)
        self.cache_dir = Path("models")


@pytest.fixture
def saved(tmp_path, monkeypatch) -> tuple[Path, dict[str, torch.Tensor]]:
    """A pickled encoder whose code is no longer there, and its state dict."""
    module = gone(Activation, Interpolation, Names, Clip, ImageEncoder)
    monkeypatch.setitem(sys.modules, "long_gone", module)
    encoder = ImageEncoder()
    torch.save(encoder, tmp_path / "zeroshot.pt")
    monkeypatch.delitem(sys.modules, "long_gone")
    with pytest.raises(ModuleNotFoundError, match="long_gone"):
        torch.load(tmp_path / "zeroshot.pt", weights_only=False)
    return tmp_path / "zeroshot.pt", encoder.model.state_dict()


def test_a_pickled_model_is_its_state_dict(saved) -> None:
    path, expected = saved
    found = read_state_dict(path, allow_pickle=True)
    assert list(found) == list(expected)
    assert "visual.bn.running_mean" in found
    assert "mask" not in found
    assert "tied" in found
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert not found[name].requires_grad
        assert type(found[name]) is torch.Tensor


def test_only_a_prefix_that_all_share_goes(tmp_path) -> None:
    path = tmp_path / "m.pt"
    for module, expected in (
        (nn.DataParallel(nn.ModuleDict({"model": nn.Linear(1, 1)})), ["weight", "bias"]),
        (nn.ModuleDict({"visual": nn.Linear(1, 1)}), ["visual.weight", "visual.bias"]),
        (
            nn.ModuleDict({"model": nn.Linear(1, 1, bias=False), "head": nn.Linear(1, 1)}),
            ["model.weight", "head.weight", "head.bias"],
        ),
    ):
        torch.save(module, path)
        assert list(read_state_dict(path, allow_pickle=True)) == expected


def test_state_dicts_are_read_as_before(tmp_path) -> None:
    path = tmp_path / "m.pt"
    state = {"model.a": torch.ones(2), "model.b": torch.zeros(1)}
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, path)
    assert read_state_dict(path, allow_pickle=True).keys() == state.keys()
    torch.save({"args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
        read_state_dict(path, allow_pickle=True)
    torch.save(argparse.Namespace(lr=1), path)
    with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
        read_state_dict(path, allow_pickle=True)


def test_a_pickled_model_is_refused_unless_allowed(saved) -> None:
    with pytest.raises(FileFormatError, match=r"or allow a pickled model \(.*--allow-pickle\)"):
        read_state_dict(saved[0])


def test_what_is_no_tensor_is_named(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0]._buffers["odd"] = argparse.Namespace(a=1)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(FileFormatError, match=r"\(0\.odd is a Namespace, not a tensor\)"):
        read_state_dict(tmp_path / "m.pt", allow_pickle=True)
    model = nn.Sequential(nn.Linear(1, 1))
    model._modules["odd"] = argparse.Namespace(a=1)
    torch.save(model, tmp_path / "m.pt")
    with pytest.raises(FileFormatError, match=r"odd\. is a Namespace, not a module"):
        read_state_dict(tmp_path / "m.pt", allow_pickle=True)


class Harm:
    """Unpickling calls the function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.function, self.arguments


def replaced(path: Path, pickled: bytes) -> None:
    """A file of torch.save with another pickle in it."""
    buffer = io.BytesIO()
    torch.save({}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))


def test_no_code_of_a_file_runs(tmp_path) -> None:
    path, evil = tmp_path / "model.pt", tmp_path / "evil"
    for harm in (
        Harm(os.mkdir, str(evil)),
        Harm(eval, f"__import__('os').mkdir({str(evil)!r})"),
        Harm(exec, f"__import__('os').mkdir({str(evil)!r})"),
        Harm(torch.load, str(path)),
    ):
        model = nn.Linear(1, 1)
        model.note = harm
        torch.save(model, path)
        assert list(read_state_dict(path, allow_pickle=True)) == ["weight", "bias"]
        torch.save({"a": torch.ones(1), "b": harm}, path)
        with pytest.raises(FileFormatError):
            read_state_dict(path, allow_pickle=True)
    target = f"S{str(evil)!r}\n"
    for program in (
        f"cposix\nmkdir\n({target}tR.",
        f"cos\nmkdir\n({target}tR.",
        # Through what is known: attributes of what it gives, and of the modules it lies in.
        f"ctorch._utils\n_rebuild_tensor_v2.__globals__\n({target}tR.",
        f"ccollections\nOrderedDict.__init__\n({target}tR.",
        f"ctorch\nos.mkdir\n({target}tR.",
        f"ctorch._utils\nos.mkdir\n({target}tR.",
        f"({target}iposix\nmkdir\n.",
        f"cfunctools\npartial\n(cos\nmkdir\n{target}tR(tR.",
    ):
        replaced(path, program.encode())
        with pytest.raises(FileFormatError):
            read_state_dict(path, allow_pickle=True)
    # Attributes set on a known function stay with the file.
    program = "ctorch._utils\n_rebuild_tensor_v2\n(N(dS'__defaults__'\n(I1\nI2\ntstb."
    before = torch._utils._rebuild_tensor_v2.__defaults__
    replaced(path, program.encode())
    with pytest.raises(FileFormatError):
        read_state_dict(path, allow_pickle=True)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert pickles._rebuilt.__defaults__ is None
    assert not evil.exists()


class Fill(nn.Module):
    """What torch.jit.load runs when it restores the module: it writes into a user's file."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.written = torch.zeros(4, dtype=torch.uint8)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target, self.training = state
        self.written = torch.from_file(self.target, True, 4, dtype=torch.uint8).fill_(88)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def harmful_archive(tmp_path: Path) -> tuple[bytes, bytes, bytes, Path]:
    """Records, directory and end of an archive whose loading runs code, and what that changes."""
    path, target = tmp_path / "script.pt", tmp_path / "precious"
    target.write_bytes(b"    ")
    torch.jit.script(Fill(str(target))).save(path)
    target.write_bytes(b"keep")
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        # Where both readers look.
        start = new.start_dir
    content = buffer.getvalue()
    return content[:start], content[start:-22], content[-22:], target


@pytest.mark.filterwarnings("ignore:.*torch.(load|jit)")
def test_an_archive_of_two_directories_runs_no_code(tmp_path) -> None:
    """Python looks before the end record, torch.load where that says: each sees another archive."""
    records, directory, end, target = harmful_archive(tmp_path)
    harmless = directory.replace(b"constants.pkl", b"constants.xyz")
    path = tmp_path / "model.pt"
    path.write_bytes(records + directory + harmless + end)
    with zipfile.ZipFile(path) as archive:
        assert not any(name.endswith("/constants.pkl") for name in archive.namelist())
    # The test could fail: what torch.load does with it.
    torch.load(path, weights_only=False)
    assert target.read_bytes() == b"XXXX"
    target.write_bytes(b"keep")
    for content, message in (
        (records + directory + harmless + end, "not where its end says"),
        (records + harmless + directory + end, "not where its end says"),
        (records + directory + end, "a TorchScript archive"),
        # A 64-bit record that only one of the two readers believes.
        (records + directory + wide_end(records, directory, end) + end, "TorchScript"),
        (records + harmless + directory + wide_end(records, directory, end) + end, "is damaged"),
        (records + directory + wide_end(records + b"x", directory, end) + end, "is damaged"),
        (records + directory + end + b"x", "end of the archive is missing"),
        (b"x" + records + directory + end, "no zip archive"),
    ):
        for name in ("model.pt", "model.bin"):
            (tmp_path / name).write_bytes(content)
            for allow_pickle in (True, False):
                with pytest.raises(FileFormatError, match=message):
                    read_state_dict(tmp_path / name, allow_pickle=allow_pickle)
    assert target.read_bytes() == b"keep"


def wide_end(records: bytes, directory: bytes, end: bytes) -> bytes:
    """The 64-bit records that go before the end of an archive."""
    (count,) = struct.unpack("<H", end[10:12])
    sizes = count, count, len(directory), len(records)
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, *sizes)
    return record + b"PK\x06\x07" + struct.pack("<IQI", 0, sum(sizes[2:]), 1)


def test_formats_before_zip_are_refused(tmp_path) -> None:
    path, evil = tmp_path / "model.pt", tmp_path / "evil"
    harm = {"a": torch.ones(1), "b": Harm(os.mkdir, str(evil))}
    torch.save(harm, path, _use_new_zipfile_serialization=False)
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.add(path, "storages")
        archive.add(path, "tensors")
        archive.add(path, "pickle")
    for which in (path, tmp_path / "tar.pt"):
        for allow_pickle in (True, False):
            with pytest.raises(FileFormatError, match=r"no zip archive.*torch\.save since 1"):
                read_state_dict(which, allow_pickle=allow_pickle)
    assert not evil.exists()


def test_a_refusal_is_in_our_words(tmp_path) -> None:
    """torch.load's are many lines, in colours, and advise to switch the lock off."""
    path = tmp_path / "model.pt"
    torch.save({"a": argparse.Namespace(lr=1)}, path)
    with pytest.raises(FileFormatError) as raised:
        read_state_dict(path)
    assert "(it holds an object of argparse.Namespace)" in str(raised.value)
    assert not re.search(r"weights_only|safe_globals|\x1b|\\x1b", str(raised.value))


def test_a_module_within_a_checkpoint(tmp_path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"model": nn.Linear(1, 1), "epoch": 3}, path)
    assert list(read_state_dict(path, allow_pickle=True)) == ["weight", "bias"]


def test_a_torchscript_archive_is_refused(saved) -> None:
    # Such an archive has one more record; torch.load would run its code.
    with zipfile.ZipFile(saved[0], "a") as archive:
        archive.writestr("zeroshot/constants.pkl", pickle.dumps(()))
    with pytest.raises(FileFormatError, match="a TorchScript archive"):
        read_state_dict(saved[0], allow_pickle=True)


def test_damaged_files(saved) -> None:
    path, _ = saved
    content = path.read_bytes()
    for damaged in (b"", b"no archive", content[:-100], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match=r"zeroshot\.pt: cannot be read") as error:
            read_state_dict(path, allow_pickle=True)
        assert "--allow-pickle" not in str(error.value)


def test_on_the_command_line(saved, tmp_path, capsys) -> None:
    path, state = saved
    tuned = tmp_path / "tuned.pt"
    torch.save({name: tensor + 1 for name, tensor in state.items()}, tuned)
    vector, bank = tmp_path / "v.safetensors", tmp_path / "bank.safetensors"

    def run(*arguments: object) -> int:
        return cli.main([str(argument) for argument in arguments])

    assert run("diff", path, tuned, "-o", vector) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert run("diff", path, tuned, "-o", vector, "--allow-pickle") == 0
    assert run("bank", path, vector, "-o", bank) == 2
    assert run("bank", path, vector, "-o", bank, "--allow-pickle") == 0
    assert run("inspect", path, "--allow-pickle") == 0
    assert "visual.conv1.weight" in capsys.readouterr().out
