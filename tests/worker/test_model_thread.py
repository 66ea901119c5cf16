"""The model thread: commands before steps, events told when they are made, sleep without work, death reported once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from support.event_loop import PATIENCE_S

from disagg.engine.commands import AttemptKey, Command, EngineEvent, PinnedEvent, Release
from disagg.engine.stats import EngineStats
from disagg.worker.device import use_device
from disagg.worker.model_thread import ModelThread


class ScriptedEngine:
    """Answers each command with an event, then has `num_steps` steps of work."""

    def __init__(self, num_steps: int = 1, fault: Exception | None = None) -> None:
        self.calls: list[str] = []
        self._num_steps, self._left, self._fault = num_steps, 0, fault
        self._called = threading.Condition()

    @property
    def has_work(self) -> bool:
        return self._left > 0

    def handle(self, command: Command) -> list[EngineEvent]:
        self._note(f"handle {command.key.epoch}")
        self._left = self._num_steps
        return [PinnedEvent(command.key, 0)]

    def step(self) -> list[EngineEvent]:
        if self._fault is not None:
            raise self._fault
        self._left -= 1
        self._note("step")
        return [PinnedEvent(AttemptKey("step", self._left), 0)]

    def wait_for_calls(self, count: int) -> None:
        with self._called:
            assert self._called.wait_for(lambda: len(self.calls) >= count, timeout=PATIENCE_S), self.calls

    def _note(self, call: str) -> None:
        with self._called:
            self.calls.append(call)
            self._called.notify_all()

    def stats(self) -> EngineStats:
        steps = self.calls.count("step")
        return EngineStats((), 0, 0, 0, 0, 0, 0, 0, steps, ())


async def _drive(
    engine: ScriptedEngine,
    num_calls: int,
    commands: Sequence[Command],
    on_begin: Callable[[], None] = lambda: None,
) -> tuple[list[list[EngineEvent]], list[BaseException]]:
    batches: list[list[EngineEvent]] = []
    deaths: list[BaseException] = []
    loop = asyncio.get_running_loop()
    thread = ModelThread(engine, loop, lambda b: batches.append(list(b)), deaths.append, on_begin=on_begin)
    for command in commands:
        thread.submit(command)
    thread.start()
    await asyncio.to_thread(engine.wait_for_calls, num_calls)
    await thread.close()
    await asyncio.sleep(0)  # what the thread posted last
    return batches, deaths


def release(epoch: int) -> Release:
    return Release(AttemptKey("t", epoch))


def test_all_waiting_commands_are_handled_before_the_next_step() -> None:
    engine = ScriptedEngine()
    batches, deaths = asyncio.run(_drive(engine, 4, [release(1), release(2), release(3)]))
    assert engine.calls == ["handle 1", "handle 2", "handle 3", "step"]
    assert [len(batch) for batch in batches] == [1, 1, 1, 1], "each command's events, then those of the step"
    assert not deaths


def test_what_a_command_brought_about_is_told_while_the_step_behind_it_computes() -> None:
    class SlowEngine(ScriptedEngine):
        was_told = threading.Event()

        def step(self) -> list[EngineEvent]:
            self._note("told" if self.was_told.wait(timeout=PATIENCE_S) else "not told")
            return super().step()

    async def scenario() -> None:
        engine = SlowEngine()
        loop = asyncio.get_running_loop()
        thread = ModelThread(engine, loop, lambda events: engine.was_told.set(), lambda death: None)
        thread.submit(release(1))
        thread.start()
        await asyncio.to_thread(engine.wait_for_calls, 3)
        await thread.close()
        assert engine.calls == ["handle 1", "told", "step"]

    asyncio.run(scenario())


def test_a_thread_with_work_goes_on_stepping_without_commands() -> None:
    engine = ScriptedEngine(num_steps=5)
    asyncio.run(_drive(engine, 6, [release(1)]))
    assert engine.calls == ["handle 1", *["step"] * 5]


def test_a_thread_without_work_sleeps_until_a_command_comes() -> None:
    engine = ScriptedEngine(num_steps=0)
    asyncio.run(_drive(engine, 1, [release(1)]))
    assert engine.calls == ["handle 1"], "no step was made without work"


def test_the_thread_uses_its_device_before_it_handles_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    used: list[tuple[int, str, int]] = []

    def set_device(index: int) -> None:
        used.append((index, threading.current_thread().name, len(engine.calls)))

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for name in ("cpu", "cuda", "cuda:1"):
        engine = ScriptedEngine()
        asyncio.run(_drive(engine, 2, [release(1)], on_begin=partial(use_device, name)))
    assert used == [(0, "model", 0), (1, "model", 0)]


def test_a_device_that_is_lost_before_the_thread_begins_is_its_death() -> None:
    fault = RuntimeError("CUDA error: no device")

    def lose() -> None:
        engine._note("begin")
        raise fault

    engine = ScriptedEngine()
    _, deaths = asyncio.run(_drive(engine, 1, [release(1)], on_begin=lose))
    assert (deaths, engine.calls) == ([fault], ["begin"])


def test_a_thread_that_dies_reports_once_and_runs_no_more() -> None:
    fault = RuntimeError("the cache is broken")
    engine = ScriptedEngine(fault=fault)
    _, deaths = asyncio.run(_drive(engine, 1, [release(1)]))
    assert deaths == [fault]
    assert engine.calls == ["handle 1"]


def test_a_thread_that_goes_to_sleep_says_so_after_its_last_step() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(num_steps=2)
        thread = ModelThread(
            engine,
            asyncio.get_running_loop(),
            lambda events: None,
            lambda death: None,
            on_rest=lambda: engine._note("rest"),
        )
        thread.submit(release(1))
        thread.start()
        await asyncio.to_thread(engine.wait_for_calls, 5)
        await thread.close()
        assert engine.calls == ["rest", "handle 1", "step", "step", "rest"]
        assert not thread.is_dead

    asyncio.run(scenario())


def _thread_of(engine: ScriptedEngine) -> ModelThread:
    """Notes its rests among the engine's calls."""
    loop = asyncio.get_running_loop()
    return ModelThread(engine, loop, lambda events: None, lambda death: None, on_rest=lambda: engine._note("rest"))


def test_no_step_begins_while_held_and_commands_are_taken() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(num_steps=2)
        thread = _thread_of(engine)  # not started: this test makes its turns
        for epoch in (1, 2, 3):
            if epoch == 2:
                thread.hold(True)
            thread.submit(release(epoch))
            assert thread.step()
        thread.hold(False)
        assert thread.step()
        assert engine.calls == ["rest", "handle 1", "step", "rest", "handle 2", "rest", "handle 3", "step"]
        assert engine.has_work

    asyncio.run(scenario())


def test_a_thread_that_sleeps_held_with_work_goes_on_when_it_is_released() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(num_steps=3)
        thread = _thread_of(engine)
        thread.hold(True)
        thread.submit(release(1))
        thread.start()
        await asyncio.to_thread(engine.wait_for_calls, 3)
        assert engine.calls == ["rest", "handle 1", "rest"]
        thread.hold(False)
        await asyncio.to_thread(engine.wait_for_calls, 7)
        await thread.close()
        assert engine.calls[3:] == ["step", "step", "step", "rest"]

    asyncio.run(scenario())


def test_a_hold_that_comes_while_the_thread_sleeps_wakes_nothing() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine()
        thread = _thread_of(engine)
        thread.start()
        await asyncio.to_thread(engine.wait_for_calls, 1)
        thread.hold(True)
        assert thread._inbox.empty()
        thread.submit(release(1))
        await asyncio.to_thread(engine.wait_for_calls, 3)
        await thread.close()
        assert engine.calls == ["rest", "handle 1", "rest"]

    asyncio.run(scenario())


def test_steps_are_timed_for_the_rates_that_leases_tell() -> None:
    class CountingEngine(ScriptedEngine):
        def stats(self) -> EngineStats:
            steps = self.calls.count("step")
            return EngineStats((), 0, 0, 0, 0, 0, 100 * steps, 0, steps, (), answer_tokens=0)

    async def scenario() -> ModelThread:
        engine = CountingEngine(num_steps=3)
        thread = ModelThread(engine, asyncio.get_running_loop(), lambda events: None, lambda death: None)
        thread.submit(release(1))
        thread.start()
        await asyncio.to_thread(engine.wait_for_calls, 4)
        await thread.close()
        return thread

    rates = asyncio.run(scenario()).speeds.rates
    assert rates.prefill_tokens_per_s > 0
    assert rates.step_s == ()
