"""Prometheus text of the router and of every worker. One collector per router, no global registry, sorted output."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from disagg.loop_lag import LoopLag
from disagg.router.registry import Worker
from disagg.router.token_gaps import TokenGaps
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.values import MetricSample

_TTFT_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""From one hop on a fast machine to the default request timeout, two to three per decade."""
_ITL_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
"""From a kernel-bound step on a GPU to the time after which a worker is lost anyway."""
_RATIO_BUCKETS: Final = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.11, 1.25, 1.5, 2, 4, 10)
"""Symmetric around 1, where the estimate was exact."""
_FAMILIES: Final = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class RouterMetrics:
    """What the router itself measures, and where every worker's figures are joined to it."""

    def __init__(self, workers: Callable[[], Iterable[Worker]], *more: Collector) -> None:
        """`more`: what other parts of the router count."""
        self.ttft = _histogram(
            "time_to_first_token_seconds", "From receipt of a request to its first token", _TTFT_BUCKETS
        )
        self.estimate_ratio = _histogram(
            "ttft_estimate_ratio",
            "From placing a request to its first token, over the time estimated when it was placed",
            _RATIO_BUCKETS,
        )
        self.itl = TokenGaps("disagg_inter_token_latency_seconds", "Between tokens of one answer", _ITL_BUCKETS)
        self.e2e = _histogram("e2e_request_latency_seconds", "From receipt of a request to its end", _TTFT_BUCKETS)
        self.requests = Counter("disagg_requests", "Requests that ended", ["outcome"], registry=None)
        self.attempts = Counter("disagg_attempts", "Attempts that began", ["mode"], registry=None)
        self.running = Gauge("disagg_requests_running", "Requests in progress at the router", registry=None)
        self.loop_lag = LoopLag()
        self.charged_deaths = Counter(
            "disagg_charged_deaths", "Worker deaths charged to requests that were new in their last step", registry=None
        )
        self.refused_after_deaths = Counter(
            "disagg_requests_refused_after_deaths", "Requests not tried again after two such deaths", registry=None
        )
        self.continuations = Counter(
            "disagg_continuations", "Answers that went on elsewhere after their worker was lost", registry=None
        )
        self.inexact = Counter(
            "disagg_continuations_inexact", "Those of them whose KV is stored in another format there", registry=None
        )
        self.continuation_gap = _histogram(
            "continuation_gap_seconds", "From the last token before such a loss to the next one", _TTFT_BUCKETS
        )
        self.moves = Counter("disagg_moves", "Moves of answers to other workers that ended", ["outcome"], registry=None)
        self.move_pause = _histogram(
            "move_pause_seconds", "From the last token before a move to the first after it", _ITL_BUCKETS
        )
        self.peer_faults = Counter(
            "disagg_peer_faults",
            "Messages of workers that could not be taken, at the cost of their connection",
            registry=None,
        )
        own = (
            *(self.ttft, self.estimate_ratio, self.itl, self.e2e, self.requests, self.attempts, self.running),
            *(self.loop_lag, self.charged_deaths, self.refused_after_deaths, self.peer_faults),
            *(self.continuations, self.inexact, self.continuation_gap, self.moves, self.move_pause, *more),
        )
        self._own: list[Collector] = [*own]
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Everything(self._own, workers))

    def add(self, collector: Collector) -> None:
        """Tell what another part of this process counts too."""
        self._own.append(collector)

    def went_on(self, gap_s: float, *, is_exact: bool) -> None:
        """An answer has its next token after a loss, `gap_s` seconds after the one before it."""
        self.continuations.inc()
        self.inexact.inc(not is_exact)
        self.continuation_gap.observe(gap_s)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"disagg_{name}", documentation, buckets=buckets, registry=None)


class _Everything(Collector):
    """The router's own families and the workers', in one pass so that no name can appear twice."""

    def __init__(self, own: Iterable[Collector], workers: Callable[[], Iterable[Worker]]) -> None:
        self._own = own
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        reserved: set[str] = set()
        for collector in self._own:
            for family in collector.collect():
                # A creation time differs from run to run and says what `process_start_time` would say better.
                family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
                reserved |= {family.name, f"{family.name}_total", *(sample.name for sample in family.samples)}
                yield family
        yield from worker_families(self._workers(), reserved)


def worker_families(workers: Iterable[Worker], reserved: set[str]) -> Iterator[Metric]:
    """One family per figure, labelled `worker`. Names get `disagg_`; where the router has one, `disagg_worker_`."""
    found: dict[str, list[tuple[str, MetricSample]]] = defaultdict(list)
    for worker in workers:
        for sample in (*lease_samples(worker), *(worker.lease.metrics or ())):  # the worker's own word is the last
            if _NAME.fullmatch(sample.name) and sample.kind in _FAMILIES and not math.isnan(sample.value):
                found[_series_name(sample, reserved)].append((worker.worker_id, sample))
    return (_family(name, samples) for name, samples in sorted(found.items()))


def lease_samples(worker: Worker) -> Iterator[MetricSample]:
    """Figures that every lease carries anyway, unless the worker's own metrics say the same under the same name."""
    own = {sample.name.removeprefix("disagg_") for sample in worker.lease.metrics or ()}
    lease = worker.lease
    figures = [
        *(("kv_blocks_used", (("pool", str(i)),), n) for i, n in enumerate(lease.blocks_used)),
        *(("kv_blocks_free", (("pool", str(i)),), n) for i, n in enumerate(lease.blocks_free)),
        ("worker_requests_running", (), lease.num_running),
        ("worker_requests_queued", (), lease.num_queued),
        *_rate_figures(lease.rates or MeasuredRates()),
    ]
    return (MetricSample(name, "gauge", labels, float(value)) for name, labels, value in figures if name not in own)


def _rate_figures(rates: MeasuredRates) -> Iterator[tuple[str, tuple[tuple[str, str], ...], float]]:
    if rates.prefill_tokens_per_s:
        yield "prefill_tokens_per_second", (), rates.prefill_tokens_per_s
    for count, seconds in rates.step_s:
        yield "decode_step_seconds", (("answers", str(count)),), seconds


def _series_name(sample: MetricSample, reserved: set[str]) -> str:
    """The name in the text: counters end in `_total`, nothing has a name of the router's own."""
    name = sample.name.removeprefix("disagg_")
    if sample.kind == "counter":
        name = f"{name.removesuffix('_total')}_total"
    return f"disagg_worker_{name}" if f"disagg_{name}" in reserved else f"disagg_{name}"


def _family(name: str, samples: list[tuple[str, MetricSample]]) -> Metric:
    """Workers may label one figure differently; a label that a sample lacks is empty: to Prometheus, absent.

    Should they disagree on its kind, which only different versions do, it is the first worker's: a family has one.
    """
    kind = samples[0][1].kind
    samples = [(worker, sample) for worker, sample in samples if sample.kind == kind]
    given = {label for _, sample in samples for label, _ in sample.labels if _NAME.fullmatch(label)}
    labels = sorted(given - {"worker"})
    documentation = f"As the worker reported it: {name.removeprefix('disagg_')}"
    family: CounterMetricFamily | GaugeMetricFamily = _FAMILIES[kind](name, documentation, labels=["worker", *labels])
    rows = {
        (worker, *(dict(sample.labels).get(label, "") for label in labels)): sample.value for worker, sample in samples
    }
    for row, value in sorted(rows.items()):
        family.add_metric(list(row), value)
    return family
