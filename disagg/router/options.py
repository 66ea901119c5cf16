"""What a router is told when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from disagg.router.costs.decide import POLICIES
from disagg.router.gate import AHEAD_PER_SERVER
from disagg.router.going_on import MAX_CONTINUATIONS
from disagg.router.introductions import Connect
from disagg.router.tenants import TenantLimits


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """`expected_fingerprint`: the model every worker must have; None lets the first worker decide.

    `max_continuations`: losses that one answer may survive in its middle; 0: a loss ends it with an error. `tenants`:
    limits by the names of API keys; others have none. `ahead_per_server`: see `gate`. `connect`: see `introductions`.
    `policy`: how a way to serve is chosen, by the names of `costs.decide.POLICIES`; `max_local_prefill`: tokens of a
    prompt that may be computed where others' answers are decoded.
    """

    expected_fingerprint: str | None = None
    max_attempts: int = 3
    max_continuations: int = MAX_CONTINUATIONS
    max_queued: int = 1024
    request_timeout_s: float = 600.0
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)
    ahead_per_server: int = AHEAD_PER_SERVER
    connect: Connect = "auto"
    policy: str = "prefix-aware"
    max_local_prefill: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy: `{self.policy}`, expected one of {', '.join(POLICIES)}")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: {self.max_attempts}, expected at least 1")
        if self.max_continuations < 0:
            raise ValueError(f"max_continuations: {self.max_continuations}, expected at least 0")
        if self.max_queued < 1:
            raise ValueError(f"max_queued: {self.max_queued}, expected at least 1")
        if not self.request_timeout_s > 0:
            raise ValueError(f"request_timeout_s: {self.request_timeout_s}, expected more than 0")
