"""The API processes of a router: started, told how it stands, started again when one dies, drained at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from disagg.api.processes.core_side import CoreSide
from disagg.api.processes.link import ProcessLink
from disagg.api.processes.messages import CoreState, ProcessSettings, ProcessVitals
from disagg.api.settings import ApiSettings
from disagg.router.generation import Backend

START_TIMEOUT_S: Final = 120.0  # imports and a large tokenizer on a busy machine: ten times what they take alone
TELL_EVERY_S: Final = 0.25  # how old an answer to `/ready` may be: half the interval of the leases it rests on
SHORT_LIFE_S: Final = 10.0  # a process that died sooner may do so again at once
BACKOFF_S: Final = (0.0, 0.5, 1.0, 2.0, 5.0)  # before a start, by the number of short lives before it
DRAIN_S: Final = 6.0  # 5 s for running answers, as in one process, and one to end

MODULE: Final = "disagg.cli.api_process"

log: Final = logging.getLogger(__name__)


class ApiProcessLost(Exception):
    """An API process ended before it served; its log says why."""


class ApiProcesses(Collector):
    """`count` processes that accept from one listening socket. Use `async with ApiProcesses.open(...)`."""

    def __init__(
        self, backend: Backend, settings: ApiSettings, listening: socket.socket, count: int, log_level: str
    ) -> None:
        self._backend, self._settings, self._listening = backend, settings, listening
        self._log_level = log_level
        self._sides: list[CoreSide | None] = [None] * count
        self._pids = [0] * count
        self._num_restarts = 0
        self._is_closing = False
        self._all_ready = asyncio.Semaphore(0)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, backend: Backend, settings: ApiSettings, listening: socket.socket, count: int, log_level: str = "info"
    ) -> AsyncIterator[ApiProcesses]:
        """All of them accept when the block begins. Raises ApiProcessLost, in a group, when one does not start."""
        processes = cls(backend, settings, listening, count, log_level)
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(processes._tell())
            keeping = [tasks.create_task(processes._keep(place), name=f"API process {place}") for place in range(count)]
            try:
                for _ in range(count):
                    await processes._all_ready.acquire()
                yield processes
            finally:
                processes._stop()
                telling.cancel()
                _, late = await asyncio.wait(keeping, timeout=DRAIN_S)
                for task in late:
                    task.cancel()

    @property
    def pids(self) -> Sequence[int]:
        """By place; 0 where none runs just now."""
        return self._pids

    def collect(self) -> Iterator[Metric]:
        answers = GaugeMetricFamily("disagg_api_answers", "Answers in progress by API process", labels=["process"])
        connections = GaugeMetricFamily("disagg_api_connections", "Clients connected", labels=["process"])
        cpu = CounterMetricFamily("disagg_api_cpu_seconds", "CPU time of an API process", labels=["process"])
        lag = HistogramMetricFamily(
            "disagg_api_loop_lag_seconds", "How late an API process's event loop woke a task", labels=["process"]
        )
        for place, side in enumerate(self._sides):
            vitals = side.vitals if side is not None else None
            answers.add_metric([str(place)], side.num_answers if side is not None else 0)
            if isinstance(vitals, ProcessVitals):
                connections.add_metric([str(place)], vitals.num_connections)
                cpu.add_metric([str(place)], vitals.cpu_s)
                lag.add_metric([str(place)], list(vitals.lag_buckets), vitals.lag_sum_s)
        yield from (answers, connections, cpu, lag)
        restarts = CounterMetricFamily("disagg_api_restarts", "API processes started again after they died")
        restarts.add_metric([], self._num_restarts)
        yield restarts

    # --- one place ------------------------------------------------------------------------------------------

    async def _keep(self, place: int) -> None:
        num_short, has_served = 0, False
        while not self._is_closing:
            await asyncio.sleep(BACKOFF_S[min(num_short, len(BACKOFF_S) - 1)])
            if self._is_closing:
                return
            started_at = time.monotonic()
            served = await self._live(place, announces=not has_served)
            if self._is_closing:
                return
            if not (has_served := has_served or served):
                raise ApiProcessLost("an API process ended before it accepted clients; its log says why")
            num_short = num_short + 1 if time.monotonic() - started_at < SHORT_LIFE_S else 0
            self._num_restarts += 1
            log.error("API process %d ended; its clients were cut off, and it is started again", place)

    async def _live(self, place: int, *, announces: bool) -> bool:
        """One process from start to end; whether it accepted clients."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            process = await self._spawn(theirs)
        self._pids[place] = process.pid
        side = CoreSide(self._backend, link := await ProcessLink.open(ours))
        link.send(self._first_message())
        side.tell(self._state())
        self._sides[place] = side
        try:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch_start(side, process, announces=announces))
                await side.run()
                watching.cancel()
            return side.ready.is_set()
        finally:
            self._sides[place], self._pids[place] = None, 0
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # it has closed its end: whatever it still does serves no client
            await process.wait()

    async def _watch_start(self, side: CoreSide, process: asyncio.subprocess.Process, *, announces: bool) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await side.ready.wait()
        except TimeoutError:
            process.kill()
            return
        if announces:
            self._all_ready.release()

    async def _spawn(self, theirs: socket.socket) -> asyncio.subprocess.Process:
        """`-P`: the top-level links must not shadow other packages."""
        descriptors = theirs.fileno(), self._listening.fileno()
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", MODULE, *map(str, descriptors), self._log_level),
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
        )

    # --- all of them ----------------------------------------------------------------------------------------

    def _first_message(self) -> ProcessSettings:
        settings = self._settings
        return ProcessSettings(
            str(settings.model_folder), settings.served_model_name, tuple(sorted(settings.api_keys.items()))
        )

    def _state(self) -> CoreState:
        return CoreState(self._backend.is_ready(), self._backend.max_model_len())

    async def _tell(self) -> None:
        while True:
            state = self._state()
            for side in self._sides:
                if side is not None:
                    side.tell(state)
            await asyncio.sleep(TELL_EVERY_S)

    def _stop(self) -> None:
        self._is_closing = True
        for side in self._sides:
            if side is not None:
                side.stop()
