"""Decode steps as captured graphs: one per batch bucket, replayed instead of running the model's Python.

What can be captured reads and writes only tensors whose addresses stay, and takes every other number from Python once,
at capture. `DecodeInputs` owns all tensors that change from step to step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from disagg.cache.cache import KVCache
from disagg.engine.model.attention import CURRENT_STEP
from disagg.engine.model.hf import capturable_experts
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.graphs.inputs import DecodeInputs
from disagg.engine.run.graphs.use import GraphUse
from disagg.engine.run.runner import Chunk, StepRunner
from disagg.kernels.dispatch import CALLS

log = logging.getLogger(__name__)

# A graph per power of two costs at most half of its rows as padding, and ten captures up to this bucket. Larger batches
# are bound by matmuls, not by launches: they run eager.
MAX_BUCKET = 512
MIB = 1 << 20


T = TypeVar("T")


class Graph(Protocol):
    """Device work recorded once. `capture` returns what `run` did: tensors that each `replay` writes anew."""

    def capture(self, run: Callable[[], T]) -> T: ...

    def replay(self) -> None: ...


class GraphMaker(Protocol):
    """Makes graphs of one device, which share their memory: a replay may overwrite what another's left."""

    def new(self) -> Graph: ...

    @property
    def nbytes(self) -> int:
        """Device memory that captures took so far."""
        ...


def batch_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, ... and the largest batch itself, up to `MAX_BUCKET`."""
    most = min(max_num_seqs, MAX_BUCKET)
    return (*(1 << i for i in range(most.bit_length()) if 1 << i < most), most)


class DecodeGraphs:
    """The graphs of one runner. The cache's pools must stay where they are."""

    def __init__(
        self,
        model: LoadedModel,
        cache: KVCache,
        maker: GraphMaker,
        *,
        max_num_seqs: int,
        max_model_len: int,
        use: GraphUse | None = None,
    ) -> None:
        """`use` counts other graphs of the same maker too."""
        self.buckets = batch_buckets(max_num_seqs)
        self.use = use or GraphUse()
        self._model, self._maker = model, maker
        self._inputs = DecodeInputs(model, cache, max_rows=self.buckets[-1], max_model_len=max_model_len)
        # One for all graphs, each of which writes its rows of it: outputs of their own would add up over the buckets.
        self._logits = torch.zeros(self.buckets[-1], model.vocab_size, dtype=torch.float32, device=model.device)
        self._captured: dict[int, Graph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture every bucket, on padding alone: no sequence's slots are written.

        Each runs eager first, the largest before all others: what is compiled or allocated on first use (kernels, the
        workspace) is then there, and not part of a graph.
        """
        started = time.monotonic()
        self._inputs.fill((), self.buckets[-1])
        with capturable_experts(self._model.module, self._model.device, getattr(torch, self._model.dtype)):
            for count in reversed(self.buckets):
                self._forward(count)
            self._inputs.workspace.freeze()
            for number, count in enumerate(reversed(self.buckets)):
                self._capture(count)
                log.info("captured decode graph %d of %d: batch of %d", number + 1, len(self.buckets), count)
        self.use.add(len(self._captured), self._maker.nbytes)
        seconds = time.monotonic() - started
        log.info("%d decode graphs take %.0f MiB, %.1f s", len(self.buckets), self.use.nbytes / MIB, seconds)

    def bucket(self, chunks: Sequence[Chunk]) -> int | None:
        """The graph for a batch of single tokens whose logits are wanted; None: there is none, run it eager."""
        if not all(len(chunk.token_ids) == 1 and chunk.wants_logits and not any(chunk.scratch) for chunk in chunks):
            return None
        return next((count for count in self.buckets if count >= len(chunks) and count in self._captured), None)

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], count: int, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Store KV of all tokens; logits as `Runner.execute` returns them, the caller's to keep."""
        self._inputs.fill(chunks, count, drawn)
        self._captured[count].replay()
        CALLS["graph:decode"] += 1
        self.use.num_replays += 1
        return self._logits[: len(chunks)].clone()

    def _capture(self, count: int) -> None:
        graph = self._maker.new()
        graph.capture(lambda: self._forward(count))
        self._captured[count] = graph

    def _forward(self, count: int) -> None:
        current = CURRENT_STEP.set(self._inputs.step(count))
        try:
            self._logits[:count].copy_(self._inputs.forward(count))
        finally:
            CURRENT_STEP.reset(current)


class GraphRunner:
    """A runner that replays a graph where one fits, and leaves the rest to `eager`: prefill and mixed batches."""

    def __init__(self, eager: StepRunner, graphs: DecodeGraphs) -> None:
        self._eager, self._graphs = eager, graphs

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """As `Runner.execute`."""
        count = self._graphs.bucket(chunks)
        return self._eager.execute(chunks, drawn) if count is None else self._graphs.run(chunks, count, drawn)
