from __future__ import annotations

from typing import Any

import pytest

from disagg.transceiver.wire.errors import RemoteProtocolError, TicketRefused
from disagg.transceiver.wire.ticket import check, mint

KEY = bytes(range(32))
CLAIMS: dict[str, Any] = {
    "transfer_id": "a" * 32,
    "epoch": 1,
    "prefill": "p" * 32,
    "decode": "d" * 32,
    "prompt": (1, 2, 3),
    "ttl_s": 600.0,
}


def test_a_ticket_admits_exactly_what_it_was_minted_for() -> None:
    check(KEY, mint(KEY, **CLAIMS), **CLAIMS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transfer_id", "b" * 32),
        ("epoch", 2),
        ("prefill", "q" * 32),
        ("decode", "p" * 32),
        ("prompt", (1, 2, 4)),
        ("prompt", (1, 2)),
        ("ttl_s", 600.5),
        ("output", (1,)),
    ],
)
def test_a_ticket_for_anything_else_is_refused(field: str, value: object) -> None:
    with pytest.raises(TicketRefused):
        check(KEY, mint(KEY, **CLAIMS), **(CLAIMS | {field: value}))


def test_a_ticket_of_an_answer_that_goes_on_binds_where_the_prompt_ends() -> None:
    claims = CLAIMS | {"output": (3, 4)}
    check(KEY, mint(KEY, **claims), **claims)
    for prompt, output in (((1, 2), (3, 3, 4)), ((1, 2, 3, 3, 4), ()), ((1, 2, 3), (3,))):
        with pytest.raises(TicketRefused):
            check(KEY, mint(KEY, **claims), **(claims | {"prompt": prompt, "output": output}))
    assert mint(KEY, **(CLAIMS | {"output": ()})) == mint(KEY, **CLAIMS), "as of the release before"


def test_fields_cannot_run_into_each_other() -> None:
    shifted = CLAIMS | {"prefill": "p" * 31, "decode": "p" + "d" * 32}
    assert mint(KEY, **CLAIMS) != mint(KEY, **shifted)


@pytest.mark.parametrize("forged", [b"", bytes(32), b"x" * 33])
def test_a_forged_ticket_is_the_peers_fault(forged: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        check(KEY, forged, **CLAIMS)


def test_another_clusters_key_is_refused() -> None:
    with pytest.raises(TicketRefused):
        check(KEY[::-1], mint(KEY, **CLAIMS), **CLAIMS)


def test_a_whole_number_of_seconds_is_the_same_as_its_float() -> None:
    assert mint(KEY, **CLAIMS) == mint(KEY, **(CLAIMS | {"ttl_s": 600}))
