"""The operator tests on a GPU: `ATLAS_KERNELS_ON_GPU=1 pytest ...` (`make gpu`).

The tests make their tensors on the CPU. With `install`, operators of the backends for GPUs take
such tensors to the GPU as they lie in memory, compute there, and bring the results back, so that
every test of an operator is one of the compiled kernels too.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from atlas_kernels.ops import schema as ops
from atlas_kernels.ops.backends import cuda, triton

ENABLED = os.environ.get("ATLAS_KERNELS_ON_GPU") == "1"
BACKENDS = {"triton": triton, "cuda": cuda}

_libraries: list[torch.library.Library] = []


def install() -> None:
    """Lets the backends for GPUs serve CPU tensors, by way of the GPU."""
    for name, module in BACKENDS.items():
        if module.unavailable() is None:
            module.register()
            library = torch.library.Library(ops.namespace(name), "IMPL")
            _libraries.append(library)
            for operator in ops.SCHEMAS:
                library.impl(operator, _by_way_of_the_gpu(name, operator), "CPU")
            module.register = lambda: None  # type: ignore[assignment]
            module.devices = lambda: ("cpu", "cuda")  # type: ignore[assignment]


def to_gpu(tensor: Tensor) -> Tensor:
    """A copy with the same strides, and the same offset into memory that is aligned."""
    storage = torch.empty(0, dtype=tensor.dtype)
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    storage.set_(tensor.detach().untyped_storage(), 0, (size,), (1,))  # type: ignore[call-overload]
    return storage.cuda().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _by_way_of_the_gpu(backend: str, operator: str) -> Any:
    function = getattr(getattr(torch.ops, ops.namespace(backend)), operator)

    def call(*arguments: Any) -> Any:
        there = _pytree.tree_map_only(Tensor, to_gpu, arguments)
        return _pytree.tree_map_only(Tensor, Tensor.cpu, function(*there))

    return call
