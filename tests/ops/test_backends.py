import importlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from strategies import CPU_BACKENDS, need

import atlas_kernels as ak
from atlas_kernels.ops.schema import BACKENDS, SCHEMAS, namespace

# The package's attribute of this name is the function.
module = importlib.import_module("atlas_kernels.ops.backends")
ARGUMENTS = [torch.ones(3)], [[torch.ones(3)]], torch.ones(1)


@pytest.fixture
def backends_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Stand-ins for the modules of some backends, by name; the others stay."""
    replaced: dict[str, Any] = {}
    real = module._module
    monkeypatch.setattr(module, "_module", lambda name: replaced.get(name) or real(name))
    caches = (module._automatic, module._unavailable, module._register)
    for cache in caches:
        cache.cache_clear()
    yield replaced
    for cache in caches:
        cache.cache_clear()


def stand_in(reason: str | None, devices: tuple[str, ...] | None = None) -> Any:
    return SimpleNamespace(
        unavailable=lambda: reason, devices=lambda: devices, register=lambda: None
    )


def test_listing() -> None:
    listed = ak.backends()
    assert tuple(listed) == BACKENDS
    assert listed["torch"] == "available"
    for name, state in listed.items():
        # What is missing, and what to do about it.
        assert state == "available" or len(state.split()) > 5, (name, state)
        assert "\n" not in state


def test_listing_gives_the_reason(backends_here: dict[str, Any]) -> None:
    backends_here["cuda"] = stand_in("no GPU was found: buy one")
    assert ak.backends()["cuda"] == "no GPU was found: buy one"


@pytest.mark.parametrize("name", BACKENDS)
def test_unavailable_backends_raise_their_reason(name: str, backends_here: dict[str, Any]) -> None:
    backends_here[name] = stand_in("the sun does not shine: wait for the morning")
    with pytest.raises(ak.BackendUnavailableError) as raised:
        ak.compose(*ARGUMENTS, backend=name)
    message = str(raised.value)
    assert (
        message == f"backend {name!r} requested, but the sun does not shine: wait for the morning"
    )


def test_wrong_device(backends_here: dict[str, Any]) -> None:
    backends_here["cuda"] = stand_in(None, ("cuda", "hip"))
    with pytest.raises(
        ValueError, match=r"'cuda' runs on cuda and hip, but .* on 'cpu': move them"
    ):
        ak.compose(*ARGUMENTS, backend="cuda")


def test_auto_falls_back_and_says_so_once(
    backends_here: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backends_here["cpp"] = stand_in("it is not built: run make kernels")
    with caplog.at_level(logging.INFO, "atlas_kernels"):
        for _ in range(3):
            (composed,) = ak.compose(*ARGUMENTS)
        assert module.resolve("auto", "cpu", False) == "torch"
    assert torch.equal(composed, torch.full((3,), 2.0))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "'torch'" in record.message
    assert "cpp: it is not built: run make kernels" in record.message


def test_auto_is_silent_when_the_best_is_there(
    backends_here: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backends_here["cpp"] = stand_in(None, ("cpu",))
    assert module.resolve("auto", "cpu", False) == "cpp"
    # float64 and other devices have no choice: nothing to report.
    assert module.resolve("auto", "cpu", True) == "torch"
    assert module.resolve("auto", "meta", False) == "torch"
    assert caplog.records == []


def test_auto_on_a_gpu_prefers_cuda_then_triton(
    backends_here: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backends_here["triton"] = stand_in(None, ("cuda",))
    backends_here["cuda"] = stand_in(None, ("cuda",))
    assert module.resolve("auto", "cuda", False) == "cuda"
    assert caplog.records == []
    module._automatic.cache_clear(), module._unavailable.cache_clear()
    backends_here["cuda"] = stand_in("the CUDA extension is not built")
    assert module.resolve("auto", "cuda", False) == "triton"
    assert "the CUDA extension is not built" in caplog.text


def test_auto_on_rocm_does_not_ask_for_cuda(
    backends_here: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    backends_here["triton"] = stand_in(None, ("cuda",))
    assert module.resolve("auto", "cuda", False) == "triton"
    assert caplog.records == []


def test_float64_only_on_torch(backends_here: dict[str, Any]) -> None:
    backends_here["cpp"] = stand_in(None, ("cpu",))
    with pytest.raises(ValueError, match="'cpp' does not compute in float64: use backend='torch'"):
        module.resolve("cpp", "cpu", True)
    assert module.resolve("torch", "cpu", True) == "torch"


@pytest.mark.parametrize("name", ["", "Torch", "cpu", "torch ", "rocm"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="unknown backend") as raised:
        ak.compose(*ARGUMENTS, backend=name)
    assert str(raised.value).startswith(
        f"unknown backend {name!r}: expected 'auto' or one of 'torch'"
    )


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_every_operator_is_implemented(name: str) -> None:
    need(name)
    module.resolve(name, "cpu", False)
    for operator in SCHEMAS:
        key = f"{namespace(name)}::{operator}"
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        assert has(key, "CPU") or has(key, "CompositeExplicitAutograd"), key


def test_registering_twice_is_harmless() -> None:
    for _ in range(2):
        assert module.resolve("torch", "cpu", False) == "torch"
        module._automatic.cache_clear()
        module.resolve("auto", "cpu", False)
