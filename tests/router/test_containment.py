"""What one peer sends costs that peer at most: every message, every field at its extremes, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from support.cluster.fake_worker import FakeWorker
from support.cluster.router_harness import GEOMETRY, make_request
from support.event_loop import in_event_loop, until, within
from support.links.extremes import messages
from support.links.sample_messages import SAMPLES

from disagg.router.generation import GenerationEnd, GenerationError, GenerationRequest
from disagg.router.router import Router
from disagg.transceiver.layout.compatibility import geometry_difference
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages import router as r
from disagg.transceiver.wire.messages.tokens import Tokens

KEYS = ClusterKeys.published()
BATCH = 25
ANSWERS = (Tokens, r.Finished, r.RequestFailed, r.TransferFailure, r.TransferReport, r.PromptScores)


@contextlib.asynccontextmanager
async def a_router() -> AsyncIterator[Router]:
    async with Router.open("tcp://127.0.0.1:0", KEYS) as router:
        yield router
        router.check_invariants()


async def collect(router: Router, request: GenerationRequest) -> list[int]:
    token_ids: list[int] = []
    async for item in router.generate(request):
        token_ids += () if isinstance(item, GenerationEnd) else item.token_ids
    return token_ids


def look_everywhere(router: Router) -> None:
    """Whatever a person or a probe may ask is answered."""
    json.dumps(router.workers())
    router.metrics()
    router.is_ready()
    router.max_model_len()
    router.check_invariants()


async def until_heard(router: Router, worker: FakeWorker) -> None:
    """The router has taken what the worker sent: its farewell at the latest, on the same connection."""
    await worker.say(r.Lease(worker.register.incarnation, router.cluster.incarnation, r.LEAVING))
    await until(lambda: router.cluster.registry.get(worker.register.incarnation) is None, "it left")


def batches() -> list[list[tuple[str, bytes]]]:
    every = [one for message in SAMPLES for one in messages(message)]
    return [every[first : first + BATCH] for first in range(0, len(every), BATCH)]


@in_event_loop
async def test_no_message_with_any_field_at_its_extremes_ends_the_router_or_another_worker() -> None:
    async with a_router() as router:
        opened = contextlib.AsyncExitStack()
        async with opened:
            prefill = await opened.enter_async_context(FakeWorker.open(router.endpoint, KEYS, "p0", "prefill"))
            decode = await opened.enter_async_context(FakeWorker.open(router.endpoint, KEYS, "d0", "decode"))
            for number, batch in enumerate(batches()):
                role = ("prefill", "decode", "both")[number % 3]
                async with FakeWorker.open(router.endpoint, KEYS, f"evil-{number}", role) as evil:
                    for _, data in batch:
                        evil.send_bytes(data)
                    await until_heard(router, evil)
                look_everywhere(router)
            for name in ("p0", "d0"):
                assert router.cluster.registry.get(name) is not None
            for worker in list(router.cluster.registry):
                if worker.worker_id not in ("p0", "d0"):
                    router.drain(worker.worker_id)
            answer = asyncio.create_task(collect(router, make_request(max_tokens=2)))
            await within(prefill.expect(r.Dispatch))
            await decode.answer(await within(decode.expect(r.Dispatch)), 5, 6)
            assert await within(answer) == [5, 6]


@in_event_loop
async def test_no_answer_with_any_field_at_its_extremes_ends_the_router() -> None:
    async with a_router() as router, FakeWorker.open(router.endpoint, KEYS, "b0", "both") as worker:
        for sample in SAMPLES:
            if not isinstance(sample, ANSWERS):
                continue
            answer = asyncio.create_task(collect(router, make_request(max_tokens=64, num_prompt_tokens=40)))
            dispatch = await within(worker.expect_after_others(r.Dispatch))
            message = replace(sample, transfer_id=dispatch.transfer_id, epoch=dispatch.epoch)
            for _, data in messages(message):
                if answer.done():
                    with contextlib.suppress(GenerationError):
                        answer.result()
                    answer = asyncio.create_task(collect(router, make_request(max_tokens=64, num_prompt_tokens=40)))
                    dispatch = await within(worker.expect_after_others(r.Dispatch))
                worker.send_bytes(data.replace(message.transfer_id.encode(), dispatch.transfer_id.encode()))
                await asyncio.sleep(0.003)
                look_everywhere(router)
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
        assert router.cluster.registry.get("b0") is not None


@in_event_loop
async def test_a_message_that_raises_costs_its_connection_is_logged_once_by_name_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_router() as router, FakeWorker.open(router.endpoint, KEYS, "p0", "prefill"):

        def fail(*args: Any) -> None:
            raise ZeroDivisionError("by the test")

        async with FakeWorker.open(router.endpoint, KEYS, "d0", "decode") as evil:
            monkeypatch.setattr(router, "answered", fail)
            for _ in range(3):
                await evil.say(Tokens("t", 1, 0, (1,)))
            await until(lambda: evil.num_refusals, "it is refused")
        assert [worker["id"] for worker in router.workers()] == ["p0"]
        assert b"disagg_peer_faults_total 1.0" in router.metrics()
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 1
        assert "a StepTokens of worker `d0` cannot be taken" in told[0].getMessage()


@pytest.mark.parametrize(
    "change", [{"num_kv_heads": 0}, {"num_kv_heads": -1}, {"head_dim": 0}, {"num_sink_tokens": -1}]
)
def test_a_geometry_that_no_model_has_pairs_with_nothing(change: dict[str, int]) -> None:
    try:
        groups = tuple(replace(group, **change) for group in GEOMETRY.groups)
    except ValueError:
        return  # refused where it is built
    found = geometry_difference(replace(GEOMETRY, block_size=32, groups=groups), GEOMETRY)
    assert found is not None
    assert found[0].startswith("groups")
