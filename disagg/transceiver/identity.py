"""May two workers pair? Identity must be equal; geometry may differ one day where a planner converts, today it may not.

A difference is refused by the name of the field and both values, so that an operator sees at once what to change.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from disagg.transceiver.messages.values import Geometry, Identity

Difference = tuple[str, str, str]
"""(field, ours, theirs); nested fields are named by their path, as in `groups[1].window`."""


def differing_field(ours: Identity | Geometry, theirs: Identity | Geometry) -> Difference | None:
    """The first field, in declaration order, that differs between two records of one type; None when they are equal."""
    assert type(ours) is type(theirs)
    return _first_difference("", ours, theirs)


def _first_difference(path: str, ours: Any, theirs: Any) -> Difference | None:
    if ours == theirs:
        return None
    for name, a, b in _parts(path, ours, theirs):
        found = _first_difference(name, a, b)
        if found is not None:
            return found
    return path, str(ours), str(theirs)


def _parts(path: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """Pairs to look into: fields of a record, or items of two equally long tuples of records."""
    if is_dataclass(ours):
        prefix = f"{path}." if path else ""
        return [(f"{prefix}{f.name}", getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours)]
    if isinstance(ours, tuple) and len(ours) == len(theirs) and any(map(is_dataclass, ours)):
        return [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    return []
