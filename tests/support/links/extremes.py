"""Every message with each of its fields at its extremes: derived from the schema, so that no new field is forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack

from disagg.transceiver.wire.codec import PROTOCOL, TAGS, encode
from disagg.transceiver.wire.schema import Fixed, Float, Many, Optional, Record, Scalar, Shape, shape_of

INTS = (-(2**63), -1, 0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 1e-308, 1e308)
TEXTS = ("", "x" * 100_000, "\0", "prefill", "decode", "📦" * 300)
BYTES = (b"", b"\0", b"x" * 31, b"x" * 33, b"x" * 100_000)
MANY = 20_000


def messages(sample: object) -> Iterator[tuple[str, bytes]]:
    """(path of the changed field, bytes) of `sample` with one field changed at a time, however deep it lies."""
    tag = next(tag for tag, kind in TAGS.items() if kind is type(sample))
    body = msgpack.unpackb(encode(sample))[3]  # type: ignore[arg-type]
    for path, changed in _variants(shape_of(type(sample)), body, type(sample).__name__):
        yield path, msgpack.packb([*PROTOCOL, tag, changed])


def _variants(shape: Shape, value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(shape, Optional):
        yield f"{path}=None", None
    match shape:
        case Record():
            for name, member, _ in shape.members:
                for changed_path, changed in _variants(member, value.get(name), f"{path}.{name}"):
                    yield changed_path, {**value, name: changed}
        case Optional():
            yield f"{path}=None", None
            yield from _variants(shape.item, value, path) if value is not None else ()
        case Many():
            yield f"{path}=()", []
            if value:
                yield f"{path}=({MANY} items)", [value[0]] * MANY
                for changed_path, changed in _variants(shape.item, value[0], f"{path}[0]"):
                    yield changed_path, [changed, *value[1:]]
        case Fixed():
            for index, (item, inner) in enumerate(zip(shape.items, value, strict=True)):
                for changed_path, changed in _variants(item, inner, f"{path}[{index}]"):
                    yield changed_path, [*value[:index], changed, *value[index + 1 :]]
        case Float():
            yield from ((f"{path}={number}", number) for number in FLOATS)
        case Scalar():
            yield from ((f"{path}={_told(odd)}", odd) for odd in _odd(shape.kind))


def _odd(kind: type) -> tuple[Any, ...]:
    return {int: INTS, str: TEXTS, bytes: BYTES, bool: (True, False)}[kind]


def _told(value: Any) -> str:
    return repr(value) if len(repr(value)) < 40 else f"{len(value)} {type(value).__name__}"
