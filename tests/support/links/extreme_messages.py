"""Every message of the protocol with each of its fields at extremes, made from its bytes: no sender's checks apply."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import msgpack

from disagg.transceiver.wire.codec import encode

EXTREMES: dict[type, tuple[Any, ...]] = {
    bool: (True, False),
    int: (0, -1, 1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1),
    float: (0.0, -1.0, 1e-308, 1e308, float("nan"), float("inf"), float("-inf")),
    str: ("", "x" * 5000, "\0\n", "é\u202e"),
    bytes: (b"", b"\0" * 5000),
}


def extremes_of(message: Any) -> Iterator[tuple[str, bytes]]:
    """(what was changed, the message's bytes): one field at a time, also those of nested records."""
    major, minor, tag, fields = msgpack.unpackb(encode(message))
    for path, value in _leaves(fields, ()):
        for extreme in _extremes(value):
            changed = copy.deepcopy(fields)
            _put(changed, path, extreme)
            name = f"{type(message).__name__}.{'.'.join(map(str, path))}={repr(extreme)[:40]}"
            yield name, msgpack.packb([major, minor, tag, changed])


def _extremes(value: Any) -> tuple[Any, ...]:
    if isinstance(value, list):
        return [], value * 300
    if isinstance(value, dict):
        return (None,)
    return (*EXTREMES.get(type(value), ()), None)


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _leaves(item, (*path, key))


def _put(fields: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        fields = fields[key]
    fields[path[-1]] = value
