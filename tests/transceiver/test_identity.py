from __future__ import annotations

from dataclasses import fields, replace

import pytest
from support.sample_messages import GEOMETRY, IDENTITY

from disagg.transceiver.identity import differing_field


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
    assert differing_field(record, theirs) == (name, str(getattr(record, name)), str(getattr(theirs, name)))


def test_the_first_field_in_order_is_named() -> None:
    theirs = replace(IDENTITY, max_model_len=1, compute_dtype="float64")
    assert differing_field(IDENTITY, theirs) == ("compute_dtype", "float32", "float64")


def test_a_groups_field_is_named_by_its_path() -> None:
    theirs = replace(GEOMETRY, groups=(GEOMETRY.groups[0], replace(GEOMETRY.groups[1], window=65)))
    assert differing_field(GEOMETRY, theirs) == ("groups[1].window", "64", "65")
