"""Honest clients, in a process of their own so that no load generator delays what they see.

`python honest.py URL` reads its asks from the first line of stdin, streams answers one after the other, each on a
connection of its own, and says what it saw when stdin ends. Times are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FIRST_TOKEN_S = 60.0  # a prompt may wait behind the abuse's own; a client that saw nothing for so long gives up
REST_AFTER_BREAK_S = 0.2  # a server that refuses at once is not asked thousands of times
TICK_S = 0.01
SHOWN_GAP_S = 0.1  # shorter ones are nobody's stall, and there are a hundred a second


@dataclass(frozen=True)
class Ask:
    """One stream's request. `expected`: the ids that its answer begins with, by transformers."""

    prompt: tuple[int, ...]
    max_tokens: int
    expected: tuple[int, ...] = ()


@dataclass
class Seen:
    """`gaps` and `firsts` are (when it ended, seconds) between tokens and until a first token; `pauses` are how long
    this process itself stood still, by its own clock."""

    num_answers: int = 0
    num_tokens: int = 0
    broken: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    firsts: list[tuple[float, float]] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)

    def longest_gap_s(self, since: float, until: float = float("inf")) -> float:
        return _longest(self.gaps, since, until)

    def longest_first_s(self, since: float, until: float = float("inf")) -> float:
        return _longest(self.firsts, since, until)

    def longest_pause_s(self, since: float, until: float = float("inf")) -> float:
        return _longest(self.pauses, since, until)


def _longest(moments: Sequence[tuple[float, float]], since: float, until: float) -> float:
    return max((seconds for ended_at, seconds in moments if since <= ended_at < until), default=0.0)


class Honest:
    """The process as a test sees it."""

    def __init__(self, url: str, asks: Sequence[Ask]) -> None:
        command = [sys.executable, "-P", __file__, url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([asdict(ask) for ask in asks]) + "\n")
        self._process.stdin.flush()

    def stop(self) -> Seen:
        """What its streams saw. Those that are in the middle of an answer leave."""
        out, _ = self._process.communicate(timeout=30)
        return Seen(**json.loads(out))

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


async def stream_for_ever(url: str, ask: Ask, seen: Seen) -> None:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        while True:
            try:
                await _stream_once(session, url, ask, seen)
            except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
                seen.broken.append(f"{type(error).__name__}: {error}"[:300])
                await asyncio.sleep(REST_AFTER_BREAK_S)


async def _stream_once(session: Any, url: str, ask: Ask, seen: Seen) -> None:
    body = {"prompt": list(ask.prompt), "max_tokens": ask.max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    began_at = time.monotonic()
    tokens: list[int] = []
    last_at, num_breaks = began_at, len(seen.broken)
    try:
        async with (
            asyncio.timeout(FIRST_TOKEN_S) as patience,
            session.post(f"{url}/v1/completions", json=body) as answer,
        ):
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    break
                new = _token_ids(json.loads(line[6:]))
                if new:
                    patience.reschedule(asyncio.get_running_loop().time() + FIRST_TOKEN_S)
                    last_at = _note(seen, last_at, is_first=not tokens)
                    tokens += new
                    seen.num_tokens += len(new)
    finally:
        if tokens and len(tokens) < ask.max_tokens:  # it ended, or was ended, while a token was due
            _note(seen, last_at, is_first=False)
        known = min(len(tokens), len(ask.expected))
        if tuple(tokens[:known]) != tuple(ask.expected[:known]):
            seen.wrong.append(f"{tokens[:known]}, expected {ask.expected[:known]}")
    if len(tokens) != ask.max_tokens:
        raise ValueError(f"the answer ended after {len(tokens)} of {ask.max_tokens} tokens")
    seen.num_answers += len(seen.broken) == num_breaks


def _token_ids(event: dict[str, Any]) -> list[int]:
    if "error" in event:
        raise ValueError(f"error in the stream: {event['error']}")
    return [token for choice in event["choices"] for token in choice.get("token_ids") or ()]


def _note(seen: Seen, last_at: float, *, is_first: bool) -> float:
    now = time.monotonic()
    if is_first:
        seen.firsts.append((now, now - last_at))
    elif now - last_at >= SHOWN_GAP_S:
        seen.gaps.append((now, now - last_at))
    return now


async def watch_own_pauses(seen: Seen) -> None:
    last_at = time.monotonic()
    while True:
        await asyncio.sleep(TICK_S)
        now = time.monotonic()
        if now - last_at - TICK_S >= SHOWN_GAP_S:
            seen.pauses.append((now, now - last_at - TICK_S))
        last_at = now


async def main(url: str) -> None:
    asks = [Ask(tuple(a["prompt"]), a["max_tokens"], tuple(a["expected"])) for a in json.loads(sys.stdin.readline())]
    seen = Seen()
    tasks = [asyncio.create_task(stream_for_ever(url, ask, seen)) for ask in asks]
    tasks.append(asyncio.create_task(watch_own_pauses(seen)))
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, asyncio.CancelledError):
            raise RuntimeError("an honest stream ended by itself") from result
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
