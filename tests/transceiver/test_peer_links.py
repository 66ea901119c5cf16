"""Links of a decode worker: introduced ones stay, those of requests are bounded, and a request waits for its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from support.event_loop import in_event_loop, within

from disagg.transceiver.peers import peer_links
from disagg.transceiver.peers.link import PeerLink
from disagg.transceiver.peers.peer_links import PeerLinks
from disagg.transceiver.wire.messages.router import PeerTarget

ROOM = 3


def target(name: str) -> PeerTarget:
    return PeerTarget(name, name, "tcp://127.0.0.1:1")


class FakeLink:
    """Settles when it is told to; closing takes a turn of the loop or, where it is held, longer."""

    def __init__(self, target: PeerTarget, log: list[str], may_close: asyncio.Event) -> None:
        self.target, self._log, self._may_close = target, log, may_close
        self.is_connecting, self.is_ended = True, False

    def end(self) -> None:
        self.is_ended = True

    async def run(self) -> None:
        self._log.append(f"open {self.target.incarnation}")
        try:
            await asyncio.Event().wait()
        finally:
            await self._may_close.wait()
            self._log.append(f"closed {self.target.incarnation}")


class Side:
    """The links with a journal, and the peers that a test says are busy."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.log: list[str] = []
        self.busy: set[str] = set()
        self.may_close = asyncio.Event()
        self.may_close.set()
        self.links = PeerLinks(
            lambda target: cast(PeerLink, FakeLink(target, self.log, self.may_close)),
            tasks.create_task,
            lambda: self.busy,
        )

    @property
    def names(self) -> list[str]:
        return [link.target.incarnation for link in self.links]

    def settle(self, name: str) -> None:
        link: Any = self.links.get(name)
        link.is_connecting = False
        self.links.settle(name)

    def reach(self, name: str) -> None:
        self.links.reach(target(name), lambda: self.log.append(f"settled {name}"))


@asynccontextmanager
async def side() -> AsyncIterator[Side]:
    async with asyncio.TaskGroup() as tasks:
        made = Side(tasks)
        yield made
        made.may_close.set()
        made.links.end()
        for name in made.names:
            made.links.forget(name)


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_links, "MAX_ON_USE", ROOM)
    monkeypatch.setattr(peer_links, "LOOK_AGAIN_S", 0.001)


@in_event_loop
async def test_what_waits_for_a_link_goes_on_when_it_is_settled_and_later_at_once() -> None:
    async with side() as s:
        s.reach("p0")
        s.reach("p0")
        await asyncio.sleep(0)
        assert s.log == ["open p0"], "one link, and nothing goes on yet"
        s.settle("p0")
        s.reach("p0")
        assert s.log == ["open p0", *["settled p0"] * 3]


@in_event_loop
async def test_beyond_the_room_the_idle_link_used_longest_ago_gives_way() -> None:
    async with side() as s:
        for name in ("p0", "p1", "p2"):
            s.reach(name)
            s.settle(name)
        s.reach("p0")
        s.reach("p3")
        assert s.names == ["p2", "p0", "p3"], "p1 was used longest ago"
        s.settle("p3")
        s.busy = {"p2"}
        s.reach("p4")
        assert s.names == ["p2", "p3", "p4"], "p2 has a transfer, so p0 was next"


@in_event_loop
async def test_a_link_that_a_request_waits_for_does_not_give_way() -> None:
    async with side() as s:
        for name in ("p0", "p1", "p2", "p3"):
            s.reach(name)
        assert s.names == ["p0", "p1", "p2"]
        s.settle("p1")
        await within(_until(lambda: "p3" in s.names))
        assert s.names == ["p0", "p2", "p3"]


@in_event_loop
async def test_while_every_link_serves_a_transfer_the_next_peer_waits_until_one_is_over() -> None:
    async with side() as s:
        s.busy = {"p0", "p1", "p2"}
        for name in ("p0", "p1", "p2"):
            s.reach(name)
            s.settle(name)
        s.reach("p3")
        await asyncio.sleep(0.01)
        assert s.names == ["p0", "p1", "p2"]
        s.busy = {"p0", "p2"}
        await within(_until(lambda: "p3" in s.names))
        assert s.names == ["p0", "p2", "p3"]


@in_event_loop
async def test_introduced_links_take_no_room_and_never_give_way() -> None:
    async with side() as s:
        s.links.introduce([target(f"known{number}") for number in range(5)])
        for number in range(ROOM + 2):
            s.reach(f"p{number}")
            s.settle(f"p{number}")
        assert sorted(s.names) == [*(f"known{number}" for number in range(5)), "p2", "p3", "p4"]
        s.links.introduce([target("known0"), target("p4")])
        assert sorted(s.names) == ["known0", "p2", "p3", "p4"], "p4 is kept from here on"


@in_event_loop
async def test_a_peer_that_is_gone_takes_its_link_along_and_tells_what_waits() -> None:
    async with side() as s:
        s.reach("p0")
        s.links.forget("p0")
        s.links.forget("never was")
        assert s.names == []
        assert s.log == ["settled p0"]


@in_event_loop
async def test_a_new_link_to_a_peer_waits_until_the_last_one_is_closed() -> None:
    async with side() as s:
        s.reach("p0")
        await asyncio.sleep(0)
        s.may_close.clear()
        s.links.forget("p0")
        s.reach("p0")
        await asyncio.sleep(0.01)
        assert s.log == ["open p0", "settled p0"]
        s.may_close.set()
        await within(_until(lambda: s.log[-1] == "open p0"))
        assert s.log[2:] == ["closed p0", "open p0"]


@in_event_loop
async def test_once_the_side_ends_nothing_is_opened_and_nothing_waits() -> None:
    async with side() as s:
        s.links.end()
        s.reach("p0")
        assert s.names == []
        assert s.log == ["settled p0"]


async def _until(is_true: Any) -> None:
    while not is_true():  # noqa: ASYNC110 (nothing announces it)
        await asyncio.sleep(0.001)
