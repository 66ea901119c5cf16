"""A peer that knows the cluster's keys and means harm: nothing crashes, honest requests are answered, nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
import support.faults.table as table
import zmq
import zmq.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.event_loop import until
from support.faults.cells import Cell, outcome_of
from support.faults.wrong import never_late
from support.links.impostor import Impostor
from support.links.shell_pair import IDENTITY, ShellTrio
from support.links.unchecked import changed, raw

from disagg.engine.commands import ReservedEvent
from disagg.transceiver.planes.zmq import frames
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import AttemptKey, GroupRuns, UnitName, UnitRun
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.sizes import MAX_MESSAGE_NBYTES

SHM, ZMQ = pytest.param("shm", 0.2), pytest.param("zmq", 0.2)
SHARED_ARENA = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
"""Examples share one trio on purpose: whatever one leaves behind is found by the next."""


async def honest_request(trio: ShellTrio) -> None:
    assert outcome_of(await trio.ask()) == "a1"
    await trio.settle()
    trio.check()


# --- bytes --------------------------------------------------------------------------------------------------


def shm_address(trio: ShellTrio) -> str:
    return f"\0disagg-{trio.prefill.registration.source_planes['shm']._address}"


@pytest.mark.parametrize(("plane", "scale"), [SHM, ZMQ])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_bytes_on_every_port_harm_nobody(arena: Any, plane: str, seed: int) -> None:
    async def story(trio: ShellTrio) -> None:
        rng = random.Random(seed)
        doors = [trio.links.control.target, trio.router.endpoint]
        doors += [trio.links.data.target] if plane == "zmq" else []
        client = trio.begin()
        for door in doors:
            parts = urlsplit(door)
            for _ in range(10):
                _, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(rng.randbytes(rng.randrange(1, 3000)))
                await asyncio.sleep(0)
                writer.close()
        if plane == "shm":
            for _ in range(10):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(shm_address(trio))
                    sock.sendall(rng.randbytes(rng.randrange(1, 300)))
        assert outcome_of(await client) == "a1"
        await honest_request(trio)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [ZMQ])
def test_random_frames_in_good_handshakes_harm_nobody(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        rng = random.Random(3)
        server = trio.prefill.sending._server
        num_malformed = server.num_malformed, trio.prefill.registration.source_planes["zmq"].num_malformed
        client = trio.begin()
        with zmq.asyncio.Context() as context:
            for door in (trio.links.control.target, trio.links.data.target, trio.router.endpoint):
                with context.socket(zmq.DEALER) as dealer:
                    dealer.setsockopt(zmq.LINGER, 200)
                    dealer.connect(door)
                    for _ in range(60):
                        message = [rng.randbytes(rng.choice([0, 1, 40, 2000])) for _ in range(rng.randrange(1, 4))]
                        await dealer.send_multipart(message)
        assert outcome_of(await client) == "a1"
        plane = trio.prefill.registration.source_planes["zmq"]
        await until(lambda: server.num_malformed > num_malformed[0] and plane.num_malformed > num_malformed[1])
        await honest_request(trio)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(trio.links.control.target)
            monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            await dealer.send(bytes(MAX_MESSAGE_NBYTES + (1 << 20)))
            async with asyncio.timeout(5):
                await monitor.recv_multipart()
            dealer.disable_monitor()
            monitor.close()
        await honest_request(trio)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [ZMQ])
def test_the_data_port_serves_nobody_without_the_token(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        victim = trio.decode.registration.node.incarnation
        client = trio.begin()
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(trio.links.data.target)
            for name in (victim, draw_id(), "x"):
                await dealer.send(frames.pack(frames.DataHello(name, secrets.token_bytes(16))))
                async with asyncio.timeout(5):
                    assert await dealer.recv_multipart() == [frames.REFUSED]
            await dealer.send(frames.pack(frames.Credit(2**32 - 1)))
            await dealer.send(frames.pack(frames.SliceHead("0" * 32, 1, 0, 10)))
        assert outcome_of(await client) == "a1"
        await honest_request(trio)

    arena.run(story)


# --- floods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_a_flood_of_hellos_is_forgotten(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        client = trio.begin()
        async with Impostor.connected(trio) as impostor:
            for _ in range(500):
                hello = p.Hello(draw_id(), "x", IDENTITY, impostor.geometry, ("shm",))
                await impostor.client.send(hello)
            assert outcome_of(await client) == "a1"
            await honest_request(trio)
        sending, plane = trio.prefill.sending, trio.prefill.registration.source_planes["shm"]
        await until(lambda: len(sending._peers) == 1, "only the honest peer is left")
        await until(lambda: not plane._tokens._unused, "no token is left")
        await honest_request(trio)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_a_flood_of_fetches_for_unknown_transfers_is_answered_and_forgotten(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        async with Impostor.connected(trio) as impostor:
            await impostor.hello()
            for _ in range(500):
                header = impostor.header(AttemptKey(draw_id(), 1))
                await impostor.client.send(p.Fetch(header, b"", 22, (GroupRuns(0, ((0, 1),)),), "shm"))
            await honest_request_beside_early(trio)
            failed = await impostor.next(p.Failed)
            assert failed.reason == "unknown"
            await until(lambda: not trio.prefill.sending._early, "no FETCH waits for a dispatch")
        await honest_request(trio)

    arena.run(story)


async def honest_request_beside_early(trio: ShellTrio) -> None:
    assert outcome_of(await trio.ask()) == "a1"
    await until(lambda: trio.prefill.engine.num_used == 0, "the prefill worker holds nothing")


# --- messages of a hostile decode worker --------------------------------------------------------------------

HALTS = [(Role.SENDER, State.PINNING), (Role.SENDER, State.SENDING), (Role.SENDER, State.DECIDED)]
INTEGERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 5, 63, 64, 2**31, 2**32, 2**63 - 1])
RUNS = st.lists(st.tuples(INTEGERS, INTEGERS), max_size=3).map(tuple)
REQUIRED = st.lists(st.builds(partial(raw, GroupRuns), INTEGERS, RUNS), max_size=3).map(tuple)
UNITS = st.lists(st.builds(partial(raw, UnitName), INTEGERS, INTEGERS), max_size=3).map(tuple)
REASONS = st.sampled_from(["digest", "non-finite", "cancelled", "", "x" * 1000])
ANY = st.just(raw(p.Header, "", "", "", 0, 1))
"""Replaced when the message is sent."""
BYTES = st.binary(max_size=40)
WORDS = st.one_of(
    st.builds(partial(raw, p.Fetch), ANY, BYTES, INTEGERS, REQUIRED, st.sampled_from(["shm", "zmq", ""])),
    st.builds(partial(raw, p.Received), ANY, INTEGERS),
    st.builds(partial(raw, p.Ack), ANY),
    st.builds(partial(raw, p.Cancel), ANY, REASONS, UNITS),
    st.builds(partial(raw, p.Done), ANY, INTEGERS, INTEGERS, INTEGERS, st.just(()), st.none(), BYTES),
    st.builds(partial(raw, p.Closed), ANY),
    st.builds(partial(raw, p.Failed), ANY, REASONS, UNITS),
    st.builds(partial(raw, p.Slice), ANY, INTEGERS, st.just(())),
    st.builds(partial(raw, p.Refused), st.sampled_from(["stale_peer", "unknown_peer", "ticket", ""]), REASONS, REASONS),
    st.builds(partial(raw, p.Heartbeat), st.just(""), st.just(""), st.just(())),
    st.none(),  # the victim's own FETCH, with its ticket
)
SAYINGS = st.lists(st.tuples(st.integers(0, 2), st.booleans(), WORDS), min_size=1, max_size=6)
"""(in whose name, to the right incarnation or another, what)"""


def spoken(word: Any, header: p.Header, victim: str) -> Any:
    """`word` about the transfer of `header`: what names no transfer by itself is made to mean it and its receiver."""
    match word:
        case p.Refused():
            return changed(word, destination=victim, transfer_id=header.transfer_id, epoch=header.epoch)
        case p.Heartbeat():
            return p.Heartbeat(header.source, header.destination, ((header.transfer_id, header.epoch),))
        case _:
            return changed(word, header=header)


@given(sayings=SAYINGS, halt=st.sampled_from(HALTS))
@settings(SHARED_ARENA, max_examples=25)
@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_no_message_of_another_peer_touches_a_transfer(arena: Any, sayings: Any, halt: Any) -> None:
    """It knows everything: ids, incarnations, the ticket. What it cannot have is the victim's connection."""

    async def story(trio: ShellTrio) -> None:
        cell = Cell(trio, halt, table.DROPPED)
        cell.client = trio.begin()
        await cell.halt()
        fetch = trio.links.control.last("up", p.Fetch)
        assert fetch is not None
        async with Impostor.connected(trio) as impostor:
            await impostor.hello()
            names = (impostor.incarnation, trio.decode.registration.node.incarnation, "0" * 32)
            for name, is_addressed, word in sayings:
                to = impostor.prefill if is_addressed else "0" * 32
                header = impostor.header(cell.key, source=names[name], destination=to)
                with contextlib.suppress(LocalProtocolError):  # some of these no codec carries
                    await impostor.client.send(spoken(word or fetch.message, header, victim=names[1]))
            await impostor.was_heard()
            core = trio.prefill.core(cell.key)
            assert core is not None
            assert core.state is halt[1]
            assert not trio.prefill.releases[cell.key]
        cell.resume()
        assert outcome_of(await cell.reply()) == "a1"
        await trio.settle()
        trio.check()

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [SHM, ZMQ])
def test_a_foreign_or_replayed_ticket_admits_nothing(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        trio.links.control.history.clear()
        await honest_request(trio)
        used = trio.links.control.last("up", p.Fetch)
        assert used is not None
        cell = Cell(trio, (Role.SENDER, State.WAITING), table.DROPPED)
        cell.client = trio.begin()
        await cell.halt()
        victim = trio.links.control.last("up", p.Fetch)
        assert victim is not None
        async with Impostor.connected(trio) as impostor:
            await impostor.hello()
            for fetch in (used.message, victim.message, replace(victim.message, ticket=used.message.ticket)):
                key = AttemptKey(fetch.header.transfer_id, fetch.header.epoch)
                await impostor.client.send(replace(fetch, header=impostor.header(key)))
            await impostor.was_heard()
            core = trio.prefill.core(cell.key)
            assert core.state is State.WAITING
        cell.resume()
        assert outcome_of(await cell.reply()) == "a1"
        await trio.settle()
        trio.check()

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_a_hello_in_anothers_name_may_end_its_transfers_and_nothing_else(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        cell = Cell(trio, (Role.SENDER, State.SENDING), table.DROPPED)
        cell.client = trio.begin()
        await cell.halt()
        async with Impostor.connected(trio) as impostor:
            await impostor.hello(trio.decode.registration.node.incarnation)
            cell.resume()
            assert outcome_of(await cell.reply()) in ("a1", "a2")
        await trio.ready()
        await trio.settle()
        trio.check()
        await until(
            lambda: trio.prefill.sending._peers[trio.decode.registration.node.incarnation].hello.worker_id == "decode"
        )
        await trio.ready()
        await honest_request(trio)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_what_is_meant_for_another_incarnation_is_refused_and_changes_nothing(arena: Any) -> None:
    """A FETCH that reaches the successor of the process it was meant for."""

    async def story(trio: ShellTrio) -> None:
        dead = trio.prefill.registration.node.incarnation
        cell = Cell(trio, (Role.SENDER, State.WAITING), table.DROPPED)
        cell.client = trio.begin()
        await cell.halt()
        held = trio.links.control.last("up", p.Fetch)
        assert held is not None
        await trio.prefill.kill()
        trio.start_worker("prefill")
        trio.links.control.hold = None
        cell.resume()
        assert outcome_of(await cell.reply()) == "a2"
        await trio.ready()
        async with Impostor.connected(trio) as impostor:
            await impostor.hello()
            await impostor.client.send(replace(held.message, header=impostor.header(cell.key, destination=dead)))
            refused = await impostor.next(p.Refused)
            assert (refused.field, refused.destination) == ("stale_peer", dead)
        assert cell.key not in trio.prefill.sending
        assert not trio.prefill.sending._early
        await honest_request(trio)

    arena.run(story)


# --- messages of a hostile prefill worker -------------------------------------------------------------------


@dataclass(frozen=True)
class Lie:
    """What is wrong with a SLICE: everything is drawn before the transfer begins."""

    kind: str
    at: int
    number: int
    numbers: tuple[int, ...]
    keeps_length: bool

    def tell(self, message: p.Slice) -> p.Slice:
        units, at = message.units, self.at % len(message.units)
        match self.kind:
            case "number":
                return changed(message, number=self.number)
            case "twice":
                return changed(message, units=units + units[at : at + 1])
            case "stranger":
                return changed(message, units=(*units, raw(UnitRun, 0, self.number, 1, (2,), (1,))))
            case "nothing":
                return changed(message, units=())
            case "reordered":
                return changed(message, units=units[::-1])
            case _:
                return changed(message, units=(*units[:at], self._bend(units[at]), *units[at + 1 :]))

    def _bend(self, run: UnitRun) -> UnitRun:
        if self.kind in ("group", "first", "count"):
            return changed(run, **{self.kind: self.number})
        kept = getattr(run, self.kind)[:-1] if self.keeps_length else ()
        return changed(run, **{self.kind: (*kept, *(self.numbers[:1] if self.keeps_length else self.numbers))})


KINDS = ("number", "twice", "stranger", "nothing", "reordered", "group", "first", "count", "slots", "generations")
LIES = st.builds(
    Lie,
    st.sampled_from(KINDS),
    st.integers(0, 10),
    INTEGERS,
    st.lists(INTEGERS, min_size=1, max_size=4).map(tuple),
    st.booleans(),
)


@given(lie=LIES)
@settings(SHARED_ARENA, max_examples=40)
@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_a_sender_that_lies_in_slices_gets_nothing_decoded_and_nothing_written_elsewhere(arena: Any, lie: Lie) -> None:
    hear_out(arena, lie)


@given(lie=LIES)
@settings(SHARED_ARENA, max_examples=15)
@pytest.mark.parametrize(("plane", "scale"), [ZMQ])
def test_a_sender_that_lies_in_slices_gets_nothing_decoded_over_zmq_either(arena: Any, lie: Lie) -> None:
    hear_out(arena, lie)


def hear_out(arena: Any, lie: Lie) -> None:
    async def story(trio: ShellTrio) -> None:
        landed: list[Any] = []
        trio.decode.landing.on_job = landed.append
        lies_told: list[p.Slice] = []

        def rewrite(direction: str, message: Any) -> Any:
            if not isinstance(message, p.Slice) or lies_told:
                return message
            lies_told.append(lie.tell(message))
            return lies_told[0]

        cell = Cell(trio, (Role.RECEIVER, State.WAITING), table.DROPPED)
        cell.client = trio.begin()
        await cell.halt()
        trio.links.control.rewrite = rewrite
        cell.resume()
        try:
            assert outcome_of(await cell.reply()) in ("a1", "a2")
        finally:
            trio.links.control.rewrite = None
        assert lies_told
        await trio.settle()
        trio.check()
        (reserved,) = trio.decode.engine.of(cell.key, ReservedEvent)
        allowed = {(group, *pair) for group, pairs in enumerate(reserved.slots) for pair in pairs}
        written = {(u.group, u.ordinal, u.slot) for job in landed for u in job.destinations}
        with never_late():
            assert written <= allowed

    arena.run(story)
