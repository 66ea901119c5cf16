"""A worker's figures: counters it keeps itself, and gauges read from the engine, as its lease carries them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from disagg.cache.pool import NUM_RESERVED_SLOTS
from disagg.engine.stats import EngineStats
from disagg.loop_lag import LoopLag
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.peers.link import LinkSpeed
from disagg.transceiver.wire.messages.values import MetricSample

Labels = tuple[tuple[str, str], ...]


class WorkerMetrics:
    """Counters by (name, labels). Only the event loop changes them."""

    def __init__(self, group_names: Sequence[str]) -> None:
        self._group_names = group_names
        self._counters: Counter[tuple[str, Labels]] = Counter()
        self.loop_lag = LoopLag()
        self._read: dict[str, Callable[[], int]] = {}
        self._read_links: Callable[[], Iterable[LinkSpeed]] = tuple
        self._read_faults: Callable[[], int] = int

    def count_transfer(self, record: TransferRecord, outcome: str) -> None:
        """One transfer ended: payload bytes that landed per group, by what became of them."""
        of_it: Labels = (("plane", record.plane), ("purpose", record.purpose))
        self._count("disagg_transfers_total", (*of_it, ("outcome", outcome)))
        self._count("disagg_transfer_operations_total", of_it, record.num_operations)
        for group, amount in record.nbytes.items():
            labels = (*of_it, ("group", self._group_names[group]), ("outcome", outcome))
            self._count("disagg_transfer_bytes_total", labels, amount)
        self._count("disagg_kv_saturated_total", (("at", "landed"),), record.num_saturated)

    def count_refused(self, purpose: str, why: str) -> None:
        """A peer asked for, or sent, what the transfer does not allow."""
        self._count("disagg_transfers_refused_total", (("purpose", purpose), ("why", why)))

    def count_digest_failure(self, num_units: int) -> None:
        self._count("disagg_digest_failures_total", (), num_units)

    def count_rehashed(self, why: str, result: str, num_blocks: int) -> None:
        """Blocks of this worker that were hashed again: because a prefix hit or a `peer` asked, and what came of it."""
        self._count("disagg_blocks_rehashed_total", (("why", why), ("result", result)), num_blocks)

    def watch_saturation(self, at: str, read: Callable[[], int]) -> None:
        """`read()`: numbers `at` (computed or sent) that were stored as the largest of their format; it never falls."""
        self._read[at] = read

    def watch_links(self, read: Callable[[], Iterable[LinkSpeed]]) -> None:
        """`read()`: the open data planes to this worker's peers. A later registration's take the place of these."""
        self._read_links = read

    def watch_faults(self, read: Callable[[], int]) -> None:
        """`read()`: messages of peers that could not be taken, each of which cost its peer the connection."""
        self._read_faults = read

    def samples(self, stats: EngineStats) -> tuple[MetricSample, ...]:
        """Everything, as one snapshot."""
        counters = (MetricSample(name, "counter", labels, value) for (name, labels), value in self._counters.items())
        saturated = (
            MetricSample("disagg_kv_saturated_total", "counter", (("at", at),), read())
            for at, read in self._read.items()
        )
        links = map(_link_sample, self._read_links())
        # Gauges, as a lease has no histograms: a bucket is a series like any other to Prometheus.
        lag = (MetricSample(name, "gauge", labels, value) for name, labels, value in self.loop_lag.samples())
        faults = MetricSample("disagg_peer_faults_total", "counter", (), self._read_faults())
        grouped = self._group_samples(stats)
        return (*counters, *saturated, faults, *links, *lag, *_engine_samples(stats), *grouped)

    def _group_samples(self, stats: EngineStats) -> Iterator[MetricSample]:
        """Blocks per layer group: let go by windows; asked of the cache and found, whose quotient is the hit rate."""
        for group, count in zip(self._group_names, stats.num_outdated, strict=False):
            yield MetricSample("disagg_window_evictions_total", "counter", (("group", group),), count)
        for group, reuse in zip(self._group_names, stats.reuse, strict=False):  # none where nothing is reused
            labels = (("group", group),)
            yield MetricSample("disagg_prefix_queries_total", "counter", labels, reuse.num_queried)
            yield MetricSample("disagg_prefix_hits_total", "counter", labels, reuse.num_hit)

    def _count(self, name: str, labels: Labels, amount: int = 1) -> None:
        self._counters[name, labels] += amount


def _link_sample(link: LinkSpeed) -> MetricSample:
    labels = (("peer", link.peer), ("plane", link.plane), ("lane", link.lane))
    return MetricSample("disagg_link_gb_per_second", "gauge", labels, link.gb_per_s)


def _engine_samples(stats: EngineStats) -> Iterator[MetricSample]:
    for name, value in (
        ("disagg_prompt_tokens_computed_total", stats.prompt_tokens_computed),
        ("disagg_tokens_generated_total", stats.tokens_generated),
        ("disagg_engine_steps_total", stats.steps),
        ("disagg_preemptions_total", stats.num_preemptions),
        ("disagg_pieces_dropped_total", stats.num_dropped),
        ("disagg_graph_replays_total", stats.graphs.num_replays),
    ):
        yield MetricSample(name, "counter", (), value)
    for state, count in stats.released:
        yield MetricSample("disagg_requests_released_total", "counter", (("state", state),), count)
    for name, value in (
        ("disagg_requests_running", stats.num_running),
        ("disagg_requests_waiting", stats.num_waiting),
        ("disagg_requests_soft", stats.num_soft),
        ("disagg_graph_bytes", stats.graphs.nbytes),
    ):
        yield MetricSample(name, "gauge", (), value)
    for number, pool in enumerate(stats.pools):
        labels = (("pool", str(number)),)
        yield MetricSample("disagg_kv_blocks_total", "gauge", labels, pool.num_slots - NUM_RESERVED_SLOTS)
        yield MetricSample("disagg_kv_blocks_used", "gauge", labels, pool.num_used)
        yield MetricSample("disagg_kv_blocks_free", "gauge", labels, pool.num_free)
        yield MetricSample("disagg_kv_blocks_peak", "gauge", labels, pool.peak_used)
        yield MetricSample("disagg_kv_blocks_scratch", "gauge", labels, stats.scratch[number] if stats.scratch else 0)
        yield MetricSample("disagg_kv_blocks_cached", "gauge", labels, pool.num_cached)
        yield MetricSample("disagg_kv_evictions_total", "counter", labels, pool.num_evicted)
