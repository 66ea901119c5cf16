"""Two transfer cores, an engine and a pool that exist only as dictionaries, and a clock that a test turns.

`TransferPair` performs every action at once and honestly unless told otherwise, and keeps what happened for the test to
look at: releases, verdicts, licences, payloads, landings.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

from support.links.lossy_link import LossyLink

from disagg.transceiver.layout.ranks import Part
from disagg.transceiver.layout.required import needed_units, required_units
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.protocol.actions import (
    Action,
    AskPin,
    Forget,
    FreeReservation,
    Land,
    ReleaseSource,
    ReportFailed,
    Send,
    SendPayload,
    StopLanding,
    UnregisterUnits,
    Verified,
)
from disagg.transceiver.protocol.events import (
    Event,
    LandedUnit,
    LandingStopped,
    LeaseRenewed,
    MessageArrived,
    Pinned,
    PromptComputed,
    Reserved,
    SliceLanded,
    Tick,
    UnitsFinal,
)
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.transfer import Ends, Transfer
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.peer import Slice
from disagg.transceiver.wire.messages.values import (
    FirstToken,
    Geometry,
    GroupRuns,
    GroupSemantics,
    SamplingState,
    TokenLogprobs,
)
from disagg.transceiver.wire.timing import HEARTBEAT_S

KEYS = ClusterKeys.published()
GEOMETRY = Geometry(
    block_size=4,
    kv_dtype="float32",
    groups=(GroupSemantics(None, 0, 2, 8, (0, 3)), GroupSemantics(8, 0, 2, 8, (1, 2))),
    slot_nbytes=(4096,),
)
UNIT_NBYTES = (4 << 20, 4 << 20)  # two units per slice
PROMPT = tuple(range(26))
FIRST = FirstToken(7, TokenLogprobs(-0.5, ((7, -0.5), (9, 0.0))), SamplingState(11, ((7, 1),)))
PLANES = {"shm": False, "inproc": False, "zmq": True}
DEADLINE_S = 60.0
TRANSFER_ID = "0123456789abcdef0123456789abcdef"
PREFILL, DECODE = "p" * 32, "d" * 32
COMPUTE_ID = 5


def digest_of(group: int, ordinal: int, epoch: int = 0) -> int:
    """What the bytes of a unit hash to in this pretend model."""
    return int.from_bytes(blake2b(f"{group} {ordinal} {epoch}".encode(), digest_size=8).digest())


def final_unit(group: int, ordinal: int, epoch: int = 0) -> HashedUnit:
    return HashedUnit(group, ordinal, pool=0, slot=10 + ordinal, generation=3, digest=digest_of(group, ordinal, epoch))


def needed_of(geometry: Geometry = GEOMETRY, prompt: tuple[int, ...] = PROMPT) -> tuple[HashedUnit, ...]:
    need = needed_units(geometry.groups, len(prompt), geometry.block_size)
    return tuple(final_unit(entry.group, ordinal) for entry in need for ordinal in entry.ordinals)


def make_ticket(
    epoch: int = 0, *, prompt: tuple[int, ...] = PROMPT, ttl_s: float = DEADLINE_S, output: tuple[int, ...] = ()
) -> bytes:
    return ticket.mint(
        KEYS.ticket,
        transfer_id=TRANSFER_ID,
        epoch=epoch,
        prefill=PREFILL,
        decode=DECODE,
        prompt=prompt,
        ttl_s=ttl_s,
        output=output,
    )


def make_sender(
    now: float = 0.0,
    *,
    epoch: int = 0,
    unit_nbytes: tuple[int, ...] = UNIT_NBYTES,
    prompt: tuple[int, ...] = PROMPT,
    output: tuple[int, ...] = (),
) -> Transfer:
    return Sender(
        Ends(TRANSFER_ID, epoch, PREFILL, DECODE),
        Offer(
            prompt=prompt,
            output=output,
            geometry=GEOMETRY,
            unit_nbytes=unit_nbytes,
            planes=PLANES,
            keys=KEYS,
            ttl_s=DEADLINE_S,
            part=Part.whole(GEOMETRY.groups),
        ),
        now,
    )


def make_receiver(now: float = 0.0, *, epoch: int = 0, plane: str = "shm") -> Transfer:
    return Receiver(
        Ends(TRANSFER_ID, epoch, DECODE, PREFILL),
        Order(
            ticket=make_ticket(epoch),
            plane=plane,
            geometry=GEOMETRY,
            keys=KEYS,
            deadline_s=DEADLINE_S,
            part=Part.whole(GEOMETRY.groups),
        ),
        now,
    )


def make_reserved(held: tuple[set[int], ...] = ()) -> Reserved:
    return Reserved(required_units(GEOMETRY.groups, len(PROMPT), GEOMETRY.block_size, held), len(PROMPT))


class TransferPair:
    """Both ends of one epoch over one link; `corrupt` names units whose landed bytes are wrong."""

    newest = FIRST

    def __init__(self, *, plane: str = "shm", epoch: int = 0, link: LossyLink | None = None) -> None:
        self.now = 0.0
        self.next_heartbeat = 0.0
        self.link = link or LossyLink()
        self.sender, self.receiver = self.make_ends(plane, epoch)
        self.flying: list[tuple[float, int, Transfer, bytes]] = []
        self.count = 0
        self.is_pin_wanted = False
        self.jobs: dict[int, Slice] = {}
        self.corrupt: set[tuple[int, int]] = set()
        self.actions: dict[str, list[Action]] = {"sender": [], "receiver": []}
        self.remote_errors: list[str] = []
        self.payloads: list[SendPayload] = []
        self.has_heartbeat = True
        self.required: tuple[GroupRuns, ...] = ()

    def make_ends(self, plane: str, epoch: int) -> tuple[Transfer, Transfer]:
        return make_sender(epoch=epoch), make_receiver(epoch=epoch, plane=plane)

    # --- driving --------------------------------------------------------------------------------------------

    def feed(self, end: Transfer, event: Event) -> list[Action]:
        actions = end.handle(event, self.now)
        name = "sender" if end is self.sender else "receiver"
        self.actions[name] += actions
        for action in actions:
            self._perform(end, action)
        return actions

    def _perform(self, end: Transfer, action: Action) -> None:
        match action:
            case Send(message):
                self.post(self.receiver if end is self.sender else self.sender, encode(message))
            case SendPayload():
                self.payloads.append(action)
            case AskPin():
                self.is_pin_wanted = True
            case Land(message):
                assert message.number not in self.jobs, "each slice is landed once"
                self.jobs[message.number] = message
            case StopLanding():
                self.jobs.clear()
                self.feed(self.receiver, LandingStopped())
            case _:
                pass

    def post(self, target: Transfer, data: bytes) -> None:
        for at, copy in self.link.carry(data, self.now):
            self.count += 1
            self.flying.append((at, self.count, target, copy))

    def deliver_one(self) -> bool:
        """The earliest message that is due; False when none is."""
        due = [item for item in self.flying if item[0] <= self.now]
        if not due:
            return False
        item = min(due, key=lambda entry: entry[:2])
        self.flying.remove(item)
        self.arrive(item[2], item[3])
        return True

    def arrive(self, target: Transfer, data: bytes) -> None:
        try:
            self.feed(target, MessageArrived(decode(data)))
        except RemoteProtocolError as exc:
            self.remote_errors.append(str(exc))

    def land_one(self) -> None:
        """Finish the oldest landing job, with the digests of what the sender's bytes were, or of corrupt ones."""
        number, message = next(iter(self.jobs.items()))
        del self.jobs[number]
        units = tuple(
            LandedUnit(run.group, ordinal, self.landed_digest(run.group, ordinal))
            for run in message.units
            for ordinal in range(run.first, run.first + run.count)
        )
        self.feed(self.receiver, SliceLanded(number, units))

    def landed_digest(self, group: int, ordinal: int) -> int:
        return digest_of(group, ordinal) ^ ((group, ordinal) in self.corrupt)

    def settle(self) -> None:
        """Deliver and land until nothing is due at this instant."""
        while self.deliver_one() or self.jobs:
            if self.jobs:
                self.land_one()

    def advance(self, until: float) -> int:
        """Let time pass to `until`: ticks for whoever asked, heartbeats as the shell sends them. Returns the ticks."""
        num_ticks = 0
        self.settle()
        while (moment := self.next_moment()) <= until:
            self.now = max(self.now, moment)
            self.settle()
            self.heartbeat()
            num_ticks += sum(self.tick(end) for end in (self.sender, self.receiver))
            self.settle()
        self.now = max(self.now, until)
        return num_ticks

    def next_moment(self) -> float:
        wakeups = [at for end in (self.sender, self.receiver) if (at := end.next_wakeup()) is not None]
        return min([self.next_heartbeat, *(item[0] for item in self.flying), *wakeups])

    def heartbeat(self) -> None:
        if self.now >= self.next_heartbeat:
            self.next_heartbeat = self.now + HEARTBEAT_S
            if self.receiver.wants_lease and self.has_heartbeat:
                self.feed(self.sender, LeaseRenewed())

    def tick(self, end: Transfer) -> int:
        wakeup = end.next_wakeup()
        if wakeup is None or wakeup > self.now:
            return 0
        self.feed(end, Tick())
        after = end.next_wakeup()
        assert after is None or after > self.now, "a wakeup loop"
        return 1

    # --- the usual story ------------------------------------------------------------------------------------

    def reserve(self, held: tuple[set[int], ...] = ()) -> None:
        event = make_reserved(held)
        self.required = event.required
        self.feed(self.receiver, event)

    def compute(self, units: tuple[HashedUnit, ...] | None = None, compute_id: int = COMPUTE_ID) -> None:
        self.feed(self.sender, UnitsFinal(compute_id, needed_of() if units is None else units))

    def pin(self, compute_id: int = COMPUTE_ID) -> None:
        assert self.is_pin_wanted
        self.feed(self.sender, Pinned(compute_id))

    def finish_prompt(self, compute_id: int = COMPUTE_ID) -> None:
        self.feed(self.sender, PromptComputed(compute_id, FIRST))

    def run_whole(self, held: tuple[set[int], ...] = ()) -> None:
        self.reserve(held)
        self.settle()
        self.pin()
        self.compute()
        self.settle()
        self.finish_prompt()
        self.settle()

    # --- looking --------------------------------------------------------------------------------------------

    def of(self, name: str, kind: type) -> list[Any]:
        return [action for action in self.actions[name] if isinstance(action, kind)]

    @property
    def releases(self) -> list[str]:
        return [a.reason for a in self.of("sender", ReleaseSource)]

    @property
    def verdicts(self) -> list[Action]:
        return [a for a in self.actions["receiver"] if isinstance(a, Verified | ReportFailed | FreeReservation)]

    @property
    def unregistered(self) -> list[tuple[int, int]]:
        found = self.of("sender", UnregisterUnits)
        return [(u.group, u.ordinal) for action in found for u in action.units]

    def check_invariants(self) -> None:
        """True after any schedule: at most one release, one verdict, one Forget each, and none missing once over."""
        assert len(self.releases) <= 1
        assert len(self.verdicts) <= 1
        assert not self.sender.is_over or len(self.releases) == 1
        assert not self.receiver.is_over or len(self.verdicts) == 1
        for name, end in (("sender", self.sender), ("receiver", self.receiver)):
            assert len(self.of(name, Forget)) == int(end.is_over)
            assert not end.is_over or end.next_wakeup() is None
        if self.verdicts and isinstance(self.verdicts[0], Verified):
            assert not self.corrupt & self.required_keys
            assert self.verdicts[0].first_token == self.newest

    @property
    def required_keys(self) -> set[tuple[int, int]]:
        return {(entry.group, ordinal) for entry in self.required for ordinal in entry.ordinals}
