"""A lease leaves out what the router has heard, and the router keeps it."""

from __future__ import annotations

from dataclasses import replace

from support.cluster.router_harness import make_link, make_register

from disagg.router.registry import Registry
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import Lease, LinkStatus
from disagg.transceiver.wire.messages.values import MetricSample
from disagg.worker.lease_news import RATES_S, SPEEDS_S, LeaseNews


def sample(value: float) -> MetricSample:
    return MetricSample("steps", "counter", (), value)


def lease(value: float, *links: LinkStatus) -> Lease:
    return Lease("w", "router", metrics=(sample(value),), links=links)


def test_links_are_told_when_a_state_changes_and_their_speeds_now_and_then() -> None:
    now = 0.0
    news = LeaseNews(lambda: now)
    ready, lost = make_link("p0"), make_link("p0", "lost")
    faster = LinkStatus("p0", "p0", "shm", "ready", 9.0)
    assert news.of(lease(1, ready)).links == (ready,)
    assert news.of(lease(1, faster)).links is None
    assert news.of(lease(1, lost)).links == (lost,), "a state is told at once"
    assert news.of(lease(1)).links == (), "so is a link that is no more"
    now = SPEEDS_S
    assert news.of(lease(1)).links == ()


def test_metrics_are_told_as_often_as_the_router_asks_and_only_when_they_changed() -> None:
    now = 0.0
    news = LeaseNews(lambda: now)
    news.metrics_every_s = 5.0
    assert news.of(lease(1)).metrics == (sample(1),)
    assert news.of(lease(2)).metrics is None
    now = 5.0
    assert news.of(lease(2)).metrics == (sample(2),)
    now = 15.0
    assert news.of(lease(2)).metrics is None


def test_rates_are_told_when_they_changed_once_a_second_at_most() -> None:
    now = 0.0
    news = LeaseNews(lambda: now)
    first, second = MeasuredRates(1.0), MeasuredRates(2.0)
    assert news.of(replace(lease(1), rates=first)).rates == first
    assert news.of(replace(lease(1), rates=second)).rates is None
    now = RATES_S
    assert news.of(replace(lease(1), rates=second)).rates == second
    now = 9.0
    assert news.of(replace(lease(1), rates=second)).rates is None


def test_the_registry_keeps_what_a_lease_leaves_out() -> None:
    registry = Registry()
    registry.register(make_register("w", "decode"), 0.0)
    registry.renew(replace(lease(1, make_link("p0")), rates=MeasuredRates(7.0)), 0.0)
    registry.renew(Lease("w", "router", num_running=3), 0.5)
    worker = registry.get("w")
    assert worker is not None
    assert (worker.lease.metrics, worker.lease.num_running) == ((sample(1),), 3)
    assert worker.link_state("p0") == "ready"
    assert worker.lease.rates == MeasuredRates(7.0)
    registry.renew(lease(1), 1.0)
    assert worker.link_state("p0") == "connecting"
