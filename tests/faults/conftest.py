"""A trio that lives as long as a module's cells do, and the table that they fill, printed at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from support.faults.table import FAULTS, ROWS, Fault, Row, render
from support.faults.wrong import Wrong, wrong_in
from support.links.shell_pair import ShellTrio, trio_context

PAUSE_S = 0.1
"""An event loop that has work and is not run for so long shares its core with somebody."""
MAX_TRIES = 4

RESULTS: dict[tuple[str, float], dict[tuple[Row, Fault], tuple[str, float]]] = {}
"""(plane, scale) -> cell -> (outcome, seconds to the reply)."""


class Arena:
    """An event loop with a running trio; a test that fails takes the trio with it, and the next gets a new one."""

    def __init__(self, plane: str, scale: float, kind: type[ShellTrio]) -> None:
        self.plane, self.scale, self._kind = plane, scale, kind
        self.results = RESULTS.setdefault((plane, scale), {})
        self._runner = asyncio.Runner()
        self._patches: Any = None
        self._longest_pause_s = 0.0
        self._trio: ShellTrio | None = None

    @property
    def trio(self) -> ShellTrio:
        if self._trio is None:
            self._patches = trio_context(self.plane, self.scale)
            self._patches.__enter__()
            self._trio = self._kind(self.plane, self.scale)
            self._runner.run(self._trio.start())
        return self._trio

    def run(self, story: Callable[[ShellTrio], Coroutine[Any, Any, Any]]) -> Any:
        """What `story` returns. Told anew when it fails and the machine stood still meanwhile: with constants of time
        this short, a pause is a fault of its own that nobody asked for. Never when anything was `Wrong`."""
        num_tries = 0
        while True:
            num_tries += 1
            trio = self.trio
            try:
                return self._runner.run(self._watch(story(trio)))
            except BaseException as failure:
                self.end_trio()
                if trio.wrong and wrong_in(failure) is None:  # the story failed before it looked
                    raise Wrong("; ".join(trio.wrong)) from failure
                if not self._may_be_late(failure) or num_tries == MAX_TRIES:
                    raise

    def _may_be_late(self, failure: BaseException) -> bool:
        return isinstance(failure, Exception) and wrong_in(failure) is None and self._longest_pause_s > PAUSE_S

    async def _watch(self, story: Coroutine[Any, Any, Any]) -> Any:
        watching = asyncio.create_task(self._measure_pauses())
        try:
            return await story
        finally:
            watching.cancel()

    async def _measure_pauses(self) -> None:
        self._longest_pause_s, seen_at = 0.0, time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            now = time.monotonic()
            self._longest_pause_s, seen_at = max(self._longest_pause_s, now - seen_at), now

    def end_trio(self) -> None:
        if self._trio is not None:
            trio, self._trio = self._trio, None
            self._runner.run(trio.close())
            self._patches.__exit__(None, None, None)

    def close(self) -> None:
        self.end_trio()
        self._runner.close()


@pytest.fixture(scope="module")
def arenas() -> Iterator[dict[tuple[str, float], Arena]]:
    """One arena at a time, and none after its module: constants of time are patched for the whole process."""
    kept: dict[tuple[str, float], Arena] = {}
    yield kept
    for arena in kept.values():
        arena.close()


@pytest.fixture
def trio_kind() -> type[ShellTrio]:
    """A module that needs another trio has its own."""
    return ShellTrio


@pytest.fixture
def arena(arenas: dict[tuple[str, float], Arena], plane: str, scale: float, trio_kind: type[ShellTrio]) -> Arena:
    for key in [key for key in arenas if key != (plane, scale)]:
        arenas.pop(key).close()
    if (plane, scale) not in arenas:
        arenas[plane, scale] = Arena(plane, scale, trio_kind)
    return arenas[plane, scale]


@pytest.fixture
def results() -> dict[tuple[str, float], dict[tuple[Row, Fault], tuple[str, float]]]:
    return RESULTS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for (plane, scale), results in RESULTS.items():
        if not results:
            continue
        seconds = sorted(seconds / scale for _, seconds in results.values())
        p99 = seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
        write = terminalreporter.write_line
        terminalreporter.section(f"state x fault, plane {plane}, times x {scale:g}")
        write(render({cell: f"{outcome} {s / scale:.2f}" for cell, (outcome, s) in results.items()}, empty="not run"))
        write(f"{len(results)} cells of {len(ROWS)} x {len(FAULTS)}; seconds to the reply, times 1/{scale:g}: ")
        write(f"median {seconds[len(seconds) // 2]:.2f}, p99 {p99:.2f}, highest {seconds[-1]:.2f}")
