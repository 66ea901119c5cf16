"""The decode side's link: planes opened under heartbeats, and what it makes of a peer that errs or is silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from support.event_loop import in_event_loop, until
from support.links.extremes import messages
from support.links.sample_messages import PEER_SAMPLES
from support.links.sending_side import IDENTITY, Prefill, pools
from support.links.shell_pair import patched_timing
from support.links.transfer_pair import GEOMETRY, KEYS, TRANSFER_ID
from support.links.unchecked import raw

from disagg.transceiver.memory.regions import LandingJob, PoolRegion
from disagg.transceiver.peers import link as peer_link
from disagg.transceiver.peers.link import LinkSpeed, PeerLink
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.planes.inproc import InprocHub, InprocLandingPlane, InprocSourcePlane
from disagg.transceiver.wire.codec import PROTOCOL, encode
from disagg.transceiver.wire.errors import PeerLost, PlaneRefused
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import PlaneOffer
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets

SCALE = 0.5
ME = "d" * 32


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    patched_timing(monkeypatch, SCALE)


class Link:
    """A link that runs, what it delivered and why it was lost."""

    def __init__(self, target: PeerTarget, planes: Mapping[str, Callable[[], LandingPlane]], sockets: Sockets) -> None:
        self.messages: list[Any] = []
        self.num_losses = 0
        node = Node(ME, "decode", IDENTITY, GEOMETRY, KEYS)
        self.link = PeerLink(node, target, planes, pools(), self.messages.append, self._lose, lambda peer: (), sockets)

    async def _lose(self, peer: str, reason: str) -> None:
        self.num_losses += 1

    @property
    def state(self) -> str:
        return self.link.report().state

    @property
    def detail(self) -> str:
        return self.link.report().detail


@contextlib.asynccontextmanager
async def linked(
    prefill: Prefill | FakePrefill, planes: Mapping[str, Callable[[], LandingPlane]]
) -> AsyncIterator[Link]:
    sockets = Sockets(KEYS)
    link = Link(PeerTarget(prefill.node.incarnation, "prefill", prefill.server.endpoint, None), planes, sockets)
    running = asyncio.create_task(link.link.run())
    try:
        yield link
    finally:
        link.link.end()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        sockets.close()


class FakePrefill:
    """A prefill worker that answers every HELLO with these bytes, and says nothing else by itself."""

    def __init__(self, server: ControlServer, make_answer: Callable[[FakePrefill], bytes]) -> None:
        self.server, self._make_answer = server, make_answer
        self.node = Node(draw_id(), "prefill", IDENTITY, GEOMETRY, KEYS)
        self.heard: list[Any] = []
        self.route = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, make_answer: Callable[[FakePrefill], bytes]) -> AsyncIterator[FakePrefill]:
        server = ControlServer.bind("tcp://127.0.0.1:0", KEYS)
        prefill = cls(server, make_answer)
        serving = asyncio.create_task(prefill._serve())
        try:
            yield prefill
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await server.close()

    async def _serve(self) -> None:
        while True:
            self.route, message = await self.server.recv()
            self.heard.append(message)
            if isinstance(message, p.Hello) and (answer := self._make_answer(self)):
                await self.server._socket.send_multipart([self.route, answer])

    async def say(self, message: Any) -> None:
        await self.server.send(self.route, message)

    def welcome(self) -> p.Welcome:
        node = self.node
        return p.Welcome(node.incarnation, "prefill", node.identity, node.geometry, (PlaneOffer("any"),))


@contextlib.asynccontextmanager
async def faked(
    make_answer: Callable[[FakePrefill], bytes], plane: type[LandingPlane] | None = None
) -> AsyncIterator[tuple[FakePrefill, Link]]:
    """Both ends; the plane opens without a source unless told otherwise."""
    async with FakePrefill.running(make_answer) as fake, linked(fake, {"any": plane or FreePlane}) as link:
        yield fake, link


def welcomed(fake: FakePrefill) -> bytes:
    return encode(fake.welcome())


class FreePlane(InprocLandingPlane):
    """Opens without a source; nothing can be fetched."""

    def __init__(self) -> None:
        super().__init__(InprocHub())

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        self._open(pools, pools)


class HangingPlane(FreePlane):
    """Nobody answers it for longer than a peer may be silent."""

    num_tries = 0

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        type(self).num_tries += 1
        await asyncio.sleep(1.5 * peer_link.LOST_S)
        raise PlaneRefused("no answer")


class UnfitPlane(InprocLandingPlane):
    """Opens, and then brings nothing."""

    async def fetch(self, job: LandingJob) -> None:
        raise PeerLost("nothing comes")


class LatePlane(InprocLandingPlane):
    """Takes longer to open than a peer may be silent, as a large mapping does."""

    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        await asyncio.sleep(1.5 * peer_link.LOST_S)
        await super().connect(me, offer, pools)


def sources(hub: InprocHub, *names: str) -> dict[str, InprocSourcePlane]:
    """Planes of these names, all in this process."""
    kinds = {name: type(name, (InprocSourcePlane,), {"name": name}) for name in names}
    return {name: kind(hub) for name, kind in kinds.items()}


# --- planes -------------------------------------------------------------------------------------------------


@in_event_loop
async def test_a_preferred_plane_that_nobody_answers_does_not_void_the_next_ones_token() -> None:
    hub = InprocHub()
    HangingPlane.num_tries = 0
    planes = {"black": HangingPlane, "white": lambda: InprocLandingPlane(hub)}
    async with Prefill.running(sources(hub, *planes)) as prefill, linked(prefill, planes) as link:
        await until(lambda: link.state == "ready", link.detail)
        assert HangingPlane.num_tries == 1
        assert link.num_losses == 0


@in_event_loop
async def test_a_plane_that_opens_slowly_opens_under_heartbeats_and_stays() -> None:
    hub = InprocHub()
    async with (
        Prefill.running(sources(hub, "late")) as prefill,
        linked(prefill, {"late": lambda: LatePlane(hub)}) as link,
    ):
        await until(lambda: link.state == "ready", link.detail)
        speed = link.link.speed
        assert speed == LinkSpeed("prefill", "inproc", "", link.link.gb_per_s)
        await asyncio.sleep(3 * peer_link.HEARTBEAT_S)
        assert link.state == "ready"
        assert link.num_losses == 0
        assert ME in prefill.side._peers


@in_event_loop
async def test_a_plane_that_opened_and_was_given_up_costs_neither_the_peer_nor_the_next_plane() -> None:
    hub = InprocHub()
    planes = {"unfit": lambda: UnfitPlane(hub), "late": lambda: LatePlane(hub)}
    async with Prefill.running(sources(hub, *planes)) as prefill, linked(prefill, planes) as link:
        await until(lambda: link.state == "ready", link.detail)
        assert link.num_losses == 0


@in_event_loop
async def test_a_peer_that_falls_silent_while_a_plane_is_opened_is_given_up() -> None:
    class EndlessPlane(FreePlane):
        async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
            await asyncio.Event().wait()

    async with faked(welcomed, EndlessPlane) as (_, link):
        await until(lambda: link.detail.startswith("silent for"), link.detail)


@in_event_loop
async def test_a_plane_that_is_lost_while_it_is_measured_is_not_taken_for_open() -> None:
    class Fleeting(FreePlane):
        def land(self, job: LandingJob, copy: Any = None) -> int:
            self._lose()
            return 1

        async def fetch(self, job: LandingJob) -> None:
            return

    async with faked(welcomed, Fleeting) as (_, link):
        await until(lambda: link.detail == "its data plane closed", link.detail)


# --- versions -----------------------------------------------------------------------------------------------


def versioned(message: Any, version: tuple[int, int], **more: Any) -> bytes:
    _, _, tag, fields = msgpack.unpackb(encode(message))
    return bytes(msgpack.packb([*version, tag, fields | more]))


@in_event_loop
async def test_a_peer_of_another_major_is_refused_naming_both() -> None:
    other = PROTOCOL[0] + 1
    async with faked(lambda fake: versioned(fake.welcome(), (other, 3))) as (_, link):
        await until(lambda: link.state == "refused", link.detail)
        assert link.detail == f"protocol: ours {PROTOCOL[0]}.{PROTOCOL[1]}, theirs {other}.3"


@in_event_loop
async def test_a_peer_of_a_later_minor_is_linked_whatever_fields_it_adds() -> None:
    later = PROTOCOL[0], PROTOCOL[1] + 1
    async with faked(lambda fake: versioned(fake.welcome(), later, added=[1, {"x": 2}])) as (_, link):
        await until(lambda: link.state == "ready", link.detail)


@in_event_loop
async def test_a_peer_of_the_minor_before_is_linked_for_handoffs_alone() -> None:
    def answer(fake: FakePrefill) -> bytes:
        major, minor, tag, fields = msgpack.unpackb(encode(fake.welcome()))
        del fields["purposes"]
        return bytes(msgpack.packb([major, minor - 1, tag, fields]))

    async with faked(answer) as (_, link):
        await until(lambda: link.state == "ready", link.detail)
        assert link.link.purposes == ("handoff",)


@in_event_loop
async def test_over_a_link_goes_what_one_end_sends_and_the_other_receives() -> None:
    def answer(fake: FakePrefill) -> bytes:
        return encode(replace(fake.welcome(), purposes=("prefix", "later")))

    async with faked(answer) as (fake, link):
        await until(lambda: link.state == "ready", link.detail)
        assert link.link.purposes == (), "this end is a sink of handoffs alone"
        (hello,) = [message for message in fake.heard if isinstance(message, p.Hello)][:1]
        assert hello.purposes == ("handoff",)


@in_event_loop
async def test_a_peer_that_answers_no_hello_is_lost_with_a_reason() -> None:
    async with faked(lambda fake: b"") as (_, link):
        await until(lambda: link.detail.startswith("no answer to HELLO within"), link.detail)


# --- messages -----------------------------------------------------------------------------------------------


@in_event_loop
async def test_what_is_meant_for_another_incarnation_is_refused_and_changes_nothing() -> None:
    async with faked(welcomed) as (fake, link):
        await until(lambda: link.state == "ready", link.detail)
        header = p.Header(fake.node.incarnation, ME, TRANSFER_ID, 1, 1)
        await fake.say(p.Closed(replace(header, destination="0" * 32)))
        await fake.say(p.Closed(header))
        await until(lambda: link.messages, "the second one came")
        assert link.messages == [p.Closed(header)]
        refused = p.Refused("stale_peer", ME, "0" * 32, "0" * 32)
        await until(lambda: refused in fake.heard, "it is told so")


@in_event_loop
async def test_a_message_that_no_frame_can_carry_ends_its_own_transfer_and_not_the_link() -> None:
    async with faked(welcomed) as (fake, link):
        await until(lambda: link.state == "ready", link.detail)
        header = p.Header(ME, fake.node.incarnation, TRANSFER_ID, 1, 1)
        link.link.send(raw(p.Received, header, 2**70))
        link.link.send(p.Received(header, 7))
        await until(lambda: p.Received(header, 7) in fake.heard, "the next message passes")
        (refused,) = link.messages
        assert (refused.transfer_id, refused.epoch) == (TRANSFER_ID, 1)
        assert link.num_losses == 0


@in_event_loop
async def test_what_a_peer_says_of_itself_is_reported_in_bounds() -> None:
    refused = p.Refused("model_fingerprint", "x" * 60_000, "y" * 60_000)
    async with faked(lambda fake: encode(refused)) as (_, link):
        await until(lambda: link.state == "refused", link.detail)
        assert link.detail.startswith("model_fingerprint: ours yyy")
        assert len(link.detail) < 2 * peer_link.MAX_DETAIL_CHARS


# --- what a peer says at its extremes -----------------------------------------------------------------------


@pytest.mark.parametrize("sample", PEER_SAMPLES, ids=lambda sample: type(sample).__name__)
@in_event_loop
async def test_no_message_ends_a_link_for_good(sample: Any) -> None:
    async with faked(welcomed) as (fake, link):
        await until(lambda: link.state == "ready", link.detail)
        header = p.Header(fake.node.incarnation, "d" * 32, TRANSFER_ID, 0, 1)
        said = replace(sample, header=header) if hasattr(sample, "header") else sample
        for path, data in messages(said):
            if "Welcome.incarnation" not in path:
                await _say_raw(fake, data)
        await until(lambda: link.state == "ready", link.detail)


async def _say_raw(fake: FakePrefill, data: bytes) -> None:
    with contextlib.suppress(Exception):
        await fake.server._socket.send_multipart([fake.route, data])


@in_event_loop
async def test_what_a_message_raises_ends_one_connection_and_the_link_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with faked(welcomed) as (fake, link):
        await until(lambda: link.state == "ready", link.detail)
        link.link._on_message = _trip
        with caplog.at_level(logging.WARNING):
            await fake.say(p.Closed(p.Header(fake.node.incarnation, "d" * 32, TRANSFER_ID, 0, 1)))
            await until(lambda: link.num_losses == 1, link.detail)
            await until(lambda: link.state == "ready", link.detail)
        assert link.link._faults.count == 1
        assert "Closed of prefill worker prefill cannot be taken (1 so far): KeyError" in caplog.text


def _trip(message: Any) -> None:
    raise KeyError("nobody thought of this")
