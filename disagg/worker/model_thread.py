"""The thread that owns engine and cache. The event loop posts commands; events come back when they are made."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from disagg.engine.commands import Command, EngineEvent
from disagg.engine.stats import EngineStats
from disagg.worker.speeds import StepSpeeds

log = logging.getLogger(__name__)

CLOSE = None


class Wake:
    """No command: the thread looks again whether it has work."""


WAKE: Final = Wake()


@dataclass(frozen=True, slots=True)
class Call:
    """No command either: something to be called on the thread that owns the cache, between two steps."""

    function: Callable[[], None]


class StepEngine(Protocol):
    """What this thread drives: `disagg.engine.engine.Engine`."""

    @property
    def has_work(self) -> bool: ...

    def handle(self, command: Command) -> list[EngineEvent]: ...

    def step(self) -> list[EngineEvent]: ...

    def stats(self) -> EngineStats: ...


class ModelThread:
    """Runs `engine` until closed.

    `on_events` and `on_death` are called on `loop`, `on_begin` on this thread before all else and `on_rest` before it
    sleeps. A thread that dies reports once and runs no more: the cache may be half changed, so its process must end.
    """

    def __init__(
        self,
        engine: StepEngine,
        loop: asyncio.AbstractEventLoop,
        on_events: Callable[[Sequence[EngineEvent]], None],
        on_death: Callable[[BaseException], None],
        on_rest: Callable[[], None] = lambda: None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._on_events = on_events
        self._on_death = on_death
        self._on_rest = on_rest
        self._on_begin = on_begin
        self.is_dead = False
        """An exception ended the thread; any thread may read it."""
        self._is_held = False
        self._inbox: queue.SimpleQueue[Command | Call | Wake | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.speeds = StepSpeeds()
        self.stats = engine.stats()
        """The figures after the last step; replaced whole, so any thread may read it."""

    def start(self) -> None:
        self._thread.start()

    def submit(self, command: Command | Call) -> None:
        """Post `command`; wakes an idle thread. Never blocks."""
        self._inbox.put(command)

    def hold(self, is_held: bool) -> None:
        """Begin no step until told otherwise, because what steps make is not wanted yet. Commands are taken."""
        self._is_held = is_held
        if not is_held:
            self._inbox.put(WAKE)

    async def close(self) -> None:
        """Stop after the running step and join."""
        self._inbox.put(CLOSE)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def step(self) -> bool:
        """One turn: drain the commands, then compute a step. Sleeps while only a command can change anything.

        What a command brought about is told before the step: a first token would else wait while others' are computed.
        Returns False when told to close.
        """
        must_wait = not self._may_step  # asked once: a hold that comes now must not let it sleep without saying so
        if must_wait:
            self._on_rest()
        commands = self._drain(wait=must_wait)
        for command in commands:
            if isinstance(command, Call):
                command.function()
            elif command is not CLOSE and not isinstance(command, Wake):
                self._reply(self._engine.handle(command))
        events = self._compute() if self._may_step else self._rest()
        self._reply(events)
        return CLOSE not in commands

    @property
    def _may_step(self) -> bool:
        return self._engine.has_work and not self._is_held

    def _compute(self) -> list[EngineEvent]:
        """A step, measured. Where one is launched ahead, its time is that of the step whose tokens were read."""
        before, began_at = self.stats, time.perf_counter()
        events = self._engine.step()
        seconds, after = time.perf_counter() - began_at, self._engine.stats()
        self.stats = after
        num_prompt_tokens = after.prompt_tokens_computed - before.prompt_tokens_computed
        self.speeds.note(seconds, num_prompt_tokens, after.answer_tokens - before.answer_tokens)
        return events

    def _rest(self) -> list[EngineEvent]:
        self.stats = self._engine.stats()
        return []

    def _run(self) -> None:
        try:
            self._on_begin()
            while self.step():
                pass
        except BaseException as death:  # reported, then the process ends: nothing may go on with this cache
            self.is_dead = True
            log.exception("model thread died")
            self._post(self._on_death, death)

    def _drain(self, *, wait: bool) -> list[Command | Call | Wake | None]:
        commands: list[Command | Call | Wake | None] = [self._inbox.get()] if wait else []
        while True:
            try:
                commands.append(self._inbox.get_nowait())
            except queue.Empty:
                return commands

    def _reply(self, events: list[EngineEvent]) -> None:
        if events:
            self._post(self._on_events, events)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        # The loop closes only after `close()` joined this thread, unless the process is being torn down.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)
