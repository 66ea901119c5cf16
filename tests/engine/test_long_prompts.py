"""A prompt of 128k tokens beside short requests, in the engine's own steps: neither holds up the other for long.

The model computes nothing, so that 128k are cheap; scheduler, cache and promises are those that serve.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.model.engine_pair import greedy, key
from support.oracles.cache_oracle import tiny_layout

from disagg.cache.cache import KVCache
from disagg.engine.batch import share_tokens
from disagg.engine.beside import RoomBeside
from disagg.engine.commands import FinishedEvent, Serve, TokensEvent
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.run.runner import Chunk

LONG, SHORT, ANSWER = 131072, 64, 4
STEP_TOKENS, BLOCK = 2048, 16
ALONE = LONG // STEP_TOKENS
"""Steps of the long prompt on an idle worker."""
LAYOUT = tiny_layout(None, block_size=BLOCK, max_model_len=LONG + 1024)
RUNNING = 6
"""Short requests that run when the long one comes."""


class BlankRunner:
    """Every token is 5."""

    def execute(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full((sum(c.wants_logits for c in chunks),), 5), 8).float()


class Worker:
    """An engine with room for the long prompt and `num_beside` short requests; counts steps per request."""

    def __init__(self, num_beside: int) -> None:
        num_slots = -(-(LONG + ANSWER + 2 * BLOCK) // BLOCK) + num_beside * (-(-(SHORT + ANSWER) // BLOCK)) + 2
        self.cache = KVCache(LAYOUT, (num_slots,))
        config = EngineConfig("both", 32, STEP_TOKENS, LONG + 1024)
        self.engine = Engine(BlankRunner(), self.cache, config)
        self.num_steps = 0
        self.came: dict[str, int] = {}
        self.begun: dict[str, int] = {}
        self.ended: dict[str, int] = {}
        self._serial = 0

    def ask(self, length: int, max_tokens: int = ANSWER) -> str:
        self._serial += 1
        name = key(self._serial)
        self.came[name.transfer_id] = self.num_steps
        self._note(self.engine.handle(Serve(name, (1,) * length, greedy(max_tokens, ignore_eos=True))))
        return name.transfer_id

    def step(self) -> None:
        self.num_steps += 1
        self._note(self.engine.step())

    def until_begun(self, name: str, most: int, *, flood: int = 0) -> None:
        for _ in range(most):
            if name in self.begun:
                return
            for _ in range(flood):
                self.ask(SHORT)
            self.step()
        raise AssertionError(f"no token after {most} steps")

    def waits(self, *, last: int) -> list[int]:
        """Steps from arrival to the first token of the short requests that came last, unanswered ones until now."""
        names = list(self.came)[-last:]
        return [self.begun.get(name, self.num_steps) - self.came[name] for name in names]

    def _note(self, events: Sequence[object]) -> None:
        for event in events:
            if isinstance(event, TokensEvent) and event.index == 0:
                self.begun[event.key.transfer_id] = self.num_steps
            elif isinstance(event, FinishedEvent):
                self.ended[event.key.transfer_id] = self.num_steps


def test_short_requests_beside_a_long_prompt_begin_in_the_next_steps() -> None:
    worker = Worker(num_beside=16)
    long = worker.ask(LONG)
    for _ in range(ALONE - 2):
        worker.ask(SHORT)
        worker.step()
    assert long not in worker.begun
    assert max(worker.waits(last=ALONE - 4)[:-1]) <= 2
    worker.until_begun(long, ALONE)


def test_the_short_ones_would_wait_for_the_whole_prompt_without_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a step's tokens to the oldest first."""

    def oldest_first(remaining: Sequence[int], budget: int, max_chunks: int) -> list[int]:
        shares = []
        for want in remaining:
            shares.append(min(want, budget))
            budget -= shares[-1]
        return shares

    assert share_tokens([100, 4], 32, 8) != oldest_first([100, 4], 32, 8)
    monkeypatch.setattr("disagg.engine.scheduler.share_tokens", oldest_first)
    worker = Worker(num_beside=16)
    worker.ask(LONG)
    for _ in range(ALONE // 2):
        worker.ask(SHORT)
        worker.step()
    assert max(worker.waits(last=10)) > 2


def test_a_long_prompt_beside_a_flood_takes_twice_its_steps_at_most() -> None:
    worker = Worker(num_beside=RUNNING // 2)
    for _ in range(RUNNING):
        worker.ask(SHORT)
    worker.step()
    long = worker.ask(LONG)
    worker.until_begun(long, ANSWER + 2 * ALONE, flood=2)
    assert len(worker.ended) > ALONE // 2, "there is room for three at a time, which go on meanwhile"


def test_without_room_kept_for_it_the_long_prompt_never_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: whatever fits into what is free passes."""
    monkeypatch.setattr(RoomBeside, "fits", lambda *_: True)
    worker = Worker(num_beside=RUNNING // 2)
    for _ in range(RUNNING):
        worker.ask(SHORT)
    worker.step()
    long = worker.ask(LONG)
    with pytest.raises(AssertionError, match="no token after"):
        worker.until_begun(long, 4 * ALONE, flood=4)


def test_a_long_prompt_that_needs_the_whole_pool_holds_the_others_up_until_it_has_ended_and_no_longer() -> None:
    """Nothing can start beside it, and what passes it while others end would keep it out."""
    worker = Worker(num_beside=0)
    for _ in range(RUNNING):
        worker.ask(SHORT)
    worker.step()
    long = worker.ask(LONG)
    shorts = [worker.ask(SHORT) for _ in range(RUNNING)]
    worker.until_begun(long, ANSWER + ALONE + 2)
    assert not set(shorts) & set(worker.begun)
    for _ in range(ANSWER + 2):
        worker.step()
    assert set(shorts) <= set(worker.begun)
