"""What the engine says, on its way to the attempts: in order within an attempt, while blocks of others are hashed.

Final units are hashed before their transfer hears of them, and doubted blocks before the engine goes on.
Hashing takes its turn on the landing threads, so an attempt's later events wait in a lane of its own. An attempt with
nothing to be hashed waits for no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections import deque
from collections.abc import Sequence
from typing import Final

from disagg.engine.commands import (
    AttemptKey,
    EngineEvent,
    FrozenEvent,
    PrefixHitEvent,
    PrefixLentEvent,
    RegisteredEvent,
    SuspectEvent,
    UnitsFinalEvent,
)
from disagg.transceiver.layout.slice_size import units_per_slice
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.protocol.events import Pinned, UnitsFinal
from disagg.transceiver.protocol.move_source import FROZEN_ID
from disagg.transceiver.wire.errors import SourceChanged, clipped
from disagg.transceiver.wire.messages.values import Geometry
from disagg.transceiver.wire.purposes import PREFIX
from disagg.worker.attempts import Attempts
from disagg.worker.parts import WorkerParts
from disagg.worker.rechecks import Rechecks

log = logging.getLogger(__name__)

LENT: Final = 0
"""Stands for the computation that cached blocks came of: whichever it was, they are final."""


_HASHED: Final = UnitsFinalEvent | FrozenEvent | PrefixHitEvent | SuspectEvent | PrefixLentEvent


class EngineEvents:
    """Hands the engine's events to one registration's attempts. Event loop only."""

    def __init__(self, parts: WorkerParts, attempts: Attempts) -> None:
        self._parts, self._attempts = parts, attempts
        self._rechecks = Rechecks(parts)
        self._lanes: dict[AttemptKey, deque[EngineEvent]] = {}
        """By attempt of which blocks are being hashed: its later events, in order."""

    async def run(self) -> None:
        """Serve until cancelled; what waits in a lane then is lost."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                event = await self._parts.events.get()
                if (lane := self._lanes.get(event.key)) is not None:
                    lane.append(event)
                elif isinstance(event, RegisteredEvent):
                    tasks.create_task(self._hash_registered(event))
                elif isinstance(event, _HASHED):
                    self._lanes[event.key] = deque([event])
                    tasks.create_task(self._run_lane(event.key))
                else:
                    self._hand_on(event)

    def _hand_on(self, event: EngineEvent) -> None:
        try:
            self._attempts.take_event(event)
        except Exception as fault:
            self._contain(event, fault)

    def _contain(self, event: EngineEvent, fault: Exception) -> None:
        """What one attempt's event brings about costs that attempt: others of this worker go on."""
        kind = type(event).__name__
        log.error("a %s of %s cannot be taken: %s", kind, event.key.transfer_id, clipped(repr(fault)), exc_info=fault)
        self._attempts.fail(event.key, f"a fault of this worker: {kind}")

    async def _run_lane(self, key: AttemptKey) -> None:
        lane = self._lanes[key]
        while lane:
            event = lane.popleft()
            try:
                await self._take(event)
            except Exception as fault:
                self._contain(event, fault)
        del self._lanes[key]

    async def _take(self, event: EngineEvent) -> None:
        match event:
            case UnitsFinalEvent() if event.key in self._attempts:
                await self._hash_units(event.key, event.compute_id, event.units)
            case UnitsFinalEvent():
                pass
            case FrozenEvent():
                if (leg := self._attempts.froze(event)) is not None:  # the sink hears of it before anything is hashed
                    await self._hash_units(leg, FROZEN_ID, event.units)
            case PrefixLentEvent():
                await self._hash_lent(event)
            case PrefixHitEvent():
                await self._rechecks.check_hit(event)
            case SuspectEvent():
                await self._rechecks.look_at_suspects(event)
                self._attempts.suspects_seen(event.key)
            case _:
                self._hand_on(event)

    async def _hash_units(self, key: AttemptKey, compute_id: int, final: Sequence[SourceUnit]) -> None:
        """Those of an attempt's own transfer, or of a leg."""
        if self._attempts.sending is None:
            return
        await self._hash_for(key, compute_id, final, self._attempts.peer_geometry(key))

    async def _hash_lent(self, event: PrefixLentEvent) -> None:
        sources = self._attempts.sources
        if self._attempts.sending is None or sources is None or event.key not in sources:
            return
        self._attempts.sending.feed(event.key, Pinned(LENT, event.boundary))
        await self._hash_for(event.key, LENT, event.units, sources.peer_geometry(event.key))

    async def _hash_for(self, key: AttemptKey, compute_id: int, units: Sequence[SourceUnit], peer: Geometry) -> None:
        """A slice's worth at a time, each of which is told once it is hashed."""
        sending = self._attempts.sending
        assert sending is not None
        with contextlib.suppress(SourceChanged):  # dropped meanwhile: the engine says so next
            cut, kept = self._parts.cuts.of_peer(peer)
            hash_units = functools.partial(self._parts.landing.digest_units, cut=cut)
            count = units_per_slice(self._parts.layout.slot_nbytes)
            for few in (units[first : first + count] for first in range(0, len(units), count)):
                sending.feed(key, UnitsFinal(compute_id, await kept.digest_units(few, hash_units)))

    async def _hash_registered(self, event: RegisteredEvent) -> None:
        """What answers have filled, so that it can be lent at once and a later change of its memory is seen."""
        if PREFIX not in self._parts.made.sends or self._parts.made.cache.is_staged:  # there it is hashed when lent
            return
        with contextlib.suppress(SourceChanged):
            await self._parts.cuts.kept.digest_units(event.units, self._parts.landing.digest_units)
