"""The stock `openai` client against the served API."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from support.cluster.fake_backend import answer
from support.cluster.openai_client import Api

from disagg.api.text.tokenizer import ModelTokenizer
from disagg.router.generation import GenerationError, TokenChunk

pytestmark = pytest.mark.anyio

ASK: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
COMPLETE: dict[str, Any] = {"model": "demo", "prompt": "Hello"}
TEXTS = ["plain words", "naïve café, 中文字 🦊🎉 ok", "\n\n  spaces  and\ttabs\n", "ends open 🦊"]


def say(api: Api, tokenizer: ModelTokenizer, text: str, **options: Any) -> list[int]:
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    api.backend.script = lambda request: answer(ids, **options)
    return ids


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [None, ["ok"], ["ds  an", "fé, 中"], ["never"]])
async def test_joined_chat_deltas_equal_the_text_that_is_not_streamed(
    api: Api, client: openai.AsyncOpenAI, tokenizer: ModelTokenizer, text: str, stop: list[str] | None, group: int
) -> None:
    say(api, tokenizer, text, group=group)
    whole = (await client.chat.completions.create(**ASK, stop=stop)).choices[0]
    parts = [part async for part in await client.chat.completions.create(**ASK, stop=stop, stream=True)]
    deltas = [part.choices[0].delta.content or "" for part in parts]
    expected = text
    for stop_string in stop or []:
        expected = expected.split(stop_string)[0]
    assert "".join(deltas) == whole.message.content == expected
    assert not any("\ufffd" in delta for delta in deltas)
    assert parts[0].choices[0].delta.role == whole.message.role == "assistant"
    assert parts[-1].choices[0].finish_reason == whole.finish_reason == ("length" if expected == text else "stop")


@pytest.mark.parametrize("text", TEXTS)
async def test_joined_completion_deltas_equal_the_text_that_is_not_streamed(
    api: Api, client: openai.AsyncOpenAI, tokenizer: ModelTokenizer, text: str
) -> None:
    ids = say(api, tokenizer, text, reason="stop")
    whole = await client.completions.create(**COMPLETE)
    parts = [part async for part in await client.completions.create(**COMPLETE, stream=True)]
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text == text
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(ids)
    assert whole.id.startswith("cmpl-")


async def test_the_stream_ends_with_usage_if_asked(
    api: Api, client: openai.AsyncOpenAI, tokenizer: ModelTokenizer
) -> None:
    ids = say(api, tokenizer, "some words", num_cached_tokens=2)
    stream = await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    *others, last = [part async for part in stream]
    assert not any(part.usage for part in others)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(ids)
    assert last.usage.prompt_tokens == len(api.backend.requests[0].prompt)
    assert last.usage.total_tokens == last.usage.prompt_tokens + len(ids)
    assert last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens_details.cached_tokens == 2


async def test_chat_logprobs_spell_their_tokens(
    api: Api, client: openai.AsyncOpenAI, tokenizer: ModelTokenizer
) -> None:
    text = "né 🦊"
    ids = say(api, tokenizer, text, num_logprobs=2)
    whole = await client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == text
    assert [entry.logprob for entry in content] == [-0.25] * len(ids)
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(ids)
    assert content[0].top_logprobs[0].token == content[0].token
    stream = await client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2, stream=True)
    streamed = []
    async for part in stream:
        if part.choices[0].logprobs:
            streamed += part.choices[0].logprobs.content or []
    assert streamed == content


async def test_completion_logprobs_have_offsets_into_the_text(
    api: Api, client: openai.AsyncOpenAI, tokenizer: ModelTokenizer
) -> None:
    say(api, tokenizer, "the words of it", num_logprobs=1)
    choice = (await client.completions.create(**COMPLETE, logprobs=1)).choices[0]
    assert choice.logprobs is not None
    names, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert [choice.text[offset:].startswith(name) for name, offset in zip(names, offsets, strict=True)] == [True] * len(
        names
    )
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0][names[0]] == -0.25


async def test_several_prompts_times_n_give_choices_in_order(api: Api, client: openai.AsyncOpenAI) -> None:
    api.backend.script = lambda request: answer([request.prompt[-1], 30 + request.sampling.seed])
    extra = {"return_token_ids": True, "add_special_tokens": False}
    whole = await client.completions.create(model="demo", prompt=[[40], [50]], n=2, seed=7, extra_body=extra)
    assert [choice.token_ids for choice in whole.choices] == [[40, 37], [40, 38], [50, 37], [50, 38]]  # type: ignore[attr-defined]
    assert [choice.prompt_token_ids for choice in whole.choices] == [[40], [40], [50], [50]]  # type: ignore[attr-defined]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 8)
    stream = await client.completions.create(
        model="demo", prompt=[[40], [50]], n=2, seed=7, stream=True, extra_body=extra
    )
    texts = dict.fromkeys(range(4), "")
    finished = []
    async for part in stream:
        texts[part.choices[0].index] += part.choices[0].text
        finished += [part.choices[0].index] if part.choices[0].finish_reason else []
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert sorted(finished) == [0, 1, 2, 3]


async def test_the_client_raises_what_the_server_says(api: Api, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server serves `demo`"):
        await client.chat.completions.create(**{**ASK, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(**ASK, temperature=-1)
    assert refused.value.param == "temperature"
    api.backend.script = lambda request: [GenerationError(503, "all queues are full", retry_after_s=2.5)]
    with pytest.raises(openai.InternalServerError, match="all queues are full") as full:
        await client.chat.completions.create(**ASK, stream=True)
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "3"


async def test_a_stream_that_fails_raises_after_its_text(api: Api, client: openai.AsyncOpenAI) -> None:
    api.backend.script = lambda request: [TokenChunk(0, (40,)), GenerationError(503, "the decode worker was lost")]
    stream = await client.chat.completions.create(**ASK, stream=True)
    parts = aiter(stream)
    assert (await anext(parts)).choices[0].delta.content
    with pytest.raises(openai.APIError, match="the decode worker was lost"):
        await anext(parts)


async def test_models_are_listed_and_retrieved(api: Api, client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).max_model_len == 256  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")
