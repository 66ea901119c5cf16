"""Where requests wait for their turn: `Admission` decides, this file wakes the request whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from disagg.router.admission import Admission
from disagg.router.choose import RETRY_BUSY_S
from disagg.router.generation import GenerationError, GenerationRequest
from disagg.router.registry import Worker
from disagg.router.tenants import QueuedRequest, Refusal, TenantLimits

AHEAD_PER_SERVER: Final = 32
"""Requests that a worker has before it begins them: four times the prompts that one of its steps computes at most, so
it finds its next work at hand, and few enough that what comes later can still be put in order here."""

_OVERDUE: Final = Refusal(504, "the request's deadline passed while it waited for a worker")
_CLOSING: Final = Refusal(503, "the router is shutting down", RETRY_BUSY_S)


class Gate(Collector):
    """The requests that wait, and the figures of the line. All calls come from the event loop."""

    def __init__(
        self,
        tenants: Mapping[str, TenantLimits],
        *,
        max_queued: int,
        ahead_per_server: int,
        workers: Callable[[], Iterable[Worker]],
        clock: Callable[[], float],
    ) -> None:
        self._policy = Admission(tenants, max_queued=max_queued)
        self._ahead_per_server = ahead_per_server
        self._workers = workers
        self._clock = clock
        self._room = ahead_per_server
        self._waiting: dict[QueuedRequest, asyncio.Future[None]] = {}
        self._refused: dict[tuple[str, int], int] = {}
        self._is_closing = False

    async def enter(self, request: GenerationRequest, arrived_at: float, deadline: float) -> QueuedRequest:
        """Wait for the request's turn; `leave` must be called with it. Raises GenerationError when there is none."""
        turn = QueuedRequest(
            request.tenant,
            request.priority,
            len(request.prompt),
            request.sampling.max_tokens,
            arrived_at,
            deadline,
        )
        if self._is_closing:
            raise self._error(turn, _CLOSING)
        future = self._waiting[turn] = asyncio.get_running_loop().create_future()
        try:
            for refused, why in self._policy.arrive(turn, self._clock()):
                self._refuse(refused, why)
            self._admit()
            if not future.done():
                await future  # `look` owns its deadline
            future.result()
        except BaseException:
            self.leave(turn, 0)
            raise
        finally:
            self._waiting.pop(turn, None)
        return turn

    def began(self, turn: QueuedRequest) -> None:
        """The first token of a request came."""
        self._policy.begin(turn)
        self._admit()

    def leave(self, turn: QueuedRequest, num_tokens: int) -> None:
        """A request is over, however it ended, with so many tokens. A second call does nothing."""
        self._policy.end(turn, num_tokens, self._clock())
        self._admit()

    def look(self) -> None:
        """Time passed: count the workers anew, and end what waited past its deadline."""
        servers = sum(worker.role != "prefill" for worker in self._workers())
        self._room = max(1, servers) * self._ahead_per_server
        for turn in self._policy.expire(self._clock()):
            self._refuse(turn, _OVERDUE)
        self._admit()

    def close(self) -> None:
        """Refuse what waits and what comes."""
        self._is_closing = True
        for turn in list(self._waiting):
            self._refuse(turn, _CLOSING)

    @property
    def is_closing(self) -> bool:
        return self._is_closing

    def check_invariants(self) -> None:
        self._policy.check_invariants()
        assert {turn for turn, future in self._waiting.items() if turn.is_waiting and not future.done()} == set(
            self._policy.waiting()
        )

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("disagg_requests_queued", "Requests that wait at the router", labels=["tenant"])
        for tenant, count in sorted(self._policy.waiting_by_tenant().items()):
            waiting.add_metric([tenant], count)
        yield waiting
        refused = CounterMetricFamily(
            "disagg_requests_refused", "Requests refused before they went to a worker", labels=["tenant", "status"]
        )
        for (tenant, status), count in sorted(self._refused.items()):
            refused.add_metric([tenant, str(status)], count)
        yield refused

    def _admit(self) -> None:
        if self._is_closing:
            return
        for turn in self._policy.admit(self._room, self._clock()):
            future = self._waiting[turn]
            if not future.done():  # else its client left in this turn of the loop; `leave` follows
                future.set_result(None)

    def _refuse(self, turn: QueuedRequest, why: Refusal) -> None:
        future = self._waiting.get(turn)
        if future is not None and not future.done():
            future.set_exception(self._error(turn, why))

    def _error(self, turn: QueuedRequest, why: Refusal) -> GenerationError:
        key = turn.tenant, why.status
        self._refused[key] = self._refused.get(key, 0) + 1
        return GenerationError(why.status, why.message, retry_after_s=why.retry_after_s)
