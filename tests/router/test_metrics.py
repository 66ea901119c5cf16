"""Workers' figures as Prometheus text: whatever a worker sends, the text stays one that Prometheus reads."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from support.cluster.router_harness import make_lease, make_register

from disagg.router.metrics import RouterMetrics
from disagg.router.registry import Worker
from disagg.transceiver.wire.messages.router import Lease
from disagg.transceiver.wire.messages.values import MetricSample


def worker(worker_id: str, *samples: MetricSample) -> Worker:
    lease = Lease(worker_id, "router", metrics=samples, blocks_used=(3, 1), blocks_free=(59, 29))
    return Worker(make_register(worker_id, "decode"), lease, 0.0)


def text(*workers: Worker) -> str:
    return RouterMetrics(lambda: workers).text().decode()


def test_figures_of_two_workers_share_one_family() -> None:
    sample = MetricSample("disagg_engine_steps_total", "counter", (), 5.0)
    lines = text(worker("a", sample), worker("b", sample)).splitlines()
    assert lines.count("# TYPE disagg_engine_steps_total counter") == 1
    assert 'disagg_engine_steps_total{worker="a"} 5.0' in lines
    assert 'disagg_engine_steps_total{worker="b"} 5.0' in lines


def test_a_worker_s_own_block_gauges_replace_those_of_its_lease() -> None:
    own = MetricSample("disagg_kv_blocks_used", "gauge", (("pool", "0"),), 7.0)
    lines = text(worker("a", own)).splitlines()
    assert [line for line in lines if line.startswith("disagg_kv_blocks_used{")] == [
        'disagg_kv_blocks_used{pool="0",worker="a"} 7.0'
    ]
    assert 'disagg_kv_blocks_free{pool="1",worker="a"} 29.0' in lines


def test_a_name_of_the_router_s_own_is_told_apart() -> None:
    lines = text(worker("a", MetricSample("disagg_requests_total", "counter", (), 2.0))).splitlines()
    assert 'disagg_worker_requests_total{worker="a"} 2.0' in lines


def test_a_worker_cannot_speak_for_another() -> None:
    lines = text(worker("a", MetricSample("x", "gauge", (("worker", "b"),), 2.0))).splitlines()
    assert 'disagg_x{worker="a"} 2.0' in lines


def test_text_is_the_same_twice_and_for_workers_in_any_order() -> None:
    workers = [Worker(make_register(name, "decode"), make_lease(name), 0.0) for name in ("a", "b", "c")]
    assert text(*workers) == text(*reversed(workers))


names = st.one_of(
    st.sampled_from(["requests", "requests_total", "x", "x_total", "disagg_x", "kv_blocks_used"]), st.text(max_size=5)
)
labels = st.lists(
    st.tuples(st.one_of(st.sampled_from(["pool", "worker", "le"]), st.text(max_size=3)), st.text(max_size=3))
)
samples = st.builds(
    MetricSample,
    name=names,
    kind=st.sampled_from(["gauge", "counter", "histogram"]),
    labels=labels.map(tuple),
    value=st.floats(),
)


@given(first=st.lists(samples, max_size=6), second=st.lists(samples, max_size=6))
def test_no_sample_makes_the_text_unreadable_or_names_a_series_twice(
    first: list[MetricSample], second: list[MetricSample]
) -> None:
    found = text(worker("a", *first), worker("b", *second))
    types = [line for line in found.splitlines() if line.startswith("# TYPE")]
    assert len(set(types)) == len(types) == len({line.split()[2] for line in types})
    families = text_string_to_metric_families(found)
    series = [(sample.name, tuple(sorted(sample.labels.items()))) for family in families for sample in family.samples]
    assert len(set(series)) == len(series)
