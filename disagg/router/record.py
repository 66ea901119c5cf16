"""What is remembered of a request for `GET /requests/{id}`: attempts, timeline, blocks and bytes. Bounded."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from typing import Any, Final

from disagg.router.choose import Placement
from disagg.router.costs.ways import Way
from disagg.router.generation import GenerationRequest
from disagg.transceiver.wire.messages.router import TransferReport
from disagg.transceiver.wire.purposes import HANDOFF

MAX_RECORDS: Final = 1024
"""Requests remembered: as many as may wait, so that a full queue's records outlive it. About 2 KB each."""

MAX_REPORTS: Final = 4
"""Reports kept of one attempt: one from each of two sides, and one repeat of each."""


@dataclass(slots=True)
class AttemptRecord:
    """One attempt: `mode` is `transfer`, `serve`, `retarget`, `local`, `move` or `resume`; `outcome` is `running` until
    it is known.

    `num_before`: tokens that the client had of all answers; with any the attempt goes on with them, and `is_exact` says
    whether its own are what would have followed.
    """

    epoch: int
    mode: str
    placement: Placement
    started_at: float
    num_before: int = 0
    is_exact: bool = True
    has_moved: bool = False
    """Whether the answer was taken over here from `placement.prefill`, which decoded it."""
    pause_s: float | None = None
    """Between the last token of the worker before and the first of this one, where the answer was moved."""
    ended_at: float | None = None
    outcome: str = "running"
    reports: list[tuple[str, TransferReport]] = field(default_factory=list)

    def end(self, outcome: str, now: float) -> None:
        if self.ended_at is None:
            self.outcome, self.ended_at = outcome, now

    def estimate_ratio(self, now: float) -> float | None:
        """The time to a first token that comes now over what it was estimated at; None where it was not estimated."""
        way = self.placement.way
        return None if way is None or way.ttft_s <= 0 else (now - self.started_at) / way.ttft_s

    @property
    def has_report_of_server(self) -> bool:
        return self.server_report is not None

    @property
    def server_report(self) -> TransferReport | None:
        """What landed, as the receiving side counted it."""
        server = self.placement.server.incarnation
        told = (report for source, report in self.reports if source == server and report.purpose == HANDOFF)
        return next(told, None)

    def stage_ends(self) -> Iterator[tuple[str, float]]:
        """(stage, seconds from dispatch to its end), in the order of what had to happen before the first token.

        The server's stages follow one another on its clock; the prompt is computed meanwhile, by the prefill worker
        on its own. Both were dispatched at once, so `prefill` ends at its own time and the stages after it count
        from there: wire time that prefill hid is not shown twice.
        """
        server = self._stages(is_server=True)
        source = self._stages(is_server=False) if self.placement.prefill else server
        end = server.get("queue", 0.0)
        yield "queue", end
        yield "prefill", source.get("queue", 0.0) + source.get("prefill", 0.0)
        for stage in ("transfer_wait", "wire", "verify"):
            end += server.get(stage, 0.0)
            yield stage, end

    def _stages(self, *, is_server: bool) -> dict[str, float]:
        server = self.placement.server.incarnation
        reports = [report for source, report in self.reports if (source == server) is is_server]
        return {name: seconds for report in reports for name, seconds in finite_stages(report).items()}

    def _stages_by_worker(self) -> dict[str, dict[str, float]]:
        """A worker has a report for each transfer that it received, and one for the prompt."""
        stages: dict[str, dict[str, float]] = {}
        for _, report in self.reports:
            stages.setdefault(report.worker_id, {}).update(finite_stages(report))
        return stages

    def describe(self, received_at: float) -> dict[str, Any]:
        prefill = self.placement.prefill
        return {
            "epoch": self.epoch,
            "mode": self.mode,
            "prefill": prefill.worker_id if prefill else None,
            "decode": self.placement.server.worker_id,
            "outcome": self.outcome,
            "tokens_before": self.num_before,
            "exact": self.is_exact,
            "pause_s": self.pause_s,
            "started_s": self.started_at - received_at,
            "ended_s": None if self.ended_at is None else self.ended_at - received_at,
            "stages": self._stages_by_worker(),
            "estimate": None if self.placement.way is None else _describe_way(self.placement.way),
        }


def _describe_way(way: Way) -> dict[str, Any]:
    """What placing expected, in seconds; `cost_s` also counts what this request costs others."""
    return {
        "ttft_s": way.ttft_s,
        "cost_s": way.cost_s,
        "queue_s": way.start.worker.queue_s,
        "compute_s": way.start.compute_s,
        "handoff_s": way.landing.handoff_s,
        "computed_tokens": way.start.num_computed,
        "moved_bytes": way.landing.nbytes,
    }


def finite_stages(report: TransferReport) -> dict[str, float]:
    """Stage times that are times: a worker's arithmetic must not reach JSON, which has no NaN."""
    return {name: seconds for name, seconds in report.times.stages if 0 <= seconds < math.inf}


@dataclass(slots=True)
class RequestRecord:
    """One request. `state` is `running`, `finished`, `failed` or `cancelled`; times by the router's clock.

    Of the request it keeps what it shows: a prompt of 131,072 ids takes 5 MB, and `MAX_RECORDS` are remembered.
    """

    request: InitVar[GenerationRequest]
    transfer_id: str
    received_at: float
    request_id: str = field(init=False)
    num_prompt_tokens: int = field(init=False)
    seeds: tuple[int, ...] = field(init=False)
    """Of each answer: with it the answer can be had again."""
    state: str = "running"
    status: int | None = None
    error: str | None = None
    num_tokens: int = 0
    first_token_at: float | None = None
    ended_at: float | None = None
    charged_deaths: tuple[str, ...] = ()
    """Workers that died in a step in which this request was new."""
    attempts: list[AttemptRecord] = field(default_factory=list)

    def __post_init__(self, request: GenerationRequest) -> None:
        self.request_id, self.num_prompt_tokens = request.request_id, len(request.prompt)
        self.seeds = tuple(request.sampling.of_choice(i).seed for i in range(request.sampling.num_choices))

    @property
    def current(self) -> AttemptRecord:
        return self.attempts[-1]

    @property
    def num_continuations(self) -> int:
        """Times that it was placed anew after its first token."""
        return sum(attempt.num_before > 0 and attempt.mode in ("transfer", "serve") for attempt in self.attempts)

    @property
    def num_moves(self) -> int:
        """Times that its answer was taken over by another worker."""
        return sum(attempt.has_moved for attempt in self.attempts)

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.received_at

    def name_of(self, incarnation: str) -> str:
        """The name of a worker that had a part in it."""
        for attempt in self.attempts:
            for target in (attempt.placement.server, attempt.placement.prefill):
                if target is not None and target.incarnation == incarnation:
                    return target.worker_id
        return incarnation

    def emitted(self, num_tokens: int, now: float) -> None:
        self.num_tokens = num_tokens
        if self.first_token_at is None:
            self.first_token_at = now

    def note(self, source: str, report: TransferReport) -> None:
        """Keep a worker's report of an attempt that it was part of."""
        for attempt in self.attempts:
            parties = (attempt.placement.server, attempt.placement.prefill)
            is_party = any(target is not None and target.incarnation == source for target in parties)
            if attempt.epoch == report.epoch and is_party and len(attempt.reports) < MAX_REPORTS:
                attempt.reports.append((source, report))

    def decision_in_words(self) -> str:
        """For the log: where the last attempt went, and its time to the first token beside the estimate."""
        if not self.attempts or (way := self.current.placement.way) is None:
            return ""
        placement = self.current.placement
        where = f"computed by `{placement.prefill.worker_id}`" if placement.prefill else "computed there"
        took = "no token" if self.first_token_at is None else f"{self.first_token_at - self.current.started_at:.3f} s"
        return f", `{placement.server.worker_id}`, {where}: {took} to the first token, {way.ttft_s:.3f} s estimated"

    def end(self, state: str, now: float, error: str | None) -> None:
        self.state, self.ended_at, self.error = state, now, error
        if self.attempts:
            self.current.end(error or state, now)

    def timeline(self) -> dict[str, float] | None:
        """Seconds to the first token, cut into stages that sum to it; None before it.

        `waiting` is the time to its turn at the router, `failed_attempts` what attempts before the one that gave the
        token took, and `first_token` what no report explains: sampling, messages, the router itself.
        """
        if self.ttft_s is None:
            return None
        first = next(attempt for attempt in reversed(self.attempts) if not attempt.num_before)
        dispatched = first.started_at - self.received_at
        ends = [("waiting", self.attempts[0].started_at - self.received_at), ("failed_attempts", dispatched)]
        ends += [(stage, dispatched + seconds) for stage, seconds in first.stage_ends()]
        timeline, at = {}, 0.0
        for stage, end in ends:
            reached = min(max(end, at), self.ttft_s)
            timeline[stage], at = reached - at, reached
        return timeline | {"first_token": self.ttft_s - at}

    def describe(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "transfer_id": self.transfer_id,
            "state": self.state,
            "status": self.status,
            "error": self.error,
            "prompt_tokens": self.num_prompt_tokens,
            "output_tokens": self.num_tokens,
            "seeds": list(self.seeds),
            "continuations": self.num_continuations,
            "moves": self.num_moves,
            "ttft_s": self.ttft_s,
            "e2e_s": None if self.ended_at is None else self.ended_at - self.received_at,
            "timeline": self.timeline(),
            "transfer": self._describe_transfer(),
            "charged_deaths": list(self.charged_deaths),
            "attempts": [attempt.describe(self.received_at) for attempt in self.attempts],
        }

    def _describe_transfer(self) -> dict[str, Any] | None:
        """What the last transfer moved; None when nothing was (one worker served it, or no report came)."""
        told = (attempt for attempt in reversed(self.attempts) if attempt.server_report is not None)
        report = next((attempt.server_report for attempt in told if attempt.placement.prefill is not None), None)
        if report is None:
            return None
        return {
            "plane": report.plane,
            "num_operations": report.num_operations,
            "num_blocks": sum(group.num_blocks for group in report.groups),
            "nbytes": sum(group.nbytes for group in report.groups),
            "full_copy_nbytes": sum(group.full_copy_nbytes for group in report.groups),
            "groups": [
                {
                    "group": group.group,
                    "name": group.name,
                    "num_blocks": group.num_blocks,
                    "nbytes": group.nbytes,
                    "full_copy_blocks": group.full_copy_blocks,
                    "full_copy_nbytes": group.full_copy_nbytes,
                }
                for group in report.groups
            ],
        }


class RecordStore:
    """The last `MAX_RECORDS` requests, live or ended, by request id or transfer id. The newest of a request id wins."""

    def __init__(self, max_records: int = MAX_RECORDS) -> None:
        self._max_records = max_records
        self._by_transfer: OrderedDict[str, RequestRecord] = OrderedDict()
        self._transfer_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._by_transfer)

    def add(self, record: RequestRecord) -> None:
        self._by_transfer[record.transfer_id] = record
        self._transfer_of[record.request_id] = record.transfer_id
        while len(self._by_transfer) > self._max_records:
            self._forget(next(iter(self._by_transfer.values())))

    def get(self, any_id: str) -> RequestRecord | None:
        return self._by_transfer.get(self._transfer_of.get(any_id, any_id))

    def check_invariants(self) -> None:
        assert len(self._by_transfer) <= self._max_records
        assert set(self._transfer_of.values()) <= set(self._by_transfer)

    def _forget(self, record: RequestRecord) -> None:
        del self._by_transfer[record.transfer_id]
        if self._transfer_of.get(record.request_id) == record.transfer_id:
            del self._transfer_of[record.request_id]
