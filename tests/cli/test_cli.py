import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import atlas_kernels as ak
from atlas_kernels import cli
from atlas_kernels.models.coefficients import write_coefficients

COMMANDS = ("info", "demo", "diff", "bank", "merge", "inspect", "plan")


@pytest.fixture
def files(tmp_path) -> Path:
    """base.pt and two fine-tuned ones, of which only the weight differs."""
    base = {"weight": torch.randn(3, 4), "bias": torch.randn(3), "steps": torch.tensor(3)}
    torch.save(base, tmp_path / "base.pt")
    for index in (1, 2):
        tuned = {**base, "weight": base["weight"] + index}
        save_file(tuned, tmp_path / f"tuned{index}.safetensors")
    return tmp_path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def packed(folder: Path) -> Path:
    for index in (1, 2):
        tuned, vector = folder / f"tuned{index}.safetensors", folder / f"v{index}.safetensors"
        assert run("diff", folder / "base.pt", tuned, "-o", vector, "--dtype", "fp32") == 0
    vectors = [folder / "v1.safetensors", folder / "v2.safetensors"]
    bank = folder / "bank.safetensors"
    assert run("bank", folder / "base.pt", *vectors, "-o", bank, "--codec", "fp32") == 0
    return bank


def test_from_checkpoints_to_a_merged_one(files, capsys) -> None:
    bank_path = packed(files)
    bank = ak.TaskVectorBank.load(bank_path)
    assert bank.names == ("v1", "v2")
    assert bank.blocks == ("weight",)
    coefficients = files / "c.safetensors"
    write_coefficients(coefficients, torch.tensor([[0.5], [-2.0]]), bank)
    merged = files / "merged.safetensors"
    assert run("merge", bank_path, coefficients, "-o", merged) == 0
    base, result = torch.load(files / "base.pt"), load_file(merged)
    assert result.keys() == base.keys()
    # 0.5 * 1 - 2 * 2, and the deltas' own rounding.
    assert torch.allclose(result["weight"], base["weight"] - 3.5, atol=1e-5)
    assert torch.equal(result["bias"], base["bias"])
    assert result["steps"] == 3
    capsys.readouterr()
    for path, expected in (
        (files / "v1.safetensors", ["task vector 'v1'", "weight", "F32", "(3, 4)"]),
        (bank_path, ["bank of 2 task vectors", "codec fp32", "v1, v2", "weight"]),
        (coefficients, ["coefficients (2, 1)", "+0.500", "-2.000"]),
        (merged, ["state dict, 3 tensors with 16 elements", "bias"]),
        (files / "base.pt", ["state dict, 3 tensors", "int64"]),
    ):
        assert run("inspect", path) == 0
        printed = capsys.readouterr().out
        assert [text for text in expected if text not in printed] == []


def test_partitions(files, capsys) -> None:
    bank_path = packed(files)
    bank = ak.TaskVectorBank.load(bank_path)
    coef = torch.randn(2, 1, 5)
    coefficients, merged = files / "c.safetensors", files / "merged.safetensors"
    write_coefficients(coefficients, coef, bank, seed=17)
    assert run("merge", bank_path, coefficients, "-o", merged) == 0
    expected = bank.compose(coef, seed=17)["weight"]
    assert torch.equal(load_file(merged)["weight"], expected)
    assert not torch.equal(bank.compose(coef)["weight"], expected)
    capsys.readouterr()
    assert run("inspect", coefficients) == 0
    printed = capsys.readouterr().out
    assert "coefficients (2, 1, 5)" in printed
    assert "1 blocks, 5 groups of elements each, seed 17" in printed


def test_names_dtype_and_patterns(files) -> None:
    out = files / "v.safetensors"
    tuned = files / "tuned1.safetensors"
    assert run("diff", files / "base.pt", tuned, "-o", out, "--name", "cars") == 0
    vector = ak.TaskVector.load(out)
    assert vector.name == "cars"
    assert vector.deltas["weight"].dtype == torch.bfloat16
    bank = files / "bank.safetensors"
    assert run("bank", files / "base.pt", out, "-o", bank, "--include", "w*") == 0
    assert ak.TaskVectorBank.load(bank).blocks == ("weight",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "none.safetensors"), "none.safetensors: no such file"),
        (("inspect", "."), "is a folder, expected a file"),
        (("inspect", "text.txt"), "unknown ending '.txt'"),
        (("inspect", "broken.safetensors"), "not a readable safetensors file"),
        (("diff", "base.pt", "none.pt", "-o", "o.safetensors"), "none.pt: no such file"),
        (("diff", "base.pt", "other.pt", "-o", "o.safetensors"), "weight: shape (2, 2)"),
        (("diff", "base.pt", "tuned1.safetensors", "-o", "o.pt"), "call it *.safetensors"),
        (
            ("diff", "base.pt", "tuned1.safetensors", "-o", "tuned1.safetensors"),
            "tuned1.safetensors is an input",
        ),
        (("diff", "base.pt", "tuned1.safetensors", "-o", "no/o.safetensors"), "does not exist"),
        (("diff", "base.pt", "tuned1.safetensors", "-o", "f.safetensors"), "is a folder"),
        (("bank", "base.pt", "tuned1.safetensors", "-o", "o.safetensors"), "task_vector"),
        (("bank", "other.pt", "v1.safetensors", "-o", "o.safetensors"), "'weight'"),
        (("bank", "moved.pt", "v1.safetensors", "-o", "o.safetensors"), "another base"),
        (
            ("bank", "base.pt", "v1.safetensors", "-o", "o.safetensors", "--codec", "int99"),
            "unknown codec 'int99'",
        ),
        (
            ("bank", "base.pt", "v1.safetensors", "-o", "o.safetensors", "--include", "x*"),
            "nothing to pack",
        ),
        (("merge", "bank.safetensors", "v1.safetensors", "-o", "o.safetensors"), "coefficients"),
        (("merge", "bank.safetensors", "c1.safetensors", "-o", "o.safetensors"), "another bank"),
    ],
)
def test_bad_input(files, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(files)
    (files / "text.txt").write_text("text")
    (files / "broken.safetensors").write_text("text")
    (files / "f.safetensors").mkdir()
    base = torch.load("base.pt")
    torch.save({**base, "weight": torch.zeros(2, 2)}, "other.pt")
    torch.save({**base, "weight": base["weight"] + 1}, "moved.pt")
    packed(Path())
    vector = ak.TaskVector.load("v1.safetensors")
    single = ak.TaskVectorBank.from_task_vectors(base, [vector])
    write_coefficients("c1.safetensors", torch.zeros(1, 1), single)
    before = {path: path.read_bytes() for path in files.iterdir() if path.is_file()}
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("atlas-kernels: ")
    assert "Traceback" not in printed.err
    assert not printed.out
    assert {path: path.read_bytes() for path in files.iterdir() if path.is_file()} == before


def test_debug_shows_the_traceback_wherever_it_stands(capsys) -> None:
    assert run("--debug", "inspect", "none.pt") == run("inspect", "none.pt", "--debug") == 2
    assert capsys.readouterr().err.count("Traceback") == 2


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "atlas-kernels: interrupted\n"),
        (RuntimeError("odd"), 1, "failed: RuntimeError: odd"),
        (OSError(28, "No space left on device", "o"), 1, "o: No space left on device"),
        (PermissionError(13, "Permission denied", "o"), 2, "o: Permission denied"),
        (ImportError("run pip install x"), 2, "run pip install x"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error: BaseException, code: int, message: str) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr("atlas_kernels.cli.info._version", lambda package: fails())
    assert run("info") == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in COMMANDS)])
def test_help(capsys, arguments) -> None:
    assert run(*arguments) == 0
    assert "Usage: atlas-kernels" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("merge", "a"), ("demo", "--seed", "x")])
def test_wrong_usage(capsys, arguments) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("atlas-kernels: ")
    assert error.count("\n") == 1
    assert " --help" in error.lower().partition("see atlas-kernels")[2]


def test_info_names_every_backend_and_what_is_missing(capsys, monkeypatch) -> None:
    monkeypatch.setattr("atlas_kernels.cli.info.missing", lambda extra: ["matplotlib"])
    assert run("info") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert [name for name in (*ak.backends(), torch.__version__) if name not in printed] == []
    assert "lacks matplotlib: pip install 'atlas_kernels[demo]'" in printed


def test_as_a_process(files) -> None:
    def process(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "atlas_kernels", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    failed = process("inspect", files / "none.pt")
    assert failed.returncode == 2
    assert failed.stderr == f"atlas-kernels: {files / 'none.pt'}: no such file\n"
    done = process("inspect", files / "base.pt")
    assert done.returncode == 0
    assert "state dict" in done.stdout
    assert not done.stderr


HEAVY = ("torch", "numpy", "open_clip", "matplotlib", "tqdm", "jinja2", "safetensors")
LEARN = ("few-shot", "addition", "negation", "test-time", "peft", "per-instance")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("learn", *LEARN[:1])])
def test_help_imports_nothing_heavy(command) -> None:
    code = (
        "import sys; from atlas_kernels import cli; code = cli.main(sys.argv[1:]);"
        f"sys.exit(code or ', '.join(name for name in {HEAVY} if name in sys.modules) or None)"
    )
    arguments = [sys.executable, "-c", code, *command, "--help"]
    light = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert light.returncode == 0, light.stderr


@pytest.mark.parametrize("method", LEARN)
def test_help_of_every_method(method: str, capsys) -> None:
    assert run("learn", method, "--help") == 0
    printed = capsys.readouterr().out
    assert "--task" in printed
    assert "--config" in printed


def test_json_is_all_that_is_printed(files, tmp_path, capsys) -> None:
    made = tmp_path / "v.safetensors"
    assert run("diff", files / "base.pt", files / "tuned1.safetensors", "-o", made, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(made)
    assert found["blocks"] > 0
    for command in (("info",), ("inspect", made), ("plan", files / "base.pt", "--vectors", 2)):
        assert run("--json", *command) == 0
        assert json.loads(capsys.readouterr().out)


def test_quiet_prints_nothing(files, capsys) -> None:
    assert run("inspect", files / "base.pt", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def test_version(capsys) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == ak.__version__


def test_options_that_make_no_sense(files, tmp_path, capsys) -> None:
    made = tmp_path / "v.safetensors"
    diff = ("diff", files / "base.pt", files / "tuned1.safetensors", "-o", made)
    assert run(*diff, "--name", "") == 2
    assert "--name is empty" in capsys.readouterr().err
    assert not made.exists()
    assert run(*diff) == 0
    assert run("inspect", made, "--picture", tmp_path / "p.png") == 2
    assert "--picture is of a bank" in capsys.readouterr().err
    assert run("bank", files / "base.pt", made, made, "-o", tmp_path / "b.safetensors") == 2
    assert "name each task vector once" in capsys.readouterr().err
    assert run("plan", files / "base.pt", "--codec", "int99") == 2
    assert "unknown codec 'int99'" in capsys.readouterr().err
    forget = ("learn", "negation", "--task", "mnist-clean", "--control", "mnist-clean")
    assert run(*forget, "-o", tmp_path / "run") == 2
    assert "--control is mnist-clean, which is the task to forget" in capsys.readouterr().err


def test_inspect_reports_and_verifies(files, capsys) -> None:
    bank = packed(files)
    left = files / ".bank.safetensors.abcd_123.unfinished"
    left.touch()
    assert run("inspect", bank, "--verify") == 0
    assert f"{left}: a killed process left it" in capsys.readouterr().out
    for path in (bank, files / "v1.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert run("inspect", path, "--verify") == 2
        assert f"{path}: " in (message := capsys.readouterr().err)
        assert "checksum" in message
    assert run("inspect", files / "tuned1.safetensors", "--verify") == 2
    assert "holds no checksums to --verify" in capsys.readouterr().err


def test_damaged_banks_are_neither_merged_nor_planned(files, capsys) -> None:
    bank, coefficients, merged = packed(files), files / "c.safetensors", files / "m.safetensors"
    write_coefficients(coefficients, torch.zeros(2, 1), ak.TaskVectorBank.load(bank))
    content = bank.read_bytes()
    bank.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert run("merge", bank, coefficients, "-o", merged) == 2
    assert "checksum" in capsys.readouterr().err
    assert not merged.exists()
    bank.write_bytes(content.replace(b"[[3, 4]]", b"[[3, 9]]"))
    assert run("plan", bank) == 2
    assert "bank.safetensors: the file is damaged" in capsys.readouterr().err
