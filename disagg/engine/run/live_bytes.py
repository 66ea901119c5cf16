"""How many bytes of tensors are alive at once while some code runs: on any device, the meta device too."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, `live` is what the tensors made so far and still referred to take, `peak` the most it ever was.

    Memory counts once, however many tensors look at it, and what existed before does not. What an operation allocates
    for itself and gives back is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._known:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        self._known[key] = weakref.ref(storage, lambda _: self._remove(key, nbytes))
        self.live += nbytes
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, nbytes: int) -> None:
        del self._known[key]
        self.live -= nbytes


def _tensors(values: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, torch.Tensor)]
