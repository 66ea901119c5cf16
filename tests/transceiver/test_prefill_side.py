"""The prefill side's shell: whose word counts for which transfer, and what one peer can cost the others."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgpack
import pytest
from support.event_loop import in_event_loop, within
from support.links.sending_side import IDENTITY, Peer, Prefill, new_key
from support.links.transfer_pair import GEOMETRY

from disagg.transceiver.planes.inproc import InprocHub, InprocSourcePlane
from disagg.transceiver.protocol.events import Pinned
from disagg.transceiver.protocol.state import State
from disagg.transceiver.wire.codec import encode
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import AttemptKey


async def fetched(prefill: Prefill, peer: Peer) -> AttemptKey:
    """A transfer whose FETCH was accepted."""
    key = new_key()
    prefill.dispatch(peer, key)
    await peer.say(peer.fetch(key))
    await peer.next(p.Accepted)
    return key


# --- what no frame can carry --------------------------------------------------------------------------------


@in_event_loop
async def test_a_plane_that_is_named_often_is_offered_once() -> None:
    async with Prefill.running() as prefill, Peer.connected(prefill) as peer:
        welcome = await peer.hello(planes=("x", "inproc") * 8)
        assert [offer.plane for offer in welcome.planes] == ["inproc"]


@in_event_loop
async def test_a_difference_of_long_values_is_refused_in_a_short_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Prefill.running() as prefill, Peer.connected(prefill) as peer:
        monkeypatch.setattr("disagg.transceiver.wire.codec.MAX_MESSAGE_NBYTES", 20_000)
        longer = replace(IDENTITY, adapter_ids=("a",) * 5000)  # in a frame 2 bytes each, as text 5
        hello = p.Hello(peer.incarnation, "decode", longer, GEOMETRY, ("inproc",))
        await peer.say(hello)
        refused = await peer.next(p.Refused)
        assert refused.field == "adapter_ids"
        assert len(refused.theirs) < 300
        await peer.hello()


@in_event_loop
async def test_a_message_that_no_frame_can_carry_ends_its_transfer_and_the_next_one_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        key = await fetched(prefill, peer)
        with monkeypatch.context() as patch:
            patch.setattr("disagg.transceiver.wire.codec.MAX_MESSAGE_NBYTES", 550)  # slices are smaller, DONE is larger
            prefill.compute(key)
            await peer.next(p.Slice)
            await peer.say(p.Received(peer.header(key), -1))  # as a receiver does that waits for DONE
            assert (await peer.next(p.Closed)).header.transfer_id == key.transfer_id
        assert [released for released, _ in prefill.host.releases] == [key]
        other = await fetched(prefill, peer)
        prefill.compute(other)
        assert (await peer.next(p.Done)).header.transfer_id == other.transfer_id


@in_event_loop
async def test_a_decode_worker_of_a_later_minor_is_welcomed_whatever_fields_it_adds() -> None:
    async with Prefill.running() as prefill, Peer.connected(prefill) as peer:
        hello = p.Hello(peer.incarnation, "decode", IDENTITY, GEOMETRY, ("inproc",))
        major, minor, tag, fields = msgpack.unpackb(encode(hello))
        peer.client._connection.send([msgpack.packb([major, minor + 1, tag, fields | {"added": [1, {"x": 2}]}])])
        assert (await peer.next(p.Welcome)).incarnation == prefill.node.incarnation


# --- whose word counts --------------------------------------------------------------------------------------


@in_event_loop
async def test_only_its_own_connection_may_call_an_incarnation_dead() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as victim, Peer.known(prefill) as other:
        key = await fetched(prefill, victim)
        await other.say(p.Refused("stale_peer", "", "", destination=victim.incarnation))
        await other.was_heard()
        assert prefill.core(key) is not None
        assert prefill.host.releases == []
        await victim.say(p.Refused("stale_peer", "", "", destination=victim.incarnation))
        await victim.say(p.Ack(victim.header(key)))
        assert (await victim.next(p.Refused)).field == "unknown_peer"
        assert [released for released, _ in prefill.host.releases] == [key]


@in_event_loop
async def test_only_its_own_peer_renews_the_lease_of_a_transfer() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as victim, Peer.known(prefill) as other:
        key = await fetched(prefill, victim)
        core = prefill.core(key)
        assert core is not None
        granted = core._lease_end
        await other.say(other.beat(key))
        await other.was_heard()
        assert core._lease_end == granted
        await victim.say(victim.beat(key))
        await victim.was_heard()
        assert core._lease_end > granted


# --- FETCH before DISPATCH ----------------------------------------------------------------------------------


@in_event_loop
async def test_a_fetch_that_was_cancelled_before_its_dispatch_is_not_served() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        kept, cancelled = new_key(), new_key()
        await peer.say(peer.fetch(kept))
        await peer.say(peer.fetch(cancelled))
        await peer.say(p.Cancel(peer.header(cancelled), "cancelled"))
        assert (await peer.next(p.Closed)).header.transfer_id == cancelled.transfer_id
        prefill.dispatch(peer, cancelled)
        prefill.dispatch(peer, kept)
        assert prefill.host.pins == [kept]


@in_event_loop
async def test_a_strangers_fetch_neither_takes_nor_clears_the_place_of_the_right_one() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as stranger, Peer.known(prefill) as peer:
        key = new_key()
        await stranger.say(stranger.fetch(key))
        await stranger.was_heard()
        await peer.say(peer.fetch(key))
        await peer.was_heard()
        await stranger.say(p.Cancel(stranger.header(key), "cancelled"))
        await stranger.was_heard()
        prefill.dispatch(peer, key)
        assert prefill.host.pins == [key]


@in_event_loop
async def test_fetches_beyond_a_bound_are_not_kept_and_are_served_when_said_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("disagg.transceiver.peers.prefill_side.MAX_EARLY", 2)
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        keys = [new_key() for _ in range(3)]
        for key in (*keys, *keys):
            await peer.say(peer.fetch(key))
        await peer.was_heard()
        assert len(prefill.side._early) == 2
        for key in keys:
            prefill.dispatch(peer, key)
        assert prefill.host.pins == keys[:2]
        await peer.say(peer.fetch(keys[2]))
        await peer.was_heard()
        assert prefill.host.pins == keys


@in_event_loop
async def test_a_lost_peers_early_fetch_is_lost_with_it() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        key = new_key()
        await peer.say(peer.fetch(key))
        await peer.was_heard()
        async with Peer.connected(prefill, peer.incarnation) as anew:
            await anew.hello()
            prefill.dispatch(anew, key)
            assert prefill.host.pins == []


# --- the queue ----------------------------------------------------------------------------------------------


@in_event_loop
async def test_accepted_says_how_many_wait_for_their_pins_before_it() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        keys = [new_key() for _ in range(3)]

        async def position(key: AttemptKey) -> int:
            await peer.say(peer.fetch(key))
            accepted = await peer.next(p.Accepted)
            assert accepted.header.transfer_id == key.transfer_id
            return int(accepted.queue_position)

        for key in keys:
            prefill.dispatch(peer, key)
        assert [await position(key) for key in keys] == [0, 1, 2]
        prefill.side.feed(keys[0], Pinned(5))
        assert [await position(key) for key in keys] == [0, 0, 1]
        await peer.say(p.Cancel(peer.header(keys[1]), "cancelled"))
        assert await position(keys[2]) == 0


# --- losses -------------------------------------------------------------------------------------------------


class SlowToDrop(InprocSourcePlane):
    """Its streams close when a test lets them."""

    def __init__(self, hub: InprocHub) -> None:
        super().__init__(hub)
        self.may_drop = asyncio.Event()

    async def drop(self, peer: str) -> None:
        await self.may_drop.wait()
        await super().drop(peer)


@in_event_loop
async def test_a_stream_that_closes_slowly_holds_up_its_own_incarnation_and_nobody_else() -> None:
    plane = SlowToDrop(InprocHub())
    async with Prefill.running({"inproc": plane}) as prefill, Peer.known(prefill) as peer, Peer.known(prefill) as other:
        key = await fetched(prefill, peer)
        async with Peer.connected(prefill, peer.incarnation) as anew:
            hello = p.Hello(peer.incarnation, "decode", IDENTITY, GEOMETRY, ("inproc",))
            for _ in range(2):  # it is repeated until answered
                await anew.say(hello)
            await other.was_heard()
            await other.next(p.Heartbeat)
            assert [released for released, _ in prefill.host.releases] == [key]
            with pytest.raises(TimeoutError):
                await within(anew.client.recv(), 0.1)
            plane.may_drop.set()
            welcome = await anew.next(p.Welcome)
            await anew.was_heard()
            assert plane._tokens.redeem(anew.incarnation, welcome.planes[0].token)


@in_event_loop
async def test_a_data_connection_that_no_transfer_uses_may_end_without_a_loss() -> None:
    first, second = InprocSourcePlane(InprocHub()), InprocSourcePlane(InprocHub())
    planes = {"first": first, "inproc": second}
    async with Prefill.running(planes) as prefill, Peer.connected(prefill) as peer:
        welcome = await peer.hello(planes=("first", "inproc"))
        assert first.on_peer_lost is not None
        first.on_peer_lost(peer.incarnation)
        await peer.was_heard()
        assert second._tokens.redeem(peer.incarnation, welcome.planes[1].token)
        key = await fetched(prefill, peer)
        assert second.on_peer_lost is not None
        second.on_peer_lost(peer.incarnation)  # the one that carries it: that is the peer's death
        await peer.say(p.Ack(peer.header(key)))
        assert (await peer.next(p.Refused)).field == "unknown_peer"
        assert [released for released, _ in prefill.host.releases] == [key]


# --- a key is used once -------------------------------------------------------------------------------------


@in_event_loop
async def test_an_attempt_is_known_while_its_transfer_stops_and_after_its_end() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        key = await fetched(prefill, peer)
        assert prefill.side.knows(key)
        assert not prefill.side.knows(new_key())
        await peer.say(p.Cancel(peer.header(key), "cancelled"))
        await peer.next(p.Cancelled)
        assert prefill.core(key) is None
        assert prefill.side.knows(key)
        with pytest.raises(AssertionError):
            prefill.dispatch(peer, key)


@in_event_loop
async def test_a_repeated_hello_is_answered_again_and_loses_nothing() -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as peer:
        key = await fetched(prefill, peer)
        before = prefill.side._peers[peer.incarnation]
        await peer.hello()
        assert prefill.side._peers[peer.incarnation] is before
        core = prefill.core(key)
        assert core is not None
        assert core.state is State.PINNING
