"""Traces made up: chats whose turns build on each other, bursts of unrelated requests, long documents asked about."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Final

from disagg.simulate.trace import Trace, TracedRequest


@dataclass(frozen=True, slots=True)
class TraceShape:
    """`rate`: requests per second. `prompt`, `answer`: tokens of a typical prompt (of a chat's turn) and answer."""

    num_requests: int
    rate: float
    prompt: int = 512
    answer: int = 128
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_requests", "prompt", "answer", "block_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate: {self.rate}, expected requests per second above 0")


class _Draw:
    """Lengths and times for one trace; the same seed draws the same."""

    def __init__(self, shape: TraceShape) -> None:
        self.random = random.Random(shape.seed)  # noqa: S311 (repeatable, not secret)
        self._names = count()

    def length(self, typical: int) -> int:
        """Half of all are between 0.7 and 1.5 times as long, one in a hundred is 4 times as long."""
        return max(1, round(typical * self.random.lognormvariate(0.0, 0.6)))

    def pause(self, rate: float) -> float:
        return self.random.expovariate(rate)

    def names(self, how_many: int) -> tuple[int, ...]:
        return tuple(next(self._names) for _ in range(how_many))


def generate_trace(kind: str, shape: TraceShape) -> Trace:
    """`kind`: one of `KINDS`."""
    found = KINDS[kind](shape, _Draw(shape))
    found.sort(key=lambda request: request.arrival_s)
    return Trace(shape.block_size, tuple(found[: shape.num_requests]))


TURNS: Final = 4
"""Of one chat, on average."""
THINKING_S: Final = 20.0
"""A person reads an answer and writes on."""
SYSTEM_PROMPTS: Final = 8
"""Different beginnings that chats share, of half a typical prompt each."""


def _chats(shape: TraceShape, draw: _Draw) -> list[TracedRequest]:
    """Each turn's prompt is the turn before, its answer and new words; chats begin with one of a few prompts."""
    size, start = shape.block_size, 0.0
    found: list[TracedRequest] = []
    systems = [draw.names(max(1, shape.prompt // 2 // size)) for _ in range(SYSTEM_PROMPTS)]
    while len(found) < 2 * shape.num_requests:  # those beyond are cut: the first ones lack the turns of chats before
        start += draw.pause(shape.rate / TURNS)
        hashes, length, at = draw.random.choice(systems), 0, start
        length = len(hashes) * size
        for _ in range(draw.random.randint(1, 2 * TURNS - 1)):
            length += draw.length(shape.prompt // 2 or 1)
            answer = draw.length(shape.answer)
            hashes += draw.names(length // size - len(hashes))
            answered = draw.names((length + answer) // size - len(hashes))
            found.append(TracedRequest(at, length, answer, hashes, answered))
            hashes, length = hashes + answered, length + answer
            at += draw.pause(1 / THINKING_S)
    return found


BURST_S: Final = 10.0
"""From one burst to the next; half of all requests come in the first tenth of it."""


def _bursts(shape: TraceShape, draw: _Draw) -> list[TracedRequest]:
    """Requests without common beginnings, half of them in bursts."""
    found, at = [], 0.0
    for _ in range(shape.num_requests):
        at += draw.pause(shape.rate)
        into = at % BURST_S
        burst_at = at - into + into / 10
        prompt, answer = draw.length(shape.prompt), draw.length(shape.answer)
        arrival = burst_at if draw.random.random() < 0.5 else at
        found.append(TracedRequest(arrival, prompt, answer, draw.names(prompt // shape.block_size)))
    return found


QUESTIONS: Final = 4
"""To each document, on average."""


def _documents(shape: TraceShape, draw: _Draw) -> list[TracedRequest]:
    """Prompts of 16 times the typical length, each a document with one of several questions behind it."""
    size, found, at = shape.block_size, [], 0.0
    documents: list[tuple[int, ...]] = []
    for _ in range(shape.num_requests):
        at += draw.pause(shape.rate)
        if not documents or draw.random.random() < 1 / QUESTIONS:
            documents.append(draw.names(max(1, draw.length(16 * shape.prompt) // size)))
        document = draw.random.choice(documents[-32:])
        prompt = len(document) * size + draw.length(max(1, shape.prompt // 8))
        hashes = document + draw.names(prompt // size - len(document))
        found.append(TracedRequest(at, prompt, draw.length(shape.answer), hashes))
    return found


KINDS: Final[Mapping[str, Callable[[TraceShape, _Draw], list[TracedRequest]]]] = {
    "chat": _chats,
    "bursty": _bursts,
    "long": _documents,
}
