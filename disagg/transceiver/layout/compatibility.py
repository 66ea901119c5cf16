"""May two workers pair? Identity must be equal; geometry may differ where units of the finer block size convert it.

A difference is refused by the name of the field and both values, so that an operator sees at once what to change.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Final

from disagg.transceiver.layout.cut import inconvertible_field
from disagg.transceiver.layout.ranks import MAX_RANKS, is_contiguous, natural_slot_nbytes, side_of
from disagg.transceiver.layout.strides import SCALED
from disagg.transceiver.wire.errors import MAX_TOLD_CHARS, clipped
from disagg.transceiver.wire.messages.values import Geometry, Identity

Difference = tuple[str, str, str]
"""(field, ours, theirs); nested fields are named by their path, as in `groups[1].window`."""

MAX_SLOT_NBYTES: Final = 1 << 30
"""Of a peer whose geometry differs: the probe needs room for two of its slots, whatever block size it claims. 1 GiB is
a block of 3276 tokens of Llama 3 70B in bfloat16, all layers together."""

MAX_COUNT: Final = 1 << 20
"""Heads of a group, numbers of a head: a thousand times what published models have, and products of them stay small."""

_SMALLEST, _LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""float32's range of full precision, in which scales are multiplied: beyond it one would become 0 or infinite."""

_RANK_FIELDS: Final = ("tensor_parallel_size", "pipeline_parallel_size", "stages", "rank")


def differing_field(ours: Identity | Geometry, theirs: Identity | Geometry) -> Difference | None:
    """The first field, in declaration order, that differs between two records of one type; None when they are equal."""
    assert type(ours) is type(theirs)
    return _first_difference("", ours, theirs)


def geometry_difference(ours: Geometry, theirs: Geometry, *, joins_ranks: bool = False) -> Difference | None:
    """The first field of two geometries that nothing converts; None when these two can pair.

    Block sizes may differ where one divides the other, and KV dtypes and scales; ranks only where they are joined.
    """
    if ours == theirs:
        return None
    if _is_mixed(ours) or _is_mixed(theirs):
        return differing_field(ours, theirs)
    free = ("block_size", "kv_dtype", "kv_scales", "slot_nbytes", *(_RANK_FIELDS if joins_ranks else ()))
    same = replace(theirs, **{name: getattr(ours, name) for name in free})
    name = _inconvertible(ours, theirs)
    if name is not None and name not in _RANK_FIELDS:
        return _told(name, getattr(ours, name), getattr(theirs, name))
    if (found := differing_field(ours, same)) is not None:
        return found
    name = name or _impossible(ours) or _impossible(theirs)
    return None if name is None else _told(name, getattr(ours, name), getattr(theirs, name))


def _is_mixed(geometry: Geometry) -> bool:
    """Groups of several KV dtypes: units have one."""
    return "," in geometry.kv_dtype


def _inconvertible(ours: Geometry, theirs: Geometry) -> str | None:
    """What no plan converts. A peer's numbers are looked at before anything is computed from them."""
    for one in (ours, theirs):
        if not _has_counts(one):
            return "groups"
        if not 1 <= one.tensor_parallel_size <= MAX_RANKS:
            return "tensor_parallel_size"
        if (len(one.stages) or 1) != one.pipeline_parallel_size or not is_contiguous(one):
            return "pipeline_parallel_size"
        if not 0 <= one.rank < one.tensor_parallel_size * one.pipeline_parallel_size:
            return "rank"
    return inconvertible_field(ours.groups, side_of(ours), side_of(theirs))


def _has_counts(geometry: Geometry) -> bool:
    """Are heads, dimensions and sinks numbers that a model can have? What follows divides and multiplies by them."""
    return all(
        1 <= group.num_kv_heads <= MAX_COUNT
        and 1 <= group.head_dim <= MAX_COUNT
        and group.num_sink_tokens >= 0
        and (group.window is None or group.window >= 1)
        for group in geometry.groups
    )


def _impossible(geometry: Geometry) -> str | None:
    """A field that contradicts the others of its record."""
    if geometry.kv_scales and (geometry.kv_dtype not in SCALED or not _are_scales(geometry)):
        return "kv_scales"
    is_natural = natural_slot_nbytes(geometry) == geometry.slot_nbytes
    return None if is_natural and all(n <= MAX_SLOT_NBYTES for n in geometry.slot_nbytes) else "slot_nbytes"


def _are_scales(geometry: Geometry) -> bool:
    """Positive numbers that float32 holds, of each group for every layer and head of the model, or none."""
    if len(geometry.kv_scales) != len(geometry.groups):
        return False
    return all(
        len(scales) in (0, len(group.layers))
        and all(
            len(half) == group.num_kv_heads and all(_SMALLEST <= x <= _LARGEST for x in half)
            for pair in scales
            for half in pair
        )
        for group, scales in zip(geometry.groups, geometry.kv_scales, strict=True)
    )


def _first_difference(path: str, ours: Any, theirs: Any) -> Difference | None:
    if ours == theirs:
        return None
    for name, a, b in _parts(path, ours, theirs):
        found = _first_difference(name, a, b)
        if found is not None:
            return found
    return _told(path, ours, theirs)


def _told(name: str, ours: Any, theirs: Any) -> Difference:
    """Both values as text; of long ones the part where they begin to differ."""
    a, b = str(ours), str(theirs)
    if max(len(a), len(b)) > MAX_TOLD_CHARS:
        num_equal = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if (first := num_equal - MAX_TOLD_CHARS // 4) > 0:
            a, b = f"...{a[first:]}", f"...{b[first:]}"
    return name, clipped(a), clipped(b)


def _parts(path: str, ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """Pairs to look into: fields of a record, or items of two equally long tuples of records."""
    if is_dataclass(ours):
        prefix = f"{path}." if path else ""
        return [(f"{prefix}{f.name}", getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours)]
    if isinstance(ours, tuple) and len(ours) == len(theirs) and any(map(is_dataclass, ours)):
        return [(f"{path}[{i}]", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True))]
    return []
