"""Where bodies are read: small ones on the event loop, where that costs less than handing them over; others by helpers.

Helpers are processes (see `helper`), started when first wanted and kept. One of them is always left to bodies of
ordinary size, so that a burst of the largest ones delays only its like. A job whose client leaves while it waits is
dropped; one that runs is short, and runs to its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Final

from disagg.api.helpers.frames import BODY, ERROR, HEAD, JOB, PREPARED, frame, pack, unpack_error, unpack_prepared
from disagg.api.helpers.process import JOB_TIMEOUT_S
from disagg.api.http.errors import ApiError
from disagg.api.request.preparation import Prepared, Preparer
from disagg.api.settings import ApiSettings
from disagg.api.text.tokenizer import ModelTokenizer

INLINE_NBYTES: Final = 4096  # reading so much takes about a millisecond: what handing it over may cost
LONG_NBYTES: Final = 512 * 1024  # takes a tenth of a second and more; a prompt of 100k tokens is of this size
MAX_WAITING: Final = 1024  # as many requests as a router queues by default
WAIT_TIMEOUT_S: Final = 60.0  # for a free helper; clients' own timeouts are seldom longer
READ_NBYTES: Final = 256 * 1024  # of an answer, kept before the pipe is left to wait
NUM_HELPERS: Final = max(2, min(4, (os.cpu_count() or 2) // 4))  # 50 MB each and the tokenizer; workers need the cores

log: Final = logging.getLogger(__name__)

EXIT_S: Final = 1.0
"""A process whose pipes are closed ends within milliseconds."""


class Helpers:
    """Prepares requests wherever it is best done. `close` ends the processes."""

    def __init__(self, settings: ApiSettings, tokenizer: ModelTokenizer) -> None:
        self._settings = settings
        self._inline = Preparer(settings, tokenizer)
        self._idle: list[_Helper] = []
        self._slots = asyncio.Semaphore(NUM_HELPERS)
        self._long_slots = asyncio.Semaphore(NUM_HELPERS - 1)
        self._num_waiting = 0
        self._running: set[asyncio.Task[object]] = set()

    async def generation(self, endpoint: str, body: Sequence[bytes], max_model_len: int | None) -> Prepared:
        """See `Preparer.generation`."""
        if nbytes_of(body) <= INLINE_NBYTES:
            return self._inline.generation(endpoint, b"".join(body), max_model_len)
        answer = await self._run(endpoint, body, max_model_len)
        assert isinstance(answer, Prepared)
        return answer

    async def text(self, endpoint: str, body: Sequence[bytes], max_model_len: int | None) -> Sequence[bytes]:
        """See `Preparer.text`."""
        if nbytes_of(body) <= INLINE_NBYTES:
            return list(self._inline.text(endpoint, b"".join(body), max_model_len))
        answer = await self._run(endpoint, body, max_model_len)
        assert isinstance(answer, list)
        return answer

    async def warm(self) -> None:
        """Start a helper, so that the first long prompt need not wait for it."""
        async with self._slots:
            self._idle.append(await _Helper.start(self._settings))

    async def close(self) -> None:
        """End every helper."""
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        while self._idle:
            await self._idle.pop().end()

    async def _run(self, endpoint: str, body: Sequence[bytes], max_model_len: int | None) -> Prepared | list[bytes]:
        """Wait for a helper and let it answer."""
        slot = await self._take_slot(is_long=nbytes_of(body) > LONG_NBYTES)
        task = asyncio.create_task(self._ask(endpoint, body, max_model_len))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: slot.close())  # not when the client leaves: the helper is still busy
        return await asyncio.shield(task)

    async def _ask(self, endpoint: str, body: Sequence[bytes], max_model_len: int | None) -> Prepared | list[bytes]:
        helper = await self._free_helper()
        try:
            answer = await helper.ask(pack((endpoint, max_model_len)), body)
        except (OSError, EOFError) as exc:
            raise await helper.death() from exc
        except BaseException:
            await helper.end()
            raise
        self._idle.append(helper)
        if isinstance(answer, ApiError):
            raise answer
        return answer

    async def _free_helper(self) -> _Helper:
        while self._idle:
            helper = self._idle.pop()
            if helper.is_alive:
                return helper
            await helper.end()
        try:
            return await _Helper.start(self._settings)
        except OSError as exc:
            log.error("no helper can be started: %s", exc)
            raise _busy() from exc

    async def _take_slot(self, *, is_long: bool) -> _Slot:
        """The right to one helper. Raises ApiError 503 when too many wait, or it takes too long."""
        slot = _Slot([self._long_slots, self._slots] if is_long else [self._slots])
        if self._num_waiting >= MAX_WAITING:
            raise _busy()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(WAIT_TIMEOUT_S):
                await slot.take()
        except TimeoutError:
            raise _busy() from None
        finally:
            self._num_waiting -= 1
        return slot


class _Slot:
    """Semaphores taken together. A slot that is not handed on is given back by its job's end."""

    def __init__(self, semaphores: Sequence[asyncio.Semaphore]) -> None:
        self._semaphores = semaphores
        self._taken: list[asyncio.Semaphore] = []

    async def take(self) -> None:
        try:
            for semaphore in self._semaphores:
                await semaphore.acquire()
                self._taken.append(semaphore)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._taken:
            self._taken.pop().release()


def nbytes_of(body: Sequence[bytes]) -> int:
    return sum(map(len, body))


def _busy() -> ApiError:
    return ApiError(503, "the server is busy reading other long requests", retry_after_s=5)


class _Helper:
    """One process. It is asked one thing at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._jobs, self._answers = process, process.stdin, process.stdout

    @classmethod
    async def start(cls, settings: ApiSettings) -> _Helper:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "disagg.api.helpers.process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=READ_NBYTES,
        )
        helper = cls(process)
        told = (str(settings.model_folder), settings.served_model_name, settings.max_choices)
        helper._jobs.write(frame(JOB, pack(told)))
        return helper

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    async def ask(self, head: bytes, body: Sequence[bytes]) -> Prepared | list[bytes] | ApiError:
        """Raises OSError or EOFError when the process ends meanwhile, which it does when a job takes too long."""
        self._jobs.write(frame(JOB, head) + HEAD.pack(BODY, nbytes_of(body)))
        for part in body:  # not joined: copying 8 MiB takes 5 ms
            self._jobs.write(part)
            await self._jobs.drain()
        parts: list[bytes] = []
        while True:
            kind, payload = await self._read()
            if kind == ERROR:
                return unpack_error(payload)
            if kind == PREPARED:
                return unpack_prepared(payload)
            if kind != BODY:
                return parts
            parts.append(payload)

    async def end(self) -> None:
        """End the process now."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        self._jobs.close()
        await self._process.wait()

    async def death(self) -> ApiError:
        """Why the process ended by itself, for the request that it ended on.

        It is given time to end: a kill asks the kernel for its exit code, which the event loop then misses.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_S):
                await self._process.wait()
        await self.end()
        if self._process.returncode == -signal.SIGALRM:
            return ApiError(400, f"the request's text takes longer than {JOB_TIMEOUT_S} s to tokenize; shorten it")
        return ApiError(500, "the server lost the process that read this request")

    async def _read(self) -> tuple[bytes, bytes]:
        kind, nbytes = HEAD.unpack(await self._answers.readexactly(HEAD.size))
        return kind, await self._answers.readexactly(nbytes)
