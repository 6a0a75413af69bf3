"""Bytes that are alive at every moment of a computation on fake tensors, without one of them being allocated."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager: `now` are the bytes of the storages made inside it that still exist, `peak` the most there were.

    Storages of `own`, parameters and buffers, do not count. A view shares the storage it looks into. `events` are
    (number of the storage, its bytes) where one is made and (number, 0) where it ends, in their order.
    """

    def __init__(self, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.events: list[tuple[int, int]] = []
        self._made = 0
        self._own = [tensor.untyped_storage() for tensor in own]
        self._seen = {storage._cdata for storage in self._own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen.add(key)
        self._made += 1
        self.now += size
        self.peak = max(self.peak, self.now)
        self.events.append((self._made, size))
        weakref.finalize(storage, self._forget, key, self._made, size).atexit = False

    def _forget(self, key: int, number: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
        self.events.append((number, 0))
