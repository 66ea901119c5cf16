"""Which request goes to the workers next, and which is refused. Pure: time is an argument, no socket, no await.

Workers are given a little more than they can begin (`Admission.admit`'s `room`); what is beyond that waits here, where
it can still be put in order. Between tenants, one for each API key, the order is fair by tokens: the tenant that was
served least for its weight is next, and one that was idle starts level with the others, so it neither saves up nor
pays for what it was given while no other asked. Among a tenant's own requests the order is that of
`WaitingLine`: by priority, then by arrival, and one place in four for the oldest, so that nothing starves.

The line has a bound. Where it is full, the tenant with the longest line for its weight loses its last request, which
may be the one that just came. So a flood from one tenant fills that tenant's part and displaces no other's requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from disagg.router.drain_rate import DrainRate
from disagg.router.tenants import QueuedRequest, Refusal, Tenant, TenantLimits

NO_LIMITS: Final = TenantLimits()

Refused = tuple[QueuedRequest, Refusal]


class Admission:
    """All requests in flight. `num_ahead` of them were admitted and have no token yet.

    A choice looks at each tenant that waits, of which there are as many as API keys at most.
    """

    def __init__(self, tenants: Mapping[str, TenantLimits], *, max_queued: int) -> None:
        self._limits = tenants
        self._max_queued = max_queued
        self._tenants: dict[str, Tenant] = {}
        self._backlogged: dict[str, Tenant] = {}
        self._drained = DrainRate()
        self._virtual_time = 0.0
        self.num_waiting = 0
        self.num_ahead = 0

    # --- a request's life -----------------------------------------------------------------------------------

    def arrive(self, turn: QueuedRequest, now: float) -> list[Refused]:
        """Let a request wait. What must be refused for it, which may be itself, has left when this returns."""
        tenant = self._tenant(turn.tenant)
        if refusal := tenant.refusal(turn, now):
            turn.is_over = True
            return [(turn, refusal)]
        tenant.come(turn)
        self._join(tenant, turn)
        return [self._shed(now)] if self.num_waiting > self._max_queued else []

    def admit(self, room: int, now: float) -> list[QueuedRequest]:
        """Those that may go to the workers now, in order, so that `num_ahead` is at most `room`."""
        admitted = []
        while self._backlogged and self.num_ahead < room:
            tenant = min(self._backlogged.values(), key=_virtual_time_of)
            turn = tenant.line.take()
            self._note_left(tenant)
            self._drained.note(1, now)
            self._virtual_time = max(self._virtual_time, tenant.served)
            tenant.charge(turn)
            turn.is_admitted = True
            self.num_ahead += 1
            admitted.append(turn)
        return admitted

    def begin(self, turn: QueuedRequest) -> None:
        """Its first token came: the worker may be given another."""
        if turn.is_admitted and not turn.has_begun and not turn.is_over:
            turn.has_begun = True
            self.num_ahead -= 1

    def end(self, turn: QueuedRequest, num_tokens: int, now: float) -> None:
        """It left, with so many tokens, whatever it was doing. Once it is over nothing happens."""
        if turn.is_over:
            return
        tenant = self._tenant(turn.tenant)
        if turn.is_admitted:
            self.num_ahead -= not turn.has_begun
            tenant.settle(turn, num_tokens)
        else:
            tenant.line.remove(turn)
            self._note_left(tenant)
        turn.is_over = True
        tenant.go(turn, now)

    def expire(self, now: float) -> list[QueuedRequest]:
        """Those whose deadline passed while they waited; they have left."""
        late = [turn for turn in self.waiting() if turn.deadline <= now]
        for turn in late:
            self.end(turn, 0, now)
        return late

    # --- what others may ask --------------------------------------------------------------------------------

    def waiting(self) -> Iterator[QueuedRequest]:
        return (turn for tenant in self._backlogged.values() for turn in tenant.line)

    def waiting_by_tenant(self) -> dict[str, int]:
        return {name: len(tenant.line) for name, tenant in self._tenants.items()}

    def served_by_tenant(self) -> dict[str, float]:
        """Tokens over weight, as charged until now."""
        return {name: tenant.served for name, tenant in self._tenants.items()}

    def check_invariants(self) -> None:
        """Counts are those of the lines; only tenants that wait are chosen from; limits hold."""
        assert self.num_waiting == sum(len(tenant.line) for tenant in self._tenants.values()) <= self._max_queued
        assert self._backlogged == {name: tenant for name, tenant in self._tenants.items() if tenant.line}
        for tenant in self._tenants.values():
            tenant.line.check_invariants()
            assert tenant.num_requests >= len(tenant.line)
            assert tenant.num_requests <= (tenant.limits.max_requests or tenant.num_requests)
            assert tenant.num_tokens <= (tenant.limits.max_tokens or tenant.num_tokens)
        assert self.num_ahead >= 0

    # --- the line -------------------------------------------------------------------------------------------

    def _tenant(self, name: str) -> Tenant:
        if (tenant := self._tenants.get(name)) is None:
            tenant = self._tenants[name] = Tenant(name, self._limits.get(name, NO_LIMITS))
        return tenant

    def _join(self, tenant: Tenant, turn: QueuedRequest) -> None:
        if not tenant.line:
            tenant.served = max(tenant.served, self._virtual_time)
            self._backlogged[tenant.name] = tenant
        tenant.line.add(turn, turn.priority)
        self.num_waiting += 1

    def _note_left(self, tenant: Tenant) -> None:
        self.num_waiting -= 1
        if not tenant.line:
            del self._backlogged[tenant.name]

    def _shed(self, now: float) -> Refused:
        longest = max(self._backlogged.values(), key=lambda tenant: len(tenant.line) / tenant.limits.weight)
        turn = longest.line.last
        assert turn is not None
        self.end(turn, 0, now)
        message = f"{self._max_queued} requests are waiting, as many as may (`--max-queued`)"
        return turn, Refusal(503, message, self._drained.seconds_for(self._max_queued, now))


def _virtual_time_of(tenant: Tenant) -> float:
    return tenant.served
