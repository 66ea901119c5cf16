"""JSON in blocks of bounded size, so that a large answer is written in many short turns of the event loop."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from json.encoder import encode_basestring
from typing import Any, Final

ITEMS: Final = 1024  # numbers or short texts encoded at once: about 0.1 ms
CHARS: Final = 16 * 1024  # of a text encoded at once: about 0.1 ms
BLOCK_NBYTES: Final = 32 * 1024  # bytes joined and sent at once; half of what a connection buffers before it waits

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Encoded(list[bytes]):
    """A JSON array whose items are encoded already."""


def encode_json(value: Any) -> bytes:
    """UTF-8 JSON. A lone surrogate, which UTF-8 cannot hold, leaves as its `\\udXXX` escape, which is JSON."""
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


def encode_text(text: str) -> bytes:
    """As `encode_json`, of a text alone: an eighth of its time, as there is one for each token of a stream."""
    return encode_basestring(text).encode("utf-8", "backslashreplace")


def json_pieces(value: Any) -> Iterator[bytes]:
    """The JSON of a value, in pieces none of which takes long to make. Arrays are lists of integers."""
    match value:
        case dict():
            for number, (key, item) in enumerate(value.items()):
                yield (b"," if number else b"{") + encode_json(key) + b":"
                yield from json_pieces(item)
            yield b"}" if value else b"{}"
        case str() if len(value) > CHARS:
            yield b'"'
            for start in range(0, len(value), CHARS):
                yield encode_json(value[start : start + CHARS])[1:-1]
            yield b'"'
        case array() | list() | tuple() if value:
            yield from _list_pieces(value)
        case array():
            yield b"[]"
        case _:
            yield encode_json(value)


def _list_pieces(items: Sequence[Any]) -> Iterator[bytes]:
    if isinstance(items, Encoded):
        groups: Iterable[Iterable[bytes]] = ((b",".join(part),) for part in _slices(items, ITEMS // 16))
    elif isinstance(items[0], dict | list | tuple):
        groups = (json_pieces(item) for item in items)
    else:
        groups = ((encode_json(list(part))[1:-1],) for part in _slices(items, ITEMS))
    for number, group in enumerate(groups):
        yield b"," if number else b"["
        yield from group
    yield b"]"


def _slices(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer parts."""
    held: list[bytes] = []
    nbytes = 0
    for piece in pieces:
        held.append(piece)
        nbytes += len(piece)
        if nbytes >= BLOCK_NBYTES:
            yield b"".join(held)
            held, nbytes = [], 0
    if held:
        yield b"".join(held)


async def paced(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The same parts, with a turn for others between them."""
    for number, part in enumerate(parts):
        if number:
            await asyncio.sleep(0)
        yield part
