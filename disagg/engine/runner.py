"""One forward pass over chunks of many sequences, flat and ragged: prefill and decode in the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from disagg.cache.cache import KVCache
from disagg.engine.attention import CURRENT_STEP, LayerCall, Step
from disagg.engine.model import LoadedModel
from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `token_ids` of one sequence at positions `start`, `start + 1`, ...

    `tables`: its block table per layer group, with room for `start + len(token_ids)` tokens and history `start`.
    `wants_logits`: whether the last token's logits are asked for (the prompt's last chunk, and decode).
    """

    tables: tuple[npt.NDArray[np.int32], ...]
    token_ids: Sequence[int]
    start: int
    wants_logits: bool

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Runner:
    """Runs `model` over `cache`. Not thread-safe: the model thread owns both."""

    def __init__(self, model: LoadedModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._pools = {layer.index: cache.layer_view(layer.index) for layer in model.layers}
        self._workspace = Workspace()
        self._groups = {layer.index: cache.layout.place(layer.index)[0] for layer in model.layers}

    def execute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Store KV of all tokens; float32 logits `[num wanting chunks, vocab_size]` after each one's last token."""
        assert all(len(chunk.token_ids) > 0 for chunk in chunks)
        ends = np.cumsum([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
        last = np.array([end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.wants_logits], np.int64)
        token_ids = np.concatenate([np.asarray(chunk.token_ids, np.int64) for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
        current = CURRENT_STEP.set(self._step(chunks))
        try:
            return self._forward(token_ids, positions, last)
        finally:
            CURRENT_STEP.reset(current)

    @torch.inference_mode()
    def _forward(
        self, token_ids: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], last: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        device = self.model.device
        output = self.model.module(
            input_ids=torch.from_numpy(token_ids)[None].to(device),
            position_ids=torch.from_numpy(positions)[None].to(device),
            use_cache=False,
            # A tensor, never a number: Gemma 4 cuts the batch before its KV-sharing layers when it is a number.
            logits_to_keep=torch.from_numpy(last).to(device),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def _step(self, chunks: Sequence[Chunk]) -> Step:
        plans = []
        for number in range(self.cache.layout.num_groups):
            layer = self.cache.layout.groups[number].layers[0]
            plans.append(ops.plan(self._batch(number, chunks), self._pools[layer], self._dtype, self._workspace))
        return {
            layer.index: LayerCall(layer, self._pools[layer.index], plans[self._groups[layer.index]])
            for layer in self.model.layers
        }

    def _batch(self, number: int, chunks: Sequence[Chunk]) -> PagedBatch:
        group = self.cache.layout.groups[number]
        runs = tuple(QueryRun(chunk.tables[number], chunk.start, len(chunk.token_ids)) for chunk in chunks)
        return PagedBatch(runs, self.cache.layout.block_size, group.window, group.num_sink_tokens)
