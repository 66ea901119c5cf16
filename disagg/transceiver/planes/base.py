"""A data plane: one way of moving slots from a prefill worker's pools into a decode worker's.

The receiving process is the only writer of its pools; no plane writes remotely. `SourcePlane` lives in the process
that owns the sources, `LandingPlane` in the process that owns the destinations; both pass
`tests/transceiver/test_planes.py`, whatever the plane.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from disagg.transceiver.layout.runs import Ints, adjacent, ints
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.regions import Bytes, LandingJob, PoolRegion
from disagg.transceiver.wire.messages.values import PlaneOffer


class SourcePlane(ABC):
    """Sender side of a plane. `sends_bytes` planes push each slice's payload once; others let the receiver read."""

    name: str
    sends_bytes: bool
    queues_slices: bool = False
    """Whether `send` takes its place in the connection before it first waits: then the next may be called meanwhile."""
    on_peer_lost: Callable[[str], None] | None = None
    """Called on the loop with the incarnation of a peer whose connection to this plane ended by itself."""

    @abstractmethod
    async def start(self, pools: Sequence[PoolRegion]) -> None:
        """Begin listening. Idempotent is not required; called once."""

    @abstractmethod
    def offer(self, peer: str) -> PlaneOffer:
        """How the peer incarnation `peer` may open this plane; carries a token for it alone."""

    @abstractmethod
    async def send(
        self,
        peer: str,
        transfer_id: str,
        epoch: int,
        number: int,
        units: Sequence[SourceUnit],
        regions: Sequence[PoolRegion] | None = None,
    ) -> None:
        """Send one slice's bytes in order (byte-sending planes). Raises `PeerLost` when the link is gone.

        `regions`: where the units lie when that is not the pools given to `start`: packed bytes for a peer of another
        geometry. They are not written again.
        """

    @abstractmethod
    async def drop(self, peer: str) -> None:
        """Forget a lost incarnation: close its connection and revoke its token. Safe to repeat."""

    @abstractmethod
    async def close(self) -> None:
        """Release sockets and mappings. Safe to repeat."""


class UnitHasher(Protocol):
    """What a plane shows the units that landed: `disagg.transceiver.memory.hashing.Hasher`. On the landing thread."""

    def copy(
        self,
        to: Sequence[PoolRegion],
        source: Sequence[PoolRegion],
        pools: Ints,
        slots: Ints,
        source_slots: Ints,
    ) -> None:
        """Copy each unit, and hash it where it now lies unless a test is to see it in between."""

    def look(self) -> None:
        """Hash the units in their slots, unless `copy` has."""

    def copied(self) -> None:
        """All of the job lies in its slots; `take` follows."""

    def take(self, start: int, rows: Bytes, dtype: str) -> None:
        """Hash units from number `start` on by their bytes, contiguous `[n, nbytes]` of `dtype`."""


class LandingPlane(ABC):
    """Receiver side of a plane, one per source incarnation."""

    name: str
    reads_sources: bool = False
    """Whether it reads the sender's slots itself: then a `Destination` names its source slot and generation."""
    is_private: bool = True
    """True if an eavesdropper between the hosts learns nothing about the KV."""
    lane: str = ""
    """What the plane runs over, where it does not say that by its name."""
    num_operations: int = 0
    """Copies made by `land` since the plane was opened: one per run of adjacent slots. Several threads land."""
    _counting: ClassVar[threading.Lock] = threading.Lock()
    on_lost: Callable[[], None] | None = None
    """Called on the loop, once, when the source's end of the plane is gone."""

    def _count_operations(self, number: int) -> None:
        """On a landing thread."""
        with self._counting:
            self.num_operations += number

    @abstractmethod
    async def connect(self, me: str, offer: PlaneOffer, pools: Sequence[PoolRegion]) -> None:
        """Open the plane from incarnation `me` and land into `pools`.

        Raises `PlaneRefused` or `PeerLost`; `Shortage` when this process has no descriptor, memory or thread for it.
        """

    async def ask_probe(self) -> None:
        """Ask the sender, where it pushes the bytes, for the slices of `probe.measure`. Once per connection."""
        return

    def is_here(self, job: LandingJob) -> bool:
        """Whether `fetch` has nothing to wait for, now or ever, and need not be called. Raises `PeerLost`."""
        return False

    async def arrive(self, job: LandingJob) -> None:
        """Wait until `fetch` of the same job waits for nothing but these bytes: for no other slice of this plane.

        A plane with room for a few slices only gives it to those that have arrived. `job` need not name its slots yet.
        Raises as `fetch`. Cancellable at any point.
        """
        await self.fetch(job)

    @abstractmethod
    async def fetch(self, job: LandingJob) -> None:
        """Wait until the bytes of `job` can be copied here (at once on shm). Cancellable at any point."""

    @abstractmethod
    def land(self, job: LandingJob) -> int:
        """Copy every unit of `job` into its destination slot; returns payload bytes landed. Runs on the landing thread.

        Raises `SourceChanged` when a generation differs before or after the copy; destinations are then garbage.
        """

    def land_and_hash(self, job: LandingJob, hasher: UnitHasher) -> int:
        """`land`, and show `hasher` every unit where it now lies. Runs on the landing thread; raises as `land`.

        Returns how many numbers became the largest of our format, where landing converts.
        """
        self.land(job)
        hasher.look()
        return 0

    def num_copies(self, job: LandingJob) -> int:
        """How many `land` makes of this job: one per run of adjacent slots."""
        units = job.destinations
        columns = [ints([u.slot for u in units])]
        if self.reads_sources:
            columns.append(ints([u.source_slot for u in units]))
        return sum(1 for _ in adjacent(ints([u.pool for u in units]), *columns))

    @abstractmethod
    def discard(self, transfer_id: str, epoch: int) -> None:
        """Drop payloads that arrived for this epoch and will not be landed. Safe to repeat."""

    @abstractmethod
    async def close(self) -> None:
        """Unmap and close. Safe to repeat; called only when no job is running."""
