"""The decode side's shell: links to prefill workers, landing jobs, and the transfers that need them.

It performs what the cores ask and decides nothing. All methods run on the event loop; `LandingHost` is the worker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.peers.landing_threads import Landed, LandingThreads
from disagg.transceiver.peers.link import LinkSpeed, PeerLink
from disagg.transceiver.peers.link_meter import BusyTime
from disagg.transceiver.peers.live import Transfers
from disagg.transceiver.peers.peer_links import PeerLinks
from disagg.transceiver.planes.base import LandingPlane
from disagg.transceiver.protocol.actions import (
    Action,
    AskExtension,
    AskRoom,
    FreeReservation,
    Land,
    PartVerified,
    PrefixVerified,
    ReportFailed,
    Send,
    StopLanding,
    Verified,
)
from disagg.transceiver.protocol.events import (
    Event,
    LandingFailed,
    LandingStopped,
    PeerGone,
    SliceLanded,
)
from disagg.transceiver.protocol.outbox import BYTE_WINDOW
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import PeerLost, TransceiverError
from disagg.transceiver.wire.faults import PeerFaults
from disagg.transceiver.wire.messages.peer import Received, Refused, Slice, TransferMessage
from disagg.transceiver.wire.messages.router import LinkStatus as LinkReport
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import AttemptKey
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.purposes import HANDOFF, MOVE
from disagg.transceiver.wire.sockets import Sockets
from disagg.transceiver.wire.timing import REPEAT_FIRST_S

log = logging.getLogger(__name__)


RECEIVED_DELAY_S: Final = REPEAT_FIRST_S / 4
"""A slice is repeated when no RECEIVED came for `REPEAT_FIRST_S`; this late, none is repeated for want of it."""


class LandingHost(Protocol):
    """What the receiving side needs of its worker, whatever a transfer is for."""

    def transfer_failed(self, key: AttemptKey, failure: ReportFailed, record: TransferRecord) -> None:
        """This epoch failed and no job holds its slots: free the reservation and tell the router."""

    def free_reservation(self, key: AttemptKey, reason: str, record: TransferRecord) -> None:
        """The request ended without decoding here."""


class HandoffHost(LandingHost, Protocol):
    """And for handoffs."""

    def decode(self, key: AttemptKey, verified: Verified, record: TransferRecord) -> None:
        """The KV is complete and bound to this request: it may decode."""


class PrefixHost(LandingHost, Protocol):
    """And for prefixes."""

    def make_room(self, key: AttemptKey, asked: AskRoom) -> None:
        """The source has said what moves: have room made, and answer by `set_destinations` and `Reserved`."""

    def prefix_verified(self, key: AttemptKey, verified: PrefixVerified, record: TransferRecord) -> None:
        """The blocks up to its boundary may be registered."""


@dataclass(slots=True)
class TransferRecord:
    """What one transfer cost, measured where the bytes land. Times are seconds on this process's monotonic clock."""

    plane: str = ""
    purpose: str = HANDOFF
    first_slice_at: float = 0.0
    landed_at: float = 0.0
    done_at: float = 0.0
    busy: BusyTime = field(default_factory=BusyTime)
    """While bytes were on their way."""
    num_operations: int = 0
    num_saturated: int = 0
    """Numbers that landed as the largest of our format."""
    blocks: dict[int, int] = field(default_factory=dict)
    nbytes: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Incoming:
    peer: str
    destinations: dict[tuple[int, int], int]
    record: TransferRecord
    host: LandingHost
    landed: list[HashedUnit] = field(default_factory=list)
    """Slots with the digests of what landed in them, where units are slots."""
    received: int = -1
    """What the last RECEIVED said."""
    jobs: set[asyncio.Task[None]] = field(default_factory=set)


class ReceivingSide:
    """Fetches KV from prefill workers into this process's pools."""

    def __init__(
        self,
        node: Node,
        planes: Mapping[str, Callable[[], LandingPlane]],
        pools: Sequence[PoolRegion],
        pool_of_group: Sequence[int],
        landing: LandingThreads,
        sockets: Sockets,
        host: HandoffHost,
        on_part: Callable[[AttemptKey, PartVerified, TransferRecord], None] | None = None,
        faults: PeerFaults | None = None,
        on_room: Callable[[AttemptKey, AskExtension], None] | None = None,
        on_landed: Callable[[AttemptKey, Sequence[HashedUnit]], None] = lambda key, units: None,
    ) -> None:
        """`on_part` hears, where ranks are joined, of a pair of ranks that is done; its leader decides.

        `on_room`: an answer that comes here has become so long. The worker makes room for it, sets the destinations and
        feeds `Extended`, or `RoomRefused`. `on_landed` hears of slots whose transfer was verified, with their digests:
        not where units are no slots, nor of moves.
        """
        self._on_room = on_room
        self._on_landed = on_landed
        self._faults = faults or PeerFaults()
        self._on_part = on_part
        self._node, self._planes, self._pools, self._pool_of_group = node, planes, pools, pool_of_group
        self._landing, self._sockets, self._host = landing, sockets, host
        self._transfers = Transfers(node.incarnation, self._perform)
        self._incoming: dict[AttemptKey, _Incoming] = {}
        self._received: dict[AttemptKey, Received] = {}
        self.links = PeerLinks(self._make_link, self._begin, self._busy_peers)
        self._to_stop: asyncio.Queue[AttemptKey] = asyncio.Queue()
        self._tasks: asyncio.TaskGroup | None = None
        self._is_ending = False

    async def run(self) -> None:
        """Serve until cancelled. Then `held` names the attempts whose slots a landing job may still write."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._stop_landings())
            try:
                await self._transfers.tick()
            finally:
                self._is_ending = True  # links still deliver what they have received, but the group takes no new task
                self.links.end()

    # --- the worker's side ------------------------------------------------------------------------------------

    def set_peers(self, targets: Iterable[PeerTarget]) -> None:
        """Connect to exactly these prefill workers, ahead of any request."""
        self.links.introduce(targets)

    def forget_peers(self, incarnations: Iterable[str]) -> None:
        """These registrations are over, however the links to them came about."""
        for incarnation in incarnations:
            self.links.forget(incarnation)

    def reach(self, target: PeerTarget, then: Callable[[], None] | None = None) -> None:
        """Connect to `target` unless there is a link; `then` is called once it is ready, lost or refused."""
        self.links.reach(target, then)

    def start(
        self,
        key: AttemptKey,
        transfer: Transfer,
        peer: str,
        slots: Sequence[Sequence[tuple[int, int]]],
        event: Event,
        host: PrefixHost | None = None,
    ) -> None:
        """Destinations are reserved: `slots[g]` = (ordinal, slot) pairs. `event` (Reserved) begins the transfer.

        With a `host` it is a prefix: FetchWanted begins it, and its destinations come by `set_destinations`.
        """
        record = TransferRecord(self.plane_of(peer), transfer.purpose)
        self._incoming[key] = _Incoming(peer, _by_unit(slots), record, host or self._host)
        self._transfers.add(key, transfer)
        if self.is_ready(peer, transfer.purpose):
            self.feed(key, event)
        else:
            self.feed(key, PeerGone("this worker has no link to it"))

    def set_destinations(self, key: AttemptKey, slots: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Of a transfer that says only in its course what it brings: before the event that says so to its core."""
        if (incoming := self._incoming.get(key)) is not None:
            incoming.destinations = _by_unit(slots)

    def feed(self, key: AttemptKey, event: Event) -> None:
        self._transfers.feed(key, event)

    def __contains__(self, key: AttemptKey) -> bool:
        """Whether this attempt's transfer still needs its reservation."""
        return key in self._incoming

    def knows(self, key: AttemptKey) -> bool:
        """Had this attempt a transfer here, which is live or not forgotten? A key is used once."""
        return self._transfers.knows(key)

    @property
    def held(self) -> tuple[AttemptKey, ...]:
        """Attempts whose reservation is not given back yet, those included that no request waits for any more."""
        return tuple(self._incoming)

    def is_ready(self, peer: str, purpose: str = HANDOFF) -> bool:
        """Whether something of this purpose may be fetched from `peer` now."""
        link = self.links.get(peer)
        return link is not None and link.is_ready and purpose in link.purposes

    def plane_of(self, peer: str) -> str:
        """Name of the plane to `peer`, or "" while there is none."""
        plane = self._plane(peer)
        return plane.name if plane is not None else ""

    def gb_per_s(self, peer: str) -> float:
        """What the link to `peer` moves; 0 while there is none."""
        link = self.links.get(peer)
        return link.meter.gb_per_s if link is not None else 0.0

    def reports(self) -> tuple[LinkReport, ...]:
        return tuple(link.report() for link in self.links)

    def speeds(self) -> tuple[LinkSpeed, ...]:
        """Of the links whose plane is open."""
        return tuple(speed for link in self.links if (speed := link.speed) is not None)

    # --- links ------------------------------------------------------------------------------------------------

    def _make_link(self, target: PeerTarget) -> PeerLink:
        return PeerLink(
            self._node,
            target,
            self._planes,
            self._pools,
            self._take_message,
            self._lose,
            self._transfers.wanting_lease,
            self._sockets,
            self._faults,
            self.links.settle,
        )

    def _begin(self, running: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(running)

    def _busy_peers(self) -> set[str]:
        return {*(incoming.peer for incoming in self._incoming.values()), *self._transfers.peers()}

    def _plane(self, peer: str) -> LandingPlane | None:
        link = self.links.get(peer)
        return link.plane if link is not None else None

    def _take_message(self, message: TransferMessage | Refused) -> None:
        if (answer := self._transfers.take(message)) is not None:
            self._send(answer.header.destination, answer)

    async def _lose(self, peer: str, reason: str) -> None:
        """Tell every transfer of this peer; returns when no job reads its plane."""
        for key in self._transfers.of_peer(peer):
            self._transfers.tell_gone(key, reason)
        for key in [key for key, incoming in self._incoming.items() if incoming.peer == peer]:
            await self._join_jobs(key)

    # --- actions ----------------------------------------------------------------------------------------------

    def _perform(self, key: AttemptKey, action: Action) -> None:
        match action:
            case Send(Received() as message) if self._may_wait(key, message):
                self._say_received_later(key, message)
            case Send(Received() as message):
                self._received.pop(key, None)
                self._note_received(key, message)
                self._send(self._transfers.peer_of(key), message)
            case Send(message):
                self._send(self._transfers.peer_of(key), message)
            case Land(message):
                self._land(key, message)
            case AskExtension():
                assert self._on_room is not None, "a move to a worker that takes none"
                self._on_room(key, action)
            case StopLanding():
                self._to_stop.put_nowait(key)
            case Verified():
                self._host.decode(key, action, self._end_well(key))
            case PartVerified():
                assert self._on_part is not None, "a part that no leader joins"
                self._on_part(key, action, self._end(key))
            case AskRoom():
                cast(PrefixHost, self._incoming[key].host).make_room(key, action)
            case PrefixVerified():
                host = cast(PrefixHost, self._incoming[key].host)
                host.prefix_verified(key, action, self._end_well(key))
            case ReportFailed():
                self._incoming[key].host.transfer_failed(key, action, self._end(key))
            case FreeReservation(reason):
                self._incoming[key].host.free_reservation(key, reason, self._end(key))
            case _:
                raise AssertionError(f"a receiver asked for {action}")

    def _may_wait(self, key: AttemptKey, message: Received) -> bool:
        """News that the sender does not need yet: each RECEIVED wakes four threads in two processes, beside a copy of
        0.5 ms. Where the sender pushes the bytes its window waits for it, so half a window at most stays unsaid; what
        is no news answers a sender that repeats itself, and is said at once.
        """
        incoming = self._incoming.get(key)
        num_unsaid = message.number - incoming.received if incoming is not None else 0
        return num_unsaid > 0 and (self._reads_sources(key) or num_unsaid < BYTE_WINDOW // 2)

    def _reads_sources(self, key: AttemptKey) -> bool:
        plane = self._plane(self._transfers.peer_of(key))
        return plane is not None and plane.reads_sources

    def _say_received_later(self, key: AttemptKey, message: Received) -> None:
        if key not in self._received:
            asyncio.get_running_loop().call_later(RECEIVED_DELAY_S, self._say_received, key)
        self._received[key] = message

    def _say_received(self, key: AttemptKey) -> None:
        message = self._received.pop(key, None)
        if message is not None and key in self._incoming:  # else more was said meanwhile: a later one, ACK or CANCEL
            self._note_received(key, message)
            self._send(self._transfers.peer_of(key), message)

    def _note_received(self, key: AttemptKey, message: Received) -> None:
        if (incoming := self._incoming.get(key)) is not None:
            incoming.received = max(incoming.received, message.number)

    def _send(self, peer: str, message: TransferMessage | Refused) -> None:
        link = self.links.get(peer)
        if link is not None:
            link.send(message)

    def _end(self, key: AttemptKey) -> TransferRecord:
        incoming = self._incoming.pop(key)
        incoming.record.done_at = time.monotonic()
        return incoming.record

    def _end_well(self, key: AttemptKey) -> TransferRecord:
        """Its time says how fast the link is."""
        link = self.links.get(self._incoming[key].peer)
        landed = self._incoming[key].landed
        record = self._end(key)
        if record.purpose != MOVE:  # an answer that came here writes its last block on
            self._on_landed(key, landed)
        if link is not None:
            link.meter.note(sum(record.nbytes.values()), record.busy.seconds, record.done_at - record.landed_at)
        return record

    # --- landing ----------------------------------------------------------------------------------------------

    def _land(self, key: AttemptKey, message: Slice) -> None:
        incoming = self._incoming[key]
        incoming.record.first_slice_at = incoming.record.first_slice_at or time.monotonic()
        plane = self._plane(incoming.peer)
        if plane is None:
            self.feed(key, LandingFailed(message.number, "no data plane"))
            return
        if self._is_ending:
            self.feed(key, LandingFailed(message.number, "this worker's registration ends"))
            return
        job = self._make_job(key, incoming, message)
        incoming.record.busy.begin(time.monotonic())
        try:
            if plane.is_here(job):
                self._landing.begin(job, plane, self._end_job)
                return
        except PeerLost as exc:
            self._fail_job(key, job, exc)
            return
        assert self._tasks is not None
        task = self._tasks.create_task(self._run_job(key, job, plane))
        incoming.jobs.add(task)
        task.add_done_callback(incoming.jobs.discard)

    def _make_job(self, key: AttemptKey, incoming: _Incoming, message: Slice) -> LandingJob:
        destinations = []
        for run in message.units:
            for index in range(run.count):
                unit = (run.group, run.first + index)
                source = (run.slots[index], run.generations[index]) if run.slots else (-1, -1)
                pool = self._pool_of_group[run.group]
                destinations.append(Destination(*unit, pool, incoming.destinations[unit], *source))
        return LandingJob(incoming.peer, key.transfer_id, key.epoch, message.number, tuple(destinations))

    async def _run_job(self, key: AttemptKey, job: LandingJob, plane: LandingPlane) -> None:
        try:
            await plane.fetch(job)
            landed = await self._landing.submit(job, plane)
        except Exception as exc:
            self._fail_job(key, job, exc)
        else:
            self._take_landed(key, job, landed)

    def _end_job(self, job: LandingJob, future: Future[Landed]) -> None:
        key = AttemptKey(job.transfer_id, job.epoch)
        try:
            landed = future.result()
        except Exception as exc:
            self._fail_job(key, job, exc)
        else:
            self._take_landed(key, job, landed)

    def _fail_job(self, key: AttemptKey, job: LandingJob, exc: Exception) -> None:
        """The peer is gone, or the source changed, or sent what does not fit the slots; anything else is a bug of ours,
        which costs this attempt and no other."""
        if (incoming := self._incoming.get(key)) is not None:
            incoming.record.busy.end(time.monotonic())
        if not isinstance(exc, TransceiverError):
            log.error("slice %d of %s was not landed", job.number, job.transfer_id, exc_info=exc)
        reason = f"{reasons.LOST}: {exc}" if isinstance(exc, PeerLost) else str(exc)
        self.feed(key, LandingFailed(job.number, reason))

    def _take_landed(self, key: AttemptKey, job: LandingJob, landed: Landed) -> None:
        if (incoming := self._incoming.get(key)) is not None:
            incoming.record.busy.end(time.monotonic())
            self._count(incoming.record, job, landed)
            self._note_slots(incoming, job, landed)
        self.feed(key, SliceLanded(job.number, landed.units))

    def _note_slots(self, incoming: _Incoming, job: LandingJob, landed: Landed) -> None:
        link = self.links.get(job.source)
        if link is None or link.unit_nbytes:
            return
        digests = {(unit.group, unit.ordinal): unit.digest for unit in landed.units}
        for to in job.destinations:
            generation = int(self._pools[to.pool].generations[to.slot])
            digest = digests[to.group, to.ordinal]
            incoming.landed.append(HashedUnit(to.group, to.ordinal, to.pool, to.slot, generation, digest))

    def _count(self, record: TransferRecord, job: LandingJob, landed: Landed) -> None:
        """Bytes are counted here and nowhere else: where they land."""
        link = self.links.get(job.source)
        unit_nbytes = link.unit_nbytes if link is not None else ()
        record.num_operations += landed.num_operations
        record.num_saturated += landed.num_saturated
        record.landed_at = time.monotonic()
        for unit in job.destinations:
            record.blocks[unit.group] = record.blocks.get(unit.group, 0) + 1
            nbytes = unit_nbytes[unit.group] if unit_nbytes else self._pools[unit.pool].slots.shape[1]
            record.nbytes[unit.group] = record.nbytes.get(unit.group, 0) + nbytes

    async def _stop_landings(self) -> None:
        # One task for all, not one each: a core may ask while the group ends, when no task can be started any more.
        while True:
            key = await self._to_stop.get()
            await self._join_jobs(key)
            incoming = self._incoming.get(key)
            plane = self._plane(incoming.peer) if incoming is not None else None
            if plane is not None:
                self._discard(plane, key)
            self.feed(key, LandingStopped())

    def _discard(self, plane: LandingPlane, key: AttemptKey) -> None:
        try:
            plane.discard(key.transfer_id, key.epoch)
        except Exception:  # what it still holds goes with the plane; the others' slots are given back meanwhile
            log.exception("data plane %s cannot discard %s", plane.name, key.transfer_id)

    async def _join_jobs(self, key: AttemptKey) -> None:
        """Cancel this attempt's jobs that wait, join the one that runs. Safe to repeat."""
        incoming = self._incoming.get(key)
        jobs = tuple(incoming.jobs) if incoming is not None else ()
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        await self._landing.stop(key.transfer_id, key.epoch)


def _by_unit(slots: Sequence[Sequence[tuple[int, int]]]) -> dict[tuple[int, int], int]:
    """By (group, ordinal)."""
    return {(group, ordinal): slot for group, pairs in enumerate(slots) for ordinal, slot in pairs}
