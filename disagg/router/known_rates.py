"""A worker as the cost function sees it: its rates as it last said them, its queue as the router counts it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from disagg.router.costs.kv_shape import GroupShape, KvShape
from disagg.router.costs.rates import LinkRate, Rates
from disagg.router.costs.ways import Candidate
from disagg.router.pairing import MAX_KINDS_COMPARED, kv_format, traits_difference
from disagg.router.registry import Registry, Worker
from disagg.router.workload import Workload
from disagg.transceiver.layout.strides import ELEMENT_NBYTES
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import LinkStatus
from disagg.transceiver.wire.messages.values import Geometry
from disagg.transceiver.wire.purposes import HANDOFF, PREFIX, shared

FIRST_GUESS: Final = MeasuredRates(2000.0, 0.01, ((1, 0.02),))
"""Of a worker of which nothing is known, nor of another on such a device: as all are given it, it decides nothing."""
LINK_GUESS_GB_PER_S: Final = 1.0
"""Of a link that was not measured, likewise."""

CONNECT_S: Final = 0.05
"""Of a link that the first request makes: some round trips, and a measurement."""

MAX_LINKS_KEPT: Final = 1 << 14
"""Of 128 by 128 workers, 3 MB; of a larger fleet those that are asked of."""

MIN_RATE: Final = 1e-3
MAX_RATE: Final = 1e12
MAX_SECONDS: Final = 1e6
"""A worker's figures are taken within these: whatever it says, sums of them stay numbers."""


@dataclass(slots=True)
class _Known:
    """What was made of one worker's words, until it says others."""

    kv: KvShape
    measured: MeasuredRates | None = None
    rates: Rates | None = None


class KnownRates:
    """By incarnation. Workers that have measured nothing yet are taken to be as fast as the last one that had."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._last: dict[str, MeasuredRates] = {}
        """By kind of device."""

    def forget(self, incarnation: str) -> None:
        self._known.pop(incarnation, None)

    def candidate(self, worker: Worker, workload: Workload, num_requests: int) -> Candidate:
        """`num_requests`: placed there and not seen end."""
        known = self._look(worker)
        assert known.rates is not None
        incarnation, rates = worker.incarnation, known.rates
        num_answers = workload.answers[incarnation]
        return Candidate(
            incarnation,
            worker.role,
            known.kv,
            rates,
            queue_s=workload.prompt_tokens[incarnation] / rates.prefill_tokens_per_s,
            room_s=_room_s(worker, rates, num_answers, workload.mean_answer),
            num_answers=num_answers,
            num_requests=num_requests,
        )

    def _look(self, worker: Worker) -> _Known:
        known = self._known.get(worker.incarnation)
        if known is None:
            known = self._known[worker.incarnation] = _Known(kv_shape_of(worker.register.geometry))
        said = worker.lease.rates
        if known.rates is None or known.measured is not said or said is None:
            known.measured, known.rates = said, self._rates_of(worker.register.device, said or MeasuredRates())
        return known

    def _rates_of(self, device: str, said: MeasuredRates) -> Rates:
        kind = device.partition(":")[0]
        last = self._last.get(kind, FIRST_GUESS)
        is_measured = said.prefill_tokens_per_s > 0
        whole = MeasuredRates(
            said.prefill_tokens_per_s or last.prefill_tokens_per_s,
            said.prompt_step_s if is_measured else last.prompt_step_s,
            said.step_s or last.step_s,
        )
        self._last[kind] = whole
        steps = tuple((count, min(seconds, MAX_SECONDS)) for count, seconds in whole.step_s)
        tokens_per_s = min(max(whole.prefill_tokens_per_s, MIN_RATE), MAX_RATE)
        return Rates(tokens_per_s, steps, min(whole.prompt_step_s, MAX_SECONDS))


class KnownLinks:
    """The links of the registered workers, as the cost function asks for them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._made: dict[tuple[str, str], tuple[LinkStatus, LinkRate]] = {}
        """What was made of the last reports: a choice asks of a dozen links, a report comes every few seconds."""

    def __call__(self, source: str, sink: str) -> LinkRate | None:
        """None where KV cannot go from one to the other now, or only over a link that may be lost."""
        ends = self._registry.get(source), self._registry.get(sink)
        if ends[0] is None or ends[1] is None:
            return None
        report = ends[1].link_reports.get(source)
        made = self._made.get((source, sink)) if report is not None else None
        if made is not None and made[0] is report:
            return made[1]
        return self._make(ends[0], ends[1], report)

    def _make(self, source: Worker, sink: Worker, report: LinkStatus | None) -> LinkRate | None:
        state, traits = sink.link_state(source.incarnation), (source.traits, sink.traits)
        if state not in ("ready", "idle") or traits_difference(*traits) is not None:
            return None
        purposes = shared(source.sends, sink.receives)
        is_exact = kv_format(traits[0].geometry) == kv_format(traits[1].geometry)
        fetches = PREFIX in purposes and is_exact
        if report is None or state != "ready":
            return LinkRate(LINK_GUESS_GB_PER_S, CONNECT_S, hands_over=HANDOFF in purposes, fetches=fetches)
        rate = LinkRate(*_speed_of(report), hands_over=HANDOFF in purposes, fetches=fetches)
        if len(self._made) >= MAX_LINKS_KEPT:
            self._made.clear()
        self._made[source.incarnation, sink.incarnation] = report, rate
        return rate


def _speed_of(report: LinkStatus) -> tuple[float, float]:
    """GB/s and latency, within bounds."""
    gb_per_s = min(max(report.gb_per_s, MIN_RATE), MAX_RATE) if report.gb_per_s > 0 else LINK_GUESS_GB_PER_S
    return gb_per_s, min(max(report.latency_s, 0.0), MAX_SECONDS)


@lru_cache(maxsize=MAX_KINDS_COMPARED)
def kv_shape_of(geometry: Geometry) -> KvShape:
    """Bytes of whole blocks, over all ranks of the worker."""
    element = ELEMENT_NBYTES.get(geometry.kv_dtype, 2)
    return KvShape(
        geometry.block_size,
        tuple(
            GroupShape(
                group.window,
                group.num_sink_tokens,
                len(group.layers) * 2 * group.num_kv_heads * group.head_dim * geometry.block_size * element,
            )
            for group in geometry.groups
        ),
    )


def _room_s(worker: Worker, rates: Rates, num_answers: int, mean_answer: float) -> float:
    """Until those that wait there for room have it: one gets it whenever an answer ends."""
    num_waiting = worker.lease.num_queued if worker.role != "prefill" else 0
    if not num_waiting or not num_answers:
        return 0.0
    between_ends_s = mean_answer * rates.step_seconds(num_answers) / num_answers
    return min(num_waiting * between_ends_s, MAX_SECONDS)
