"""Requests at the ends of what the API accepts: every end of every field once, then several fields at random."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from support.abuse.extremes import extremes, honoured
from support.abuse.pair import MAX_MODEL_LEN

from disagg.api.request.fields import CHAT, COMPLETIONS, DETOKENIZE, GENERATE, TOKENIZE

Body = dict[str, Any]
REQUIRED: dict[str, Body] = {
    COMPLETIONS: {"prompt": "Once upon a time", "max_tokens": 4},
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4},
    TOKENIZE: {"prompt": "Hello"},
    DETOKENIZE: {"tokens": [40]},
}
SAMPLED: Body = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.5}
"""Beside one extreme in each other request: much of sampling is skipped when nothing asks for it."""
WEIGHTS = {COMPLETIONS: 10, CHAT: 10, TOKENIZE: 1, DETOKENIZE: 1}
MAX_FIELDS = 6
MAX_CHOICES_IN_FLIGHT = 256  # four times what the pair computes at once: its queue is used and never full
PATIENCE_S = 45.0  # an answer as long as the model allows, behind a queue of others; then the client leaves
MAX_NUM_TOKENS = 4  # of most answers: it is the extremes that are many, not the tokens
REFUSED = (400, 413)
LOST = (502, 503)  # a worker that the machine did not run is lost, which is nothing that a request did


@dataclass(frozen=True)
class Shot:
    endpoint: str
    body: Body

    @property
    def num_choices(self) -> int:
        prompt = self.body.get("prompt")
        is_many = isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str)
        return int(self.body.get("n") or 1) * (len(prompt) if is_many and prompt else 1)


@dataclass
class Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)


def every_extreme() -> Iterator[Shot]:
    """Each accepted end of each field of each endpoint, alone and beside ordinary sampling."""
    for endpoint in REQUIRED:
        for row in honoured(endpoint):
            for value in extremes(row):
                for others in ({}, SAMPLED) if endpoint in GENERATE else ({},):
                    body = REQUIRED[endpoint] | others | {row.name: value}
                    yield Shot(endpoint, made_consistent(endpoint, body))


def any_extremes(rng: random.Random) -> Iterator[Shot]:
    """Several fields at once, for ever."""
    values = {(e, row.name): extremes(row) for e in REQUIRED for row in honoured(e)}
    while True:
        (endpoint,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        names = [row.name for row in honoured(endpoint)]
        chosen = rng.sample(names, min(len(names), rng.randint(1, MAX_FIELDS)))
        body = REQUIRED[endpoint] | (SAMPLED if endpoint in GENERATE and rng.random() < 0.5 else {})
        body |= {name: rng.choice(values[endpoint, name]) for name in chosen}
        yield Shot(endpoint, made_consistent(endpoint, body))


def made_consistent(endpoint: str, body: Body) -> Body:
    """Fields that speak of each other made to agree, so that what is extreme alone is not refused together."""
    body = dict(body)
    if endpoint in (TOKENIZE, DETOKENIZE):
        return _one_source(body)
    body["model"] = "demo"
    if "best_of" in body or "n" in body:
        body["n"] = body.get("n", body.get("best_of"))
        if "best_of" in body:
            body["best_of"] = body["n"]
    if "stream_options" in body:
        body["stream"] = True
    if body.get("top_logprobs"):
        body["logprobs"] = True
    if body.get("echo"):
        body.pop("logprobs", None)
    return _within_the_model(body)


def _one_source(body: Body) -> Body:
    body["model"] = "demo"
    if "messages" in body:
        body.pop("prompt", None)
    else:
        for name in ("add_generation_prompt", "chat_template_kwargs"):
            body.pop(name, None)
    return body


def _within_the_model(body: Body) -> Body:
    """Counts of tokens as high as the model's length allows, and few where there are many choices."""
    prompt = body.get("prompt")
    is_many = isinstance(prompt, list) and isinstance(prompt[0], list | str)
    length = max(map(_length, prompt)) if is_many else _length(prompt)
    room = max(1, MAX_MODEL_LEN - length - 1)
    asked = body.pop("max_completion_tokens", None) or body["max_tokens"]
    many = Shot("", body).num_choices > 4
    body["max_tokens"] = min(asked, MAX_NUM_TOKENS if many else room)
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    return body


def _length(prompt: Any) -> int:
    """Tokens of a prompt, and more than that for a text, whose tokens are at most its bytes."""
    if isinstance(prompt, str):
        return len(prompt.encode()) + 1
    return len(prompt) if prompt else 0


async def fire(
    url: str, shots: Iterator[Shot], *, num_shots: int, seconds: float, patience_s: float = PATIENCE_S
) -> Tally:
    """Send up to so many for so long. Every answer is whole JSON or a whole stream, never a failure of the server."""
    tally, gate, until = Tally(), _Gate(MAX_CHOICES_IN_FLIGHT), time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=patience_s)
    connector = aiohttp.TCPConnector(limit=64)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as tasks:
        for _ in range(num_shots):
            shot = next(shots, None)
            if shot is None or time.monotonic() > until:
                break
            await gate.enter(shot.num_choices)
            task = tasks.create_task(_fire(session, url, shot, tally))
            task.add_done_callback(lambda _, n=shot.num_choices: gate.leave(n))
    return tally


class _Gate:
    """So many choices in flight at once."""

    def __init__(self, num_seats: int) -> None:
        self._num_free, self._num_seats, self._changed = num_seats, num_seats, asyncio.Event()

    async def enter(self, num_wanted: int) -> None:
        while self._num_free < min(num_wanted, self._num_seats):
            self._changed.clear()
            await self._changed.wait()
        self._num_free -= num_wanted

    def leave(self, num_given_back: int) -> None:
        self._num_free += num_given_back
        self._changed.set()


async def _fire(session: aiohttp.ClientSession, url: str, shot: Shot, tally: Tally) -> None:
    try:
        async with session.post(url + shot.endpoint, json=shot.body) as answer:
            data = await answer.read()
    except TimeoutError:
        tally.statuses["left"] += 1
        return
    except aiohttp.ClientError as error:
        _blame(tally, tally.late, shot, repr(error))
        return
    tally.statuses[str(answer.status)] += 1
    if fault := fault_of(answer.status, answer.content_type, data):
        is_lost = answer.status in LOST
        _blame(tally, tally.late if is_lost else tally.wrong, shot, fault)


def fault_of(status: int, content_type: str, data: bytes) -> str:
    """What is wrong with an answer to a request that the table of fields accepts; empty if nothing is."""
    text = data.decode(errors="replace")
    if status not in (200, *REFUSED):
        return f"status {status}: {text[:300]}"
    if content_type == "text/event-stream":
        return "" if text.endswith("data: [DONE]\n\n") and '"error"' not in text else f"a broken stream: {text[-300:]}"
    try:
        json.loads(text)
    except ValueError:
        return f"not JSON: {text[:300]}"
    return ""


def _blame(tally: Tally, faults: list[str], shot: Shot, fault: str) -> None:
    tally.statuses["fault"] += 1
    if len(faults) < 20:
        faults.append(f"{fault}; {shot.endpoint} {json.dumps(shot.body)[:600]}")
