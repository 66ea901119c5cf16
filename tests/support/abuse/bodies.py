"""The largest bodies that the API reads, each of another kind, all of them JSON."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from disagg.api.request.fields import CHAT, COMPLETIONS, DETOKENIZE, TOKENIZE

NUM_BYTES = 8 * 1024 * 1024  # the API's own cap
MAX_ANSWER_S = 120.0  # sixteen of them, one after the other on one core
STATUSES = (200, 400, 413, 429, 503)
"""Served, or refused in a sentence: too long for the model, or too many of this size at once."""


def filled(head: str, item: str, tail: str) -> bytes:
    """`head`, then `item` with commas between as often as it fits, then `tail`."""
    count = (NUM_BYTES - len(head) - len(tail) + 1) // (len(item) + 1)
    return (head + ",".join([item] * count) + tail).encode()


def text(head: str, tail: str, piece: str = "word ") -> bytes:
    size = NUM_BYTES - len(head.encode()) - len(tail.encode())
    return head.encode() + piece.encode() * (size // len(piece.encode())) + tail.encode()


def distinct(head: str, tail: str) -> bytes:
    """Keys and values of an object, no two alike."""
    entry = '"%08d":1'
    count = (NUM_BYTES - len(head) - len(tail) + 1) // len(entry % 0 + ",")
    return (head + ",".join(entry % number for number in range(count)) + tail).encode()


def nested() -> bytes:
    half = (NUM_BYTES - 16) // 2
    return b'{"prompt":' + b"[" * half + b"]" * half + b"}"


P = '"prompt":"Hello","max_tokens":1'
M = '"messages":[{"role":"user","content":"Hello"}],"max_tokens":1'
KINDS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "token ids": (COMPLETIONS, lambda: filled('{"prompt":[', "1", "]}")),
    "text": (COMPLETIONS, lambda: text('{"prompt":"', '"}')),
    "text without a space": (COMPLETIONS, lambda: text('{"prompt":"', '"}', "x")),
    "text of four-byte characters": (COMPLETIONS, lambda: text('{"prompt":"', '"}', "\U0001f600")),
    "escaped text": (COMPLETIONS, lambda: text('{"prompt":"', '"}', "\\u00e9")),
    "many prompts": (COMPLETIONS, lambda: filled('{"prompt":[', '"a"', "]}")),
    "many prompts of ids": (COMPLETIONS, lambda: filled('{"prompt":[', "[1]", "]}")),
    "stops": (COMPLETIONS, lambda: filled("{" + P + ',"stop":[', '"a"', "]}")),
    "stop token ids": (COMPLETIONS, lambda: filled("{" + P + ',"stop_token_ids":[', "7", "]}")),
    "biases": (COMPLETIONS, lambda: distinct("{" + P + ',"logit_bias":{', "}}")),
    "unknown fields": (COMPLETIONS, lambda: distinct("{" + P + ",", "}")),
    "nested": (COMPLETIONS, nested),
    "messages": (CHAT, lambda: filled('{"messages":[', '{"role":"user","content":"a"}', "]}")),
    "one long message": (CHAT, lambda: text('{"messages":[{"role":"user","content":"', '"}]}')),
    "parts": (CHAT, lambda: filled('{"messages":[{"role":"user","content":[', '{"type":"text","text":"a"}', "]}]}")),
    "template arguments": (CHAT, lambda: distinct("{" + M + ',"chat_template_kwargs":{', "}}")),
    "tokenize": (TOKENIZE, lambda: text('{"prompt":"', '","return_token_strs":true}')),
    "tokenize messages": (TOKENIZE, lambda: filled('{"messages":[', '{"role":"user","content":"a"}', "]}")),
    "detokenize": (DETOKENIZE, lambda: filled('{"tokens":[', "99", "]}")),
    "a user's name": (COMPLETIONS, lambda: text("{" + P + ',"user":"', '"}')),
    "a number": (COMPLETIONS, lambda: text("{" + P + ',"seed":', "}", "9")),
}


@dataclass
class Answers:
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


async def post_at_once(url: str, names: list[str]) -> Answers:
    """All of these bodies at the same time, one connection each."""
    bodies = {name: KINDS[name][1]() for name in set(names)}
    assert all(NUM_BYTES - 64 <= len(body) <= NUM_BYTES for body in bodies.values())
    answers = Answers()
    timeout = aiohttp.ClientTimeout(total=MAX_ANSWER_S)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(_post(session, url + KINDS[name][0], name, bodies[name], answers))
    return answers


async def _post(session: aiohttp.ClientSession, url: str, name: str, body: bytes, answers: Answers) -> None:
    began_at = time.monotonic()
    try:
        async with session.post(url, data=io.BytesIO(body), headers={"Content-Type": "application/json"}) as response:
            data = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        answers.late.append(f"{name}: no answer: {error!r}")
        return
    answers.statuses[str(response.status)] += 1
    answers.slowest = max(answers.slowest, (time.monotonic() - began_at, name))
    if response.status not in STATUSES:
        answers.wrong.append(f"{name}: status {response.status}: {data[:300]!r}")
    elif response.status != 200 and not json.loads(data)["error"]["message"]:
        answers.wrong.append(f"{name}: refused without a word")
