"""One tenant of the router: the limits of its API key, what it has in flight, what it was served. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from disagg.router.drain_rate import DrainRate
from disagg.waiting_line import WaitingLine

FIRST_GUESS_TOKENS: Final = 256
"""The length of a tenant's first answer, before any has ended: its true length is settled when it ends."""
WEIGHT_OF_ONE: Final = 1 / 8
"""Of one ended answer in the mean: the last dozen decide it."""


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """`weight`: its share of the workers where several tenants wait. None = no limit on what it has in flight.

    `max_requests` and `max_tokens` (prompt plus `max_tokens` of each request) count what waits too.
    """

    weight: float = 1.0
    max_requests: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight: {self.weight}, expected a number above 0")
        for name in ("max_requests", "max_tokens"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"{name}: {limit}, expected at least 1")


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """One request at the gate. `is_admitted`: it may go to a worker; `has_begun`: its first token came."""

    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    arrived_at: float
    deadline: float
    is_admitted: bool = False
    has_begun: bool = False
    is_over: bool = False
    charged: float = 0.0
    """Tokens that its tenant was charged so far."""

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.max_tokens

    @property
    def is_waiting(self) -> bool:
        return not (self.is_admitted or self.is_over)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not taken, in words for its client."""

    status: int
    message: str
    retry_after_s: float | None = None


@dataclass(slots=True, eq=False)
class Tenant:
    """`served`: tokens charged to it over its weight, its virtual time; the tenant with the least is next."""

    name: str
    limits: TenantLimits
    line: WaitingLine[QueuedRequest] = field(default_factory=WaitingLine)
    served: float = 0.0
    num_requests: int = 0
    num_tokens: int = 0
    mean_answer: float = FIRST_GUESS_TOKENS
    ended_requests: DrainRate = field(default_factory=DrainRate)
    ended_tokens: DrainRate = field(default_factory=DrainRate)

    def refusal(self, turn: QueuedRequest, now: float) -> Refusal | None:
        """Why its limits forbid one more request like this, if they do."""
        limits, of = self.limits, f"API key of `{self.name}`" if self.name else "server"
        if limits.max_tokens is not None and turn.most_tokens > limits.max_tokens:
            return Refusal(
                400,
                f"the request may take {turn.most_tokens} tokens, more than the {limits.max_tokens} that the {of} may "
                "have in flight at all; shorten the prompt or lower `max_tokens`",
            )
        if limits.max_requests is not None and (excess := self.num_requests + 1 - limits.max_requests) > 0:
            return Refusal(
                429,
                f"{self.num_requests} requests are in flight, as many as the {of} may have; wait for one to end",
                self.ended_requests.seconds_for(excess, now),
            )
        if limits.max_tokens is not None and (excess := self.num_tokens + turn.most_tokens - limits.max_tokens) > 0:
            return Refusal(
                429,
                f"the requests in flight may take {self.num_tokens} tokens and this one {turn.most_tokens}; the {of} "
                f"may have {limits.max_tokens}; wait for one to end",
                self.ended_tokens.seconds_for(excess, now),
            )
        return None

    def come(self, turn: QueuedRequest) -> None:
        self.num_requests += 1
        self.num_tokens += turn.most_tokens

    def go(self, turn: QueuedRequest, now: float) -> None:
        self.num_requests -= 1
        self.num_tokens -= turn.most_tokens
        if turn.is_admitted:  # what was refused or left while it waited says nothing of how fast answers end
            self.ended_requests.note(1, now)
            self.ended_tokens.note(turn.most_tokens, now)

    def charge(self, turn: QueuedRequest) -> None:
        """For its prompt and for an answer as long as this tenant's mostly are."""
        self._charge(turn, turn.prompt_tokens + min(turn.max_tokens, self.mean_answer))

    def settle(self, turn: QueuedRequest, num_tokens: int) -> None:
        """The answer had so many tokens: charge what it was."""
        self.mean_answer += (num_tokens - self.mean_answer) * WEIGHT_OF_ONE
        self._charge(turn, turn.prompt_tokens + num_tokens)

    def _charge(self, turn: QueuedRequest, total: float) -> None:
        self.served += (total - turn.charged) / self.limits.weight
        turn.charged = total
