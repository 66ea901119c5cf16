"""Messages of the protocol with one field at an extreme, as the bytes that another implementation could send."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgpack

from disagg.transceiver.wire.codec import PROTOCOL, TAGS
from disagg.transceiver.wire.schema import Record
from disagg.transceiver.wire.sizes import limit_of

TAG_OF = {kind: tag for tag, kind in TAGS.items()}
MANY = 20_000  # entries of a list: far more than any message has, far from the largest message
ROOM_NBYTES = 4096  # for all fields but one
INTEGERS = (-(2**63), -1, 0, 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 5e-324, 1e308)
TEXTS = (
    "",
    "\0",
    "x" * 100_000,
    "\U0010ffff",
    "tcp://",
    "tcp://127.0.0.1:0",
    "tcp://[::1]:99999",
    "inproc://x",
    "%s%n",
)
BYTES = (b"", b"\0", b"x" * 100_000)
ANY_TYPE: tuple[Any, ...] = (None, True, [], {}, [[[]]], -1, "", 1.5)
Path = tuple[Any, ...]


def packed_form(message: Any) -> dict[str, Any]:
    """The map that the codec packs for a message."""
    form: dict[str, Any] = Record(type(message)).write(message, "")
    return form


def pack(kind: type, form: Any) -> bytes:
    return bytes(msgpack.packb([*PROTOCOL, TAG_OF[kind], form]))


@dataclass(frozen=True)
class Change:
    """One field, by its path in the packed form, and what it is changed to."""

    path: Path
    value: Any

    def applied_to(self, form: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(form)
        _at(changed, self.path[:-1])[self.path[-1]] = self.value
        return changed


def changes(form: dict[str, Any], keep: frozenset[str] = frozenset()) -> Iterator[Change]:
    """Each field, and each field within, to each extreme. Fields named in `keep` stay as they are, at any depth."""
    for path in _paths(form, keep):
        for value in _extremes(_at(form, path)):
            yield Change(path, value)


def mutants(kind: type, form: dict[str, Any]) -> Iterator[bytes]:
    """The message as it is, and with each of its fields at each extreme, one at a time."""
    yield pack(kind, form)
    for change in changes(form):
        yield pack(kind, change.applied_to(form))


def largest(kind: type, form: dict[str, Any]) -> Iterator[bytes]:
    """The message with one of its lists, or a list that no version knows, as long as its kind may be."""
    items = {name: value[0] for name, value in form.items() if isinstance(value, list) and value} | {"unknown": []}
    for name, item in items.items():
        count = (limit_of(kind).nbytes - ROOM_NBYTES) // len(msgpack.packb(item))
        yield pack(kind, form | {name: [item] * count})


def _paths(value: Any, keep: frozenset[str], here: Path = ()) -> Iterator[Path]:
    """Every field of maps, and the first and last of lists."""
    for name, item in _entries(value):
        if name not in keep:
            yield (*here, name)
            yield from _paths(item, keep, (*here, name))


def _entries(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    every = list(enumerate(value)) if isinstance(value, list) else []
    return every[:1] + every[1:][-1:]


def _at(form: Any, path: Path) -> Any:
    for name in path:
        form = form[name]
    return form


def _extremes(value: Any) -> Iterator[Any]:
    match value:
        case bool():
            yield not value
        case int():
            yield from INTEGERS
        case float():
            yield from FLOATS
        case str():
            yield from TEXTS
        case bytes():
            yield from BYTES
        case list() if value:
            yield from ([], value[:1] * MANY, value * 2, value[:-1])
    yield from (other for other in ANY_TYPE if type(other) is not type(value))
