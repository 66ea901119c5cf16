"""What router and workers say of themselves twice a second: that they live, how they stand, how fast they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from disagg.transceiver.wire.messages.ranges import (
    MAX_ADDRESS_CHARS,
    MAX_GROUPS,
    MAX_INT32,
    MAX_LEASED,
    MAX_LINKS,
    MAX_NAME_CHARS,
    MAX_SAMPLES,
    MAX_TEXT_CHARS,
    check_finite,
    check_id,
    check_int,
    check_ints,
    check_size,
    check_transfers,
)
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.values import MetricSample


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """What a worker says of one peer. `state`: `ready`, `suspect`, `lost`, `connecting` or `refused`; `detail` names
    the field that differs. Of the last transfers: `gb_per_s`, before the first that of a probe; `latency_s`, from their
    last byte to their end.
    """

    incarnation: str
    worker_id: str
    plane: str
    state: str
    gb_per_s: float
    detail: str = ""
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("plane", self.plane, MAX_ADDRESS_CHARS)
        check_size("state", self.state, MAX_NAME_CHARS)
        check_finite("gb_per_s", self.gb_per_s)
        check_finite("latency_s", self.latency_s)
        check_size("detail", self.detail, MAX_TEXT_CHARS)


READY = "ready"
DRAINING = "draining"
"""`state` of the leases of a worker that finishes what it has and wants nothing new."""
LEAVING = "leaving"
"""`state` of a worker's last lease: it ends its registration itself, so no timeout has to find out."""
YOUNG_TOKENS: Final = 8
"""A request that emitted so many was in as many steps of this worker and ended none: what ends one now is another."""
BROKEN = "broken"
"""As LEAVING, of a worker whose model thread died: `requests` are the new ones of the step that it died in."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Both ways, every 0.5 s, from a thread of its own: this process lives, however busy its event loop is.

    With `in_step` from the model thread, before each step whose new requests differ from the last one's: attempts in
    the step that have emitted fewer than 8 tokens here. Should the process die now, it was in that step.
    """

    incarnation: str
    in_step: Annotated[tuple[tuple[str, int], ...], MAX_LEASED] | None = None

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        if self.in_step is not None:
            check_transfers("in_step", self.in_step, MAX_LEASED)


@dataclass(frozen=True, slots=True)
class Lease:
    """Both ways, every 0.5 s. A worker's carries its figures and live requests, the router's only its incarnation.

    `metrics`, `links` and `rates` None: as in the last lease that had them. They are most of it, and seldom change.
    """

    incarnation: str
    router_incarnation: str
    state: str = READY
    metrics: Annotated[tuple[MetricSample, ...], MAX_SAMPLES] | None = None
    requests: Annotated[tuple[tuple[str, int], ...], MAX_LEASED] = ()
    num_running: int = 0
    num_queued: int = 0
    blocks_used: Annotated[tuple[int, ...], MAX_GROUPS] = ()
    blocks_free: Annotated[tuple[int, ...], MAX_GROUPS] = ()
    links: Annotated[tuple[LinkStatus, ...], MAX_LINKS] | None = None
    rates: MeasuredRates | None = None

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_size("router_incarnation", self.router_incarnation, MAX_NAME_CHARS)
        check_size("state", self.state, MAX_NAME_CHARS)
        check_size("metrics", self.metrics or (), MAX_SAMPLES)
        check_transfers("requests", self.requests, MAX_LEASED)
        check_int("num_running", self.num_running, 0, MAX_INT32)
        check_int("num_queued", self.num_queued, 0, MAX_INT32)
        for name in ("blocks_used", "blocks_free"):
            check_size(name, getattr(self, name), MAX_GROUPS)
            check_ints(name, getattr(self, name), 0, MAX_INT32)
        check_size("links", self.links or (), MAX_LINKS)
