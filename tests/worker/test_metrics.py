"""A worker's figures as its lease carries them."""

from __future__ import annotations

from support.model.engine_pair import TestedEngine, greedy, key, prompt_of

from disagg.engine.commands import Serve
from disagg.transceiver.peers.link import LinkSpeed
from disagg.transceiver.wire.messages.values import MetricSample
from disagg.worker.metrics import WorkerMetrics


def link_samples(metrics: WorkerMetrics) -> list[MetricSample]:
    stats = TestedEngine(role="decode").stats()
    return [sample for sample in metrics.samples(stats) if sample.name == "disagg_link_gb_per_second"]


def test_each_open_link_is_a_gauge_labelled_with_plane_and_lane() -> None:
    metrics, links = WorkerMetrics(["full"]), [LinkSpeed("prefill-0", "ucx", "rc_mlx5", 11.5)]
    assert link_samples(metrics) == []
    metrics.watch_links(lambda: links)
    labels = (("peer", "prefill-0"), ("plane", "ucx"), ("lane", "rc_mlx5"))
    assert link_samples(metrics) == [MetricSample("disagg_link_gb_per_second", "gauge", labels, 11.5)]
    links.clear()
    assert link_samples(metrics) == []


def test_a_later_registrations_links_take_the_place_of_the_last_ones() -> None:
    metrics = WorkerMetrics(["full"])
    metrics.watch_links(lambda: [LinkSpeed("gone", "tcp", "", 1.0)])
    metrics.watch_links(lambda: [LinkSpeed("here", "shm", "", 5.0)])
    assert [dict(sample.labels)["peer"] for sample in link_samples(metrics)] == ["here"]


def test_blocks_that_windows_let_go_are_counted_per_group() -> None:
    engine = TestedEngine()
    names = [group.name for group in engine._cache.layout.groups]
    engine.serve_all([Serve(key(1), prompt_of(40), greedy(4, ignore_eos=True))])
    samples = WorkerMetrics(names).samples(engine.stats())
    found = {dict(x.labels)["group"]: x.value for x in samples if x.name == "disagg_window_evictions_total"}
    assert found == dict(zip(names, engine._cache.num_outdated, strict=True))
    windowed = [group.name for group in engine._cache.layout.groups if group.window is not None]
    assert {name for name in names if found[name] > 0} == set(windowed)
