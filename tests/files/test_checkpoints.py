import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from strategies import same_bits
from torch import nn

import atlas_kernels as ak
from atlas_kernels.files.atomic import abandoned, write_atomically
from atlas_kernels.files.errors import FileFormatError
from atlas_kernels.files.state_dicts import read_state_dict
from atlas_kernels.files.tensors import describe, read_tensors, write_tensors

STATE = {"w": torch.arange(6.0).view(2, 3), "step": torch.tensor(3), "h": torch.ones(2).half()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in right)
    assert all(left[key].dtype == right[key].dtype for key in right)


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_read_state_dict(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    (save_file if ending == ".safetensors" else torch.save)(STATE, path)
    assert_same(read_state_dict(path), STATE)
    assert_same(read_state_dict(str(path)), STATE)


def test_training_checkpoints_are_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pt"
    wrapped = {f"module.{name}": tensor for name, tensor in STATE.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "name": "run"}, path)
    assert_same(read_state_dict(path), STATE)
    torch.save(wrapped, path)
    assert_same(read_state_dict(path), STATE)
    # A submodule that is called so is not a wrapper's prefix.
    mixed = {"module.w": torch.ones(1), "head": torch.ones(2)}
    torch.save(mixed, path)
    assert_same(read_state_dict(path), mixed)
    torch.save({"module.module.w": torch.ones(1)}, path)
    assert read_state_dict(path).keys() == {"module.w"}


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_one_rule_for_prefixes(prefix: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    save = save_file if ending == ".safetensors" else torch.save
    save({prefix + name: tensor for name, tensor in STATE.items()}, path)
    assert_same(read_state_dict(path), STATE)
    some = {"_orig_mod.w": torch.ones(1), "inner._orig_mod.w": torch.ones(1)}
    save(some, path)
    assert_same(read_state_dict(path), some)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_what_checkpoints_are_wrapped_in(wrapper: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, wrapper: STATE, "optimizer": {"lr": [0.1]}}, path)
    assert_same(read_state_dict(path), STATE)
    # A weight of that name is no wrapper.
    torch.save({wrapper: torch.ones(1), "w": torch.ones(2)}, path)
    assert read_state_dict(path).keys() == {wrapper, "w"}


class Custom:
    """What unpickling would run if it were allowed to."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["ATLAS_KERNELS_TEST_EVIL"],)


def test_pickled_objects_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, evil = tmp_path / "model.pt", tmp_path / "evil"
    monkeypatch.setenv("ATLAS_KERNELS_TEST_EVIL", str(evil))
    for harmful in (nn.Linear(2, 2), {"w": torch.ones(1), "x": Custom()}):
        torch.save(harmful, path)
        with pytest.raises(
            FileFormatError, match=r"Save model\.state_dict\(\), not the model"
        ) as e:
            read_state_dict(path)
        assert str(path) in str(e.value)
        assert "\n" not in str(e.value)
    assert not evil.exists()


@pytest.mark.parametrize("content", [[1, 2], {"w": 1.5}, {"state_dict": {"w": "x"}}, torch.ones(2)])
def test_what_is_no_state_dict(content: object, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(FileFormatError, match="expected a dictionary of tensors"):
        read_state_dict(path)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such file"):
        read_state_dict(tmp_path / "none.pt")
    with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
        read_state_dict(tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    with pytest.raises(
        FileFormatError, match=r"unknown ending '\.onnx', expected \.safetensors or"
    ):
        read_state_dict(path)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 9, 200, -1, -30])
def test_truncated_checkpoints(ending: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    (save_file if ending == ".safetensors" else torch.save)(STATE, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileFormatError, match=f"model{ending}: "):
        read_state_dict(path)


def test_flipped_bytes_never_end_in_another_exception(tmp_path: Path) -> None:
    """Every byte of the pickle inside a checkpoint, one at a time."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(2)}, path)
    content = path.read_bytes()
    start = content.index(b"\x80\x02")
    refused = 0
    for position in range(start, start + 120):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except FileFormatError:
            refused += 1
    assert refused > 60


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    shared = torch.arange(8.0)
    tensors = {
        "a": shared, "same": shared, "half": shared[:4], "stride": shared[::2], "none": shared[:0],
        "scalar": torch.tensor(2.0, requires_grad=True), "t": shared.view(2, 4).t(),
    }  # fmt: skip
    write_tensors(path, tensors, "thing", names=["x", "é"], count=3, nested={"a": [1, None]})
    for mmap in (True, False):
        loaded, fields = read_tensors(path, "thing", mmap)
        assert loaded.keys() == tensors.keys()
        assert all(same_bits(loaded[key], tensor) for key, tensor in tensors.items())
        assert fields == {"names": ["x", "é"], "count": 3, "nested": {"a": [1, None]}}
    kind, fields, listed = describe(path)
    assert (kind, fields["count"]) == ("thing", 3)
    assert listed["t"] == ("F32", [4, 2])
    with pytest.raises(FileFormatError, match=r"expected a file of atlas_kernels.other, found"):
        read_tensors(path, "other")
    write_tensors(path, {"w": torch.ones(1)})
    assert load_file(path).keys() == {"w"}


def test_mapped_tensors_are_private(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"w": torch.ones(3)}, "thing")
    mapped, _ = read_tensors(path, "thing", mmap=True)
    mapped["w"].fill_(7)
    assert torch.equal(read_tensors(path, "thing")[0]["w"], torch.ones(3))


def leftovers(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"

    def half_written(*tensors: object) -> None:
        raise error

    for before in (None, b"old content"):
        if before is not None:
            path.write_bytes(before)
        with monkeypatch.context() as patch:
            patch.setattr("atlas_kernels.files.tensors.crc", half_written)
            with pytest.raises(type(error)):
                write_tensors(path, STATE, "thing")
        assert leftovers(tmp_path) == ([] if before is None else ["file.safetensors"])
        assert before is None or path.read_bytes() == before


def test_a_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_tensors(tmp_path / "file.safetensors", STATE, "thing")
    assert leftovers(tmp_path) == []


def test_a_disk_that_is_full_in_earnest(tmp_path: Path) -> None:
    """The kernel's own limit on the size of a file, in a process of its own."""
    program = f"""
import torch
from atlas_kernels.files import write_tensors
try:
    write_tensors({str(tmp_path / "big.safetensors")!r}, {{"w": torch.ones(100_000)}}, "thing")
except Exception as error:
    print(type(error).__name__, isinstance(error, OSError))
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = subprocess.run(
        [sys.executable, "-B", "-c", program],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # A caller reports an OSError as what it is: no room, in the words of the system.
    assert result.stdout == "OSError True\n", result
    assert leftovers(tmp_path) == []


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old content")
    die_while_writing(path)
    assert path.read_bytes() == b"old content"


def die_while_writing(path: Path) -> None:
    """In a process of its own, which leaves what it has written."""
    child = os.fork()
    if child == 0:

        def killed(name: str) -> None:
            Path(name).write_bytes(b"half")
            os._exit(9)

        write_atomically(path, killed)
    os.waitpid(child, 0)


def test_what_a_killed_process_left_is_found_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    for name in ("file", "file.b"):
        die_while_writing(tmp_path / name)
    # Of other files, or a user's own.
    others = [".file.bak", ".file.b.c.unfinished", "file.abc.unfinished"]
    for name in others:
        (tmp_path / name).touch()
    (left,) = abandoned(path)
    assert re.fullmatch(r"\.file\.\w+\.unfinished", left.name)

    def written(name: str) -> None:
        # A living process's own is not abandoned.
        assert abandoned(path) == []
        write_atomically(path, lambda inner: Path(inner).write_text("inner"))
        assert Path(name).exists()

    write_atomically(path, written)
    assert [record.message for record in caplog.records if "killed" in record.message] == [
        f"removed {left}, which a process that was killed had left"
    ]
    (unfinished,) = abandoned(tmp_path / "file.b")
    assert leftovers(tmp_path) == sorted([*others, "file", unfinished.name])


def test_errors_name_the_file_and_not_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.safetensors"

    def refused(*_: object) -> None:
        temporary = tmp_path / ".file.safetensors.abcd_123.unfinished"
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))

    with monkeypatch.context() as patch:
        patch.setattr("tempfile.mkstemp", refused)
        with pytest.raises(PermissionError) as raised:
            write_tensors(path, STATE, "thing")
    assert (raised.value.filename, raised.value.strerror) == (str(path), "Permission denied")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left .*: the file takes \d,\d{3} b") as error:
            write_tensors(path, STATE, "thing")
    assert error.value.filename == str(path)
    assert re.search(r"bytes, [\d,]+ are free", str(error.value))

    def elsewhere(_: str) -> None:
        (tmp_path / "none").read_bytes()

    with pytest.raises(FileNotFoundError) as other:
        write_atomically(path, elsewhere)
    assert other.value.filename == str(tmp_path / "none")
    assert leftovers(tmp_path) == []


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"file\.safetensors: tensor 'w' has dtype torch.complex1"):
        write_tensors(tmp_path / "file.safetensors", {"w": torch.ones(1, dtype=torch.complex128)})
    assert leftovers(tmp_path) == []


def test_what_is_no_file(tmp_path: Path) -> None:
    loop, pipe = tmp_path / "loop.pt", tmp_path / "pipe.pt"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, message in ((loop, "symbolic links that lead in a circle"), (pipe, "a pipe")):
        with pytest.raises(OSError, match=message):
            read_state_dict(path)


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "file.safetensors", STATE, "thing")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.safetensors").stat().st_mode) == 0o640


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    vector = ak.TaskVector({"w": torch.ones(1)})
    with pytest.raises(FileNotFoundError, match=r"cannot write .*: the folder .*nowhere does not"):
        vector.save(tmp_path / "nowhere" / "v.safetensors")
