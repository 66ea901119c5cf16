"""Tokens that were drawn where the logits lie, and are on their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from disagg.engine.sampling.rows import Sampled


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A token per row. `token_ids`: int64 `[rows]`, on the logits' device for the next step. `read` waits for them."""

    token_ids: torch.Tensor
    read: Callable[[], Sequence[Sampled]]


def drawn_here(sampled: Sequence[Sampled], device: torch.device) -> Drawn:
    """Of rows whose tokens the host knows already."""
    token_ids = torch.tensor([row.token_id for row in sampled], dtype=torch.int64, device=device)
    return Drawn(token_ids, lambda: sampled)


class Copies:
    """Copies of tensors on the host, queued behind what computes them; `read` waits for these and for nothing later."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._there = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        is_cuda = bool(tensors) and tensors[0].device.type == "cuda"
        self._done = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record(torch.cuda.current_stream(tensors[0].device))

    def read(self) -> list[torch.Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._there
