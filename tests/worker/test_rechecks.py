"""Blocks hashed again before reuse, and after a peer's complaint: the fake runner reads what memory holds."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, greedy, key, prompt_of
from support.model.fake_runner import reference_tokens

from disagg.cache.prefix_cache import Chain
from disagg.engine.commands import (
    Command,
    Pin,
    Prefill,
    PrefixChecked,
    PrefixHitEvent,
    Release,
    Serve,
    SuspectEvent,
    TokensEvent,
    UnitsFinalEvent,
    Unregister,
)
from disagg.engine.recheck import PrefixRecheck
from disagg.transceiver.memory.kept_digests import KeptDigests
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.landing_threads import LandingThreads
from disagg.transceiver.wire.messages.values import UnitName
from disagg.worker.rechecks import Rechecks

T = LAYOUT.block_size
SHARED = prompt_of(8 * T)
LONGER = (*SHARED, *prompt_of(3 * T, salt=1))
FULL = next(number for number, group in enumerate(LAYOUT.groups) if group.window is None)
NOW_DUE = 1e-9  # any later look comes after this


class Worker:
    """An engine whose questions about blocks are answered as a worker does; `answers` False leaves them open."""

    def __init__(self, *, role: str = "prefill", recheck_s: float | None = NOW_DUE) -> None:
        self.engine = TestedEngine(role=role, hasher=HASHER, prefix_recheck_s=recheck_s, max_num_seqs=4)
        pools = self.engine.cache.pools
        sides = [pool.sides for pool in pools]
        regions = [PoolRegion(side.host.numpy(), side.generations, side.fd, side.slots_offset) for side in sides]
        self.counts: Counter[tuple[str, str]] = Counter()
        self.commands: list[Command] = []
        self.parts: Any = SimpleNamespace(
            cuts=SimpleNamespace(kept=KeptDigests([pool.num_slots for pool in pools])),
            landing=LandingThreads(regions, [group.dtype for group in LAYOUT.groups]),
            metrics=SimpleNamespace(count_rehashed=lambda why, result, n: self.counts.update({(why, result): n})),
            model=SimpleNamespace(submit=self.commands.append),
        )
        self.rechecks = Rechecks(self.parts)
        self.num_seen = 0
        self.num_hits = 0

    async def hear(self) -> None:
        """Everything the engine said since, in order, as the event loop takes it."""
        while self.num_seen < len(self.engine.events):
            event = self.engine.events[self.num_seen]
            self.num_seen += 1
            if isinstance(event, UnitsFinalEvent):
                await self.parts.cuts.kept.digest_units(event.units, self.parts.landing.digest_units)
            elif isinstance(event, PrefixHitEvent):
                self.num_hits += 1
                await self.rechecks.check_hit(event)
            elif isinstance(event, SuspectEvent):
                await self.rechecks.look_at_suspects(event)
            while self.commands:
                self.engine.handle(self.commands.pop(0))

    def run(self, *commands: Command) -> None:
        """Handle, answer and step until nothing is left to do."""

        async def work() -> None:
            for command in commands:
                self.engine.handle(command)
            await self.hear()
            while self.engine.has_work:
                self.engine.step()
                await self.hear()

        asyncio.run(work())

    def prefill(self, number: int, prompt: tuple[int, ...]) -> dict[tuple[int, int], bytes]:
        """What a peer would be sent of this prompt, by (group, ordinal)."""
        self.run(Prefill(key(number), prompt, greedy(4)), Pin(key(number)))
        finals = self.engine.of(key(number), UnitsFinalEvent)
        units = [unit for event in finals for unit in event.units]  # type: ignore[attr-defined]
        found = {(unit.group, unit.ordinal): self.engine.bytes_of(unit) for unit in units}
        self.run(Release(key(number)))
        return found

    def slot_of(self, ordinal: int, prompt: tuple[int, ...] = SHARED) -> tuple[int, int]:
        """(pool, slot) where the full attention group's block of a registered prompt lies."""
        match = self.engine.cache.prefixes.match(Chain(""), prompt)  # type: ignore[union-attr]
        return LAYOUT.pool_of_group[FULL], int(match.slots[FULL][ordinal])

    def flip(self, ordinal: int) -> None:
        pool, slot = self.slot_of(ordinal)
        self.engine.cache.pools[pool].memory[slot, 2] ^= 0x40

    def num_registered(self, prompt: tuple[int, ...]) -> int:
        return len(self.engine.cache.prefixes.match(Chain(""), prompt).path)  # type: ignore[union-attr]


@pytest.fixture
def make() -> Any:
    made: list[Worker] = []

    def worker(**options: Any) -> Worker:
        made.append(Worker(**options))
        return made[-1]

    yield worker
    for each in made:
        asyncio.run(each.parts.landing.close())
        each.engine.cache.check_invariants()
        assert not any(pool.num_used for pool in each.engine.cache.usage())


def test_a_hit_on_good_blocks_is_checked_once_per_interval_and_used(make: Callable[..., Worker]) -> None:
    worker = make(recheck_s=3600.0)
    worker.prefill(1, SHARED)
    worker.prefill(2, LONGER)
    worker.prefill(3, LONGER)
    # What was sent before was hashed just now; a window's blocks that no peer needed are hashed when first reused.
    assert worker.counts.total() == worker.counts["prefix_hit", "unknown"]
    before = worker.counts.copy()
    worker.prefill(4, LONGER)
    assert worker.counts == before
    assert worker.engine.stats().prompt_tokens_computed < len(SHARED) + len(LONGER) + 2 * T


@pytest.mark.parametrize("ordinal", [0, 5])
def test_a_prompt_that_hits_a_changed_block_is_computed_anew_and_right(
    make: Callable[..., Worker], ordinal: int, caplog: pytest.LogCaptureFixture
) -> None:
    worker, fresh = make(), make(recheck_s=None)
    worker.prefill(1, SHARED)
    worker.flip(ordinal)
    with caplog.at_level(logging.ERROR):
        sent = worker.prefill(2, LONGER)
    assert sent == fresh.prefill(2, LONGER)
    assert worker.counts["prefix_hit", "changed"] == 1
    assert "memory of this machine has changed" in caplog.text
    # Nothing of the bad block or of what extended it was reused, everything before it was.
    computed = worker.engine.stats().prompt_tokens_computed - len(SHARED)
    assert len(LONGER) - ordinal * T <= computed <= len(LONGER)
    assert worker.prefill(3, LONGER) == sent


def test_without_the_check_the_changed_block_is_used(make: Callable[..., Worker]) -> None:
    worker, fresh = make(recheck_s=None), make(recheck_s=None)
    worker.prefill(1, SHARED)
    worker.flip(5)
    assert worker.prefill(2, LONGER) != fresh.prefill(2, LONGER)


def test_an_answer_of_this_worker_waits_for_the_check_too(make: Callable[..., Worker]) -> None:
    worker = make(role="both")
    worker.run(Serve(key(1), SHARED, greedy(3)))
    worker.run(Serve(key(2), LONGER, greedy(3)))  # hashed for the first time
    worker.flip(2)
    worker.run(Serve(key(3), LONGER, greedy(3)))
    assert worker.engine.tokens(key(3)) == reference_tokens(LAYOUT, LONGER, greedy(3))
    assert worker.counts["prefix_hit", "changed"] == 1
    (first, *_) = worker.engine.of(key(3), TokensEvent)
    assert first.num_cached_tokens <= 2 * T  # type: ignore[attr-defined]


def test_nothing_is_computed_or_announced_before_the_answer(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.prefill(1, SHARED)
    worker.engine.handle(Prefill(key(2), LONGER, greedy(4)))
    worker.engine.handle(Pin(key(2)))
    assert not worker.engine.has_work
    assert worker.engine.of(key(2), PrefixHitEvent)
    assert not worker.engine.of(key(2), UnitsFinalEvent)
    worker.run()
    assert worker.engine.of(key(2), UnitsFinalEvent)
    worker.run(Release(key(2)))


def test_a_result_for_a_prompt_that_is_gone_still_unregisters_what_is_wrong(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.prefill(1, SHARED)
    worker.flip(5)
    assert worker.num_registered(SHARED) == 8
    worker.engine.handle(Prefill(key(2), LONGER, greedy(4)))
    worker.engine.handle(Release(key(2)))
    worker.run()
    assert worker.num_registered(SHARED) == 5


def test_a_result_of_an_older_check_says_nothing(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.prefill(1, SHARED)
    worker.engine.handle(Prefill(key(2), LONGER, greedy(4)))
    (hit,) = worker.engine.of(key(2), PrefixHitEvent)
    worker.engine.handle(PrefixChecked(key(2), hit.check_id + 1, hit.units, ()))  # type: ignore[attr-defined]
    assert not worker.engine.has_work
    worker.run(Pin(key(2)))
    worker.run(Release(key(2)))


def complain(worker: Worker, ordinal: int) -> None:
    """A peer says that this block of its transfer arrived wrong, and ends the transfer."""
    worker.run(Prefill(key(9), SHARED, greedy(4)), Pin(key(9)))
    worker.run(Unregister(key(9), (UnitName(FULL, ordinal),)))
    worker.run(Release(key(9)))


def test_a_block_that_a_peer_reports_is_hashed_again_and_the_fault_is_found_elsewhere(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(recheck_s=None)
    complain(worker, 4)
    assert worker.counts == {("peer", "same"): 1}
    assert "1 are as they were hashed here, 0 have changed here" in caplog.text
    assert worker.num_registered(SHARED) == 4


def test_a_block_that_a_peer_reports_and_that_changed_here_is_this_machines_fault(
    make: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = make(recheck_s=None)
    worker.run(Prefill(key(9), SHARED, greedy(4)), Pin(key(9)))
    worker.flip(4)
    worker.run(Unregister(key(9), (UnitName(FULL, 4),)))
    worker.run(Release(key(9)))
    assert worker.counts == {("peer", "changed"): 1}
    assert "0 are as they were hashed here, 1 have changed here" in caplog.text


def test_each_block_is_due_once_per_interval(make: Callable[..., Worker]) -> None:
    worker, now = make(recheck_s=None), [0.0]
    worker.prefill(1, SHARED)
    cache = worker.engine.cache
    recheck = PrefixRecheck(cache, 60.0, lambda: now[0])
    sequence = cache.open("looks")
    cache.reuse_prefix(sequence, LONGER)
    due = recheck.due(sequence)
    assert {unit.ordinal for unit in due if unit.group == FULL} == set(range(8))
    recheck.note(due[1:])
    assert recheck.due(sequence) == due[:1]
    recheck.note(due)
    now[0] = 60.0
    assert recheck.due(sequence) == ()
    now[0] = 60.1
    assert recheck.due(sequence) == due
    cache.close_sequence(sequence)
