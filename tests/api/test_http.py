"""Statuses, headers, error objects and what happens when either side goes away."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from support.cluster.fake_backend import FakeBackend, Step, answer
from support.cluster.openai_client import Api, Reply, served
from support.model.small_tokenizers import DEMO_FOLDER, byte_level, write_folder

from disagg.api.app import create_admin_app, open_app
from disagg.api.http.server import serve
from disagg.api.request.sampling import prefix_salt
from disagg.api.settings import ApiSettings
from disagg.engine.model.checkpoint import GenerationDefaults
from disagg.engine.model.weights import ModelRefused
from disagg.router.generation import GenerationEnd, GenerationError, TokenChunk

pytestmark = pytest.mark.anyio

HELD_S = 0.08  # far over what a turn of the loop may take, far under what such a prompt takes

SETTINGS = ApiSettings(model_folder=DEMO_FOLDER, served_model_name="demo")
BOTH = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
STREAMED_OR_NOT = pytest.mark.parametrize("stream", [True, False])
BODY: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}


def raw_request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def assert_is_error(reply: Reply, status: int, *, code: str | None = None) -> None:
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.error["message"]
    assert code in (None, reply.error["code"])
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/requests/abc", 404, "not_found"),
    ],
)
async def test_what_is_not_there_is_an_error_object(api: Api, method: str, path: str, status: int, code: str) -> None:
    assert_is_error(await api.request(method, path), status, code=code)


@BOTH
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1, 2]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"null"]
)
async def test_a_body_that_is_no_json_object_is_400(api: Api, path: str, body: bytes) -> None:
    assert_is_error(await api.request("POST", path, data=body), 400)


@BOTH
async def test_an_unknown_model_is_404(api: Api, path: str) -> None:
    reply = await api.post(path, {**BODY[path], "model": "\udcffgpt"})
    assert_is_error(reply, 400)
    reply = await api.post(path, {**BODY[path], "model": "gpt"})
    assert_is_error(reply, 404, code="model_not_found")
    assert reply.error["param"] == "model"


async def test_a_body_over_the_limit_is_413_declared_or_not() -> None:
    async with served(replace(SETTINGS, max_body_nbytes=1000)) as api:
        body = json.dumps({"prompt": "x" * 2000}).encode()

        async def in_parts() -> Any:
            yield body[:900]
            yield body[900:]

        for data in (body, in_parts()):
            reply = await api.request("POST", "/v1/completions", data=data)
            assert_is_error(reply, 413, code="request_too_large")
            assert "at most 1000 bytes" in reply.error["message"]
        assert (await api.complete()).status == 200


async def test_the_key_opens_all_but_the_probes() -> None:
    async with served(replace(SETTINGS, api_keys={"sésame": "t"})) as api:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sésame"}):
            reply = await api.post("/v1/completions", BODY["/v1/completions"], headers=headers)
            assert_is_error(reply, 401, code="invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert [(await api.get(path)).status for path in ("/workers", "/v1/models", "/nothing")] == [401] * 3
        assert [(await api.get(path)).status for path in ("/health", "/ready", "/version", "/metrics")] == [200] * 4
        assert (await api.get("/workers", headers={"Authorization": "Bearer sésame"})).status == 200


@BOTH
async def test_the_key_and_the_salt_of_a_request_reach_the_workers_as_one_salt(path: str) -> None:
    headers = {"Authorization": "Bearer key"}
    async with served(replace(SETTINGS, api_keys={"key": "t"})) as api:
        for extra in ({}, {"cache_salt": "mine"}, {"n": 2}):
            assert (await api.post(path, {**BODY[path], **extra}, headers=headers)).status == 200
        salts = [request.sampling.cache_salt for request in api.backend.requests]
    tenant, mine = prefix_salt("t", None), prefix_salt("t", "mine")
    assert salts == [tenant, mine, tenant]
    assert len({"", tenant, mine, prefix_salt(None, "mine"), prefix_salt("other", None)}) == 5


async def test_the_tenant_of_the_key_and_the_client_s_own_limit_reach_the_router(api: Api) -> None:
    await api.complete()
    assert (api.backend.requests[-1].tenant, api.backend.requests[-1].timeout_s) == ("", None)
    headers = {"Authorization": "Bearer two", "X-Request-Timeout": "2.5"}
    async with served(replace(SETTINGS, api_keys={"one": "ann", "two": "bob"})) as keyed:
        assert (await keyed.post("/v1/completions", BODY["/v1/completions"], headers=headers)).status == 200
        assert (keyed.backend.requests[-1].tenant, keyed.backend.requests[-1].timeout_s) == ("bob", 2.5)


@pytest.mark.parametrize("given", ["", "soon", "0", "-1", "nan", "inf", "1" * 40])
async def test_a_limit_that_is_no_time_is_refused(api: Api, given: str) -> None:
    reply = await api.post("/v1/completions", BODY["/v1/completions"], headers={"X-Request-Timeout": given})
    assert_is_error(reply, 400)
    assert reply.error["param"] == "X-Request-Timeout"


async def test_request_ids_are_taken_drawn_and_returned(api: Api) -> None:
    given = await api.post("/v1/completions", BODY["/v1/completions"], headers={"X-Request-Id": "my id/7"})
    assert given.headers["x-request-id"] == api.backend.requests[-1].request_id == "my id/7"
    assert given.json["id"] == "cmpl-my id/7"
    drawn = await api.complete(stream=True)
    assert drawn.headers["x-request-id"] == api.backend.requests[-1].request_id
    assert len(drawn.headers["x-request-id"]) == 32
    several = await api.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}, headers={"X-Request-Id": "two"})
    assert [request.request_id for request in api.backend.requests[-2:]] == ["two-0", "two-1"]
    assert several.headers["x-request-id"] == "two"
    for path in ("/health", "/nothing", "/v1/models"):
        assert (await api.get(path, headers={"X-Request-Id": "seen"})).headers["x-request-id"] == "seen"


@pytest.mark.parametrize("bad", ["", "x" * 129, "café", "tab\there"])
async def test_request_ids_that_logs_cannot_hold_are_refused(api: Api, bad: str) -> None:
    reply = await api.post("/v1/completions", BODY["/v1/completions"], headers={"X-Request-Id": bad})
    assert_is_error(reply, 400)
    assert reply.error["param"] == "X-Request-Id"


async def test_without_workers_nothing_is_ready_and_requests_are_503(api: Api) -> None:
    api.backend.limit = None
    for reply in (await api.get("/ready"), await api.complete(), await api.chat(stream=True)):
        assert_is_error(reply, 503, code="service_unavailable")
        assert reply.headers["retry-after"] == "1"
    assert (await api.get("/health")).status == 200


async def test_the_routes_that_say_how_things_stand(api: Api) -> None:
    assert (await api.get("/ready")).status == 200
    assert (await api.get("/workers")).json == {"workers": api.backend.workers()}
    assert set((await api.get("/version")).json) == {"version"}
    metrics = await api.get("/metrics")
    assert metrics.body == b"disagg_up 1\n"
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")


async def test_a_slash_after_models_names_no_empty_model(api: Api) -> None:
    assert (await api.get("/v1/models/")).json == (await api.get("/v1/models")).json


async def test_the_admin_application_shows_records() -> None:
    backend = FakeBackend()
    backend.records["a/b"] = {"request_id": "a/b", "attempts": 1}
    async with serve(create_admin_app(backend), "127.0.0.1", 0) as listener, aiohttp.ClientSession() as session:
        api = Api(listener.url, backend, session)
        assert (await api.get("/requests/a%2Fb")).json == {"request_id": "a/b", "attempts": 1}
        assert_is_error(await api.get("/requests/other"), 404)
        nameless = await api.get("/requests/")
        assert_is_error(nameless, 404)
        assert "expected a request's id in the path" in nameless.json["error"]["message"]
        assert (await api.get("/workers")).status == 200


async def test_the_admin_application_empties_workers_by_name() -> None:
    backend = FakeBackend()
    async with serve(create_admin_app(backend), "127.0.0.1", 0) as listener, aiohttp.ClientSession() as session:
        api = Api(listener.url, backend, session)
        assert (await api.request("POST", "/workers/p0/drain")).json == {"worker": "p0", "draining": True}
        assert (await api.request("DELETE", "/workers/p0/drain")).json == {"worker": "p0", "draining": False}
        assert backend.drained == {"p0": False}
        assert_is_error(await api.request("POST", "/workers/d9/drain"), 404, code="worker_not_found")
        assert_is_error(await api.get("/workers/p0/drain"), 405)


async def test_the_public_application_empties_no_worker(api: Api) -> None:
    assert_is_error(await api.request("POST", "/workers/p0/drain"), 404)


@BOTH
@pytest.mark.parametrize("long_by", ["prompt", "answer"])
async def test_what_the_model_has_no_room_for_is_400_with_the_numbers(api: Api, path: str, long_by: str) -> None:
    word = "Hello " * 300 if long_by == "prompt" else "Hello"
    body = {"prompt": word} if "chat" not in path else {"messages": [{"role": "user", "content": word}]}
    reply = await api.post(path, body if long_by == "prompt" else {**body, "max_tokens": 256})
    assert_is_error(reply, 400, code="context_length_exceeded")
    assert "256" in reply.error["message"]
    assert reply.error["param"] == ("max_tokens" if long_by == "answer" else next(iter(body)))
    assert api.backend.requests == []


@BOTH
@STREAMED_OR_NOT
@pytest.mark.parametrize("status", [400, 429, 500, 503, 504])
async def test_a_failure_before_the_first_token_has_its_true_status(
    api: Api, path: str, stream: bool, status: int
) -> None:
    api.backend.script = lambda request: [GenerationError(status, "the reason")]
    reply = await api.post(path, {**BODY[path], "stream": stream})
    assert_is_error(reply, status)
    assert reply.error["message"] == "the reason"
    assert ("retry-after" in reply.headers) == (status == 503)


@BOTH
async def test_a_failure_after_the_first_token_ends_the_stream_without_done(api: Api, path: str) -> None:
    api.backend.script = lambda request: [TokenChunk(0, (40,)), GenerationError(503, "the reason")]
    reply = await api.post(path, {**BODY[path], "stream": True})
    assert reply.status == 200
    assert len(reply.events) == 2
    assert reply.events[-1]["error"]["message"] == "the reason"


@BOTH
@pytest.mark.parametrize("status", [400, 503])
async def test_a_failure_after_the_first_token_is_502_if_not_streamed(api: Api, path: str, status: int) -> None:
    api.backend.script = lambda request: [TokenChunk(0, (40,)), GenerationError(status, "the reason")]
    assert_is_error(await api.post(path, BODY[path]), 502)


@STREAMED_OR_NOT
async def test_an_answer_that_ends_without_its_end_is_no_answer(api: Api, stream: bool) -> None:
    api.backend.script = lambda request: [TokenChunk(0, (40,))]
    reply = await api.complete(stream=stream)
    assert "error" in reply.events[-1] if stream else reply.status == 502


@STREAMED_OR_NOT
async def test_one_failing_choice_fails_the_request(api: Api, stream: bool) -> None:
    forever = asyncio.Event()

    def script(request: Any) -> Iterable[Step]:
        return [GenerationError(503, "no")] if request.sampling.seed == 1 else [forever]

    api.backend.script = script
    assert_is_error(await api.complete(n=3, seed=0, stream=stream), 503)
    assert (len(api.backend.requests), api.backend.num_open) == (1, 0)


async def test_an_error_of_our_own_is_500_with_the_id_that_its_log_line_has(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.backend.script = lambda request: [KeyError("a secret")]
    reply = await api.complete()
    assert_is_error(reply, 500)
    assert reply.headers["x-request-id"] in reply.error["message"]
    assert "a secret" not in reply.error["message"]
    assert reply.headers["x-request-id"] in caplog.text


async def test_tokens_that_repeat_are_an_error_not_an_answer(api: Api) -> None:
    api.backend.script = lambda request: [TokenChunk(0, (40,)), TokenChunk(0, (40,)), GenerationEnd("length")]
    assert_is_error(await api.complete(), 500)
    cut: Reply | None = None
    with pytest.raises(aiohttp.ClientPayloadError):
        cut = await api.complete(stream=True)
    assert cut is None


async def test_headers_wait_for_the_first_token(api: Api) -> None:
    first = asyncio.Event()
    api.backend.script = lambda request: [first, *answer([40, 41])]
    request = asyncio.create_task(api.session.post(api.url + "/v1/completions", json={"prompt": "a", "stream": True}))
    await api.backend.until(lambda: api.backend.num_open == 1)
    await asyncio.sleep(0.05)
    assert not request.done()
    first.set()
    async with await request as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_text_held_for_a_stop_string_still_sends_the_headers(api: Api) -> None:
    rest = asyncio.Event()
    api.backend.script = lambda request: [TokenChunk(0, (42,)), rest, TokenChunk(1, (43,)), GenerationEnd("length")]
    stop = (await api.post("/detokenize", {"tokens": [42]})).json["prompt"] + "never"
    body = {"prompt": "a", "stream": True, "stop": stop}
    async with api.session.post(api.url + "/v1/completions", json=body) as response:
        assert response.status == 200
        rest.set()
        events = [json.loads(line[6:]) for line in (await response.text()).split("\n\n")[:-2]]
    assert events[0]["choices"][0]["text"] == ""


@BOTH
@STREAMED_OR_NOT
@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_at_once(api: Api, path: str, stream: bool, num_tokens: int, n: int) -> None:
    forever = asyncio.Event()
    steps: list[Step] = [TokenChunk(i, (40,)) for i in range(num_tokens)]
    api.backend.script = lambda request: [*steps, forever]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(api.url.rsplit(":", 1)[1]))
    writer.write(raw_request(path, {**BODY[path], "stream": stream, "n": n}))
    await api.backend.until(lambda: len(api.backend.requests) == 1)
    if stream and num_tokens:
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    assert api.backend.num_cancelled == 0
    writer.close()
    started = time.monotonic()
    await writer.wait_closed()
    await api.backend.until(lambda: api.backend.num_open == 0)
    assert api.backend.num_cancelled == 1
    assert time.monotonic() - started < 1


async def test_a_client_that_stops_reading_is_cancelled_after_a_while() -> None:
    async with served(replace(SETTINGS, send_timeout_s=0.2), FakeBackend(max_model_len=10**6)) as api:
        api.backend.script = lambda request: (TokenChunk(i, (40,)) for i in range(10**6))
        port = int(api.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.sendall(raw_request("/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 900_000}))
            await api.backend.until(lambda: api.backend.num_cancelled == 1)


async def test_a_stop_string_closes_the_backend_at_once(api: Api) -> None:
    api.backend.script = lambda request: [*answer([40])[:-1], asyncio.Event()]
    text = (await api.post("/detokenize", {"tokens": [40]})).json["prompt"]
    reply = await asyncio.wait_for(api.complete(stop=text), 5)
    assert (reply.json["choices"][0]["text"], reply.json["choices"][0]["stop_reason"]) == ("", text)
    assert api.backend.num_open == 0


async def test_finish_fields_say_what_ended_the_answer(api: Api) -> None:
    cases: list[tuple[Any, dict[str, Any], str, Any]] = [
        (answer([40, 41]), {}, "length", None),
        (answer([40, 1], reason="stop", stop_token_id=1), {}, "stop", None),
        (answer([40, 41], reason="stop", stop_token_id=41), {"stop_token_ids": [41]}, "stop", 41),
    ]
    for steps, extra, reason, stop_reason in cases:
        api.backend.script = lambda request, steps=steps: steps
        choice = (await api.complete(**extra)).json["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop_reason)


async def test_token_ids_come_back_where_vllm_puts_them(api: Api) -> None:
    api.backend.script = lambda request: answer([40, 41, 42])
    whole = (await api.complete(return_token_ids=True)).json["choices"][0]
    assert (whole["token_ids"], whole["prompt_token_ids"]) == ([40, 41, 42], list(api.backend.requests[-1].prompt))
    chat = (await api.chat(return_token_ids=True)).json
    assert (chat["choices"][0]["token_ids"], chat["prompt_token_ids"]) == (
        [40, 41, 42],
        list(api.backend.requests[-1].prompt),
    )
    streamed = (await api.complete(return_token_ids=True, stream=True)).events[:-1]
    assert [id_ for event in streamed for id_ in event["choices"][0]["token_ids"]] == [40, 41, 42]
    assert ["prompt_token_ids" in event["choices"][0] for event in streamed] == [True, False, False, False]
    streamed = (await api.chat(return_token_ids=True, stream=True)).events[:-1]
    assert ["prompt_token_ids" in event for event in streamed] == [True, False, False, False]


async def test_echo_begins_with_the_prompt_and_only_once(api: Api) -> None:
    api.backend.script = lambda request: answer([40, 41])
    plain = (await api.complete()).json["choices"][0]["text"]
    assert (await api.complete(echo=True)).json["choices"][0]["text"] == "Hello" + plain
    events = (await api.complete(echo=True, stream=True)).events[:-1]
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello" + plain
    assert (await api.complete(prompt=[2, 40], echo=True)).json["choices"][0]["text"].endswith(plain)


async def test_minus_infinity_and_lone_surrogates_are_still_json(api: Api) -> None:
    from disagg.transceiver.wire.messages.values import TokenLogprobs

    chunk = TokenChunk(0, (40,), (TokenLogprobs(float("-inf"), ((41, float("-inf")),)),))
    api.backend.script = lambda request: [chunk, GenerationEnd("length")]
    assert (await api.complete(logprobs=1)).json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]
    reply = await api.post("/v1/completions", {"prompt": "a", "\ud800": 1})
    assert_is_error(reply, 400)
    assert reply.error["param"] == "\ud800"


async def test_tokenize_gives_the_ids_that_a_request_would_have(api: Api) -> None:
    await api.complete()
    await api.chat()
    completion, chat = (list(request.prompt) for request in api.backend.requests)
    reply = (await api.post("/tokenize", {"model": "demo", **BODY["/v1/completions"], "return_token_strs": True})).json
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (completion, len(completion), 256)
    assert reply["token_strs"][0] == "<bos>"
    assert (await api.post("/tokenize", BODY["/v1/chat/completions"])).json["tokens"] == chat
    assert (await api.post("/detokenize", {"tokens": completion})).json == {"prompt": "<bos>Hello"}
    without = (await api.post("/tokenize", {"prompt": "Hello", "add_special_tokens": False})).json
    assert without["tokens"] == completion[1:]
    assert without["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [2048]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_tokenize_refuses_by_name(api: Api, path: str, body: dict[str, Any], param: str) -> None:
    reply = await api.post(path, body)
    assert_is_error(reply, 404 if param == "model" else 400)
    assert reply.error["param"] == param


async def test_a_model_without_a_template_says_so(tmp_path: Any) -> None:
    folder = write_folder(tmp_path, byte_level())
    async with served(ApiSettings(model_folder=folder, served_model_name="demo")) as api:
        reply = await api.chat()
        assert_is_error(reply, 400)
        assert "no chat template" in reply.error["message"]
        assert (await api.complete()).status == 200


async def test_a_model_with_senseless_sampling_defaults_is_refused_at_the_start() -> None:
    with pytest.raises(ModelRefused, match="top_p"):
        async with open_app(FakeBackend(), replace(SETTINGS, defaults=GenerationDefaults(top_p=0))):
            raise AssertionError("opened")


async def test_what_the_template_refuses_is_400(tmp_path: Any) -> None:
    config = {"chat_template": "{{ raise_exception('roles must alternate') }}"}
    folder = write_folder(tmp_path, byte_level(), config=config)
    async with served(ApiSettings(model_folder=folder, served_model_name="demo")) as api:
        reply = await api.chat()
        assert_is_error(reply, 400)
        assert "roles must alternate" in reply.error["message"]


async def test_a_long_prompt_does_not_keep_others_waiting(api: Api, longest: list[float]) -> None:
    """Two MiB take most of a second to encode; meanwhile the loop answers."""
    body = io.BytesIO(json.dumps({"prompt": "a quick brown fox. " * 100_000}).encode())
    long = asyncio.create_task(api.request("POST", "/v1/completions", data=body))
    while not long.done():
        assert (await api.get("/health")).status == 200
        await asyncio.sleep(0.01)
    assert (await long).error["code"] == "context_length_exceeded"
    assert longest[0] < HELD_S
