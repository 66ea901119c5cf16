"""Prefixes that prompts of this worker wait for, from the order that names a source to the verified blocks.

    expect  -> the order names a source: its link is made and its blocks are named, while the prompt waits for its turn
    wanted  -> the prompt could begin: FETCH. From here a clock runs, and when it is over the prompt is computed
    room    -> the source has said what moves: the engine makes room, and slices land
    end     -> verified and registered, or given up: either way the prompt is computed from what it has then

Whatever goes wrong ends in `PrefixGivenUp`, once. While bytes may land, a release of the prompt waits (`submit`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from disagg.cache.identity import BlockHasher
from disagg.engine.commands import (
    AttemptKey,
    Command,
    MakePrefixRoom,
    PrefixGivenUp,
    PrefixLanded,
    PrefixRoomEvent,
    PrefixWantedEvent,
    Release,
)
from disagg.transceiver.peers.decode_side import ReceivingSide, TransferRecord
from disagg.transceiver.protocol.actions import AskRoom, PrefixVerified, ReportFailed
from disagg.transceiver.protocol.events import CancelAsked, FetchWanted
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import Dispatch, PrefixLeg, RouterMessage, TransferFailure, TransferReport
from disagg.transceiver.wire.messages.values import StageTimes, UnitName
from disagg.transceiver.wire.purposes import PREFIX
from disagg.worker.metrics import WorkerMetrics
from disagg.worker.pairing import Pairing
from disagg.worker.put_off import PutOff
from disagg.worker.request_state import RequestState
from disagg.worker.taking_in import OnFault, Slots

log = logging.getLogger(__name__)

NO_LINK: Final = "no link"
NO_ROOM: Final = "no room"
LATE: Final = "late"
NOTHING: Final = "nothing there"
NOT_WORTH_IT: Final = "computing is as fast"
NOT_COPIED: Final = "cannot be copied to the device"
"""Why a prefix was given up, beside the reasons of transfers."""


@dataclass(slots=True, eq=False)
class _Leg:
    """One prompt's prefix. `key`: of the transfer; `attempt`: of the prompt."""

    key: AttemptKey
    attempt: AttemptKey
    dispatch: Dispatch
    """The leg as an order of its own: the tokens to ask for, and their source."""
    pairing: Pairing
    names: asyncio.Future[tuple[bytes, ...]]
    timer: asyncio.TimerHandle | None = None
    wanted_at: float = 0.0
    asked_room: AskRoom | None = None
    slots: tuple[tuple[int, ...], ...] = ()
    partial_blocks: tuple[UnitName, ...] = ()
    waiting: list[Command] = field(default_factory=list)
    """What was said of the prompt since bytes may land for it."""


class PrefixSinks:
    """The prefixes of one registration's prompts; host of their receivers. Event loop only."""

    def __init__(
        self,
        pair: Callable[[Dispatch], Pairing],
        submit: Callable[[Command], None],
        send: Callable[[RouterMessage], None],
        metrics: WorkerMetrics,
        *,
        hasher: BlockHasher | None,
        rates: Callable[[], MeasuredRates],
        take_in: Callable[[PrefixLanded, Slots, OnFault], None],
    ) -> None:
        """`hasher` None: this worker is no sink of prefixes. `take_in`: hands a command on once what landed in
        its slots lies where kernels read.
        """
        self._pair, self._hasher, self._submit, self._send = pair, hasher, submit, send
        self._metrics, self._rates, self._take_in = metrics, rates, take_in
        self._put_off = PutOff()
        self._by_attempt: dict[AttemptKey, _Leg] = {}
        self._by_key: dict[AttemptKey, _Leg] = {}
        self.receiving: ReceivingSide | None = None

    def __len__(self) -> int:
        return len(self._by_key)

    # --- the prompt's side ------------------------------------------------------------------------------------

    def expect(self, state: RequestState) -> int:
        """Tokens of the prompt whose blocks will be asked for elsewhere; 0 where the order names no usable source."""
        named = state.dispatch.prefix
        if named is None or self.receiving is None or self._hasher is None or not _is_sound(state.dispatch, named):
            return 0
        dispatch = _dispatch_of(state.dispatch, named, named.boundary)
        pairing = self._pair(dispatch)
        if not pairing.is_exact or named.boundary % pairing.coarser_block_size:
            return 0
        loop = asyncio.get_running_loop()
        size, salt = pairing.peer_geometry.block_size, state.dispatch.sampling.cache_salt
        names = loop.run_in_executor(None, self._hasher.chain, dispatch.prompt, size, salt)
        key = AttemptKey(named.transfer_id, state.dispatch.epoch)
        leg = _Leg(key, state.key, dispatch, pairing, names)
        self._by_attempt[leg.attempt] = self._by_key[leg.key] = leg
        self.receiving.reach(named.source)
        return named.boundary

    def wanted(self, event: PrefixWantedEvent) -> None:
        """The prompt could begin: ask, and begin without after a while."""
        if (leg := self._by_attempt.get(event.key)) is None or self.receiving is None:
            self._submit(PrefixGivenUp(event.key))
            return
        leg.wanted_at = time.monotonic()
        peer = leg.dispatch.peer
        assert peer is not None
        nbytes = leg.pairing.missing_nbytes(event.held)
        speed = self.receiving.gb_per_s(peer.incarnation)
        limit_s = self._put_off.limit_s(nbytes, speed, event.boundary - event.own, self._rates())
        if not limit_s:
            self._end(leg, NOT_WORTH_IT)
            return
        leg.timer = asyncio.get_running_loop().call_later(limit_s, self._give_up, leg, LATE)
        leg.names.add_done_callback(lambda names: self._reach(leg, event))

    def begun_without(self, attempt: AttemptKey) -> None:
        """The prompt is computed, and did not want it."""
        if (leg := self._by_attempt.get(attempt)) is not None and not leg.wanted_at:
            self._forget(leg)

    def room(self, event: PrefixRoomEvent) -> None:
        """Where it lands, or that it cannot."""
        leg = self._by_attempt.get(event.key)
        if leg is None or leg.asked_room is None or self.receiving is None:
            return
        pairing, asked = self._pair(_shortened(leg.dispatch, event.boundary)), leg.asked_room
        destinations = pairing.destinations(event.slots) if event.slots is not None else ()
        reserved = pairing.reserved_of(destinations)
        if event.slots is None or (reserved.required, reserved.prompt_len) != (asked.required, asked.boundary):
            self._give_up(leg, NO_ROOM)
            return
        leg.slots = tuple(tuple(slot for _, slot in pairs) for pairs in event.slots)
        leg.partial_blocks = pairing.partial_blocks(destinations)
        self.receiving.set_destinations(leg.key, destinations)
        self.receiving.feed(leg.key, reserved)

    def submit(self, command: Command) -> None:
        """To the engine; the release of a prompt that bytes may land for waits until they cannot."""
        leg = self._by_attempt.get(command.key.attempt)
        if leg is None or not isinstance(command, Release):
            self._submit(command)
            return
        leg.waiting.append(command)
        if leg.wanted_at:
            self._give_up(leg, reasons.CANCELLED)
        else:
            self._forget(leg)

    def close(self) -> None:
        """The registration is over: its clocks stop, and its landing jobs are joined by its owner."""
        for leg in self._by_key.values():
            if leg.timer is not None:
                leg.timer.cancel()
        self._by_attempt.clear()
        self._by_key.clear()

    # --- the transfer's side ----------------------------------------------------------------------------------

    def make_room(self, key: AttemptKey, asked: AskRoom) -> None:
        leg = self._by_key[key]
        leg.asked_room = asked
        self._submit(MakePrefixRoom(leg.attempt, asked.boundary))

    def prefix_verified(self, key: AttemptKey, verified: PrefixVerified, record: TransferRecord) -> None:
        leg = self._by_key[key]
        self._metrics.count_transfer(record, "verified")
        if not verified.boundary:
            self._end(leg, NOTHING)
            return
        self._put_off.note(record.done_at - leg.wanted_at, sum(record.nbytes.values()), self._speed(leg))
        self._report(leg, record)
        self._take_in(PrefixLanded(leg.attempt, leg.partial_blocks), leg.slots, self._cannot_copy)
        self._forget(leg)

    def transfer_failed(self, key: AttemptKey, failure: ReportFailed, record: TransferRecord) -> None:
        self._metrics.count_transfer(record, "failed")
        if failure.reason in reasons.WRONG:
            self._metrics.count_refused(record.purpose, failure.reason)
        self._end(self._by_key[key], failure.reason)

    def free_reservation(self, key: AttemptKey, reason: str, record: TransferRecord) -> None:
        self._metrics.count_transfer(record, reason)
        self._end(self._by_key[key], reason)

    # --- how it is done ---------------------------------------------------------------------------------------

    def _reach(self, leg: _Leg, event: PrefixWantedEvent) -> None:
        peer = leg.dispatch.peer
        if self.receiving is not None and peer is not None and not leg.names.cancelled():
            self.receiving.reach(peer, partial(self._ask, leg, event))

    def _ask(self, leg: _Leg, event: PrefixWantedEvent) -> None:
        peer = leg.dispatch.peer
        if self._by_attempt.get(leg.attempt) is not leg or self.receiving is None or peer is None:
            return  # given up meanwhile
        if not self.receiving.is_ready(peer.incarnation, PREFIX):
            self._give_up(leg, NO_LINK)
            return
        plane = self.receiving.plane_of(peer.incarnation)
        transfer = leg.pairing.prefix_receiver(plane, event.own, event.held, leg.names.result())
        self.receiving.start(leg.key, transfer, peer.incarnation, (), FetchWanted(), self)

    def _give_up(self, leg: _Leg, reason: str) -> None:
        """A transfer that is under way ends first, and `_end` follows."""
        if self.receiving is not None and leg.key in self.receiving:
            self.receiving.feed(leg.key, CancelAsked(reason))
        elif self._by_attempt.get(leg.attempt) is leg:
            self._end(leg, reason)

    def _end(self, leg: _Leg, reason: str) -> None:
        """Nothing lands any more: compute."""
        log.info("a prefix of %d tokens was given up: %s", len(leg.dispatch.prompt), reason)
        if reason not in (reasons.CANCELLED, NO_ROOM, NOT_WORTH_IT):
            self._send(TransferFailure(leg.key.transfer_id, leg.key.epoch, reason))
        self._submit(PrefixGivenUp(leg.attempt))
        self._forget(leg)

    def _forget(self, leg: _Leg) -> None:
        del self._by_attempt[leg.attempt], self._by_key[leg.key]
        if leg.timer is not None:
            leg.timer.cancel()
        for command in leg.waiting:
            self._submit(command)

    def _cannot_copy(self, key: AttemptKey, fault: BaseException) -> None:
        log.error("a prefix %s: %r", NOT_COPIED, fault)
        self._submit(PrefixGivenUp(key))

    def _speed(self, leg: _Leg) -> float:
        peer = leg.dispatch.peer
        return self.receiving.gb_per_s(peer.incarnation) if self.receiving is not None and peer is not None else 0.0

    def _report(self, leg: _Leg, record: TransferRecord) -> None:
        """For `/requests/{id}`."""
        times = StageTimes((("prefix", record.done_at - leg.wanted_at),))
        groups = leg.pairing.group_bytes(record)
        key, name = leg.attempt, leg.pairing.worker_id
        report = TransferReport(key.transfer_id, key.epoch, name, record.plane, groups, times, record.num_operations)
        self._send(replace(report, purpose=PREFIX))


def _is_sound(dispatch: Dispatch, named: PrefixLeg) -> bool:
    """Logits are wanted of the prompt's last token at least; a prompt that is scored, of all."""
    is_scored = dispatch.sampling.num_prompt_logprobs is not None
    return named.boundary < len(dispatch.prompt) and not is_scored and not dispatch.output


def _dispatch_of(dispatch: Dispatch, named: PrefixLeg, boundary: int) -> Dispatch:
    """The leg as an order of its own, which is what a pairing is made of."""
    return replace(
        dispatch,
        transfer_id=named.transfer_id,
        peer=named.source,
        ticket=named.ticket,
        prompt=dispatch.prompt[:boundary],
        prefix=None,
    )


def _shortened(dispatch: Dispatch, boundary: int) -> Dispatch:
    return replace(dispatch, prompt=dispatch.prompt[:boundary])
