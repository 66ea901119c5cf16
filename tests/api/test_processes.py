"""Real API processes behind one socket: equal answers, one of them killed, clients that leave, stall or come late."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.cluster.fake_backend import FakeBackend, answer
from support.cluster.openai_client import served
from support.cluster.remote import ProcessApi, served_by_processes

from disagg.api.processes.fleet import ApiProcesses, ApiProcessLost
from disagg.api.settings import ApiSettings
from disagg.config.demo import demo_model_folder
from disagg.config.errors import found_in
from disagg.router.generation import GenerationEnd, GenerationRequest, TokenChunk

pytestmark = [pytest.mark.anyio, pytest.mark.processes]

SETTINGS = ApiSettings(model_folder=demo_model_folder(), served_model_name="demo", api_keys={"key": "ann"})
AUTH = {"Authorization": "Bearer key"}
SMALL_NBYTES = 32 * 1024  # of a socket's buffer: some 200 tokens
STREAM = {"prompt": "Hello", "max_tokens": 200, "stream": True, "ignore_eos": True}


@contextlib.asynccontextmanager
async def two_processes(backend: FakeBackend | None = None) -> AsyncIterator[ProcessApi]:
    async with asyncio.timeout(120), served_by_processes(SETTINGS, 2, backend) as api:
        yield api


async def until(is_true: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not is_true():  # noqa: ASYNC110 (processes and sockets, which nothing announces)
            await asyncio.sleep(0.02)


def without_times(value: Any) -> Any:
    return {name: part for name, part in value.items() if name not in ("id", "created")}


async def held_streams(api: ProcessApi, held: asyncio.Event) -> dict[int, aiohttp.ClientResponse]:
    """One stream with a first token on each process, by place."""
    api.backend.script = lambda _: [TokenChunk(0, (40,)), held, *answer_from(1, 3)]
    found: dict[int, aiohttp.ClientResponse] = {}
    while len(found) < 2:
        before = [answers_of(api, place) for place in (0, 1)]
        response = await api.session.post(api.url + "/v1/completions", json=STREAM, headers=AUTH)
        assert response.status == 200
        assert (await response.content.readline()).startswith(b"data: ")
        (place,) = [place for place in (0, 1) if answers_of(api, place) > before[place]]
        if place in found:
            response.close()
            await until(lambda place=place, before=before: answers_of(api, place) == before[place])
        else:
            found[place] = response
    return found


def answer_from(first: int, end: int) -> list[TokenChunk | GenerationEnd]:
    return [*(TokenChunk(index, (40,)) for index in range(first, end)), GenerationEnd("length")]


def answers_of(api: ProcessApi, place: int) -> float:
    return sample(api.processes, "disagg_api_answers", place)


def sample(processes: ApiProcesses, name: str, place: int) -> float:
    """The figure of one process; -1 where there is none."""
    found = [
        each.value
        for family in processes.collect()
        for each in family.samples
        if each.name == name and each.labels.get("process", str(place)) == str(place)
    ]
    return found[0] if found else -1


async def test_answers_are_those_of_one_process_and_clients_that_leave_cancel() -> None:
    body = {"prompt": [40, 41, 42] * 3000, "max_tokens": 30, "logprobs": 2, "n": 2, "seed": 7, "priority": -2}
    replies = []

    def script(request: GenerationRequest) -> Any:
        return answer([40 + i % 50 for i in range(request.sampling.max_tokens)], group=3, num_logprobs=2)

    for open_api in (served(SETTINGS, FakeBackend(20_000)), served_by_processes(SETTINGS, 2, FakeBackend(20_000))):
        async with asyncio.timeout(120), open_api as api:
            api.backend.script = script
            whole = await api.post("/v1/completions", body, headers=AUTH)
            events = await api.post("/v1/completions", {**body, "stream": True}, headers=AUTH)
            wrong = await api.post("/v1/completions", {**body, "priority": "high"}, headers=AUTH)
            pages = [(await api.get(path, headers=AUTH)).json for path in ("/workers", "/v1/models", "/ready")]
            del pages[1]["data"][0]["created"]
            streamed = sorted(str(without_times(event)) for event in events.events[:-1])
            replies.append((whole.status, without_times(whole.json), streamed, wrong.status, wrong.error, pages))
            assert (await api.get("/workers")).status == 401
            assert (await api.get("/metrics")).body == b"disagg_up 1\n"
            api.backend.script = lambda _: [TokenChunk(0, (40,)), asyncio.Event()]
            leaving = await api.session.post(api.url + "/v1/completions", json=STREAM, headers=AUTH)
            await leaving.content.readline()
            leaving.close()
            await api.backend.until(lambda api=api: api.backend.num_cancelled == 1)
            assert {request.tenant for request in api.backend.requests} == {"ann"}
    assert replies[0] == replies[1]


async def test_a_killed_process_costs_its_own_clients_and_is_started_again() -> None:
    async with two_processes() as api:
        held = asyncio.Event()
        streams = await held_streams(api, held)
        killed = api.processes.pids[0]
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await streams[0].content.read()
        await api.backend.until(lambda: api.backend.num_cancelled >= 1)
        held.set()
        assert (await streams[1].content.read()).endswith(b"data: [DONE]\n\n")
        await until(lambda: api.processes.pids[0] not in (0, killed))
        await until(lambda: sample(api.processes, "disagg_api_loop_lag_seconds_count", 0) > 0)
        assert sample(api.processes, "disagg_api_restarts_total", 0) == 1
        assert sample(api.processes, "disagg_api_cpu_seconds_total", 0) > 0
        api.backend.script = lambda _: answer([40])
        reply = await api.post("/v1/completions", {"prompt": "Hello"}, headers=AUTH)
        assert reply.status == 200


def small_socket(address: Any) -> socket.socket:
    """A client's socket that takes little before it is read: set before it connects, or the window is agreed on."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_NBYTES)
    made.setblocking(False)
    return made


async def test_a_client_that_does_not_read_slows_itself_alone() -> None:
    """Its answer stops where it is generated, far before its end: after what is buffered on the way and the credit.

    The kernel's buffers have a fixed size here; left alone, they grow with the way in which a client reads at first.
    """
    connector = aiohttp.TCPConnector(socket_factory=small_socket)
    async with (
        served_by_processes(SETTINGS, 2, FakeBackend(2_000_000), send_nbytes=SMALL_NBYTES) as api,
        aiohttp.ClientSession(connector=connector, read_bufsize=SMALL_NBYTES) as session,
        asyncio.timeout(120),
    ):
        taken = 0

        def endless(request: GenerationRequest) -> Any:
            nonlocal taken
            for index in range(request.sampling.max_tokens):
                taken += 1
                yield TokenChunk(index, (40,))
            yield GenerationEnd("length")

        api.backend.script = endless
        body = {**STREAM, "max_tokens": 1_000_000}
        stalled = await session.post(api.url + "/v1/completions", json=body, headers=AUTH)
        assert (await stalled.content.readline()).startswith(b"data: ")
        seen = -1
        while seen != taken:
            seen = taken
            await asyncio.sleep(0.5)
        assert 0 < taken < 5_000
        api.backend.script = lambda _: answer([40, 41])
        for _ in range(4):
            reply = await api.post("/v1/completions", {"prompt": "Hello"}, headers=AUTH)
            assert reply.status == 200
        stalled.close()
        await api.backend.until(lambda: api.backend.num_cancelled == 1, timeout_s=60)


async def test_at_the_end_running_answers_end_and_no_client_is_taken() -> None:
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        async with two_processes() as api:
            held = asyncio.Event()
            api.backend.script = lambda _: [TokenChunk(0, (40,)), held, *answer_from(1, 3)]
            response = await session.post(api.url + "/v1/completions", json=STREAM, headers=AUTH)
            await response.content.readline()
            asyncio.get_running_loop().call_later(1.0, held.set)
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(api.url + "/health")


async def test_a_process_that_cannot_start_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        async with served_by_processes(replace(SETTINGS, model_folder=tmp_path), 1):
            pass
    assert re.search("ended before it accepted", str(found_in(caught.value, ApiProcessLost)))
