"""The router's end of the index process: passes events on, asks which workers hold a prompt, starts it anew.

Nothing here waits for the process but a question, and that for a bounded time: without an answer a request is placed as
if no worker held anything of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from disagg.router.index.block_index import Holder
from disagg.router.index.frames import (
    ADDED,
    FIGURES,
    GONE,
    HEAD,
    HOLDERS,
    MISSED,
    PUBLISH,
    QUESTION,
    REFUSED,
    SETTINGS,
    events_frame,
    frame,
    values_of,
)
from disagg.router.index.publisher import PublishOptions
from disagg.transceiver.wire.errors import EndpointRefused
from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.router import Register

log: Final = logging.getLogger(__name__)

MAX_HOLDERS: Final = 4
"""Named of one prompt: sources to fetch from and workers to go to, of which each adds ways to weigh."""

ANSWER_S: Final = 0.1
"""For an answer, which takes under a millisecond for a prompt of a thousand tokens and 20 for one of 128,000: a process
that is busier than that costs a request its prefix, not its time."""

MAX_UNREAD_NBYTES: Final = 64 << 20
"""Said and not read by the process: 30 seconds of 62,000 stored and as many dropped blocks. It is then started anew."""

LOOK_S: Final = 5.0
"""Between two looks at its figures: a third of the 15 s at which Prometheus asks by default."""

BACKOFF_S: Final = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Before a start, by the number of starts before it: what kills the process may do so at once."""


@dataclass(frozen=True, slots=True)
class IndexFigures:
    """`cpu_s`, `nbytes`: of the process; `num_blocks`: known, of any worker."""

    num_blocks: int = 0
    cpu_s: float = 0.0
    nbytes: int = 0


class PrefixIndex(Collector):
    """Use `async with PrefixIndex.open(...)`. All methods belong to the event loop."""

    def __init__(
        self,
        hash_key: bytes,
        ask: Callable[[str, AskBlocks], None],
        publish: PublishOptions | None = None,
        *,
        tokens: bool = False,
    ) -> None:
        """`ask(incarnation, message)`: send it to that worker. `publish`: to subscribers, with the `tokens`' ids or
        without."""
        self._hash_key, self._ask, self._publish, self._tokens = hash_key, ask, publish, tokens
        self._published: asyncio.Future[None] | None = None
        self._workers: dict[str, Register] = {}
        """Those that may be asked for their blocks."""
        self._least_block_size = sys.maxsize
        self._process: asyncio.subprocess.Process | None = None
        self._questions: dict[int, asyncio.Future[list[Holder]]] = {}
        self._num_questions = 0
        self.num_starts = self.num_unanswered = 0
        self.figures = IndexFigures()

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        hash_key: bytes,
        ask: Callable[[str, AskBlocks], None],
        publish: PublishOptions | None = None,
        *,
        tokens: bool = False,
    ) -> AsyncIterator[PrefixIndex]:
        """The process runs while the block does. Raises `EndpointRefused` when it cannot publish where it should."""
        index = cls(hash_key, ask, publish, tokens=tokens)
        running = asyncio.create_task(index._run(), name="prefix index")
        try:
            if publish is not None:
                index._published = asyncio.get_running_loop().create_future()
                await index._published
            yield index
        finally:
            running.cancel()
            await asyncio.wait({running})

    # --- what the router says -------------------------------------------------------------------------------

    def add(self, register: Register) -> None:
        """A worker registered; it is asked for its blocks, if it tells any."""
        if register.tells_blocks:
            is_first = not self._workers
            self._workers[register.incarnation] = register
            self._note_block_sizes()
            if is_first:
                self._say(self._settings())
            self._say_added(register)

    def remove(self, incarnation: str) -> None:
        if self._workers.pop(incarnation, None) is not None:
            self._note_block_sizes()
            self._say(frame(GONE, incarnation))

    def _note_block_sizes(self) -> None:
        sizes = [register.geometry.block_size for register in self._workers.values()]
        self._least_block_size = min(sizes, default=sys.maxsize)

    def take(self, events: BlockEvents) -> None:
        """A worker told what it registered and dropped."""
        if events.incarnation in self._workers:
            self._say(events_frame(events))

    async def who_holds(self, prompt: Sequence[int], salt: str) -> dict[str, int]:
        """By incarnation, from how many tokens of the prompt it could go on: few workers, those with the most.

        Empty when no answer comes in time.
        """
        if self._process is None or len(prompt) <= self._least_block_size:
            return {}  # no block of it could be cached, or no worker tells any
        tokens = prompt if isinstance(prompt, array) and prompt.typecode == "i" else array("i", prompt)
        self._num_questions += 1
        number = self._num_questions
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._say(frame(QUESTION, number, salt, MAX_HOLDERS, tokens.tobytes()))
        try:
            async with asyncio.timeout(ANSWER_S):
                return {holder.incarnation: holder.num_tokens for holder in await answer}
        except TimeoutError:
            self.num_unanswered += 1
            return {}
        finally:
            del self._questions[number]

    def collect(self) -> Iterator[Metric]:
        """The process's figures as it last said them."""
        figures = self.figures
        yield GaugeMetricFamily("disagg_index_blocks", "Cached blocks known, of any worker", figures.num_blocks)
        yield GaugeMetricFamily("disagg_index_bytes", "Memory of the prefix index's process", figures.nbytes)
        yield CounterMetricFamily("disagg_index_cpu_seconds", "CPU time of the prefix index", figures.cpu_s)
        yield CounterMetricFamily("disagg_index_starts", "Starts of the prefix index", self.num_starts)
        yield CounterMetricFamily("disagg_index_unanswered", "Requests placed without its answer", self.num_unanswered)

    # --- the process ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(BACKOFF_S[min(self.num_starts, len(BACKOFF_S) - 1)])
            self.num_starts += 1
            try:
                await self._live()
            except OSError as exc:
                log.error("the prefix index cannot be started: %s", exc)
            log.error("the prefix index ended; it is started again, and workers are asked for their blocks")

    async def _live(self) -> None:
        """One process from start to end."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "disagg.router.index.process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._process, looking = process, None
        try:
            if self._publish is not None:
                self._say(frame(PUBLISH, *astuple(self._publish)))
            if self._workers:
                self._say(self._settings())
            for register in self._workers.values():
                self._say_added(register)
            assert process.stdout is not None
            looking = asyncio.create_task(self._look())
            while True:
                kind, nbytes = HEAD.unpack(await process.stdout.readexactly(HEAD.size))
                self._hear(kind, values_of(await process.stdout.readexactly(nbytes)))
        except asyncio.IncompleteReadError:
            pass
        finally:
            self._process = None
            if looking is not None:
                looking.cancel()
            self._give_up_questions()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _look(self) -> None:
        """Ask now and then how it stands."""
        while True:
            self._say(frame(FIGURES))
            await asyncio.sleep(LOOK_S)

    def _hear(self, kind: bytes, values: tuple[Any, ...]) -> None:
        if kind == HOLDERS:
            number, holders = values
            answer = self._questions.get(number)
            if answer is not None and not answer.done():
                answer.set_result([Holder(*holder) for holder in holders])
        elif kind == MISSED:
            log.warning("blocks of %s were missed; it is asked for all of them", values[0])
            if values[0] in self._workers:
                self._ask(values[0], AskBlocks(values[0], self._tokens))
        elif kind == FIGURES:
            self.figures = IndexFigures(*values)
        elif kind in (PUBLISH, REFUSED):
            self._hear_published(kind, values)

    def _hear_published(self, kind: bytes, values: tuple[Any, ...]) -> None:
        assert self._publish is not None
        is_first = self._published is not None and not self._published.done()
        if kind == REFUSED:
            refusal = f"cannot publish at {self._publish.endpoint}: {values[0]}; choose another port or host"
            log.error("cached blocks are not published: %s", refusal)
            if is_first and self._published is not None:
                self._published.set_exception(EndpointRefused(refusal))
            return
        self._publish = replace(self._publish, endpoint=values[0], replay_endpoint=values[1])
        log.info("cached blocks are published at %s, and again on request at %s", *values)
        if is_first and self._published is not None:
            self._published.set_result(None)

    @property
    def endpoints(self) -> tuple[str, str] | None:
        """Where blocks are published, and where they are asked for again."""
        return None if self._publish is None else (self._publish.endpoint, self._publish.replay_endpoint)

    def _give_up_questions(self) -> None:
        for answer in self._questions.values():
            if not answer.done():
                answer.set_result([])

    def _settings(self) -> bytes:
        """The model is the first worker's: the identities of all are equal."""
        first = next(iter(self._workers.values()))
        spans = [(group.window, group.num_sink_tokens) for group in first.geometry.groups]
        return frame(SETTINGS, self._hash_key, first.identity.model_fingerprint, spans)

    def _say_added(self, register: Register) -> None:
        if self._process is not None:
            medium = "CPU" if register.device == "cpu" else "GPU"
            told = (register.incarnation, register.geometry.block_size, register.worker_id, medium)
            self._say(frame(ADDED, *told))
            self._ask(register.incarnation, AskBlocks(register.incarnation, self._tokens))

    def _say(self, data: bytes) -> None:
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            return
        if process.stdin.transport.get_write_buffer_size() > MAX_UNREAD_NBYTES:
            log.error("the prefix index does not keep up with what workers tell")
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return
        process.stdin.write(data)
