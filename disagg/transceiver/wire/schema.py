"""The wire shape of a type, compiled once from its annotations: how to write a value as msgpack and read it back.

A shape knows no bytes. `write` turns a value into what msgpack packs (records as maps, tuples as arrays) and `read`
does the reverse; both check types strictly, so that what the wire carries is exactly what the dataclass declares.
Strict means: `True` is no integer, a number is no string, an integer is accepted for a float because packers shorten
`1.0`-like values in other languages. Errors are `ShapeError` with the path of the offending field.
"""

from __future__ import annotations

import sys
import types
import typing
from abc import ABC, abstractmethod
from array import array
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

PackedInts = Annotated[tuple[int, ...], "int32"]
"""Many integers as the bytes of little-endian int32: 128k of them take 2 ms to write or read, as msgpack's 20 ms."""

PackedFloats = Annotated[tuple[float, ...], "float64"]
"""The same of little-endian float64, which is what a log-probability is on both sides."""


class ShapeError(ValueError):
    """A value is not of its declared type. The codec turns it into the local or the remote protocol error."""


class Shape(ABC):
    @abstractmethod
    def write(self, value: Any, path: str) -> Any:
        """The packable form of `value`. Raises `ShapeError`."""

    @abstractmethod
    def read(self, value: Any, path: str) -> Any:
        """The value of an unpacked form. Raises `ShapeError`."""


class Scalar(Shape):
    """`int`, `str`, `bytes` or `bool`: the same form on both sides."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def write(self, value: Any, path: str) -> Any:
        if type(value) is not self.kind:
            raise ShapeError(f"{path}: {type(value).__name__}, expected {self.kind.__name__}")
        return value

    read = write


class Float(Shape):
    """Always packed as a float, so that a value has one encoding; an integer is accepted on both sides."""

    def write(self, value: Any, path: str) -> float:
        if type(value) is not float and type(value) is not int:
            raise ShapeError(f"{path}: {type(value).__name__}, expected float")
        return float(value)

    read = write


class Optional(Shape):
    def __init__(self, item: Shape) -> None:
        self.item = item

    def write(self, value: Any, path: str) -> Any:
        return None if value is None else self.item.write(value, path)

    def read(self, value: Any, path: str) -> Any:
        return None if value is None else self.item.read(value, path)


class Many(Shape):
    """`Annotated[tuple[X, ...], most]`: a longer one is refused before an item is looked at.

    Plain numbers take a short cut: a slice names thousands of slots, a geometry thousands of scales.
    """

    def __init__(self, item: Shape, most: int) -> None:
        self.item = item
        self.most = most
        self.plain = (
            int if isinstance(item, Scalar) and item.kind is int else float if isinstance(item, Float) else None
        )

    def write(self, value: Any, path: str) -> list[Any]:
        if type(value) is not tuple:
            raise ShapeError(f"{path}: {type(value).__name__}, expected tuple")
        return list(value) if self._all_plain(value) else [self.item.write(item, f"{path}[]") for item in value]

    def read(self, value: Any, path: str) -> tuple[Any, ...]:
        if type(value) is not list:
            raise ShapeError(f"{path}: {type(value).__name__}, expected array")
        if len(value) > self.most:
            raise ShapeError(f"{path}: {len(value)} long, expected a length of 0 to {self.most}")
        if self._all_plain(value):
            return tuple(value)
        read, inner = self.item.read, f"{path}[]"
        return tuple([read(item, inner) for item in value])

    def _all_plain(self, values: typing.Sequence[Any]) -> bool:
        return self.plain is not None and set(map(type, values)) <= {self.plain}


class PackedShape(Shape):
    """`PackedInts` or `PackedFloats`: one `bytes`, read and written without looking at each item in Python."""

    def __init__(self, code: str, expected: str) -> None:
        """`code`: the item's type as `array` names it."""
        self.code, self.expected, self.nbytes = code, expected, array(code).itemsize

    def write(self, value: Any, path: str) -> bytes:
        if type(value) is array and value.typecode == self.code and sys.byteorder == "little":
            return value.tobytes()  # a prompt of a million ids takes no time that an event loop would miss
        if type(value) is not tuple:
            raise ShapeError(f"{path}: {type(value).__name__}, expected tuple")
        try:
            return _little(array(self.code, value)).tobytes()
        except (TypeError, OverflowError) as exc:
            raise ShapeError(f"{path}: {exc}, expected {self.expected}") from exc

    def read(self, value: Any, path: str) -> tuple[Any, ...]:
        if type(value) is not bytes or len(value) % self.nbytes:
            raise ShapeError(f"{path}: {type(value).__name__}, expected the bytes of {self.expected}")
        items = array(self.code)
        items.frombytes(value)
        return tuple(_little(items))


def _little(items: array[Any]) -> array[Any]:
    if sys.byteorder == "big":
        items.byteswap()
    return items


class Fixed(Shape):
    """`tuple[X, Y]`. One of plain values is checked in one look: a FETCH has thousands of runs."""

    def __init__(self, items: tuple[Shape, ...]) -> None:
        self.items = items
        self.kinds = list(map(_plain_kind, items))

    def write(self, value: Any, path: str) -> list[Any]:
        self._check(value, tuple, path)
        return [
            shape.write(item, f"{path}[{i}]") for i, (shape, item) in enumerate(zip(self.items, value, strict=True))
        ]

    def read(self, value: Any, path: str) -> tuple[Any, ...]:
        self._check(value, list, path)
        if list(map(type, value)) == self.kinds:
            return tuple(value)
        pairs = zip(self.items, value, strict=True)
        return tuple(shape.read(item, f"{path}[{i}]") for i, (shape, item) in enumerate(pairs))

    def _check(self, value: Any, kind: type[tuple[Any, ...]] | type[list[Any]], path: str) -> None:
        if type(value) is not kind or len(value) != len(self.items):
            raise ShapeError(f"{path}: {type(value).__name__}, expected {len(self.items)} items")


class Record(Shape):
    """A dataclass as a map by field name. Unknown names are ignored; a missing one takes the field's default."""

    def __init__(self, kind: type) -> None:
        hints = get_type_hints(kind, include_extras=True)
        self.kind = kind
        self.members = tuple((f.name, shape_of(hints[f.name]), _is_required(f)) for f in fields(kind))
        self.kinds = tuple((name, shape, _plain_kind(shape)) for name, shape, _ in self.members)

    def write(self, value: Any, path: str) -> dict[str, Any]:
        if type(value) is not self.kind:
            raise ShapeError(f"{path}: {type(value).__name__}, expected {self.kind.__name__}")
        return {name: shape.write(getattr(value, name), f"{path}.{name}") for name, shape, _ in self.members}

    def read(self, value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise ShapeError(f"{path}: {type(value).__name__}, expected map")
        present = {
            name: value[name] if type(value[name]) is kind else shape.read(value[name], f"{path}.{name}")
            for name, shape, kind in self.kinds
            if name in value
        }
        if len(present) < len(self.members):
            self._check_required(present, path)
        try:
            return self.kind(**present)
        except ValueError as exc:  # the dataclass's own validation
            raise ShapeError(f"{path}: {exc}") from exc

    def _check_required(self, present: dict[str, Any], path: str) -> None:
        missing = [name for name, _, is_required in self.members if is_required and name not in present]
        if missing:
            raise ShapeError(f"{path}.{missing[0]}: missing")


def _plain_kind(shape: Shape) -> type | None:
    """The type whose values are read as they are, without a call: a DONE has a hundred thousand such fields."""
    return shape.kind if isinstance(shape, Scalar) else None


def shape_of(hint: Any) -> Shape:
    """The shape of a type annotation. Raises `TypeError` for a type that the wire does not know."""
    if hint in (int, str, bytes, bool):
        return Scalar(hint)
    if hint is float:
        return Float()
    if is_dataclass(hint):
        return Record(typing.cast(type, hint))
    if hint == PackedInts:
        return PackedShape("i", "integers of 32 bits")
    if hint == PackedFloats:
        return PackedShape("d", "floats of 64 bits")
    if get_origin(hint) is Annotated:
        return _many(*get_args(hint))
    arguments = get_args(hint)
    if get_origin(hint) is tuple and Ellipsis not in arguments:
        return Fixed(tuple(map(shape_of, arguments)))
    if get_origin(hint) in (Union, types.UnionType) and len(arguments) == 2 and arguments[1] is type(None):
        return Optional(shape_of(arguments[0]))
    raise TypeError(f"no wire shape for {hint!r}")


def _many(hint: Any, most: Any) -> Many:
    item, rest = get_args(hint)
    if get_origin(hint) is not tuple or rest is not Ellipsis or type(most) is not int:
        raise TypeError(f"no wire shape for {hint!r} of {most!r}")
    return Many(shape_of(item), most)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
