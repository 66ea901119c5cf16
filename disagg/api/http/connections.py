"""The open connections of one listener: how many there may be, and which one gives way to a new one."""

from __future__ import annotations

import enum
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

MOST_CONNECTIONS: Final = 16_384  # a connection holds about 12 KB: 200 MB, which a router has beside its workers
FEWEST_CONNECTIONS: Final = 16
RESERVED: Final = 128
"""Descriptors not for clients: listeners, pipes and ZeroMQ's own (about 40), one per worker, accepts in flight."""
LOG_EVERY_S: Final = 60.0
STALLED_S: Final = 2.0  # a body of which nothing came for so long is missed less than an idle client

log: Final = logging.getLogger(__name__)


def connections_within(descriptors: int) -> int:
    """How many clients a process may have that may open so many files: three quarters, more is kept if that is few."""
    left = descriptors - max(RESERVED, descriptors // 4)  # a large fleet's control sockets grow with the limit
    return max(FEWEST_CONNECTIONS, min(left, MOST_CONNECTIONS))


class Activity(enum.Enum):
    """What a connection does. All but `ANSWERING` give way, in this order: a stranger first, a request last."""

    SILENT = "no request came yet, or the connection is being closed"
    IDLE = "the last request was answered"
    RECEIVING = "a request's body is not here yet"
    ANSWERING = "a request is running"


class Droppable(Protocol):
    def drop(self) -> None:
        """Close at once."""


class Connections:
    """At most `bound`; where a new one finds no room, the oldest of the least busy stage is closed."""

    def __init__(self, bound: int = MOST_CONNECTIONS, clock: Callable[[], float] = time.monotonic) -> None:
        self.bound = bound
        self._clock = clock
        self._stages: dict[Droppable, Activity] = {}
        self._by_stage: dict[Activity, OrderedDict[Droppable, float]] = {stage: OrderedDict() for stage in Activity}
        self._logged_at = float("-inf")

    def __len__(self) -> int:
        return len(self._stages)

    def place(self, connection: Droppable, stage: Activity) -> None:
        """It is in this stage, and did something just now. A connection enters with its first stage."""
        self.remove(connection)
        self._stages[connection] = stage
        self._by_stage[stage][connection] = self._clock()

    def remove(self, connection: Droppable) -> None:
        if (stage := self._stages.pop(connection, None)) is not None:
            del self._by_stage[stage][connection]

    def make_room(self) -> bool:
        """Whether one more may come. Closes one if that makes it so."""
        if len(self) < self.bound:
            return True
        self.note("as many clients are connected as may be", len(self))
        return self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Close the connection that is missed least. False when all of them have running requests."""
        stalled_since = self._clock() - STALLED_S
        for stage, since in (
            (Activity.SILENT, math.inf),
            (Activity.RECEIVING, stalled_since),
            (Activity.IDLE, math.inf),
            (Activity.RECEIVING, math.inf),
        ):
            connection, active_at = next(iter(self._by_stage[stage].items()), (None, math.inf))
            if connection is not None and active_at <= since:
                self.remove(connection)
                connection.drop()
                return True
        return False

    def note(self, what: str, count: int) -> None:
        """Log it, but not for each connection of a flood."""
        now = self._clock()
        if now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            log.warning(
                "%s (%d): the oldest idle ones are closed for new ones; raise the limit of open files (ulimit -n)"
                " for more; not said again for %d s",
                *(what, count, LOG_EVERY_S),
            )

    def check_invariants(self) -> None:
        assert {c: stage for stage, found in self._by_stage.items() for c in found} == self._stages
