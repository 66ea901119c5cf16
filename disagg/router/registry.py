"""Which workers there are: registrations, leases and losses. Pure: time is an argument, nothing here sends.

A worker is known by its *incarnation*, a random id of one registration; its `worker_id` is a name for people.
At most one incarnation has a worker id. Another that asks for it is a restart if the first is gone, and a second worker
by mistake if the first lives: it waits until the first was lost, gave a sign of life since, or was silent for too long.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count
from typing import Final

from disagg.router.pairing import Difference, PairTraits, record_difference
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.router import DRAINING, Lease, LinkStatus, PeerTarget, Register
from disagg.transceiver.wire.purposes import told_or_first
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S, SUSPECT_S

ROLES = ("prefill", "decode", "both")

PROOF_S: Final = HEARTBEAT_S / 2
"""A sign of life counts as given after a moment when it is heard so much later: what a process said before it died has
long arrived by then, and one that lives speaks twice a second by two ways."""

MAX_KINDS: Final = 64
"""Kinds of workers that are remembered: a fleet has a handful at a time, and what is forgotten costs a comparison."""

MAX_CLAIMANTS: Final = 16
"""Incarnations that wait for one worker id: a supervisor starts one at a time, all else are mistakes."""


class WorkerState(Enum):
    """In order of preference for new work; DRAINING workers get none. A lost worker is no longer in the registry."""

    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"


@dataclass(slots=True)
class Worker:
    """One live incarnation: what it registered with and what its last lease said."""

    register: Register
    lease: Lease
    heard_at: float
    draining: bool = field(default=False)
    traits: PairTraits = field(init=False)
    claimed_at: dict[str, float] = field(default_factory=dict)
    """Other incarnations that ask for this one's name, and since when."""
    link_reports: dict[str, LinkStatus] = field(init=False)
    """By peer incarnation, as the last lease told them."""
    sends: tuple[str, ...] = field(init=False)
    receives: tuple[str, ...] = field(init=False)
    """The purposes of which it is a source, and those of which it is a sink."""
    is_linked_on_use: bool = False
    """Whether it connects to a peer when a request names it, so that it needs no link to be chosen."""

    def __post_init__(self) -> None:
        self.traits = PairTraits(self.register)
        told = self.register
        self.sends, self.receives = told_or_first(told.role, told.sends, told.receives)
        self.take(self.lease)

    def take(self, lease: Lease) -> None:
        """What this worker says of itself from here on; what it leaves out is as it last was."""
        last = getattr(self, "lease", lease)
        links = last.links if lease.links is None else lease.links
        metrics = last.metrics if lease.metrics is None else lease.metrics
        rates = last.rates if lease.rates is None else lease.rates
        if lease.links is None or lease.metrics is None or lease.rates is None:
            lease = replace(lease, links=links, metrics=metrics, rates=rates)
        self.lease = lease
        if links is not last.links or not hasattr(self, "link_reports"):
            self.link_reports = {link.incarnation: link for link in links or ()}

    @property
    def incarnation(self) -> str:
        return self.register.incarnation

    @property
    def worker_id(self) -> str:
        return self.register.worker_id

    @property
    def role(self) -> str:
        return self.register.role

    @property
    def target(self) -> PeerTarget:
        register = self.register
        return PeerTarget(self.incarnation, self.worker_id, register.peer_endpoint, register.geometry)

    @property
    def goes_on(self) -> bool:
        """Whether it can go on with an answer begun elsewhere: protocol 2.1 has both that and names of purposes."""
        return self.register.sends is not None

    def state(self, now: float) -> WorkerState:
        if self.draining or self.lease.state == DRAINING:
            return WorkerState.DRAINING
        return WorkerState.SUSPECT if now - self.heard_at >= SUSPECT_S else WorkerState.READY

    def link_state(self, peer: str) -> str:
        """What this worker last said of its link to incarnation `peer`; `connecting` when it said nothing yet.

        `idle`: none yet, which the first request makes.
        """
        if (report := self.link_reports.get(peer)) is not None and report.state != "connecting":
            return report.state
        return "idle" if self.is_linked_on_use else "connecting"


@dataclass(frozen=True, slots=True)
class Admitted:
    """The worker is registered. `superseded` = the earlier incarnation of the same worker id, which is lost now."""

    superseded: Worker | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """Not decided: `rival` has the worker id and may be dead. To be asked again."""

    rival: Worker


class Registry:
    """Live workers in order of registration.

    `expected_fingerprint`: the model the router was started with; every worker must have it. Without one the
    workers registered now decide.
    """

    def __init__(
        self, expected_fingerprint: str | None = None, pulse_at: Callable[[str], float] = lambda _: float("-inf")
    ) -> None:
        """`pulse_at`: when an incarnation last gave a sign of life other than by its leases."""
        self._expected_fingerprint = expected_fingerprint
        self._pulse_at = pulse_at
        self._workers: dict[str, Worker] = {}
        self._by_name: dict[str, Worker] = {}
        self._numbers = count()
        self._kinds: dict[PairTraits, PairTraits] = {}
        """So that equal ones are one object, and comparing them looks at no number of a geometry."""
        self.is_linked_on_use = False
        """Whether decode workers connect to a peer when a request names it, and not ahead of any."""
        self._looks: list[tuple[float, int, Worker]] = []
        """A heap, one entry for each worker: its sign of life when it was last looked at. A worker that lives is looked
        at again when that sign is `LOST_S` old, and not before; so is one that has left, to be forgotten."""

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, incarnation: str) -> Worker | None:
        return self._workers.get(incarnation)

    def named(self, worker_id: str) -> Worker | None:
        return self._by_name.get(worker_id)

    def max_model_len(self) -> int | None:
        """That of any worker, since the identities of all are equal; None without workers."""
        worker = next(iter(self), None)
        return None if worker is None else worker.register.identity.max_model_len

    def sign_at(self, worker: Worker) -> float:
        """When it last gave a sign of life, by its event loop or by its pulse."""
        return max(worker.heard_at, self._pulse_at(worker.incarnation))

    def register(self, message: Register, now: float) -> Admitted | Refused | Claimed:
        """Admit a worker or say what forbids it. Idempotent: REGISTER is repeated until answered."""
        known = self._workers.get(message.incarnation)
        if known is not None:
            known.heard_at = now
            return Admitted()
        if difference := self._difference(message):
            return Refused(difference.field, difference.ours, difference.theirs, destination=message.incarnation)
        rival = self.named(message.worker_id)
        if rival is not None:
            if (verdict := self._judge(rival, message, now)) is not None:
                return verdict
            self.remove(rival.incarnation)
        worker = Worker(message, Lease(message.incarnation, ""), now, is_linked_on_use=self.is_linked_on_use)
        worker.traits = self._kind_of(worker.traits)
        self._workers[message.incarnation] = self._by_name[message.worker_id] = worker
        self._look_later(worker)
        return Admitted(rival)

    def link_on_use(self) -> None:
        """From here on pairs need no link to be chosen."""
        if not self.is_linked_on_use:
            self.is_linked_on_use = True
            for worker in self:
                worker.is_linked_on_use = True

    def _kind_of(self, traits: PairTraits) -> PairTraits:
        if len(self._kinds) >= MAX_KINDS:
            self._kinds.clear()
        return self._kinds.setdefault(traits, traits)

    def _judge(self, rival: Worker, message: Register, now: float) -> Refused | Claimed | None:
        """What `rival`, which has the name, means for the one that asks for it; None = it is dead and gives way."""
        sign_at = self.sign_at(rival)
        if now - sign_at >= SUSPECT_S:
            return None
        if message.incarnation not in rival.claimed_at and len(rival.claimed_at) >= MAX_CLAIMANTS:
            del rival.claimed_at[next(iter(rival.claimed_at))]
        if sign_at < rival.claimed_at.setdefault(message.incarnation, now) + PROOF_S:
            return Claimed(rival)
        ours, theirs = describe_process(rival.register), describe_process(message)
        return Refused("worker_id", ours, theirs, destination=message.incarnation)

    def renew(self, lease: Lease, now: float) -> bool:
        """Take a lease. False when the incarnation is not registered here (any more): it must register anew."""
        worker = self._workers.get(lease.incarnation)
        if worker is None:
            return False
        worker.take(lease)
        worker.heard_at = now
        return True

    def remove(self, incarnation: str) -> Worker | None:
        worker = self._workers.pop(incarnation, None)
        if worker is not None:
            del self._by_name[worker.worker_id]
        return worker

    def expire(self, now: float) -> list[Worker]:
        """Remove and return the workers that were silent for `LOST_S`."""
        due = []
        while self._looks and now - self._looks[0][0] >= LOST_S:
            due.append(heapq.heappop(self._looks)[2])
        known = [worker for worker in due if self._workers.get(worker.incarnation) is worker]
        lost = [worker for worker in known if now - self.sign_at(worker) >= LOST_S]
        for worker in lost:
            self.remove(worker.incarnation)
        for worker in known:
            if self._workers.get(worker.incarnation) is worker:
                self._look_later(worker)
        return lost

    def _look_later(self, worker: Worker) -> None:
        heapq.heappush(self._looks, (self.sign_at(worker), next(self._numbers), worker))

    def drain(self, worker_id: str, draining: bool = True) -> bool:
        """Give a worker no new requests (or give it some again). False when no such worker is registered."""
        worker = self.named(worker_id)
        if worker is not None:
            worker.draining = draining
        return worker is not None

    def check_invariants(self) -> None:
        """Names are unique, keys are incarnations, and all identities are equal."""
        assert self._by_name == {worker.worker_id: worker for worker in self}
        assert len(self._by_name) == len(self)
        looked_at = [id(worker) for _, _, worker in self._looks]
        assert {id(worker) for worker in self} <= set(looked_at)
        assert len(looked_at) == len(set(looked_at))
        known = [(sign, worker) for sign, _, worker in self._looks if self.get(worker.incarnation) is worker]
        assert all(sign <= self.sign_at(worker) for sign, worker in known)
        assert all(key == worker.incarnation for key, worker in self._workers.items())
        assert len({worker.register.identity for worker in self}) <= 1
        fingerprints = {worker.register.identity.model_fingerprint for worker in self}
        assert self._expected_fingerprint is None or fingerprints <= {self._expected_fingerprint}

    def _difference(self, message: Register) -> Difference | None:
        if message.role not in ROLES:
            return Difference("role", ", ".join(ROLES), message.role)
        fingerprint = message.identity.model_fingerprint
        if self._expected_fingerprint not in (None, fingerprint):
            return Difference("model_fingerprint", str(self._expected_fingerprint), fingerprint)
        # A worker that replaces itself need not agree with its dead predecessor.
        others = (worker for worker in self if worker.worker_id != message.worker_id)
        other = next(others, None)
        return record_difference(other.register.identity, message.identity) if other else None


def describe_process(register: Register) -> str:
    """A worker's name with the process that has it."""
    return f"`{register.worker_id}` (pid {register.pid} on {register.host})"
