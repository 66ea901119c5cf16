"""A client that sends requests at their times and notes when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import aiohttp

from disagg.bench.pair import BenchError

LONGEST_S: Final = 600.0
"""Of one request: more than any measurement here runs."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """`at_s` from the beginning; the answer has `num_tokens`."""

    at_s: float
    prompt: Sequence[int]
    num_tokens: int


@dataclass(slots=True)
class PlayedRequest:
    """`token_at`: when each token came, in seconds from when the request was due."""

    token_at: list[float] = field(default_factory=list)
    num_cached: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_at[0]

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_at)]


async def play(url: str, planned: Sequence[PlannedRequest], *, at_once: int | None = None) -> list[PlayedRequest]:
    """Send them when they are due, at most `at_once` at a time. Raises BenchError for an answer that is not whole."""
    gate = asyncio.Semaphore(at_once or len(planned))
    timeout = aiohttp.ClientTimeout(total=LONGEST_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begun = time.perf_counter()

        async def one(request: PlannedRequest) -> PlayedRequest:
            await asyncio.sleep(begun + request.at_s - time.perf_counter())
            async with gate:
                due = begun + request.at_s if at_once is None else time.perf_counter()
                return await _ask(session, url, request, due)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(request)) for request in planned]
        return [task.result() for task in tasks]


async def _ask(session: aiohttp.ClientSession, url: str, request: PlannedRequest, due: float) -> PlayedRequest:
    played = PlayedRequest()
    async with session.post(f"{url}/v1/completions", json=_body(request)) as answer:
        if answer.status != 200:
            raise BenchError(f"a request was answered {answer.status}: {(await answer.text())[:200]}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                _note(played, json.loads(line[6:]), time.perf_counter() - due)
    if len(played.token_at) != request.num_tokens:
        raise BenchError(f"a request returned {len(played.token_at)} tokens instead of {request.num_tokens}")
    return played


def _body(request: PlannedRequest) -> dict[str, object]:
    return {
        "prompt": list(request.prompt),
        "max_tokens": request.num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }


def _note(played: PlayedRequest, chunk: dict[str, object], now: float) -> None:
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        played.token_at += [now] * len(choice.get("token_ids") or ())
    usage = chunk.get("usage")
    if isinstance(usage, dict):
        played.num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
