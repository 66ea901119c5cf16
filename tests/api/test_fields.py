"""The table of fields: every row has an effect that is seen below or in the answer, or is refused by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cluster.fake_backend import FakeBackend, answer
from support.cluster.openai_client import Api, Reply

from disagg.api.http.errors import ApiError
from disagg.api.request.field_docs import render
from disagg.api.request.fields import (
    BY_ENDPOINT,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    FIELDS,
    GENERATE,
    TOKENIZE,
    Field,
    parse_params,
)
from disagg.api.request.params import RequestParams
from disagg.api.request.sampling import prefix_salt

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs" / "request-fields.md"
USER = {"role": "user", "content": "Hello"}
REQUIRED: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hello"},
    CHAT: {"messages": [USER]},
    TOKENIZE: {"prompt": "Hello"},
    DETOKENIZE: {"tokens": [40]},
}

Look = Callable[[FakeBackend, Reply], Any]
"""What an effect is seen by: it must differ between a request with the field and one without."""


def sampling(name: str) -> Look:
    return lambda backend, reply: getattr(backend.requests[-1].sampling, name)


def first_choice(name: str) -> Look:
    return lambda backend, reply: reply.json["choices"][0].get(name)


def prompt(backend: FakeBackend, reply: Reply) -> Any:
    return backend.requests[-1].prompt


def priority(backend: FakeBackend, reply: Reply) -> Any:
    return backend.requests[-1].priority


def text(backend: FakeBackend, reply: Reply) -> Any:
    return reply.json["choices"][0].get("text") or reply.json["choices"][0]["message"]["content"]


def media_type(backend: FakeBackend, reply: Reply) -> Any:
    return reply.headers["content-type"]


def body(backend: FakeBackend, reply: Reply) -> Any:
    return reply.json


def num_events(backend: FakeBackend, reply: Reply) -> Any:
    return len(reply.events)


def named_tokens(backend: FakeBackend, reply: Reply) -> Any:
    logprobs = reply.json["choices"][0]["logprobs"]
    return logprobs["tokens"] if "tokens" in logprobs else logprobs["content"][0]["token"]


def num_top(backend: FakeBackend, reply: Reply) -> Any:
    return len(reply.json["choices"][0]["logprobs"]["content"][0]["top_logprobs"])


# name -> value to send, what sees it, and what must be sent with it.
EFFECTS: dict[str, tuple[Any, Look, dict[str, Any]]] = {
    "max_tokens": (5, sampling("max_tokens"), {}),
    "max_completion_tokens": (5, sampling("max_tokens"), {}),
    "min_tokens": (2, sampling("min_tokens"), {}),
    "n": (2, sampling("num_choices"), {}),
    "seed": (11, sampling("seed"), {}),
    "temperature": (0, sampling("temperature"), {}),
    "top_p": (0.5, sampling("top_p"), {}),
    "top_k": (3, sampling("top_k"), {}),
    "min_p": (0.25, sampling("min_p"), {}),
    "repetition_penalty": (2, sampling("repetition_penalty"), {}),
    "presence_penalty": (1.5, sampling("presence_penalty"), {}),
    "frequency_penalty": (-1.5, sampling("frequency_penalty"), {}),
    "logit_bias": ({"40": -100}, sampling("logit_bias"), {}),
    "stop": ("lo", text, {}),
    "include_stop_str_in_output": (True, text, {"stop": ["lo"]}),
    "stop_token_ids": ([40], sampling("stop_token_ids"), {}),
    "ignore_eos": (True, sampling("ignore_eos"), {}),
    "priority": (-3, priority, {}),
    "cache_salt": ("mine", sampling("cache_salt"), {}),
    "skip_special_tokens": (False, text, {}),
    "top_logprobs": (2, num_top, {"logprobs": True}),
    "return_tokens_as_token_ids": (True, named_tokens, {"logprobs": True}),
    "return_token_ids": (True, first_choice("token_ids"), {}),
    "stream": (True, media_type, {}),
    "stream_options": ({"include_usage": True}, num_events, {"stream": True}),
    "echo": (True, text, {}),
    "prompt_logprobs": (1, sampling("num_prompt_logprobs"), {}),
    "add_generation_prompt": (False, prompt, {}),
    "chat_template_kwargs": ({"bos_token": "other"}, prompt, {}),
    "prompt": ("Another", prompt, {}),
    "messages": ([USER, USER], prompt, {}),
}
SEEN_ELSEWHERE = {"model", "user", "logprobs", "add_special_tokens", "best_of"}  # each has a test of its own below

HONOURED = [(field, endpoint) for field in FIELDS if field.is_honoured for endpoint in field.endpoints]
REFUSED = [(field, endpoint) for field in FIELDS if not field.is_honoured for endpoint in field.endpoints]
SEEN_BELOW = [(f, e) for f, e in HONOURED if e in GENERATE and not f.is_fixed and f.name not in SEEN_ELSEWHERE]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Field) else str(value).replace("/", "-")


async def ask(api: Api, endpoint: str, extra: dict[str, Any]) -> Reply:
    ids = json.loads((await api.post(TOKENIZE, {"prompt": "Hello there", "add_special_tokens": False})).body)["tokens"]
    api.backend.script = lambda request: answer([*ids, 2], num_logprobs=request.sampling.num_logprobs)
    api.backend.requests.clear()
    return await api.post(endpoint, {**REQUIRED[endpoint], **extra})


@pytest.mark.parametrize(("field", "endpoint"), SEEN_BELOW, ids=name_of)
async def test_a_honoured_field_changes_what_the_backend_or_the_client_sees(
    api: Api, field: Field, endpoint: str
) -> None:
    value, look, others = EFFECTS[field.name]
    if endpoint == COMPLETIONS and "logprobs" in others:
        others = {"logprobs": 1}
    without = await ask(api, endpoint, others)
    seen_without = look(api.backend, without)
    with_field = await ask(api, endpoint, {**others, field.name: value})
    assert (without.status, with_field.status) == (200, 200), with_field.body
    assert look(api.backend, with_field) != seen_without
    unset = await ask(api, endpoint, {**others, field.name: None})
    if field.name not in REQUIRED[endpoint] | {"seed": 0}:
        assert look(api.backend, unset) == seen_without


@pytest.mark.parametrize(("field", "endpoint"), [(f, e) for f, e in HONOURED if f.is_fixed], ids=name_of)
async def test_a_fixed_field_takes_its_one_value_and_no_other(api: Api, field: Field, endpoint: str) -> None:
    assert (await ask(api, endpoint, {field.name: field.check.value})).status == 200  # type: ignore[union-attr]
    for other in ("something else", 17, field.check.value is not True, []):  # type: ignore[union-attr]
        refused = await ask(api, endpoint, {field.name: other})
        assert (refused.status, refused.error["param"]) == (400, field.name)


@pytest.mark.parametrize(("field", "endpoint"), REFUSED, ids=name_of)
@pytest.mark.parametrize("value", [1, "text", {}], ids=type)
async def test_a_refused_field_is_named_by_the_error(api: Api, field: Field, endpoint: str, value: object) -> None:
    refused = await ask(api, endpoint, {field.name: value})
    assert (refused.status, refused.error["param"], refused.error["code"]) == (400, field.name, "unsupported_parameter")
    assert api.backend.requests == []
    assert (await ask(api, endpoint, {field.name: None})).status == 200


@pytest.mark.parametrize("endpoint", REQUIRED, ids=name_of)
async def test_an_unknown_field_is_named_by_the_error(api: Api, endpoint: str) -> None:
    refused = await ask(api, endpoint, {"temprature": 1})
    assert (refused.status, refused.error["param"], refused.error["code"]) == (400, "temprature", "unknown_parameter")


@pytest.mark.parametrize(("field", "endpoint"), HONOURED, ids=name_of)
async def test_a_value_of_another_type_is_refused_by_name(api: Api, field: Field, endpoint: str) -> None:
    """An object inside a list is a value of no field."""
    refused = await ask(api, endpoint, {field.name: [{"no": "field"}]})
    assert refused.status == 400
    assert refused.error["param"].startswith(field.name)


WRONG = [
    ({"max_tokens": -1}, "max_tokens", "or more, got -1"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "from 0 to 20"),
    ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "leave `stream` out"),
    ({"max_tokens": 5.0}, "max_tokens", "got 5.0"),
    ({"max_tokens": True}, "max_tokens", "got true"),
    ({"max_tokens": "5"}, "max_tokens", "got '5'"),
    ({"temperature": math.nan}, "temperature", "a finite number, 0 or more, got nan"),
    ({"temperature": math.inf}, "temperature", "got inf"),
    ({"temperature": 10**400}, "temperature", "got 1000"),
    ({"temperature": False}, "temperature", "got false"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.5}, "top_p", "at most 1"),
    ({"min_p": -0.1}, "min_p", "0 or more"),
    ({"top_k": -2}, "top_k", "-1 or more"),
    ({"n": 0}, "n", "from 1 to 128"),
    ({"n": 129}, "n", "from 1 to 128"),
    ({"seed": 2**63}, "seed", "an integer"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "got a list of 5"),
    ({"stop": ["a", ""]}, "stop[1]", "1 to 1024 characters"),
    ({"stop": "\ud800"}, "stop", "valid Unicode"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids as keys"),
    ({"logit_bias": {"40": 101}}, "logit_bias.40", "at most 100"),
    ({"logit_bias": {"4000": 1}}, "logit_bias", "token id 4000 is not in the vocabulary of 2048"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "got -1"),
    ({"stop_token_ids": [2048]}, "stop_token_ids", "token id 2048 is not in the vocabulary of 2048"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs `stream`"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "only the keys"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "more than the 8"),
    ({"user": 7}, "user", "a string"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'only {"type": "text"}'),
]
WRONG_COMPLETIONS = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "at least one"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt[0]", "at least one token id"),
    ({"prompt": [1, 2.5]}, "prompt[1]", "got 2.5"),
    ({"prompt": [1, True]}, "prompt[1]", "got true"),
    ({"prompt": ["a", [1]]}, "prompt", "a list of strings, a list of token ids"),
    ({"prompt": [None]}, "prompt[0]", "a string or a list of token ids"),
    ({"prompt": 5}, "prompt", "got 5"),
    ({"prompt": None}, "prompt", "required"),
    ({"prompt": [2047, 2048]}, "prompt", "token id 2048 is not in the vocabulary of 2048"),
    ({"prompt": [-1]}, "prompt[0]", "got -1"),
    ({"prompt": "half \udc00 a pair"}, "prompt", "valid Unicode"),
    ({"best_of": 2}, "best_of", "differs from `n`"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"logprobs": True}, "logprobs", "got true"),
    ({"max_tokens": 0}, "max_tokens", "or `echo`"),
    ({"prompt": ["a"] * 65, "n": 2}, "n", "130 choices"),
    ({"prompt": ["a"] * 129}, "prompt", "129 choices"),
]
WRONG_CHAT = [
    ({"max_tokens": 0}, "max_tokens", "1 or more, got 0"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": None}, "messages", "required"),
    ({"messages": ["hi"]}, "messages[0]", "a message"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "a string"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "a string"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "text parts"),
    ({"messages": [{"role": "tool", "content": "5"}]}, "messages[0].role", "tools are not supported"),
    ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls", "only []"),
    ({"messages": [{**USER, "annotations": [1]}]}, "messages[0].annotations", "only []"),
    ({"messages": [{**USER, "weight": 1}]}, "messages[0].weight", "only the keys"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "reads text only",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "a string"),
    ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
    ({"logprobs": 2}, "logprobs", "true or false"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "differ"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "does not set itself"),
    ({"chat_template_kwargs": {"bos_token": "\ud800"}}, "chat_template_kwargs", "valid Unicode"),
    ({"tool_choice": "auto"}, "tool_choice", 'only "none"'),
]
CASES = [
    *((endpoint, *case) for case in WRONG for endpoint in GENERATE),
    *((COMPLETIONS, *case) for case in WRONG_COMPLETIONS),
    *((CHAT, *case) for case in WRONG_CHAT),
]


@pytest.mark.parametrize(
    ("endpoint", "extra", "param", "words"), CASES, ids=lambda v: str(v)[:50] if isinstance(v, dict) else ""
)
async def test_a_wrong_value_is_400_with_its_name_and_a_reason(
    api: Api, endpoint: str, extra: dict[str, Any], param: str, words: str
) -> None:
    reply = await api.post(endpoint, {**REQUIRED[endpoint], **extra})
    assert (reply.status, reply.error["param"]) == (400, param), reply.body
    assert words in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert api.backend.requests == []


async def test_the_models_sampling_defaults_hold_until_a_request_says_otherwise(api: Api) -> None:
    await api.complete()
    chosen = api.backend.requests[-1].sampling
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p, chosen.repetition_penalty) == (
        0.7,
        40,
        0.9,
        0.05,
        1.1,
    )
    assert chosen.eos_token_ids == (1,)
    await api.complete(temperature=1, top_k=-1, top_p=1, min_p=0, repetition_penalty=1)
    chosen = api.backend.requests[-1].sampling
    assert (chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p, chosen.repetition_penalty) == (1, 0, 1, 0, 1)


async def test_seeds_differ_unless_given_and_negative_ones_are_taken(api: Api) -> None:
    for extra in ({}, {}, {"seed": -5}, {"seed": -5}):
        await api.complete(**extra)
    seeds = [request.sampling.seed for request in api.backend.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2] == seeds[3] >= 0


async def test_answers_are_limited_by_default_as_each_endpoint_does(api: Api) -> None:
    await api.complete()
    await api.chat()
    await api.complete(prompt=[40] * 250)
    completion, chat, long = api.backend.requests
    assert completion.sampling.max_tokens == 16
    assert chat.sampling.max_tokens == 256 - len(chat.prompt)
    assert long.sampling.max_tokens == 6


async def test_logprobs_are_passed_on_by_number(api: Api) -> None:
    requests: list[tuple[Any, Any]] = [
        (api.complete, {}),
        (api.complete, {"logprobs": 0}),
        (api.complete, {"logprobs": 5}),
        (api.chat, {"logprobs": False}),
        (api.chat, {"logprobs": True}),
        (api.chat, {"logprobs": True, "top_logprobs": 20}),
    ]
    for send, extra in requests:
        assert (await send(**extra)).status == 200
    assert [request.sampling.num_logprobs for request in api.backend.requests] == [None, 0, 5, None, 0, 20]


async def test_special_tokens_are_the_tokenizers_own(api: Api) -> None:
    """The bundled tokenizer adds BOS; a chat has it from its template already."""
    await api.complete()
    await api.complete(add_special_tokens=False)
    await api.chat()
    await api.chat(add_special_tokens=True)
    prompts = [request.prompt for request in api.backend.requests]
    assert [prompt.count(2) for prompt in prompts] == [1, 0, 1, 1]
    assert prompts[2] == prompts[3]


async def test_kv_is_shared_by_api_key_and_salt_and_the_workers_learn_neither(api: Api) -> None:
    await api.complete()
    await api.complete(cache_salt="mine")
    await api.complete(cache_salt="mine", seed=2)
    salts = [request.sampling.cache_salt for request in api.backend.requests]
    assert salts[0] == ""
    assert salts[1] == salts[2]
    every = {prefix_salt(tenant, salt) for tenant in (None, "key", "other") for salt in (None, "mine", "key")}
    assert len(every) == 9
    assert not any("key" in salt or "mine" in salt for salt in every)


async def test_who_asked_is_recorded(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="disagg.api"):
        await api.complete(user="ann")
    assert "user ann" in caplog.text


def test_the_parsed_request_has_exactly_the_honoured_fields() -> None:
    attributes = {field.name for field in dataclass_fields(RequestParams)} - {"endpoint"}
    assert attributes == {field.name for field in FIELDS if field.is_honoured and not field.is_fixed}


def test_every_honoured_field_has_its_effect_tested() -> None:
    assert {f.name for f, _ in SEEN_BELOW} == EFFECTS.keys()
    others = {f.name for f, e in HONOURED if e not in GENERATE and f.name not in EFFECTS}
    assert others == {"model", "tokens", "add_special_tokens", "return_token_strs"}  # tested with `/tokenize`


def test_no_field_has_two_rows_for_an_endpoint() -> None:
    pairs = [(field.name, endpoint) for field in FIELDS for endpoint in field.endpoints]
    assert len(pairs) == len(set(pairs)) == sum(map(len, BY_ENDPOINT.values()))


def test_every_field_of_the_stock_client_is_in_the_table() -> None:
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    for endpoint, module in ((COMPLETIONS, completion_create_params), (CHAT, chat_create_params)):
        names = set(module.CompletionCreateParamsBase.__annotations__) | {"stream"}
        assert names - BY_ENDPOINT[endpoint].keys() == set()


def test_the_page_of_fields_is_fresh() -> None:
    assert PAGE.read_text() == render(), "run: python -m disagg.api.request.field_docs > docs/request-fields.md"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), endpoint=st.sampled_from(sorted(REQUIRED)))
def test_no_body_makes_the_parser_fail_in_another_way(data: st.DataObject, endpoint: str) -> None:
    names = st.sampled_from(sorted(BY_ENDPOINT[endpoint])) | st.text(max_size=5)
    for value in (data.draw(st.dictionaries(names, JSON, max_size=4)), data.draw(JSON)):
        with suppress(ApiError):
            assert parse_params(endpoint, value).endpoint == endpoint
