"""The router hands on what workers tell of their blocks, and asks who holds a prompt before it places it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from support.cluster.fake_worker import FakeWorker
from support.cluster.router_harness import make_request
from support.cluster.router_stage import collect, stage
from support.event_loop import in_event_loop, until

from disagg.cache.journal import JournalRestart
from disagg.router.generation import GenerationError
from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.router import Dispatch, Register
from disagg.worker.block_news import events_message


class ScriptedIndex(Collector):
    """Answers as told, and notes what it is told."""

    def __init__(self, held: dict[str, int] | None = None) -> None:
        self.held = held or {}
        self.workers: list[str] = []
        self.events: list[BlockEvents] = []
        self.asked: list[tuple[int, str]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def collect(self) -> Iterator[Metric]:
        return iter(())

    def add(self, register: Register) -> None:
        self.workers.append(register.incarnation)

    def remove(self, incarnation: str) -> None:
        self.workers.remove(incarnation)

    def take(self, events: BlockEvents) -> None:
        self.events.append(events)

    async def who_holds(self, prompt: Sequence[int], salt: str) -> dict[str, int]:
        self.asked.append((len(prompt), salt))
        await self.may_answer.wait()
        return self.held


@in_event_loop
async def test_workers_before_and_after_are_made_known_asked_heard_and_forgotten() -> None:
    async with stage() as made:
        first = await made.add("p0", "prefill")
        await until(lambda: len(made.router.workers()) == 1)
        index = ScriptedIndex()
        made.router.use(index)  # type: ignore[arg-type]
        second = await made.add("p1", "prefill")
        await until(lambda: index.workers == ["p0", "p1"])
        made.router.ask_blocks("p1", AskBlocks("p1"))
        assert await second.expect(AskBlocks) == AskBlocks("p1")
        told = events_message("p1", 0, 16, [JournalRestart()])
        await first.say(told)
        await second.say(replace(told, sequence=1))
        await until(lambda: index.events != [])
        assert index.events == [replace(told, sequence=1)], "a worker speaks for itself alone"
        await second._client.close()
        await until(lambda: index.workers == ["p0"])


async def served(worker: FakeWorker) -> None:
    await worker.answer(await worker.expect_after_others(Dispatch), 5, 6)


@in_event_loop
async def test_a_request_goes_to_the_worker_that_holds_its_prompt() -> None:
    async with stage() as made:
        workers = {name: await made.add(name, "both") for name in ("b0", "b1", "b2", "b3", "b4")}
        await until(lambda: len(made.router.workers()) == 5)
        index = ScriptedIndex({"b4": 400, "gone": 400})
        made.router.use(index)  # type: ignore[arg-type]
        for number in range(3):
            asking = asyncio.create_task(
                collect(made.router, make_request(2, f"r{number}", num_prompt_tokens=410, cache_salt="s"))
            )
            await served(workers["b4"])
            assert (await asking)[0] == [5, 6]
        assert index.asked == [(410, "s")] * 3
        record = made.router.record("r2")
        assert record is not None
        assert record["attempts"][0]["estimate"]["computed_tokens"] == 10


HELPED_BY_NONE = [({"policy": "least-loaded"}, {}), ({}, {"num_prompt_logprobs": 0})]


@pytest.mark.parametrize(("options", "fields"), HELPED_BY_NONE, ids=["policy", "scores"])
def test_nothing_is_asked_for_a_request_that_no_prefix_helps(options: dict[str, Any], fields: dict[str, Any]) -> None:
    @in_event_loop
    async def scenario() -> None:
        async with stage(**options) as made:
            worker = await made.add("b0", "both")
            await until(made.router.is_ready)
            index = ScriptedIndex()
            made.router.use(index)  # type: ignore[arg-type]
            request = make_request(2, num_prompt_tokens=400, **fields)
            asking = asyncio.create_task(collect(made.router, request))
            await worker.expect_after_others(Dispatch)
            assert index.asked == []
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    scenario()


@in_event_loop
async def test_a_request_that_waits_for_an_answer_can_be_cancelled_and_ends_with_the_router() -> None:
    async with stage() as made:
        worker = await made.add("b0", "both")
        await until(made.router.is_ready)
        index = ScriptedIndex()
        index.may_answer.clear()
        made.router.use(index)  # type: ignore[arg-type]
        leaving = asyncio.create_task(collect(made.router, make_request(2, "leaves")))
        staying = asyncio.create_task(collect(made.router, make_request(2, "stays")))
        await until(lambda: len(index.asked) == 2)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        left = made.router.record("leaves")
        assert left is not None
        assert left["state"] == "cancelled"
        made.router.shut_down()
        index.may_answer.set()
        with pytest.raises(GenerationError) as refused:
            await staying
        assert refused.value.status == 503
        assert worker.has_no_orders()
