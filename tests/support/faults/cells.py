"""Brings a trio's transfer to a standstill in any state of the table, and lets a fault happen there."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import support.faults.table as table
from support import event_loop
from support.faults.table import Fault, Row
from support.faults.wrong import Wrong
from support.links.shell_pair import REPLY_S, Reply, ShellTrio, let_go

from disagg.engine.commands import (
    AttemptKey,
    FinishedEvent,
    PinnedEvent,
    PromptComputedEvent,
    ReservedEvent,
    TokensEvent,
    UnitsFinalEvent,
)
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.regions import LandingJob
from disagg.transceiver.protocol.events import ComputeFailed
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages import peer as p

DEADLINE_S = 0.7
PATIENCE_S = 10.0  # a state that a transfer has left does not come back: the story is sooner told anew
"""Far longer than it takes to bring a transfer to any state; how long a cell of the column `deadline` takes."""


LEFT_EARLY = (table.GENERATION, table.SOURCE_FLIP, table.DATA_CUT)
"""Faults that come too late for bytes that have left. On tcp the kernel carries them when it likes: nobody can see."""

NOTICED_AS: dict[Fault, tuple[str, ...]] = {
    # Before it is hashed, a block that was given away is never announced; after, whoever copies it sees the generation.
    table.GENERATION: (reasons.INCOMPLETE, "given to another sequence"),
    table.SOURCE_FLIP: (reasons.DIGEST,),
    table.LANDED_FLIP: (reasons.DIGEST,),
}
"""What the first attempt fails of, in these words, when a block is not what its digest was made of."""


def after_the_first(kind: type, *others: type) -> Callable[[Any], bool]:
    """Holds every event of `kind` but the first, and all of `others`."""
    seen: list[Any] = []

    def holds(event: Any) -> bool:
        if isinstance(event, kind):
            seen.append(event)
            return len(seen) > 1
        return isinstance(event, others)

    return holds


def down(*kinds: type) -> Callable[[str, Any], bool]:
    return lambda direction, message: direction == "down" and (not kinds or isinstance(message, kinds))


def up(*kinds: type) -> Callable[[str, Any], bool]:
    return lambda direction, message: direction == "up" and isinstance(message, kinds)


async def until(is_true: Callable[[], object], what: str = "", patience_s: float = PATIENCE_S) -> None:
    await event_loop.until(is_true, what, patience_s)


@dataclass
class Cell:
    """One (state, fault) on a running trio. `run` returns what the client got; every assertion is in here."""

    trio: ShellTrio
    row: Row
    fault: Fault
    key: AttemptKey = field(init=False)
    client: asyncio.Task[Reply] = field(init=False)
    fault_at: float = field(init=False)
    _failures: list[str] = field(init=False)
    _num_failures: int = field(init=False)
    _num_cancels: int = field(init=False)

    async def run(self) -> tuple[str, float]:
        """(outcome, seconds from the fault to the client's reply)."""
        trio = self.trio
        trio.links.control.history.clear()
        self._failures, self._num_failures = trio.decode.failures, len(trio.decode.failures)
        self._num_cancels = len(trio.prefill.cancels)
        timeout_s = DEADLINE_S if self.fault is table.DEADLINE else 60.0
        begun_at = time.monotonic()
        self.client = trio.begin(timeout_s=timeout_s)
        await self.halt()
        self.fault_at = time.monotonic()
        has_fired = await self.inject()
        if self.fault is table.DEADLINE:
            await until(self.client.done, "the deadline ends the request")
            self.fault_at = begun_at + timeout_s
        self.resume()
        reply = await self.reply()
        outcome = outcome_of(reply)
        seconds = max(0.0, reply.at - self.fault_at)
        await until(has_fired, f"{self.fault.name} has fired", REPLY_S)
        await self.recover()
        self._check_noticed(outcome)
        assert outcome in self._allowed(), (outcome, reply)
        assert seconds < REPLY_S, reply
        return outcome, seconds

    def _check_noticed(self, outcome: str) -> None:
        """A changed block ends the attempt for that very reason, unless nobody reads it any more.

        In the rows left out the transfer has failed already or has nothing more to lose. Where `a1` is allowed too, the
        block had left: then no attempt failed, and the answer and the landed bytes were compared with what was sent.
        """
        if self.fault not in NOTICED_AS or self.row in table.FAILING | table.VERIFIED:
            return
        failures = self._failures[self._num_failures :]
        if outcome == "a1":
            if "a1" not in self._allowed():
                raise Wrong(f"decoded from a changed block: {self.fault.name}, {failures}")
            assert not failures, failures
        else:
            (reason,) = failures
            # A sender that finds its source changed after DONE ends the transfer: the receiver then hears of none.
            said = [reason, *self.trio.prefill.cancels[self._num_cancels :]]
            assert any(words in text for words in NOTICED_AS[self.fault] for text in said), said

    def _allowed(self) -> frozenset[str]:
        plane = self.trio.plane
        allowed = table.allowed(self.row, self.fault, sends_bytes=plane in ("zmq", "tcp", "ucx"))
        if plane in ("tcp", "ucx") and self.row in table.ALL_SENT and self.fault in LEFT_EARLY:
            allowed |= {"a1", "a2"}
        return allowed

    # --- standing still ---------------------------------------------------------------------------------------

    async def halt(self) -> None:
        """Until the transfer stands in the row's state, where it stays."""
        trio, (role, state) = self.trio, self.row
        kinds = (TokensEvent, FinishedEvent)  # no request ends before its fault
        if self.row == (Role.RECEIVER, State.WAITING):
            kinds += (ReservedEvent,)
        trio.decode.events.hold(lambda event: isinstance(event, kinds))
        num_landed = trio.decode.landing.num_landed
        self._set_gates()
        await until(lambda: trio.router._streams, "the router took the request")
        self.key = trio.newest_key()
        await self._steer(num_landed)
        await until(self._stands, f"the {role.value} stands in {state.value}: {self._where()}")
        if trio.plane == "zmq" and self.row in table.ALL_SENT:
            await until(self._are_bytes_here, "the bytes of every announced slice have arrived")

    def _set_gates(self) -> None:
        trio, control = self.trio, self.trio.links.control
        match self.row:
            case Role.SENDER, State.WAITING:
                control.hold = up(p.Fetch)
            case Role.SENDER, State.PINNING:
                trio.prefill.events.hold(lambda event: isinstance(event, PinnedEvent))
            case Role.SENDER, State.SENDING:
                trio.prefill.events.hold(after_the_first(UnitsFinalEvent, PromptComputedEvent))
                control.hold = down(p.Slice)
            case Role.SENDER, State.DECIDED:
                control.hold = down(p.Slice, p.Done)
            case Role.SENDER, State.CLOSED:
                control.hold = down(p.Closed)
            case Role.RECEIVER, State.FETCHING:
                control.hold = down()
            case Role.RECEIVER, State.VERIFIED:
                control.hold = up(p.Ack)
            case Role.SENDER, State.STOPPED:
                trio.prefill.events.hold(after_the_first(UnitsFinalEvent, PromptComputedEvent))
            case Role.RECEIVER, State.CANCELLING:
                trio.prefill.events.hold(after_the_first(UnitsFinalEvent, PromptComputedEvent))
            case Role.RECEIVER, State.LANDING | State.STOPPING | State.JOINING:
                trio.prefill.events.hold(after_the_first(UnitsFinalEvent, PromptComputedEvent))
                trio.decode.landing.shut()

    async def _steer(self, num_landed: int) -> None:
        """What must happen on the way."""
        trio, control, landing = self.trio, self.trio.links.control, self.trio.decode.landing
        if self.row == (Role.RECEIVER, State.LANDING):
            await until(lambda: landing.num_inside, "slice 0 is being landed")
            control.hold = down(p.Slice, p.Done)
            trio.prefill.events.open()
            await until(lambda: control.is_holding(p.Done), "DONE is on its way")
        if self.row not in table.FAILING:
            return
        if self.row[1] in (State.STOPPING, State.JOINING):
            await until(lambda: landing.num_inside, "slice 0 is being landed")
        else:
            await until(lambda: landing.num_landed > num_landed, "slice 0 has landed")
        if self.row[1] is not State.JOINING:
            control.hold = up(p.Cancel)
        trio.prefill.sending.feed(self.key, ComputeFailed("a failure by the test"))
        if self.row[1] is not State.JOINING:
            await until(lambda: control.is_holding(p.Cancel), "CANCEL is on its way")

    def _stands(self) -> bool:
        trio, (role, state) = self.trio, self.row
        worker = trio.prefill if role is Role.SENDER else trio.decode
        if self.row == (Role.RECEIVER, State.WAITING):
            # The shell makes the core and feeds it `Reserved` in one call: until then the attempt itself waits.
            return trio.decode.events.is_holding(ReservedEvent) and self._is_computed()
        if state is State.CLOSED:
            return worker.is_buried(self.key) and trio.decode.events.is_holding(TokensEvent)
        core = worker.core(self.key)
        if core is None or core.state is not state:
            return False
        if self.row in ((Role.SENDER, State.WAITING), (Role.SENDER, State.PINNING)):
            return self._is_computed()
        if self.row == (Role.SENDER, State.SENDING) and not trio.prefill.events.is_holding(PromptComputedEvent):
            # The engine still reads these blocks: bent now, they would bend its first token, which no digest can tell.
            return False
        control = trio.links.control
        waits_for = {
            (Role.SENDER, State.SENDING): p.Slice,
            (Role.SENDER, State.DECIDED): p.Done,
            (Role.RECEIVER, State.FETCHING): p.Done,
            (Role.RECEIVER, State.VERIFIED): p.Ack,
        }.get(self.row)
        return waits_for is None or control.is_holding(waits_for)

    def _are_bytes_here(self) -> bool:
        plane = self.trio.decode.plane
        num_announced = self.trio.prefill.core(self.key)._outbox.num_slices
        return bool(plane._num_held == num_announced - self.trio.decode.landing.num_inside)

    def _is_computed(self) -> bool:
        core = self.trio.prefill.core(self.key)
        return core is not None and any(c.first_token for c in core._computations.values())

    def _where(self) -> str:
        cores = {worker.role: worker.core(self.key) for worker in (self.trio.prefill, self.trio.decode)}
        return str({role: core.state if core else None for role, core in cores.items()})

    def resume(self) -> None:
        """Open every gate; a link that was made silent stays so."""
        trio = self.trio
        trio.prefill.events.open()
        trio.decode.events.open()
        trio.decode.landing.open()
        trio.links.control.release()

    # --- faults -----------------------------------------------------------------------------------------------

    async def inject(self) -> Callable[[], bool]:
        """Let the fault happen; what is returned says whether it really did."""
        trio, control = self.trio, self.trio.links.control
        peer = trio.worker("decode" if self.row[0] is Role.SENDER else "prefill")
        if self.fault in table.MESSAGE_FAULTS:
            return self._disturb_messages()
        match self.fault:
            case table.KILLED:
                await peer.kill()
                return lambda: not peer.is_running
            case table.REPLACED:
                dead = peer.registration.node.incarnation
                await peer.kill()
                trio.start_worker(peer.role)
                return lambda: self._is_replaced(peer.role, dead)
            case table.CONTROL_CUT:
                num_cut = control.num_cut
                control.cut()
                return lambda: control.num_cut > num_cut
            case table.CONTROL_SILENT:
                control.stall()
                return lambda: control.num_stalled > 0
            case table.DATA_CUT:
                return self._cut_data()
            case table.GENERATION:
                unit = self._final_unit(-1)
                pool = self._pool(unit.group)
                pool.generations[unit.slot] += 2
                is_given_away = int(pool.generations[unit.slot]) != unit.generation
                return lambda: is_given_away  # whether anybody noticed, `_check_noticed` asks
            case table.SOURCE_FLIP:
                unit = self._hashed_unit()
                self._pool(unit.group).memory[unit.slot, 0] ^= 1
                is_bent = self._is_bent(unit)
                return lambda: is_bent  # whether anybody noticed, `_check_noticed` asks
            case table.LANDED_FLIP:
                landing = trio.decode.landing
                num_flipped = landing.num_flipped
                landing.flip_at = first_byte
                return lambda: landing.num_flipped > num_flipped
            case table.CANCEL:
                self.client.cancel()
                return self.client.done
            case table.DEADLINE:
                return self.client.done
            case _:
                assert self.fault is table.ROUTER_LOST
                router = trio.router
                await trio.kill_router()
                return lambda: router._gate._is_closing

    def _disturb_messages(self) -> Callable[[], bool]:
        control = self.trio.links.control
        control.arm(self.fault.name)
        if self.row == (Role.RECEIVER, State.CLOSED):
            self._inject_late(p.Done)  # answered from the tombstone: that answer meets the fault
        elif self.row in table.LATE_COPY:
            late = control.last("down", p.Slice)
            assert late is not None
            control.inject_faulty(late)
        return lambda: control.num_fired == 1

    def _inject_late(self, kind: type) -> None:
        control = self.trio.links.control
        late = control.last("down", kind)
        assert late is not None
        control.inject(late)

    def _cut_data(self) -> Callable[[], bool]:
        """End the plane's connection as its death would."""
        trio = self.trio
        plane = trio.decode.plane
        match trio.plane:
            case "zmq" | "tcp" | "ucx":
                trio.links.data.cut()
            case "shm":
                plane._socket.shutdown(socket.SHUT_RDWR)
            case _:
                plane._source.leave(plane._me, plane)
                plane.end()
        return lambda: bool(plane._is_lost)

    def _is_replaced(self, role: str, dead: str) -> bool:
        live = {worker.incarnation for worker in self.trio.router.cluster.registry if worker.role == role}
        return bool(live) and dead not in live

    def _pool(self, group: int) -> Any:
        cache = self.trio.prefill.engine.cache
        return cache.pools[cache.layout.pool_of_group[group]]

    def _is_bent(self, unit: Any) -> bool:
        """Does the slot of a unit hold other bytes than when the unit became final?"""
        engine = self.trio.prefill.engine
        final = SourceUnit(unit.group, unit.ordinal, unit.pool, unit.slot, unit.generation)
        return bool(engine.bytes_of(final) != engine.bytes_when_final[final])

    def _final_unit(self, index: int) -> SourceUnit:
        """A unit of the attempt in the order in which they became final."""
        events = self.trio.prefill.engine.of(self.key, UnitsFinalEvent)
        units: list[SourceUnit] = [unit for event in events for unit in event.units]
        return units[index]

    def _hashed_unit(self) -> Any:
        """The last unit that the sender knows the digest of; after its end any final one."""
        core = self.trio.prefill.core(self.key)
        if core is None:
            return self._final_unit(-1)
        soft = [unit for computation in core._computations.values() for unit in computation.units]
        hashed = [*soft, *core._outbox.announced]
        return hashed[-1]

    # --- afterwards -------------------------------------------------------------------------------------------

    async def reply(self) -> Reply:
        try:
            async with asyncio.timeout(REPLY_S):
                return await self.client
        except asyncio.CancelledError:
            return Reply("cancelled", at=time.monotonic())

    async def recover(self) -> None:
        """Nothing is held by the survivors; with what died replaced, the next request is answered."""
        trio = self.trio
        trio.links.control.flow()
        if self.fault is table.KILLED:
            await self._settle_survivor()
            trio.start_worker("decode" if self.row[0] is Role.SENDER else "prefill")
        elif self.fault is table.ROUTER_LOST:
            await trio.start_router()
        await trio.ready()
        await trio.settle()
        trio.check()
        self._check_ends()
        reply = await trio.ask()
        assert outcome_of(reply) == "a1", reply
        await trio.settle()
        trio.check()

    async def _settle_survivor(self) -> None:
        survivor = self.trio.worker("prefill" if self.row[0] is Role.SENDER else "decode")
        await let_go(survivor.leftovers)

    def _check_ends(self) -> None:
        """Exactly one release and one verdict, where that side lived to give it."""
        if self.fault is table.ROUTER_LOST:
            return  # the registration ended: everything was released with it
        is_replaced = self.fault in (table.KILLED, table.REPLACED)
        peer = "decode" if self.row[0] is Role.SENDER else "prefill"
        if not (is_replaced and peer == "prefill"):
            assert self.trio.prefill.releases[self.key] == 1, self.trio.prefill.releases
        had_core = self.row != (Role.RECEIVER, State.WAITING) or self.fault not in (table.CANCEL, table.DEADLINE)
        if had_core and not (is_replaced and peer == "decode"):
            assert self.trio.decode.verdicts[self.key] == 1, self.trio.decode.verdicts


def first_byte(job: LandingJob, pools: Any) -> tuple[int, int, int]:
    unit = job.destinations[0]
    return unit.pool, unit.slot, 0


def outcome_of(reply: Reply) -> str:
    match reply.kind:
        case "answer":
            return f"a{reply.num_attempts}"
        case "error":
            return str(reply.status)
        case _:
            return "gone"
