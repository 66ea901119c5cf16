"""Values at the ends of what each field accepts, drawn from the API's one table of fields."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

from disagg.api.http.errors import ApiError
from disagg.api.request.checks import Boolean, Check, Exactly, Integer, Number, Text
from disagg.api.request.fields import BY_ENDPOINT, Field
from disagg.api.request.request_checks import LogitBias, Messages, Prompts, Stops, StreamOptions, TemplateArguments

VOCAB_SIZE = 2048  # of the bundled model
MANY = 4096  # of what has no bound of its own; the largest bodies have a test of their own
NUMBERS = (5e-324, 1e-308, 1e-46, 1e-38, 1e-9, 0.5, 1, 1e9, 3.4e38, 1e39, 1e308, sys.float_info.max)
TEXTS = (
    *("", " ", "\n", "\0", "\x7f", "a", "<bos>", "<eos>", "\ufffd", "\ufffe", "\U0010ffff", "\u202e", "e\u0301" * 9),
    *("\U0001f468\u200d\U0001f469\u200d\U0001f467", "\r\n\t\v\f", "{{ messages }}{% raw %}", "\\ud800", "'\"`"),
)


def extremes(field: Field) -> list[Any]:
    """Accepted values of the field, at its ends and where the numbers of a machine have theirs."""
    assert field.check is not None
    return [value for value in _candidates(field.check) if _is_accepted(field, value)]


def _is_accepted(field: Field, value: Any) -> bool:
    try:
        field.read(value)
    except ApiError:
        return False
    return True


def _candidates(check: Check) -> Iterator[Any]:
    match check:
        case Boolean():
            yield from (True, False)
        case Exactly():
            yield check.value
        case Integer():
            yield from (*_around(check.low), *_around(check.high), -1, 0, 1, 2)
        case Number():
            ends = [end for end in (check.low, check.high, check.above) if math.isfinite(end)]
            yield from (near for end in ends for near in (end, math.nextafter(end, -9e9), math.nextafter(end, 9e9)))
            yield from (number * sign for number in NUMBERS for sign in (1, -1))
        case Text():
            yield from _texts(check.min_length, check.max_length)
        case _ if hasattr(check, "item"):
            yield from _lists(check)
        case _:
            yield from _own_candidates(check)


def _around(end: int) -> tuple[int, ...]:
    return end - 1, end, end + 1


def _texts(shortest: int, longest: int) -> Iterator[str]:
    longest = min(longest, MANY)
    yield from TEXTS
    yield from ("x" * shortest, "x" * longest, "\U0010ffff" * longest, "\0" * longest)


def _lists(check: Any) -> Iterator[list[Any]]:
    """Of a check of lists, whatever its class: one that has an `item` and a `max_length`."""
    items = [item for item in _candidates(check.item) if isinstance(item, int) and 0 <= item < VOCAB_SIZE]
    items = items or [0, VOCAB_SIZE - 1]
    longest = min(check.max_length, MANY)
    yield from ([], [0] * longest, list(range(longest))[:VOCAB_SIZE], *([item] for item in items))
    yield [VOCAB_SIZE - 1] * longest


def _own_candidates(check: Check) -> Iterator[Any]:
    match check:
        case Prompts():
            yield from _prompts()
        case Messages():
            yield from _conversations()
        case Stops():
            yield from (
                "\n",
                "\0",
                "x" * 1024,
                [],
                ["\U0010ffff"] * 4,
                ["e"],
                ["a", "aa", "aaa", "aaaa"],
                ["x" * 1024] * 4,
            )
        case LogitBias():
            yield from _biases()
        case StreamOptions():
            yield from ({}, {"include_usage": True}, {"include_usage": False, "include_obfuscation": False})
        case TemplateArguments():
            yield from ({}, {"x": None}, {"bos_token": ""}, {"x": [[{"y": 1e308}]] * 99}, {"": ""}, {"x" * MANY: 0})
        case _:
            raise AssertionError(f"no extremes are known for {type(check).__name__}: add them here")


def _prompts() -> Iterator[Any]:
    yield from TEXTS
    yield from ("word " * 100, "\U0010ffff" * 100, "a" * 1000)
    yield from ([0], [VOCAB_SIZE - 1], [0] * 999, [VOCAB_SIZE - 1] * 700, list(range(512)), [2] * 64)
    yield from ([[7]] * 32, [[0], [1] * 500], ["a"] * 32, ["", "b"], ["a"], [[5] * 16] * 8)


def _conversations() -> Iterator[Any]:
    for role in ("user", "system", "assistant", "developer", "x" * 64, "\0"):
        yield [{"role": role, "content": "Hello"}]
    for text in TEXTS:
        yield [{"role": "user", "content": text}]
        yield [{"role": "user", "content": [{"type": "text", "text": text}] * 2}]
    yield [{"role": "user", "content": "a"}] * 200
    yield [{"role": "user", "content": [{"type": "text", "text": "b"}] * 200, "name": "n" * 64}]


def _biases() -> Iterator[dict[str, float]]:
    last = VOCAB_SIZE - 1
    yield from ({}, {"0": -100}, {"0": 100}, {str(last): 100, "1": 100}, {"5": 5e-324}, {"000": 1})
    for bias in (-100, 100, 0):
        yield {str(token): bias for token in range(1024)}
    yield {str(last - token): (-1) ** token * 100 for token in range(1024)}


def honoured(endpoint: str) -> list[Field]:
    return [field for field in BY_ENDPOINT[endpoint].values() if field.is_honoured]
