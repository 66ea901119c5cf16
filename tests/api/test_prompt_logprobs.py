"""A prompt's own log-probabilities, as `prompt_logprobs` and before an answer's where the prompt is echoed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import pytest
from support.cluster.fake_backend import Step, answer
from support.cluster.openai_client import Api

from disagg.router.generation import GenerationRequest, TokenChunk
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs

pytestmark = pytest.mark.anyio

PROMPT = [2, 40, 41, 42]


def scores_of(start: int, targets: Sequence[int], num_top: int) -> PromptLogprobs:
    """Token t at position p has logprob -p and rank 1; the likeliest are t, t + 1, ..."""
    n, top = len(targets), [t + k for t in targets for k in range(num_top)]
    own = [-float(start + i) for i in range(n)]
    values = [-float(start + i) - k for i in range(n) for k in range(num_top)]
    packed = struct.pack(f"<{n}f", *own), struct.pack(f"<{n}i", *[1] * n)
    return PromptLogprobs(start, *packed, struct.pack(f"<{len(top)}i", *top), struct.pack(f"<{len(top)}f", *values))


def scripted(request: GenerationRequest) -> list[Step]:
    """The last position comes in a part of its own."""
    sampling, prompt = request.sampling, request.prompt
    first, *rest = answer([50] * sampling.max_tokens, num_logprobs=sampling.num_logprobs)
    assert isinstance(first, TokenChunk)
    if (count := sampling.num_prompt_logprobs) is None:
        return [first, *rest]
    cuts = [(1, prompt[1:-1]), (len(prompt) - 1, prompt[max(1, len(prompt) - 1) :])]
    parts = tuple(scores_of(start, targets, count) for start, targets in cuts if targets)
    return [replace(first, prompt_logprobs=parts), *rest]


@pytest.fixture
def scored(api: Api) -> Api:
    api.backend.script = scripted
    return api


async def test_an_echoed_prompt_has_its_logprobs_before_the_answers(scored: Api) -> None:
    reply = await scored.complete(prompt=PROMPT, echo=True, logprobs=1, max_tokens=1)
    logprobs, text = reply.json["choices"][0]["logprobs"], reply.json["choices"][0]["text"]
    assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -3.0, -0.25]
    assert logprobs["top_logprobs"][0] is None
    for token, offset, top in zip(logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], strict=True):
        assert top is None or (list(top) == [token] and text[offset:].startswith(token))
    assert [len(column) for column in logprobs.values()] == [5] * 4


async def test_max_tokens_0_returns_the_prompt_alone(scored: Api) -> None:
    reply = await scored.complete(prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    choice = reply.json["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == (await scored.complete(prompt=PROMPT, echo=True, max_tokens=0)).json["choices"][0]["text"]
    assert reply.json["usage"]["completion_tokens"] == 0
    assert scored.backend.requests[-1].sampling.max_tokens == 1


async def test_a_stream_begins_with_the_echoed_logprobs(scored: Api) -> None:
    whole = (await scored.complete(prompt=PROMPT, echo=True, logprobs=1, max_tokens=3)).json["choices"][0]["logprobs"]
    events = (await scored.complete(prompt=PROMPT, echo=True, logprobs=1, max_tokens=3, stream=True)).events[:-1]
    parts = [event["choices"][0]["logprobs"] for event in events if event["choices"][0]["logprobs"]]
    assert {name: [item for part in parts for item in part[name]] for name in whole} == whole


async def test_prompt_logprobs_name_tokens_by_id_with_rank_and_text(scored: Api) -> None:
    choice = (await scored.complete(prompt=PROMPT, prompt_logprobs=2)).json["choices"][0]
    assert choice["logprobs"] is None
    first, *entries = choice["prompt_logprobs"]
    assert first is None
    assert [list(entry) for entry in entries] == [["40", "41"], ["41", "42"], ["42", "43"]]
    assert entries[0]["40"].keys() == {"logprob", "rank", "decoded_token"}
    assert (entries[2]["43"]["logprob"], entries[2]["43"]["rank"]) == (-4.0, 2)
    assert "prompt_logprobs" not in (await scored.complete(prompt=PROMPT)).json["choices"][0]


async def test_each_of_several_prompts_has_its_own(scored: Api) -> None:
    reply = await scored.complete(prompt=[PROMPT, PROMPT[:2], [9]], echo=True, logprobs=1, max_tokens=1)
    lists = [choice["logprobs"]["token_logprobs"] for choice in reply.json["choices"]]
    assert lists == [[None, -1.0, -2.0, -3.0, -0.25], [None, -1.0, -0.25], [None, -0.25]]


async def test_a_chat_has_them_beside_its_choices(scored: Api) -> None:
    reply = await scored.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "prompt_logprobs": 0}
    )
    prompt = scored.backend.requests[-1].prompt
    assert [None, *map(str, prompt[1:])] == [e and next(iter(e)) for e in reply.json["prompt_logprobs"]]


async def test_logprobs_of_an_echo_and_prompt_logprobs_have_their_own_numbers(scored: Api) -> None:
    choice = (await scored.complete(prompt=PROMPT, echo=True, logprobs=1, prompt_logprobs=3)).json["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 1
    assert len(choice["prompt_logprobs"][1]) == 3
    assert scored.backend.requests[-1].sampling.num_prompt_logprobs == 3
