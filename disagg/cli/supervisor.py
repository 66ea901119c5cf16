"""Keep one router and its workers running until told otherwise, and leave nothing behind.

Every child has one task, `_keep`: start it, follow it until it ends, decide, start again. All of them live in one task
group, so there are three ways out and each ends every child: the work is done, a signal cancels the group, or a child
cannot be helped.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from disagg.cli.child import DRAIN_S, Child, ChildSpec, describe_exit
from disagg.cli.display import Display
from disagg.cli.restarts import MAX_RESTARTS, WINDOW_S, Restarts
from disagg.config.errors import ConfigError, leaves
from disagg.config.signals import heeded_signals

GRACE_S: Final = 8.0
"""After SIGTERM: the router gives running answers 5 s, and with the router a worker ends: nothing is left to finish."""

USER_ERROR: Final = 2
REFUSAL: Final = "disagg: "  # how a command begins the sentence of a user's mistake
MAX_TOLD_CHARS: Final = 400  # of a line that a dead child wrote; what is longer is above it in the log

Ready = Mapping[str, Any]
Work = Callable[[Ready, Sequence[Ready]], Awaitable[int]]


class StartPlan(Protocol):
    """What to start."""

    def router(self, ready: Ready | None) -> ChildSpec:
        """The router; `ready` is what it announced before it died, whose ports it must take again."""

    def workers(self) -> Sequence[ChildSpec]:
        """The workers, which find the router by themselves: they start beside it."""


class ClusterError(Exception):
    """The processes cannot be kept serving; the message says which one and why."""


class Supervisor:
    def __init__(self, cluster: StartPlan, secret: bytes, display: Display, *, grace_s: float = GRACE_S) -> None:
        self.children: dict[str, Child] = {}
        self._cluster = cluster
        self._secret = secret
        self._display = display
        self._grace_s = grace_s
        self._ready: dict[str, asyncio.Future[Ready]] = {}
        self._stopping: signal.Signals | None = None

    async def run(self, work: Work) -> int:
        """Start everything, then `work(router, workers)`: its result is the exit code. All children end before this.

        Returns 128 + n after signal n. Raises ConfigError when a child refused what the user gave, ClusterError when
        one could not be kept alive.
        """
        with self._signals():
            try:
                return await self._run(work)
            except asyncio.CancelledError:
                if self._stopping is None:
                    raise
                return 128 + self._stopping
            except BaseExceptionGroup as group:
                raise _first(group) from None

    async def _run(self, work: Work) -> int:
        async with asyncio.TaskGroup() as group:
            keepers = [group.create_task(self._keep("router", self._cluster.router))]
            specs = self._cluster.workers()
            keepers += [group.create_task(self._keep(spec.name, _always(spec))) for spec in specs]
            router = await self._became_ready("router")
            code = await work(router, [await self._became_ready(spec.name) for spec in specs])
            for keeper in keepers:
                keeper.cancel()
        return code

    async def _became_ready(self, name: str) -> Ready:
        """The first `ready` of a child."""
        return await self._ready.setdefault(name, asyncio.get_running_loop().create_future())

    async def _keep(self, name: str, spec: Callable[[Ready | None], ChildSpec]) -> None:
        """Start a child, and again whenever it dies, within bounds. Cancelled: ends the child first."""
        restarts = Restarts()
        future = self._ready.setdefault(name, asyncio.get_running_loop().create_future())
        while True:
            code, last_words = await self._live(name, spec(future.result() if future.done() else None))
            if not future.done():
                raise _never_ready(name, code, last_words)
            delay_s = restarts.next_delay_s(time.monotonic())
            if delay_s is None:
                raise ClusterError(f"`{name}` {describe_exit(code)}, after {MAX_RESTARTS} restarts in {WINDOW_S:.0f} s")
            self._display.say(f"`{name}` {describe_exit(code)}: restarting it in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    async def _live(self, name: str, spec: ChildSpec) -> tuple[int, str]:
        """One life of a child: its exit code and what it said last.

        Raises ConfigError with the sentence of a child that exits 2: what a user gave will be as wrong again.
        """
        child = await Child.spawn(spec, self._secret)
        self.children[name] = child
        self._display.progress(name, f"starting (pid {child.pid})")
        error: list[str] = []
        last_line: deque[str] = deque(maxlen=1)
        readers = [
            asyncio.create_task(self._follow(name, child, error)),
            asyncio.create_task(self._relay(child, last_line)),
        ]
        try:
            code = await child.process.wait()
        finally:
            await child.stop(self._grace_s)
            await _finish(readers)
            child.close()
            del self.children[name]
        if code == USER_ERROR and error:
            raise ConfigError(error[0])
        return code, "".join(error[-1:] or last_line)

    async def _follow(self, name: str, child: Child, error: list[str]) -> None:
        async for event in child.announcements():
            match event:
                case {"event": "ready"}:
                    self._display.ready(name)
                    if not (future := self._ready[name]).done():
                        future.set_result(event)
                case {"event": "progress", "stage": stage}:
                    self._display.progress(name, str(stage))
                case {"event": "error", "message": message}:
                    error.append(str(message))

    async def _relay(self, child: Child, last_line: deque[str]) -> None:
        async for line in child.log_lines():
            self._display.log(line)
            if line.strip():
                last_line.append(line.strip())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        before = {signum: signal.getsignal(signum) for signum in heeded_signals()}
        for signum in before:
            loop.add_signal_handler(signum, self._on_signal, signum, task)
        try:
            yield
        finally:
            for signum, handler in before.items():
                loop.remove_signal_handler(signum)
                signal.signal(signum, handler)

    def _on_signal(self, signum: signal.Signals, task: asyncio.Task[Any]) -> None:
        """The first signal ends everything in order, the second at once."""
        if self._stopping is None:
            self._stopping = signum
            task.cancel()
            self._display.say(f"{signum.name}: stopping, once more to stop at once")
            return
        for child in self.children.values():
            child.kill()


def _always(spec: ChildSpec) -> Callable[[Ready | None], ChildSpec]:
    return lambda ready: spec


async def _finish(readers: Sequence[asyncio.Task[None]]) -> None:
    """Let the readers take what a dead child left in its pipes, then end them; their errors are ours."""
    _, unfinished = await asyncio.wait(readers, timeout=DRAIN_S)
    for reader in unfinished:
        reader.cancel()
    await asyncio.gather(*unfinished, return_exceptions=True)
    for reader in set(readers) - unfinished:
        reader.result()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The sentence to show: one user error explains the others."""
    flat = list(leaves(group))
    return next((exc for exc in flat if isinstance(exc, ConfigError)), flat[0])


def _never_ready(name: str, code: int, last_words: str) -> Exception:
    """A child that ended before it was ever ready would end so again: nothing about it has changed."""
    if code == USER_ERROR and last_words.startswith(REFUSAL):
        return ConfigError(last_words.removeprefix(REFUSAL))
    words = f": {last_words[:MAX_TOLD_CHARS]}" if last_words else ""
    return ClusterError(f"`{name}` {describe_exit(code)} before it was ready{words}")
