"""One forward pass over chunks of many sequences, flat and ragged: prefill and decode in the same batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from disagg.cache.cache import KVCache
from disagg.cache.scratch import Scratch, page_table
from disagg.engine.model.attention import CURRENT_STEP, LayerCall, Step
from disagg.engine.model.head import layers_kept
from disagg.engine.model.kv_dtype import kernel_scales
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.scoring import Scoring, in_pieces
from disagg.kernels import ops
from disagg.kernels.batch import PagedBatch, QueryRun
from disagg.kernels.upload import upload
from disagg.kernels.workspace import Workspace

log = logging.getLogger(__name__)


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
    scratch: tuple[Scratch | None, ...] = ()
    """Per group, the blocks of this step that have no slot of their own; empty when there are none."""
    scoring: Scoring | None = None
    """Told the logits of the chunk's first `scoring.num_rows` tokens, some rows at a time."""

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class StepRunner(Protocol):
    """What computes a step, eager or captured."""

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [rows, vocabulary] of the chunks that want them, in order.

        `drawn`: int64 [n], on the device; a token id -1 - i stands for `drawn[i]`.
        """
        ...


def filled_in(token_ids: npt.NDArray[np.int64], drawn: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """The ids on `device`, those below 0 taken from `drawn` there: the host need not know them."""
    ids = upload(token_ids, device)
    return ids if drawn is None else torch.where(ids < 0, drawn[(-1 - ids).clamp(min=0)], ids)


class Runner:
    """Runs `model` over `cache`. Not thread-safe: the model thread owns both."""

    def __init__(self, model: LoadedModel, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._pools = {layer.index: cache.layer_view(layer.index) for layer in model.layers}
        self._scales = kernel_scales(model.layers, model.saturated)
        self._workspace = Workspace()
        if self._pools:
            log.info("%s", ops.describe(next(iter(self._pools.values())), self._dtype))
        self._places = {layer.index: cache.layout.place(layer.index) for layer in model.layers}
        self._pages = [cache.page_view(number) for number in range(cache.layout.num_groups)]

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Store KV of all tokens; float32 logits `[num wanting chunks, vocab_size]` after each one's last token."""
        assert all(len(chunk.token_ids) > 0 for chunk in chunks)
        ends = accumulate(len(chunk.token_ids) for chunk in chunks)
        last = np.array([end - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.wants_logits], np.int64)
        token_ids = np.fromiter(chain.from_iterable(chunk.token_ids for chunk in chunks), np.int64)
        positions = np.fromiter(chain.from_iterable(range(chunk.start, chunk.end) for chunk in chunks), np.int64)
        current = CURRENT_STEP.set(self._step(chunks))
        try:
            ids = filled_in(token_ids, drawn, self.model.device)
            if any(chunk.scoring for chunk in chunks):
                return self._forward_scored(ids, positions, last, chunks)
            return self._forward(ids, positions, last)
        finally:
            CURRENT_STEP.reset(current)

    @torch.inference_mode()
    def _forward(
        self, token_ids: torch.Tensor, positions: npt.NDArray[np.int64], last: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        device = self.model.device
        output = self.model.module(
            input_ids=token_ids[None],
            position_ids=upload(positions, device)[None],
            use_cache=False,
            # A tensor, never a number: Gemma 4 cuts the batch before its KV-sharing layers when it is a number.
            logits_to_keep=upload(last, device),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    @torch.inference_mode()
    def _forward_scored(
        self,
        token_ids: torch.Tensor,
        positions: npt.NDArray[np.int64],
        last: npt.NDArray[np.int64],
        chunks: Sequence[Chunk],
    ) -> torch.Tensor:
        """`_forward`, eager; then the model's head alone over the rows to be scored, never all of their logits."""
        with layers_kept(self.model.module) as head:
            logits = Runner._forward(self, token_ids, positions, last)
            first = 0
            for chunk in chunks:
                if chunk.scoring is not None:
                    for rows in in_pieces(first, chunk.scoring.num_rows, self.model.vocab_size):
                        chunk.scoring.add(head(torch.arange(rows.start, rows.stop, device=self.model.device)).float())
                first += len(chunk.token_ids)
        return logits

    def _step(self, chunks: Sequence[Chunk]) -> Step:
        plans = [self._plans(number, chunks) for number in range(self.cache.layout.num_groups)]
        calls = {}
        for layer in self.model.layers:
            group, position = self._places[layer.index]
            own_pool, plan = self._pools[layer.index], plans[group][position % len(plans[group])]
            pool = own_pool if len(plans[group]) == 1 else self._pages[group]
            calls[layer.index] = LayerCall(layer, pool, plan, self._scales.get(layer.index))
        return calls

    def _plans(self, number: int, chunks: Sequence[Chunk]) -> list[ops.Plan]:
        """One plan for all layers of the group; with scratch blocks one per layer, over the group's pages.

        A group of one layer has one page per slot, so there the two are the same.
        """
        group = self.cache.layout.groups[number]
        if not any(chunk.scratch and chunk.scratch[number] for chunk in chunks):
            tables = [chunk.tables[number] for chunk in chunks]
            pool = self._pools[group.layers[0]]
            return [ops.plan(self._batch(number, chunks, tables), pool, self._dtype, self._workspace)]
        pages, num_layers = self._pages[number], len(group.layers)
        batches = [
            self._batch(number, chunks, [_pages_of(chunk, number, num_layers, position) for chunk in chunks])
            for position in range(num_layers)
        ]
        first = ops.plan(batches[0], pages, self._dtype, self._workspace)
        return [first, *(ops.retarget(first, batch, pages) for batch in batches[1:])]

    def _batch(self, number: int, chunks: Sequence[Chunk], tables: Sequence[npt.NDArray[np.int32]]) -> PagedBatch:
        group = self.cache.layout.groups[number]
        runs = tuple(
            QueryRun(table, chunk.start, len(chunk.token_ids)) for table, chunk in zip(tables, chunks, strict=True)
        )
        return PagedBatch(runs, self.cache.layout.block_size, group.window, group.num_sink_tokens)


def _pages_of(chunk: Chunk, number: int, num_layers: int, position: int) -> npt.NDArray[np.int32]:
    scratch = chunk.scratch[number] if chunk.scratch else None
    return page_table(chunk.tables[number], scratch, num_layers, position)
