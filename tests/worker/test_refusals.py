"""What a worker says when the router will not have it."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.values import Identity
from disagg.worker.router_link import NEXT_STEPS, RegistrationRefused, RouterLink

NO_PART: Any = SimpleNamespace()


def sentence(field: str) -> str:
    link = RouterLink(NO_PART, NO_PART, NO_PART)
    with pytest.raises(RegistrationRefused) as refused:
        link._read_answer(Refused(field, "this", "that"))
    return str(refused.value)


@pytest.mark.parametrize("field", ["role", *(field.name for field in fields(Identity))])
def test_a_refusal_names_the_field_both_values_and_what_to_do(field: str) -> None:
    start, _, step = sentence(field).partition("; ")
    assert start == f"the router refuses this worker: {field}: it has this, this worker that"
    assert step == NEXT_STEPS.get(field, "start it as the workers that are registered were")


def test_only_adapters_which_no_flag_sets_have_no_step_of_their_own() -> None:
    assert {field.name for field in fields(Identity)} - set(NEXT_STEPS) == {"adapter_ids"}
