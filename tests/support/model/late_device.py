"""A device that computes later: launches lie in its queue until its clock has passed them, or the host waits.

Launching costs the host time, each operation the device; a read waits until the device is done with what it reads. All
that a device orders by its stream is queued here too: forward passes, draws, and the zeroing of slots. What a transfer
lands is written at once, as it is from another thread, so a block that a queued step still needs shows as wrong tokens.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from disagg.cache.cache import KVCache
from disagg.engine.run.runner import Chunk, StepRunner
from disagg.engine.sampler import Drawn, Sampled, SampleInput, sample


@dataclass(eq=False)
class Later:
    """What an operation will have made; `parts` of it may be asked for before."""

    value: Any = None
    is_made: bool = False
    rows: list[int] | None = None
    of: Later | None = None

    def __getitem__(self, rows: list[int]) -> Later:
        return Later(rows=rows, of=self)

    def get(self) -> Any:
        if self.of is not None:
            return self.of.get()[self.rows]
        assert self.is_made, "the host read what the device has not computed"
        return self.value


@dataclass
class LateDevice:
    """Drives `runner` over `cache`. Times are seconds of `now`, which only launches and waits move."""

    runner: StepRunner
    cache: KVCache
    host_s: float = 1.0
    device_s: float = 1.0
    now: float = 0.0
    done_at: float = 0.0
    queue: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        for pool in self.cache.pools:
            zero = pool.sides.zero
            pool.sides.zero = lambda slots, zero=zero: self._zero(lambda: zero(slots))  # type: ignore[method-assign,misc]

    def execute(self, chunks: Sequence[Chunk], drawn: Any = None) -> Any:
        self.now += self.host_s
        kept = [replace(chunk, tables=tuple(table.copy() for table in chunk.tables)) for chunk in chunks]
        made = Later()

        def run() -> None:
            filled = [replace(chunk, token_ids=[_filled(i, drawn) for i in chunk.token_ids]) for chunk in kept]
            made.value, made.is_made = self.runner.execute(filled), True

        self._launch(run, self.device_s)
        return made

    def draw(self, logits: Any, inputs: Sequence[SampleInput]) -> Drawn:
        made, given = Later(), copy.deepcopy(list(inputs))
        told: list[Sampled] = []

        def run() -> None:
            told.extend(sample(logits.get(), given))
            made.value, made.is_made = torch.tensor([one.token_id for one in told]), True

        ready_at = self._launch(run, 0.0)

        def read() -> list[Sampled]:
            self.now = max(self.now, ready_at)
            self.catch_up()
            return told

        return Drawn(made, read)  # type: ignore[arg-type]

    def catch_up(self) -> None:
        """Run what the clock has passed."""
        while self.queue and self.queue[0][0] <= self.now:
            self.queue.popleft()[1]()

    def idle(self) -> None:
        """Run all that was launched."""
        self.now = max(self.now, self.done_at)
        self.catch_up()

    def _zero(self, run: Callable[[], None]) -> None:
        """At once where nothing is queued before it."""
        self._launch(run, 0.0) if self.queue else run()

    def _launch(self, run: Callable[[], None], seconds: float) -> float:
        self.done_at = max(self.now, self.done_at) + seconds
        self.queue.append((self.done_at, run))
        return self.done_at


def _filled(token_id: int, drawn: Any) -> int:
    return token_id if token_id >= 0 else int(drawn.get()[-1 - token_id])
