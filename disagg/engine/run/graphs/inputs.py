"""The tensors that captured decode steps read: allocated once, filled before each replay, and only there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from disagg.cache.cache import KVCache
from disagg.engine.model.attention import LayerCall, Step
from disagg.engine.model.kv_dtype import kernel_scales
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.runner import Chunk, filled_in
from disagg.kernels.decode_plan import DecodePlan
from disagg.kernels.workspace import Workspace


class DecodeInputs:
    """Token ids, positions and one plan per layer group for at most `max_rows` sequences of `max_model_len` tokens.

    A graph of fewer rows reads the beginning of the same buffers.
    """

    def __init__(self, model: LoadedModel, cache: KVCache, *, max_rows: int, max_model_len: int) -> None:
        self.workspace = Workspace()
        self._model, self._cache = model, cache
        self._there = torch.zeros(2, max_rows, dtype=torch.int64, device=model.device)
        # A tensor, never a number: Gemma 4 cuts the batch before its KV-sharing layers when it is a number.
        self._last = torch.arange(max_rows, device=model.device)
        self._scales = kernel_scales(model.layers, model.saturated)  # held here: a graph holds addresses, not tensors
        self._plans = [
            DecodePlan(
                block_size=cache.layout.block_size,
                window=group.window,
                num_sink_tokens=group.num_sink_tokens,
                max_rows=max_rows,
                max_tokens=max_model_len,
                device=model.device,
                workspace=self.workspace,
            )
            for group in cache.layout.groups
        ]

    def step(self, count: int) -> Step:
        """What attention needs in a graph of `count` rows."""
        plans = [plan.rows(count) for plan in self._plans]
        layout = self._cache.layout
        return {
            layer.index: LayerCall(
                layer,
                self._cache.layer_view(layer.index),
                plans[layout.place(layer.index)[0]],
                self._scales.get(layer.index),
            )
            for layer in self._model.layers
        }

    def forward(self, count: int) -> torch.Tensor:
        """The model over the buffers' first `count` rows: logits `[count, vocab_size]` in its own type."""
        output = self._model.module(
            input_ids=self._there[0, None, :count],
            position_ids=self._there[1, None, :count],
            use_cache=False,
            logits_to_keep=self._last[:count],
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def fill(self, chunks: Sequence[Chunk], count: int, drawn: torch.Tensor | None = None) -> None:
        """One row per chunk of one token; the rows up to `count` are padding, token 0 at position 0."""
        host = np.zeros((2, count), np.int64)
        host[0, : len(chunks)] = [chunk.token_ids[0] for chunk in chunks]
        host[1, : len(chunks)] = positions = [chunk.start for chunk in chunks]
        self._there[:, :count].copy_(filled_in(host, drawn, self._there.device))
        for group, plan in enumerate(self._plans):
            plan.fill([chunk.tables[group] for chunk in chunks], np.array(positions, np.int64), count)
