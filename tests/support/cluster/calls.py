"""Completions over HTTP, each on its own task, with the time of everything that its client saw."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Call:
    """What the client saw so far. `cut`: the connection ended before the answer did."""

    request_id: str
    stream: bool
    prompt: Sequence[int]
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    status: int | None = None
    error: Any = None
    is_done: bool = False
    cut: str = ""
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    ended_at: float = 0.0

    @property
    def is_whole(self) -> bool:
        """A complete answer: 200 and, for a stream, `[DONE]`."""
        return self.status == 200 and self.is_done and self.error is None

    async def run(self, session: aiohttp.ClientSession, url: str) -> None:
        body = {"prompt": list(self.prompt), "max_tokens": self.max_tokens, "temperature": 0, "ignore_eos": True}
        body |= {"stream": self.stream, "return_token_ids": True}
        headers = {"X-Request-Id": self.request_id}
        try:
            async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
                await self._read(response)
        except aiohttp.ClientError as exc:
            self.cut = repr(exc)
        finally:
            self.ended_at = time.monotonic()

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        if response.status != 200:
            self.error = (await response.json())["error"]
        elif self.stream:
            await self._read_events(response)
        else:
            answer = await response.json()
            self.token_ids = answer["choices"][0]["token_ids"]
            self.is_done = True

    async def _read_events(self, response: aiohttp.ClientResponse) -> None:
        async for line in response.content:
            if line.strip() == b"data: [DONE]":
                self.is_done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                self.error = event.get("error", self.error)
                for choice in event.get("choices", ()):
                    self.token_ids += choice.get("token_ids") or ()
                self.last_token_at = time.monotonic()
                self.first_token_at = self.first_token_at or self.last_token_at
        if not self.is_done and self.error is None:
            self.cut = "the stream ended"


async def until(condition: Any, what: str, timeout_s: float = 20.0) -> None:
    """Look every few milliseconds, in a thread: `condition` may block on HTTP."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.01)
