"""Many requests at once over real HTTP, some of whose clients leave in the middle."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from support.cluster.system import System

REQUEST_TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Shot:
    """One request. `leave_after_s` or `leave_after_tokens`: when its client disconnects; neither = it stays."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    leave_after_s: float | None = None
    leave_after_tokens: int | None = None

    @property
    def leaves(self) -> bool:
        return self.leave_after_s is not None or self.leave_after_tokens is not None


@dataclass
class Outcome:
    """What its client saw. `status` None = it left before headers."""

    shot: Shot
    status: int | None = None
    token_ids: list[int] = field(default_factory=list)
    left: bool = False
    done: bool = False
    error: Any = None


async def storm(
    url: str, shots: Sequence[Shot], *, num_in_flight: int, watch: Callable[[], None] | None = None
) -> list[Outcome]:
    """Fire all shots, streamed, at most `num_in_flight` at a time. `watch` runs in a thread, again and again."""
    seats = asyncio.Semaphore(num_in_flight)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a client that leaves closes its connection
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def fire(shot: Shot) -> Outcome:
            async with seats:
                return await _fire(session, url, shot)

        async def look() -> None:
            while watch is not None:
                await asyncio.to_thread(watch)

        async with asyncio.TaskGroup() as tasks:  # what `watch` finds wrong ends the storm
            looking = tasks.create_task(look())
            outcomes = await asyncio.gather(*map(fire, shots))
            looking.cancel()
        return outcomes


async def _fire(session: aiohttp.ClientSession, url: str, shot: Shot) -> Outcome:
    outcome = Outcome(shot)
    try:
        async with asyncio.timeout(shot.leave_after_s):
            await _read(session, url, shot, outcome)
    except TimeoutError:
        if shot.leave_after_s is None:
            raise
        outcome.left = True
    return outcome


async def _read(session: aiohttp.ClientSession, url: str, shot: Shot, outcome: Outcome) -> None:
    body = {"prompt": list(shot.prompt), "max_tokens": shot.max_tokens, "temperature": 0, "ignore_eos": True}
    headers = {"X-Request-Id": shot.request_id}
    options: dict[str, Any] = {"json": body | {"stream": True, "return_token_ids": True}, "headers": headers}
    async with session.post(f"{url}/v1/completions", **options) as response:
        outcome.status = response.status
        if response.status != 200:
            outcome.error = await response.json()
            return
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                outcome.done = True
                return
            event = json.loads(line[6:])
            if "error" in event:
                outcome.error = event["error"]
                return
            outcome.token_ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
            if shot.leave_after_tokens is not None and len(outcome.token_ids) >= shot.leave_after_tokens:
                outcome.left = True
                return


def phases_left_in(system: System) -> dict[str, float]:
    """How many attempts were cancelled in which phase, as the workers counted them."""
    released = "disagg_requests_released_total"
    return {
        "queued": system.total(released, state="waiting"),
        "prefilling": system.total(released, state="prefilling", worker="prefill-0"),
        "transferring": system.total("disagg_transfers_total", outcome="cancelled"),
        "bytes landed for nothing": system.total("disagg_transfer_bytes_total", outcome="cancelled"),
        "decoding": system.total(released, state="decoding", worker="decode-0"),
    }
