"""May two workers pair? Identity must be equal; geometry may differ where units of the finer block size convert it.

A difference is refused by the name of the field and both values, so that an operator sees at once what to change.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from disagg.transceiver.messages.values import Geometry, Identity

Difference = tuple[str, str, str]
"""(field, ours, theirs); nested fields are named by their path, as in `groups[1].window`."""


def differing_field(ours: Identity | Geometry, theirs: Identity | Geometry) -> Difference | None:
    """The first field, in declaration order, that differs between two records of one type; None when they are equal."""
    assert type(ours) is type(theirs)
    return _first_difference("", ours, theirs)


def geometry_difference(ours: Geometry, theirs: Geometry) -> Difference | None:
    """The first field of two geometries that nothing converts between running workers; None when they can pair.

    Block sizes may differ where one divides the other, and slot bytes with them; what else `reshape` could plan is
    refused until both ends of a transfer carry it.
    """
    sizes = ours.block_size, theirs.block_size
    if sizes[0] == sizes[1] or min(sizes) < 1 or max(sizes) % min(sizes) or "," in ours.kv_dtype:
        return differing_field(ours, theirs)
    per_token = [[nbytes * size for nbytes in g.slot_nbytes] for g, size in ((ours, sizes[1]), (theirs, sizes[0]))]
    scaled = ours.slot_nbytes if per_token[0] == per_token[1] else theirs.slot_nbytes
    return differing_field(ours, replace(theirs, block_size=ours.block_size, slot_nbytes=scaled))


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
