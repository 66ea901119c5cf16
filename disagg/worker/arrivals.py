"""Answers that this worker takes over from another: room, what they have become, their KV and newest token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

from disagg.engine.commands import AttemptKey, Command, Extend, MoveRefusedEvent, Reserve
from disagg.transceiver.peers.decode_side import ReceivingSide
from disagg.transceiver.protocol.actions import AskExtension
from disagg.transceiver.protocol.events import CancelAsked, Event, Extended, RoomMade, RoomRefused
from disagg.transceiver.wire.messages.router import Dispatch
from disagg.transceiver.wire.messages.tokens import ChoiceOutput, Tokens
from disagg.transceiver.wire.messages.values import FirstToken
from disagg.worker.pairing import Pairing, Slots
from disagg.worker.request_state import RequestState

ROOM_WAIT_S: Final = 1.0
"""How long an answer that goes on elsewhere waits for room here: the router finds another worker sooner than an answer
of this one ends."""


class Arrivals:
    """By leg, the transfer's own (id, epoch). Of one registration, on its event loop."""

    def __init__(
        self,
        submit: Callable[[Command], None],
        pair: Callable[[Dispatch], Pairing],
        side: Callable[[], ReceivingSide | None],
    ) -> None:
        self._submit, self._pair, self._side = submit, pair, side
        self._by_leg: dict[AttemptKey, RequestState] = {}

    def pairing_of(self, dispatch: Dispatch) -> Pairing:
        """As far as the router has the answer; its newest token has no KV."""
        return self._pair(_of_leg(dispatch, dispatch.first_output[:-1]))

    def release(self, leg: AttemptKey) -> AttemptKey:
        """A transfer has ended; the attempt that it was for, which for any other than a move has the same key."""
        state = self._by_leg.pop(leg, None)
        return leg if state is None else state.key

    def begin(self, state: RequestState) -> None:
        """Ask the engine for room for what the router has of the answer."""
        dispatch, side = state.dispatch, self._side()
        if side is not None and dispatch.peer is not None:
            side.reach(dispatch.peer)
        self._by_leg[_leg_of(state)] = state
        self._submit(
            Reserve(
                state.key,
                dispatch.prompt,
                dispatch.sampling,
                priority=dispatch.priority,
                output=dispatch.first_output[:-1],
                arrived_at=state.began_at,
                is_moved=True,
            )
        )

    def reserved(self, state: RequestState, slots: Slots) -> None:
        """There is room: for what the router has, then for what the answer has become."""
        if state.came is None:
            self._fetch(state, slots)
        else:
            self._land(state, slots)

    def _fetch(self, state: RequestState, slots: Slots) -> None:
        side, peer = self._side(), state.dispatch.peer
        assert side is not None
        assert peer is not None
        state.reserved_at = time.monotonic()
        side.reach(peer, partial(self._ask, state, slots))

    def _ask(self, state: RequestState, slots: Slots) -> None:
        """The link to the source is ready, or there is none: the transfer's core says what follows."""
        dispatch, side = state.dispatch, self._side()
        if side is None or dispatch.peer is None or self._by_leg.get(_leg_of(state)) is not state:
            return  # cancelled while the link was made
        transfer = state.pairing.move_sink(side.plane_of(dispatch.peer.incarnation), dispatch)
        held = state.pairing.held(slots)
        side.start(_leg_of(state), transfer, dispatch.peer.incarnation, (), RoomMade(held))

    def _land(self, state: RequestState, slots: Slots) -> None:
        side, pairing = self._side(), state.pairing
        assert side is not None
        destinations = pairing.destinations(slots)
        state.reserved = tuple(tuple(slot for _, slot in pairs) for pairs in slots)
        state.partial_blocks = pairing.partial_blocks(destinations)
        side.set_destinations(_leg_of(state), destinations)
        side.feed(_leg_of(state), Extended(pairing.reserved(destinations).required))

    def make_room(self, leg: AttemptKey, asked: AskExtension) -> None:
        """The answer stands still, and this is all of it."""
        if (state := self._by_leg.get(leg)) is not None:
            state.came = asked
            state.pairing = self._pair(_of_leg(state.dispatch, asked.output[:-1]))
            self._submit(Extend(state.key, asked.output[:-1]))

    def refuse(self, state: RequestState, event: MoveRefusedEvent) -> None:
        self._feed(_leg_of(state), RoomRefused(event.reason))

    def tokens(self, state: RequestState, newest: FirstToken) -> Tokens:
        """What the router lacks, and the newest token in any case: with it this worker speaks."""
        assert state.came is not None
        output, logprobs = state.came.output, state.came.logprobs
        first = min(len(state.dispatch.first_output), len(output) - 1)
        if not logprobs and newest.logprobs is not None:
            logprobs = (newest.logprobs,)
        ids = output[first:]
        return Tokens(state.key.transfer_id, state.key.epoch, first, ids, logprobs if len(logprobs) == len(ids) else ())

    def cancel(self, state: RequestState, reason: str) -> bool:
        """Stop the transfer of a move, which then gives the room back. False when there is none to stop."""
        leg, side = _leg_of(state), self._side()
        if side is None or leg not in side:
            return False
        side.feed(leg, CancelAsked(reason))
        return True

    def is_late(self, state: RequestState, now: float) -> bool:
        """Whether the answer has waited long enough for room here."""
        waits = state.dispatch.mode == "move" and state.reserved_at is None
        return waits and now - state.arrived_at > ROOM_WAIT_S

    def forget(self, state: RequestState) -> None:
        """The attempt is over. A transfer of it that is still stopping gives the room back by `release`."""
        leg, side = _leg_of(state), self._side()
        if side is None or leg not in side:
            self._by_leg.pop(leg, None)

    def _feed(self, leg: AttemptKey, event: Event) -> None:
        if (side := self._side()) is not None:
            side.feed(leg, event)


def _leg_of(state: RequestState) -> AttemptKey:
    return AttemptKey(state.dispatch.leg, state.dispatch.epoch)


def _of_leg(dispatch: Dispatch, output: tuple[int, ...]) -> Dispatch:
    """The transfer as a pair of workers plans it: for the KV of the prompt and `output`, under the leg's own id."""
    stored = (ChoiceOutput(0, output),)
    return replace(dispatch, transfer_id=dispatch.leg, mode="decode", leg="", output=stored)
