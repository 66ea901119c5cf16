from __future__ import annotations

from dataclasses import fields, replace

import pytest
from support.links.sample_messages import GEOMETRY, IDENTITY
from support.links.unchecked import raw

from disagg.transceiver.layout.compatibility import differing_field, geometry_difference
from disagg.transceiver.wire.errors import MAX_TOLD_CHARS
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics


def changed(value: object) -> object:
    if isinstance(value, tuple):
        return (*value, value[0]) if value else ("x",)
    return value + 1 if isinstance(value, int) else f"{value}!"


@pytest.mark.parametrize("record", [IDENTITY, GEOMETRY], ids=["identity", "geometry"])
def test_equal_records_pair(record: object) -> None:
    assert differing_field(record, replace(record)) is None


@pytest.mark.parametrize(
    ("record", "name"),
    [(record, f.name) for record in (IDENTITY, GEOMETRY) for f in fields(record)],
)
def test_each_field_is_refused_by_its_name_with_both_values(record: object, name: str) -> None:
    theirs = replace(record, **{name: changed(getattr(record, name))})
    found = differing_field(record, theirs)
    assert found is not None
    assert found[0] == name
    assert found[1] != found[2]
    values = str(getattr(record, name)), str(getattr(theirs, name))
    assert found[1:] == values or max(map(len, values)) > MAX_TOLD_CHARS


@pytest.mark.parametrize(("at", "what"), [(0, "the beginning"), (5000, "the middle"), (9999, "the end")])
def test_of_long_values_the_part_is_told_where_they_begin_to_differ(at: int, what: str) -> None:
    ours = "".join(chr(ord("a") + i % 26) for i in range(10_000))
    theirs = f"{ours[:at]}#{ours[at + 1 :]}"
    found = differing_field(replace(IDENTITY, attention=ours), replace(IDENTITY, attention=theirs))
    assert found is not None
    name, a, b = found
    assert name == "attention"
    assert "#" in b, what
    assert "#" not in a
    assert max(len(a), len(b)) < MAX_TOLD_CHARS + 40


def test_a_value_that_another_begins_with_is_told_from_it() -> None:
    ours, theirs = "x" * 1000, "x" * 1001
    found = differing_field(replace(IDENTITY, attention=ours), replace(IDENTITY, attention=theirs))
    assert found is not None
    assert found[1] != found[2]


def test_the_first_field_in_order_is_named() -> None:
    theirs = replace(IDENTITY, max_model_len=1, compute_dtype="float64")
    assert differing_field(IDENTITY, theirs) == ("compute_dtype", "float32", "float64")


def test_a_groups_field_is_named_by_its_path() -> None:
    theirs = replace(GEOMETRY, groups=(GEOMETRY.groups[0], replace(GEOMETRY.groups[1], window=65)))
    assert differing_field(GEOMETRY, theirs) == ("groups[1].window", "64", "65")


@pytest.mark.parametrize(("block_size", "field"), [(64, None), (2**12, None), (2**40, "slot_nbytes")])
def test_slots_that_no_memory_holds_pair_with_nobody(block_size: int, field: str | None) -> None:
    group = GroupSemantics(None, 0, 2, 64, (0, 1))
    ours, theirs = (raw(Geometry, size, "float32", (group,), (2048 * size,)) for size in (16, block_size))
    found = geometry_difference(ours, theirs)
    assert (found and found[0]) == field


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-40, 1e300, float("inf"), float("nan"), 0.5])
def test_scales_are_positive_numbers_that_float32_holds(scale: float) -> None:
    group = GroupSemantics(None, 0, 1, 4, (0,))
    ours = Geometry(8, "float32", (group,), (256,))
    theirs = raw(Geometry, 8, "int8", (group,), (64,), kv_scales=((((scale,), (scale,)),),))
    found = geometry_difference(ours, theirs)
    assert (found is None) == (scale == 0.5)
    assert found is None or found[0] == "kv_scales"
