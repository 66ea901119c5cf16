"""Values that no constructor would make: what a hostile or broken peer puts on the wire."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

Value = TypeVar("Value")


def raw(kind: type[Value], *args: Any, **kwargs: Any) -> Value:
    """What `kind(*args, **kwargs)` would be without its own validation."""
    made: Value = object.__new__(kind)
    named = dict(zip((field.name for field in fields(kind)), args, strict=False)) | kwargs  # type: ignore[arg-type]
    for field in fields(kind):  # type: ignore[arg-type]
        value = named.get(field.name, field.default)
        assert value is not MISSING, field.name
        object.__setattr__(made, field.name, value)
    return made


def changed(value: Value, **changes: Any) -> Value:
    """`dataclasses.replace` without validation."""
    kept = {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]
    return raw(type(value), **(kept | changes))
