"""What an API process sees of the router through the link is what the router says, chunk by chunk and by credit."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any

import pytest
from support.cluster.fake_backend import FakeBackend, answer
from support.cluster.remote import linked
from support.event_loop import PATIENCE_S

from disagg.api.processes.core_side import CoreSide
from disagg.api.processes.link import LENGTH, ProcessLink
from disagg.api.processes.remote_backend import CREDIT, GRANTED_AT_ONCE
from disagg.router.generation import GenerationEnd, GenerationError, GenerationRequest, TokenChunk
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.values import Sampling

pytestmark = pytest.mark.anyio


def request(max_tokens: int = 8, **fields: Any) -> GenerationRequest:
    sampling = Sampling(max_tokens=max_tokens, seed=2**62, top_p=0.5, logit_bias=((3, -1.5),), cache_salt="s")
    return GenerationRequest("id", tuple(range(100_000)), sampling, **fields)


async def collect(backend: Any, asked: GenerationRequest) -> list[TokenChunk | GenerationEnd]:
    return [item async for item in backend.generate(asked)]


async def test_request_and_answer_arrive_as_they_were_sent() -> None:
    async with linked() as pair:
        pair.backend.script = lambda _: answer(
            [5, 6, 7], group=2, reason="stop", stop_token_id=7, num_cached_tokens=3, num_logprobs=2
        )
        asked = request(priority=-3, tenant="ann", timeout_s=2.5)
        assert await collect(pair.remote, asked) == [s async for s in FakeBackend.generate(pair.backend, asked)]
        told = pair.backend.requests[0]
        assert asdict(replace(told, prompt=tuple(told.prompt))) == asdict(asked)


async def test_choices_prompt_scores_and_an_early_end_cross_too() -> None:
    scores = (PromptLogprobs(1, struct.pack("<f", -1.5), struct.pack("<i", 2)),)
    asked = GenerationRequest("id", (1, 2), Sampling(max_tokens=8, seed=4, num_choices=2))
    async with linked() as pair:
        pair.backend.script = lambda alone: [
            TokenChunk(0, (alone.sampling.seed,), (), 0, scores),
            GenerationEnd("stop"),
        ]
        items = await collect(pair.remote, asked)
        chunks = {item.choice: item for item in items if isinstance(item, TokenChunk)}
        assert {choice: chunk.token_ids for choice, chunk in chunks.items()} == {0: (4,), 1: (5,)}
        assert chunks[0].prompt_logprobs == scores
        assert sorted(item.choice for item in items if isinstance(item, GenerationEnd)) == [0, 1]
        pair.backend.script = lambda _: [TokenChunk(0, (1,)), asyncio.Event()]
        async with aclosing(pair.remote.generate(asked)) as stream:
            await anext(stream)
            pair.remote.end_choice(asked, 1)
            async with asyncio.timeout(10):
                while not pair.backend.ended_choices:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
        assert pair.backend.ended_choices == [("id", 1)]


@pytest.mark.parametrize("retry_after_s", [None, 2.0])
async def test_an_error_keeps_status_words_and_retry_after(retry_after_s: float | None) -> None:
    async with linked() as pair:
        pair.backend.script = lambda _: [GenerationError(429, "too many", retry_after_s=retry_after_s)]
        with pytest.raises(GenerationError) as caught:
            await collect(pair.remote, request())
        assert (caught.value.status, caught.value.message) == (429, "too many")
        assert caught.value.retry_after_s == retry_after_s


async def test_an_error_of_the_router_s_own_is_500_and_costs_that_request_alone() -> None:
    async with linked() as pair:
        pair.backend.script = lambda _: [RuntimeError("a bug")]
        with pytest.raises(GenerationError, match="the router failed") as caught:
            await collect(pair.remote, request())
        assert caught.value.status == 500
        pair.backend.script = lambda _: answer([1])
        assert len(await collect(pair.remote, request())) == 2


async def test_closing_the_stream_cancels_at_the_router() -> None:
    async with linked() as pair:
        pair.backend.script = lambda _: [TokenChunk(0, (1,)), asyncio.Event()]
        async with aclosing(pair.remote.generate(request())) as items:
            assert await anext(items) == TokenChunk(0, (1,))
        await pair.backend.until(lambda: pair.backend.num_cancelled == 1)
        assert pair.backend.num_open == 0


async def test_an_answer_that_is_not_read_stops_at_its_credit_and_goes_on_when_it_is() -> None:
    async with linked() as pair:
        taken: list[int] = []

        def script(_: GenerationRequest) -> Any:
            for index in range(4 * CREDIT):
                taken.append(index)
                yield TokenChunk(index, (index,))
            yield GenerationEnd("length")

        pair.backend.script = script
        items = pair.remote.generate(request(4 * CREDIT))
        await anext(items)
        for _ in range(20 * CREDIT):
            await asyncio.sleep(0)
        assert len(taken) <= CREDIT + 1
        quick = FakeBackend().script
        pair.backend.script = quick
        assert len(await collect(pair.remote, request())) == 4  # another is served meanwhile
        rest = [item async for item in items]
        assert [item.index for item in rest if isinstance(item, TokenChunk)] == list(range(1, 4 * CREDIT))
        assert isinstance(rest[-1], GenerationEnd)


def test_credit_is_granted_before_it_is_used_up() -> None:
    assert GRANTED_AT_ONCE < CREDIT / 2


async def test_questions_are_answered() -> None:
    async with linked() as pair:
        assert await pair.remote.workers() == pair.backend.workers()
        assert await pair.remote.metrics() == pair.backend.metrics()
        assert pair.remote.max_model_len() == 256


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", LENGTH.pack(2) + b"\x00\x00", LENGTH.pack(3) + b"\x92\x63\x80"])
async def test_what_cannot_be_read_ends_that_process_s_answers_and_nothing_else(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    side = CoreSide(FakeBackend(), await ProcessLink.open(ours))
    theirs.send(data)
    async with asyncio.timeout(PATIENCE_S):
        await side.run()
    theirs.close()
