"""Large bodies: read by other processes with the same result, bounded, and without holding the loop."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.cluster.fake_backend import FakeBackend
from support.cluster.openai_client import served
from support.event_loop import until
from support.model.small_tokenizers import DEMO_FOLDER

from disagg.api.helpers import pool as helpers
from disagg.api.helpers.frames import JOB, frame, pack, pack_error, pack_prepared, unpack_error, unpack_prepared
from disagg.api.helpers.pool import INLINE_NBYTES, Helpers
from disagg.api.http import bodies
from disagg.api.http.errors import ApiError
from disagg.api.request.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE
from disagg.api.request.preparation import Preparer
from disagg.api.settings import ApiSettings
from disagg.api.text.tokenizer import ModelTokenizer

pytestmark = pytest.mark.anyio

SETTINGS = ApiSettings(model_folder=DEMO_FOLDER, served_model_name="demo")
LARGEST = SETTINGS.max_body_nbytes
PADDING = " " * INLINE_NBYTES  # JSON may have spaces anywhere: the same request as a large body


@pytest.fixture
async def pool(tokenizer: ModelTokenizer) -> AsyncIterator[Helpers]:
    pool = Helpers(SETTINGS, tokenizer)
    yield pool
    await pool.close()


HELD_S = 0.08
"""Far over the 5 ms that a turn may take, far under what reading such a body takes: no slow machine turns the test."""
BODIES = [
    (COMPLETIONS, {"prompt": "héllo 🦊 " * 20, "echo": True, "stop": ["a", "b"], "logit_bias": {"5": 1.5}}),
    (COMPLETIONS, {"prompt": [[1, 2, 3], [4]], "n": 2, "seed": -(2**63), "stream": True}),
    (COMPLETIONS, {"prompt": [5000]}),
    (COMPLETIONS, {"prompt": "x", "\ud800": 1}),
    (COMPLETIONS, {"prompt": "x", "model": "other"}),
    (COMPLETIONS, {"prompt": "word " * 3000}),
    (CHAT, {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": [1]}, "user": "me"}),
    (CHAT, {"messages": []}),
    (TOKENIZE, {"prompt": "some words", "return_token_strs": True}),
    (DETOKENIZE, {"tokens": list(range(2000))}),
    (DETOKENIZE, {}),
]


@pytest.mark.parametrize(("endpoint", "request_"), BODIES)
async def test_a_helper_gives_what_the_loop_would(
    pool: Helpers, tokenizer: ModelTokenizer, endpoint: str, request_: dict[str, object]
) -> None:
    inline, body = Preparer(SETTINGS, tokenizer), json.dumps(request_).encode()
    is_text = endpoint in (TOKENIZE, DETOKENIZE)
    here, there = (inline.text, pool.text) if is_text else (inline.generation, pool.generation)
    outcomes: list[object] = []
    for read in (here, there):
        try:
            found = read(endpoint, [body, PADDING.encode()] if read == there else body, 256)
            found = await found if inspect.iscoroutine(found) else found
            outcomes.append(b"".join(found) if is_text else found)  # type: ignore[arg-type]
        except ApiError as error:
            outcomes.append(vars(error))
    assert outcomes[0] == outcomes[1]


def test_frames_carry_every_field(tokenizer: ModelTokenizer) -> None:
    body = {"prompt": [1, 2], "stop_token_ids": [1], "cache_salt": "s", "logprobs": 0, "temperature": 0.5}
    prepared = Preparer(SETTINGS, tokenizer).generation(COMPLETIONS, json.dumps(body).encode(), 256)
    assert unpack_prepared(pack_prepared(prepared)) == prepared
    error = ApiError(404, "half \ud800", param="a", code="b")
    assert vars(unpack_error(pack_error(error))) == vars(error)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":[' + b"1," * (LARGEST // 2 - 100) + b"1]}",
        b'{"prompt":' + b"[" * (LARGEST // 2) + b"]" * (LARGEST // 2 - 50) + b"}",
        b'{"messages":[' + b'{"role":"user","content":""},' * (LARGEST // 30) + b"1]}",
    ],
    ids=["ids", "nested", "messages"],
)
async def test_the_largest_bodies_do_not_hold_the_loop(longest: list[float], body: bytes) -> None:
    async with served(SETTINGS) as api:
        path = CHAT if b"messages" in body else COMPLETIONS
        replies = await asyncio.gather(*(api.request("POST", path, data=io.BytesIO(body)) for _ in range(4)))
        assert {reply.status for reply in replies} == {400}
    assert longest[0] < HELD_S


async def test_the_same_bodies_on_the_loop_do_hold_it(longest: list[float], tokenizer: ModelTokenizer) -> None:
    """The control: the measure shows what it is to show."""
    await asyncio.sleep(0)
    with pytest.raises(ApiError):
        Preparer(SETTINGS, tokenizer).generation(COMPLETIONS, b'{"prompt":[' + b"1.5," * (LARGEST // 4) + b"1]}", 256)
    await asyncio.sleep(0)
    assert longest[0] > HELD_S


async def test_ordinary_bodies_do_not_wait_for_the_largest(pool: Helpers) -> None:
    largest = json.dumps({"prompt": "some words " * (LARGEST // 12)}).encode()
    ordinary = json.dumps({"prompt": "some words " * 1000}).encode()
    long = [asyncio.create_task(pool.text(TOKENIZE, [largest], None)) for _ in range(4)]
    await asyncio.sleep(0)
    await pool.text(TOKENIZE, [ordinary], None)
    assert not all(task.done() for task in long)
    for task in long:
        task.cancel()
    await asyncio.wait(long)


async def test_a_client_that_leaves_costs_no_helper(pool: Helpers) -> None:
    body = json.dumps({"prompt": "some words " * 100_000}).encode()
    for _ in range(3):
        task = asyncio.create_task(pool.text(TOKENIZE, [body], None))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
    assert await pool.text(TOKENIZE, [json.dumps({"prompt": "x" + PADDING}).encode()], None)


async def computing(pool: Helpers, pid: int) -> asyncio.Task[object]:
    """A text that this idle helper has begun to read, seconds before its end."""
    began_at = cpu_ticks(pid)
    task = asyncio.create_task(pool.text(TOKENIZE, [json.dumps({"prompt": "some words " * 600_000}).encode()], None))
    await until(lambda: cpu_ticks(pid) > began_at + 2, "it computes")
    return task


def cpu_ticks(pid: int) -> int:
    """Of 10 ms that a process has computed."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


async def test_a_helper_that_dies_fails_its_request_only(pool: Helpers) -> None:
    small = json.dumps({"prompt": "x" + PADDING}).encode()
    await pool.text(TOKENIZE, [small], None)
    (helper,) = pool._idle
    task = await computing(pool, helper._process.pid)
    os.kill(helper._process.pid, signal.SIGKILL)
    with pytest.raises(ApiError) as raised:
        await task
    assert raised.value.status == 500
    assert await pool.text(TOKENIZE, [small], None)


async def test_a_text_that_takes_too_long_is_the_requests_fault(pool: Helpers) -> None:
    small = json.dumps({"prompt": "x" + PADDING}).encode()
    await pool.text(TOKENIZE, [small], None)
    (helper,) = pool._idle
    task = await computing(pool, helper._process.pid)
    os.kill(helper._process.pid, signal.SIGALRM)  # what its own alarm sends
    with pytest.raises(ApiError, match="to tokenize") as raised:
        await task
    assert raised.value.status == 400


async def test_a_helper_that_died_while_idle_is_replaced(pool: Helpers) -> None:
    small = json.dumps({"prompt": "x" + PADDING}).encode()
    await pool.text(TOKENIZE, [small], None)
    (helper,) = pool._idle
    os.kill(helper._process.pid, signal.SIGKILL)
    await helper._process.wait()
    assert await pool.text(TOKENIZE, [small], None)


async def test_more_than_may_wait_are_told_to_come_back(pool: Helpers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "MAX_WAITING", 0)
    with pytest.raises(ApiError) as raised:
        await pool.text(TOKENIZE, [json.dumps({"prompt": "x" + PADDING}).encode()], None)
    assert raised.value.status == 503


async def test_bodies_in_memory_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies.Bodies.__init__, "__defaults__", (1_000_000,))
    async with served(SETTINGS) as api:
        assert (await api.request("POST", COMPLETIONS, data=io.BytesIO(b"x" * 2_000_000))).status == 503
        assert (await api.request("POST", COMPLETIONS, data=io.BytesIO(b"x" * 900_000))).status == 400
        assert (
            await api.request("POST", COMPLETIONS, data=io.BytesIO(b"x" * 900_000))
        ).status == 400  # the first was given back


async def test_a_text_far_too_long_is_refused_by_its_beginning(
    tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = ModelTokenizer._encode

    def counted(self: ModelTokenizer, text: str, *, special: bool) -> tuple[int, ...]:
        encoded.append(len(text))
        return encode(self, text, special=special)

    monkeypatch.setattr(ModelTokenizer, "_encode", counted)
    body = json.dumps({"prompt": "some words " * 100_000}).encode()
    with pytest.raises(ApiError, match="more than 512 tokens") as raised:
        Preparer(SETTINGS, tokenizer).generation(COMPLETIONS, body, 256)
    assert raised.value.code == "context_length_exceeded"
    assert max(encoded) < 10_000


async def test_a_long_text_that_has_few_tokens_is_not_refused(tokenizer: ModelTokenizer) -> None:
    """Its beginning says nothing then: it is encoded whole."""
    body = json.dumps({"prompt": "some words", "max_tokens": 1}).encode()
    assert Preparer(SETTINGS, tokenizer).generation(COMPLETIONS, body, 40).prompts


async def test_a_long_prompt_comes_back_whole(tokenizer: ModelTokenizer) -> None:
    ids = [20 + i % 1000 for i in range(100_000)]
    async with served(SETTINGS, FakeBackend(200_000)) as api:
        ask = {"prompt": ids, "max_tokens": 2, "return_token_ids": True, "echo": True}
        whole = await api.post(COMPLETIONS, ask)
        assert whole.json["choices"][0]["prompt_token_ids"] == ids
        assert whole.json["choices"][0]["text"].startswith(tokenizer.decode(ids))
        assert list(api.backend.requests[0].prompt) == ids
        events = (await api.post(COMPLETIONS, {**ask, "stream": True})).events
        assert events[0]["choices"][0]["prompt_token_ids"] == ids
        assert events[-1] == "[DONE]"


async def test_a_helper_ends_with_its_parent() -> None:
    """However the parent ends, the pipe is closed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "disagg.api.helpers.process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(frame(JOB, pack((str(DEMO_FOLDER), "demo", 1)))), 30)
    assert (process.returncode, out) == (0, b"")


def test_a_helper_loads_neither_torch_nor_the_server() -> None:
    unwanted = {"torch", "numpy", "uvicorn", "starlette"}
    script = f"import sys, disagg.api.helpers.process; print(*{unwanted} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
