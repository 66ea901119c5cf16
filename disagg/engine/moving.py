"""Answers on their way to another worker. At the one that has it an answer is frozen between two steps: it keeps its
blocks, takes no part in steps and is never preempted, until it is released or thawed. At the other, the room that was
made for it grows to what it has become.
"""

from __future__ import annotations

from disagg.cache.cache import KVCache
from disagg.cache.window import needed_ordinals
from disagg.engine.announce import units_at
from disagg.engine.commands import (
    EngineEvent,
    Extend,
    Freeze,
    FrozenEvent,
    MoveRefusedEvent,
    PressedEvent,
    Thaw,
)
from disagg.engine.reserving import extend
from disagg.engine.scheduler import Scheduler
from disagg.engine.sequence import DecodingSequence, Reservation
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.wire.messages.values import UnitName


class Moves:
    """Applies the commands of a move to the sequences of one scheduler. No clock, no sockets."""

    def __init__(self, cache: KVCache, scheduler: Scheduler) -> None:
        self._cache, self._scheduler = cache, scheduler

    def freeze(self, command: Freeze) -> list[EngineEvent]:
        """Leave the answer out of the next step. It is told frozen now, or when the step under way was read."""
        answer = self._scheduler.get(command.key)
        if not isinstance(answer, DecodingSequence):
            return [MoveRefusedEvent(command.key, "the answer is not being decoded")]
        if answer.cached.chain is not None and answer.cached.chain.precision:
            return [MoveRefusedEvent(command.key, "its KV has been through other formats than this worker's")]
        answer.frozen_for = command.leg
        return self.settled(answer)

    def settled(self, answer: DecodingSequence) -> list[EngineEvent]:
        """The news of a frozen answer whose newest token is known; nothing for any other."""
        if not answer.is_frozen or answer.num_ahead or self._scheduler.get(answer.key) is not answer:
            return []
        whole, logprobs = tuple(answer.output), tuple(answer.logprobs)
        return [FrozenEvent(answer.key, whole, logprobs, self._units_of(answer), answer.frozen_for or "")]

    def thaw(self, command: Thaw) -> list[EngineEvent]:
        """Go on from where the answer stands. Its last block is written again, so its slots get other names first."""
        answer = self._scheduler.get(command.key)
        if isinstance(answer, DecodingSequence) and answer.is_frozen:
            self._rename_last(answer)
            answer.frozen_for = None
        return []

    def pressed(self) -> list[EngineEvent]:
        """The answer that is preempted next, where that is near: in time to move it, and at most once in a block."""
        answer = self._scheduler.pressed_answer()
        if answer is None or answer.request.sampling.num_choices > 1 or answer.key.choice:
            return []
        count, since = len(answer.output), answer.named_at
        if since is not None and count < since + self._cache.layout.block_size:
            return []
        answer.named_at = count
        return [PressedEvent(answer.key)]

    def extend(self, command: Extend) -> list[EngineEvent]:
        """Room for all that is to come, or the news that there is none."""
        reservation = self._scheduler.get(command.key)
        if not isinstance(reservation, Reservation) or reservation.cached is None:
            return []  # released meanwhile
        count = reservation.request.prompt_len + len(command.output)
        if count < reservation.request.num_known or not self._scheduler.try_extend(reservation, count):
            return [MoveRefusedEvent(command.key, "no room for what the answer has become")]
        return [extend(self._cache, reservation, command.output)]

    def _rename_last(self, answer: DecodingSequence) -> None:
        """Peers were shown the block that the next token goes to, where that is one that has tokens already."""
        layout = self._cache.layout
        ordinal, num_in_it = divmod(answer.num_stored, layout.block_size)
        if num_in_it:
            for table, pool in zip(answer.cached.tables, layout.pool_of_group, strict=True):
                self._cache.pools[pool].rename([int(table[ordinal])])

    def _units_of(self, answer: DecodingSequence) -> tuple[SourceUnit, ...]:
        """What the next query and all later ones read, published: peers may read it from here on."""
        layout = self._cache.layout
        units: tuple[SourceUnit, ...] = ()
        for number, group in enumerate(layout.groups):
            needed = needed_ordinals(answer.num_stored, group.window, group.num_sink_tokens, layout.block_size)
            some = units_at(self._cache, answer.cached, [UnitName(number, ordinal) for ordinal in needed.tolist()])
            assert len(some) == len(needed), f"{answer.key}: a block that is read next is not there"
            self._cache.publish(number, [unit.slot for unit in some])
            units += some
        return units
