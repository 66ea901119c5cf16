"""Which parts of a lease are news. A router may have a thousand workers, each of which sends two leases a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import Lease, LinkStatus
from disagg.transceiver.wire.messages.values import MetricSample

SPEEDS_S: Final = 5.0
"""Least time between reports of links of which only the measured speed has changed."""

RATES_S: Final = 1.0
"""Least time between reports of how fast this worker computes: each step changes it a little, and an estimate by rates
of a second ago is as good."""

Speedless = tuple[tuple[str, str, str, str], ...]


class LeaseNews:
    """Of one registration: leaves out what the router has heard."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.metrics_every_s = 0.0
        """What the router of a large fleet asks for."""
        self._metrics: tuple[MetricSample, ...] | None = None
        self._links: Speedless | None = None
        self._rates: MeasuredRates | None = None
        self._metrics_at = self._links_at = self._rates_at = float("-inf")

    def of(self, lease: Lease) -> Lease:
        """The lease as it is sent."""
        now = self._clock()
        metrics, links = self._new_metrics(lease, now), self._new_links(lease, now)
        return replace(lease, metrics=metrics, links=links, rates=self._new_rates(lease, now))

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

    def _new_rates(self, lease: Lease, now: float) -> MeasuredRates | None:
        if lease.rates == self._rates or now - self._rates_at < max(RATES_S, self.metrics_every_s):
            return None
        self._rates, self._rates_at = lease.rates, now
        return lease.rates


def _without_speed(links: tuple[LinkStatus, ...]) -> Speedless:
    return tuple((link.incarnation, link.plane, link.state, link.detail) for link in links)
