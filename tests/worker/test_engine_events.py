"""Events of the engine: an attempt's in order, and none waits because blocks of another are being hashed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from support.event_loop import in_event_loop, until
from support.links.pools import close_pools, make_pools
from support.model.engine_pair import LAYOUT, key

from disagg.engine.commands import (
    AttemptKey,
    PrefixHitEvent,
    PromptComputedEvent,
    SuspectEvent,
    TokensEvent,
    UnitsFinalEvent,
)
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.kept_digests import KeptDigests
from disagg.transceiver.peers.landing_threads import LandingThreads
from disagg.transceiver.wire.messages.values import FirstToken, SamplingState
from disagg.worker.engine_events import EngineEvents

FIRST = FirstToken(1, None, SamplingState(0, ()))
BLOCKS = tuple(SourceUnit(0, ordinal, 0, 2 + ordinal, 102 + ordinal) for ordinal in range(3))


class Heard:
    """Attempts and a sending side that only keep what they are told, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[AttemptKey, str]] = []
        self.sending = SimpleNamespace(feed=lambda key, event: self.said.append((key, type(event).__name__)))

    def __contains__(self, key: AttemptKey) -> bool:
        return True

    def peer_geometry(self, key: AttemptKey) -> None:
        return None

    def take_event(self, event: Any) -> None:
        self.said.append((event.key, type(event).__name__))

    def suspects_seen(self, key: AttemptKey) -> None:
        self.said.append((key, "suspects seen"))

    def of(self, key: AttemptKey) -> list[str]:
        return [what for whose, what in self.said if whose == key]


class Story:
    """A registration's events over a landing thread that a test holds up."""

    def __init__(self) -> None:
        self.pools = make_pools([(8, 64)])
        self.heard, self.commands = Heard(), []
        self._may_go = threading.Event()
        self.landing = LandingThreads(self.pools, ["float32"] * LAYOUT.num_groups)
        kept = KeptDigests([8])
        self.parts: Any = SimpleNamespace(
            cuts=SimpleNamespace(of_peer=lambda geometry: (None, kept), kept=kept),
            events=asyncio.Queue(),
            landing=self.landing,
            layout=SimpleNamespace(slot_nbytes=(64,)),
            metrics=SimpleNamespace(count_rehashed=lambda *a: None),
            model=SimpleNamespace(submit=self.commands.append),
        )
        self.events = EngineEvents(self.parts, self.heard)  # type: ignore[arg-type]

    def hold_up(self) -> None:
        """Whatever is to be hashed from now on waits for `go_on`."""
        self._may_go.clear()
        self.landing._executor.submit(self._may_go.wait, 10)

    def go_on(self) -> None:
        self._may_go.set()

    def say(self, *events: Any) -> None:
        for event in events:
            self.parts.events.put_nowait(event)

    async def until_said(self, wanted: AttemptKey, said: Sequence[str]) -> None:
        await until(lambda: self.heard.of(wanted) == list(said), f"{wanted} said {said}")


@contextlib.asynccontextmanager
async def a_story() -> AsyncIterator[Story]:
    story = Story()
    serving = asyncio.create_task(story.events.run())
    try:
        yield story
    finally:
        story.go_on()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await story.landing.close()
        close_pools(story.pools)


def tokens(number: int, index: int = 0) -> TokensEvent:
    return TokensEvent(key(number), index, (1,), ())


@in_event_loop
async def test_tokens_of_a_request_flow_while_another_ones_blocks_wait_to_be_hashed() -> None:
    async with a_story() as story:
        story.hold_up()
        story.say(PrefixHitEvent(key(1), 1, BLOCKS), UnitsFinalEvent(key(2), 1, BLOCKS), SuspectEvent(key(3), BLOCKS))
        story.say(*(tokens(4, index) for index in range(3)))
        await story.until_said(key(4), ["TokensEvent"] * 3)
        assert not story.commands
        assert not story.heard.of(key(2))
        assert not story.heard.of(key(3))
        story.go_on()
        await story.until_said(key(2), ["UnitsFinal"])
        await story.until_said(key(3), ["suspects seen"])
        assert [command.key for command in story.commands] == [key(1)]


@in_event_loop
async def test_an_attempts_own_events_keep_their_order() -> None:
    async with a_story() as story:
        story.hold_up()
        computed = PromptComputedEvent(key(1), 1, FIRST, finished=False)
        story.say(UnitsFinalEvent(key(1), 1, BLOCKS[:1]), UnitsFinalEvent(key(1), 1, BLOCKS[1:]), computed, tokens(1))
        story.say(UnitsFinalEvent(key(2), 1, BLOCKS), tokens(3))
        await story.until_said(key(3), ["TokensEvent"])
        assert not story.heard.of(key(1))
        story.go_on()
        await story.until_said(key(1), ["UnitsFinal", "UnitsFinal", "PromptComputedEvent", "TokensEvent"])


@in_event_loop
async def test_nothing_is_left_of_a_lane_whose_events_were_told() -> None:
    async with a_story() as story:
        for number in range(20):
            story.say(UnitsFinalEvent(key(number), 1, BLOCKS), tokens(number))
            await story.until_said(key(number), ["UnitsFinal", "TokensEvent"])
        assert not story.events._lanes
        story.say(tokens(0, 1))
        await story.until_said(key(0), ["UnitsFinal", "TokensEvent", "TokensEvent"])


@in_event_loop
async def test_blocks_given_away_before_they_were_hashed_are_not_announced_and_hold_nobody_up() -> None:
    async with a_story() as story:
        story.hold_up()
        story.say(UnitsFinalEvent(key(1), 1, BLOCKS), tokens(1))
        story.say(tokens(2))
        await story.until_said(key(2), ["TokensEvent"])
        story.pools[0].generations[BLOCKS[1].slot] += 2
        story.go_on()
        await story.until_said(key(1), ["TokensEvent"])
