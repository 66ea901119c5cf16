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

from disagg.engine.commands import (
    AttemptKey,
    EngineEvent,
    FrozenEvent,
    PrefixHitEvent,
    SuspectEvent,
    UnitsFinalEvent,
)
from disagg.transceiver.layout.slice_size import units_per_slice
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.protocol.events import UnitsFinal
from disagg.transceiver.protocol.move_source import FROZEN_ID
from disagg.transceiver.wire.errors import SourceChanged, clipped
from disagg.worker.attempts import Attempts
from disagg.worker.parts import WorkerParts
from disagg.worker.rechecks import Rechecks

log = logging.getLogger(__name__)


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
                elif isinstance(event, UnitsFinalEvent | FrozenEvent | PrefixHitEvent | SuspectEvent):
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
        with contextlib.suppress(SourceChanged):  # dropped meanwhile: the engine says so next, and computes them anew
            cut, kept = self._parts.cuts.of_peer(self._attempts.peer_geometry(key))
            hash_units = functools.partial(self._parts.landing.digest_units, cut=cut)
            count = units_per_slice(self._parts.layout.slot_nbytes)
            for few in (final[first : first + count] for first in range(0, len(final), count)):
                units = await kept.digest_units(few, hash_units)
                self._attempts.sending.feed(key, UnitsFinal(compute_id, units))
