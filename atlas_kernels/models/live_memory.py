"""How much memory a piece of code needs, counted in tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside and alive at the same time.

    Exact and repeatable, on every device: a storage counts from the operation that returned it
    until its last tensor is gone, the backward pass included. Not counted: what existed before,
    and buffers that an operation allocates and frees within itself.

    Attributes:
        live: bytes alive now.
        peak: the most bytes that were alive at once.

    Example:
        >>> import torch
        >>> from atlas_kernels.models import PeakMemory
        >>> with PeakMemory() as memory:
        ...     x = torch.ones(10) + 1  # two tensors of 40 bytes, one of them dropped at once
        >>> memory.peak, memory.live
        (80, 40)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __enter__(self) -> PeakMemory:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        arguments = (args, kwargs or {})
        # What an operation receives and we have not seen was there before: free of charge, even
        # if a result is a view of it.
        before = {_key(leaf) for leaf in tree_iter(arguments) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


def _key(tensor: Tensor) -> int:
    # The address: unique among live storages, but for empty ones, which cost nothing.
    return tensor.untyped_storage().data_ptr()
