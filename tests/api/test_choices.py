"""The choices of one prompt: one request to the router, each with an end of its own."""

from __future__ import annotations

import asyncio

import pytest
from support.cluster.fake_backend import Step, answer
from support.cluster.openai_client import Api

from disagg.router.generation import GenerationRequest, TokenChunk

pytestmark = pytest.mark.anyio


async def test_choices_are_one_request_whose_seed_is_the_first_ones(api: Api) -> None:
    api.backend.script = lambda request: answer([30 + request.sampling.seed, 40])
    reply = await api.complete(prompt=[40], n=3, seed=2, return_token_ids=True)
    assert [choice["token_ids"] for choice in reply.json["choices"]] == [[32, 40], [33, 40], [34, 40]]
    (request,) = api.backend.requests
    assert (request.sampling.num_choices, request.sampling.seed) == (3, 2)


async def test_a_choice_that_its_stop_string_ends_is_called_off_alone(api: Api) -> None:
    """The second one's token spells the stop; it would go on for ever."""
    forever = asyncio.Event()
    stop = (await api.post("/detokenize", {"tokens": [50]})).json["prompt"]

    def script(request: GenerationRequest) -> list[Step]:
        return [TokenChunk(0, (50,)), forever] if request.sampling.seed == 1 else answer([40, 41, 42])

    api.backend.script = script
    reply = await api.complete(prompt=[40], n=3, seed=0, stop=[stop], return_token_ids=True, max_tokens=9)
    assert [choice["finish_reason"] for choice in reply.json["choices"]] == ["length", "stop", "length"]
    assert [choice["token_ids"] for choice in reply.json["choices"]] == [[40, 41, 42], [50], [40, 41, 42]]
    assert [choice for _, choice in api.backend.ended_choices] == [1]


async def test_the_last_choice_to_end_needs_no_calling_off(api: Api) -> None:
    stop = (await api.post("/detokenize", {"tokens": [50]})).json["prompt"]
    api.backend.script = lambda request: answer([50] * 5)
    await api.complete(prompt=[40], n=2, stop=[stop], max_tokens=9)
    assert len(api.backend.ended_choices) == 1
