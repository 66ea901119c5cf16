"""Requests that cannot be served: a clear error with its true status, and a system that is none the worse for it."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.cluster.system import System, running
from support.model.families import VOCAB_SIZE, save_family

pytestmark = pytest.mark.processes

MODEL = "tiny"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KV_NBYTES_PER_WORKER = 160 * 1024  # 1 KiB a token: 20 blocks of 8, two of them reserved
MAX_MODEL_LEN = 18 * 8  # what that holds; nobody says it to `up`


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = save_family("llama", tmp_path_factory.mktemp("llama"))
    flags = ("--dtype", "float32", "--block-size", "8", "--kv-cache-memory", str(2 * KV_NBYTES_PER_WORKER))
    with running("--model", str(folder), "--served-model-name", MODEL, *flags) as system:
        yield system


@pytest.fixture(scope="module", autouse=True)
def unharmed(system: System) -> Iterator[None]:
    """After all tests: the same processes, nothing held, and a request is served."""
    before = processes(system)
    yield
    assert processes(system) == before
    status, answer = system.complete([5, 6, 7], max_tokens=3, ignore_eos=True)
    assert (status, len(answer["choices"][0]["token_ids"])) == (200, 3)
    system.settle()
    system.wait_until_idle()


def processes(system: System) -> dict[str, tuple[int, str]]:
    return {worker["id"]: (worker["pid"], worker["incarnation"]) for worker in system.workers()}


def refusal(system: System, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    """Status and error object; its shape is OpenAI's whatever the error."""
    status, answer = system.post(path, body)
    assert set(answer) == {"error"}, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    return status, error


COMPLETE: dict[str, Any] = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 2}
TALK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.mark.parametrize(("path", "good"), [(COMPLETIONS, COMPLETE), (CHAT, TALK)])
@pytest.mark.parametrize(
    ("changes", "status", "param", "code"),
    [
        ({"model": "gpt-4"}, 404, "model", "model_not_found"),
        ({"max_tokens": -1}, 400, "max_tokens", None),
        ({"max_tokens": 0}, 400, "max_tokens", None),
        ({"max_tokens": "many"}, 400, "max_tokens", None),
        ({"max_tokens": MAX_MODEL_LEN}, 400, "max_tokens", "context_length_exceeded"),
        ({"temperature": -0.1}, 400, "temperature", None),
        ({"top_p": 0}, 400, "top_p", None),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, 400, "logit_bias", None),
        ({"stop_token_ids": [VOCAB_SIZE]}, 400, "stop_token_ids", None),
        ({"seed": 2**64}, 400, "seed", None),
        ({"n": 0}, 400, "n", None),
        ({"stream_options": 5}, 400, "stream_options", None),
        ({"temprature": 1}, 400, "temprature", "unknown_parameter"),
        ({"guided_json": {}}, 400, "guided_json", "unsupported_parameter"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(
    system: System, path: str, good: dict[str, Any], changes: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    for stream in (False, True):  # a stream's status is true too: its headers wait for the first token
        got_status, error = refusal(system, path, good | changes | {"stream": stream})
        assert (got_status, error["param"]) == (status, param), error
        assert code in (None, error["code"])


@pytest.mark.parametrize(
    "prompt",
    [[VOCAB_SIZE], [5, VOCAB_SIZE + 10**6], [-1], [5, 2**31], [2**70], [1.5], ["a", 5], [], "", [[5], []], None, {}],
)
def test_a_prompt_that_is_none_is_refused(system: System, prompt: Any) -> None:
    status, error = refusal(system, COMPLETIONS, COMPLETE | {"prompt": prompt})
    assert (status, error["param"].partition("[")[0]) == (400, "prompt"), error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny", "prompt": [5',
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": [5], "temperature": Infinity}',
        b"[" * 100_000,
        b'{"prompt": [' + b"9" * 5000 + b"]}",
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_body_that_is_no_json_object_is_refused(system: System, path: str, body: bytes) -> None:
    assert refusal(system, path, body)[0] == 400


@pytest.mark.parametrize("messages", [None, [], "Hi", [{"role": "user"}], [{"role": "user", "content": 5}], [5]])
def test_messages_that_are_none_are_refused(system: System, messages: Any) -> None:
    status, error = refusal(system, CHAT, TALK | {"messages": messages})
    assert (status, error["param"].partition("[")[0]) == (400, "messages"), error


def test_what_the_pools_hold_is_served_and_one_token_more_is_refused_with_the_numbers(system: System) -> None:
    """`--max-model-len` was not given: it is what `--kv-cache-memory` holds, and `up` says so."""
    assert [worker["identity"]["max_model_len"] for worker in system.workers()] == [MAX_MODEL_LEN] * 2
    assert any(f"max-model-len {MAX_MODEL_LEN}" in line for line in system.stdout)
    prompt = [5 + i % 200 for i in range(100)]
    status, answer = system.complete(prompt, max_tokens=MAX_MODEL_LEN - 100, ignore_eos=True)
    assert (status, len(answer["choices"][0]["token_ids"])) == (200, MAX_MODEL_LEN - 100)
    for body in ({"prompt": prompt, "max_tokens": 45}, {"prompt": prompt + [5] * 44, "max_tokens": 1}):
        status, error = refusal(system, COMPLETIONS, body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert str(len(body["prompt"])) in error["message"]
        assert str(MAX_MODEL_LEN) in error["message"]
    status, error = refusal(system, CHAT, TALK | {"messages": [{"role": "user", "content": "word " * 40}]})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")


def test_requests_that_fill_the_pool_one_by_one_are_all_served(system: System) -> None:
    """Each takes the whole pool of both workers: the others wait for it and none is refused."""
    with ThreadPoolExecutor(6) as clients:
        asked = clients.map(lambda i: system.complete([5 + i] * 120, max_tokens=24, ignore_eos=True), range(6))
        assert [(status, len(answer["choices"][0]["token_ids"])) for status, answer in asked] == [(200, 24)] * 6


@pytest.mark.parametrize(
    ("method", "path", "status", "named"),
    [
        ("GET", "/v1/nothing", 404, "/v1/nothing"),
        ("GET", COMPLETIONS, 405, "GET"),
        ("DELETE", "/v1/models", 405, "DELETE"),
        ("GET", "/v1/models/other", 404, "other"),
    ],
)
def test_paths_and_methods_that_do_not_exist(system: System, method: str, path: str, status: int, named: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(system.url + path, method=method), timeout=10)
    with caught.value as response:
        assert response.status == status
        assert named in json.loads(response.read())["error"]["message"]


def test_bad_requests_among_good_ones_take_nothing_from_them(system: System) -> None:
    bad = [COMPLETE | {"prompt": [VOCAB_SIZE]}, COMPLETE | {"model": "x"}, b"{", COMPLETE | {"max_tokens": 10**9}]

    def ask(i: int) -> int:
        if i % 2:
            return refusal(system, COMPLETIONS, bad[i // 2 % len(bad)])[0]
        return system.complete([5 + i] * 20, max_tokens=8, ignore_eos=True)[0]

    before = processes(system)
    with ThreadPoolExecutor(16) as clients:
        statuses = list(clients.map(ask, range(32)))
    assert set(statuses[::2]) == {200}
    assert set(statuses[1::2]) == {400, 404}
    system.wait_until_idle()
    assert processes(system) == before
