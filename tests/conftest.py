"""Test-wide settings: uninitialised memory is NaN, Triton kernels run in their interpreter."""

import os

# Read by Triton when the kernels are imported, so before anything imports them.
if os.environ.get("ATLAS_KERNELS_ON_GPU") != "1":
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Workers share the cores. Read by PyTorch when it is imported, here and in processes of tests.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import on_gpu
import pytest
import torch
from hypothesis import settings

if on_gpu.ENABLED:
    on_gpu.install()

settings.register_profile("atlas", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("atlas")


@pytest.fixture(autouse=True)
def _nan_poisoned_memory():
    """Every `torch.empty`, in Python and in the extension, starts as NaN: padding included."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
