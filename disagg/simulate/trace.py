"""What arrives, and when: traces as JSON lines, in this project's form or in Mooncake's.

Ours: a first line {"block_size": 16}, then one line for each request:

    {"arrival": 1.5, "prompt": 400, "answer": 48, "hashes": ["a", "b", ...], "answer_hashes": ["c"]}

`arrival` is in seconds, `prompt` and `answer` are counts of tokens. `hashes` name the prompt's whole blocks, each with
all that comes before it, so equal names mean equal prefixes; `answer_hashes`, which may be left out, name the blocks
after these that the answer fills. Mooncake's lines have `timestamp` in milliseconds, `input_length`, `output_length`
and `hash_ids` of blocks of 512 tokens; a last block that is not whole has a name there and is never reused here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MOONCAKE_BLOCK: Final = 512


class TraceRefused(Exception):
    """The trace cannot be read; the message names the line and what was expected."""


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """`hashes`, `answer_hashes`: numbers of whole blocks, those of the prompt and those that the answer fills."""

    arrival_s: float
    prompt_len: int
    answer_len: int
    hashes: tuple[int, ...]
    answer_hashes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < float("inf"):
            raise ValueError(f"arrival {self.arrival_s}, expected seconds from 0 on")
        if self.prompt_len < 1 or self.answer_len < 1:
            raise ValueError(
                f"{self.prompt_len} prompt and {self.answer_len} answer tokens, expected 1 or more of each"
            )


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival. `block_size`: tokens per named block."""

    block_size: int
    requests: tuple[TracedRequest, ...]

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size}, expected 1 or more")
        if not self.requests:
            raise ValueError("no request, expected at least one line with one")
        size = self.block_size
        for number, request in enumerate(self.requests, 1):
            if len(request.hashes) > request.prompt_len // size:
                raise ValueError(
                    f"request {number}: {len(request.hashes)} hashes, expected at most {request.prompt_len // size}, "
                    f"one for each whole block of {size} tokens"
                )
            most = (request.prompt_len + request.answer_len) // size - request.prompt_len // size
            if len(request.answer_hashes) > most:
                raise ValueError(
                    f"request {number}: {len(request.answer_hashes)} answer_hashes, expected at most {most}"
                )

    @property
    def last_arrival_s(self) -> float:
        return self.requests[-1].arrival_s

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(request.prompt_len + request.answer_len for request in self.requests)

    def faster(self, factor: float) -> Trace:
        """The same requests, arriving `factor` times as fast."""
        return Trace(
            self.block_size,
            tuple(
                TracedRequest(r.arrival_s / factor, r.prompt_len, r.answer_len, r.hashes, r.answer_hashes)
                for r in self.requests
            ),
        )


def read_trace(path: Path, *, most: int | None = None) -> Trace:
    """The trace of a file, its first `most` requests. Raises TraceRefused."""
    try:
        with path.open(encoding="utf-8") as lines:
            return parse_trace(lines, most=most)
    except (OSError, UnicodeDecodeError) as fault:
        raise TraceRefused(f"trace `{path}` cannot be read: {fault}") from fault
    except TraceRefused as fault:
        raise TraceRefused(f"trace `{path}`: {fault}") from fault


def parse_trace(lines: Iterable[str], *, most: int | None = None) -> Trace:
    """The trace of these lines. Raises TraceRefused."""
    block_size, names = MOONCAKE_BLOCK, _Names()
    requests: list[TracedRequest] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = _object(line)
            if not requests and "block_size" in values:
                block_size = _count(values, "block_size")
                continue
            requests.append(_mooncake(values, names) if "timestamp" in values else _own(values, names))
        except ValueError as fault:
            raise TraceRefused(f"line {number}: {fault}") from fault
        if len(requests) == most:
            break
    requests.sort(key=lambda request: request.arrival_s)
    try:
        return Trace(block_size, tuple(requests))
    except ValueError as fault:
        raise TraceRefused(str(fault)) from fault


def trace_lines(trace: Trace) -> Iterable[str]:
    """The trace in this project's form, line by line, each with its end."""
    yield json.dumps({"block_size": trace.block_size}) + "\n"
    for r in trace.requests:
        values = {"arrival": round(r.arrival_s, 6), "prompt": r.prompt_len, "answer": r.answer_len}
        blocks = {"hashes": r.hashes, "answer_hashes": r.answer_hashes}
        yield json.dumps(values | {name: some for name, some in blocks.items() if some}) + "\n"


class _Names(dict[object, int]):
    """Numbers for names, in order of appearance."""

    def numbers(self, names: Sequence[object]) -> tuple[int, ...]:
        return tuple(self.setdefault(name, len(self)) for name in names)


def _own(values: dict[str, Any], names: _Names) -> TracedRequest:
    return TracedRequest(
        _number(values, "arrival"),
        _count(values, "prompt"),
        _count(values, "answer"),
        names.numbers(_hashes(values, "hashes")),
        names.numbers(_hashes(values, "answer_hashes")),
    )


def _mooncake(values: dict[str, Any], names: _Names) -> TracedRequest:
    prompt_len = _count(values, "input_length")
    whole = _hashes(values, "hash_ids")[: prompt_len // MOONCAKE_BLOCK]
    answer_len = max(1, _count(values, "output_length", least=0))  # a request that was cut off still gets a token
    return TracedRequest(_number(values, "timestamp") / 1e3, prompt_len, answer_len, names.numbers(whole))


def _object(line: str) -> dict[str, Any]:
    values = json.loads(line)  # its error is a ValueError
    if not isinstance(values, dict):
        raise ValueError(f"{line.strip()[:40]!r}, expected a JSON object")
    return values


def _number(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, expected a number")
    return float(value)


def _count(values: dict[str, Any], name: str, *, least: int = 1) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {least} on")
    return value


def _hashes(values: dict[str, Any], name: str) -> list[object]:
    found = values.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, int | str) for one in found):
        raise ValueError(f"{name} is {str(found)[:40]!r}, expected a list of numbers or strings")
    return found
