"""Which parts of a lease are news. A router may have a thousand workers, each of which sends two leases a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from disagg.transceiver.wire.messages.router import Lease, LinkStatus
from disagg.transceiver.wire.messages.values import MetricSample

SPEEDS_S: Final = 5.0
"""Least time between reports of links of which only the measured speed has changed."""

Speedless = tuple[tuple[str, str, str, str], ...]


class LeaseNews:
    """Of one registration: leaves out what the router has heard."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.metrics_every_s = 0.0
        """What the router of a large fleet asks for."""
        self._metrics: tuple[MetricSample, ...] | None = None
        self._links: Speedless | None = None
        self._metrics_at = self._links_at = float("-inf")

    def of(self, lease: Lease) -> Lease:
        """The lease as it is sent."""
        now = self._clock()
        return replace(lease, metrics=self._new_metrics(lease, now), links=self._new_links(lease, now))

    def _new_metrics(self, lease: Lease, now: float) -> tuple[MetricSample, ...] | None:
        if lease.metrics == self._metrics or now - self._metrics_at < self.metrics_every_s:
            return None
        self._metrics, self._metrics_at = lease.metrics, now
        return lease.metrics

    def _new_links(self, lease: Lease, now: float) -> tuple[LinkStatus, ...] | None:
        links = _without_speed(lease.links or ())
        if links == self._links and now - self._links_at < SPEEDS_S:
            return None
        self._links, self._links_at = links, now
        return lease.links


def _without_speed(links: tuple[LinkStatus, ...]) -> Speedless:
    return tuple((link.incarnation, link.plane, link.state, link.detail) for link in links)
