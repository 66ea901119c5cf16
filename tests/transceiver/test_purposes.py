"""Purposes: named by both ends, under claims and seals of their own, and unknown to the minor before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.links.sample_messages import FIRST, HEADER, ID, SAMPLES

from disagg.transceiver.protocol.manifest import is_sealed, seal
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.codec import PROTOCOL, TAGS, decode, encode
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages import router as r
from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.purposes import HANDOFF, MOVE, PREFIX, PURPOSES, served_by, shared, told_or_first

KEY = bytes(range(32))
ENTRIES = (GroupDigests.of(0, (0, 1, 0, 2), {3: 11}),)
FIRST_GOLDEN = {
    name: bytes.fromhex(data)
    for name, data in (
        line.split() for line in (Path(__file__).parent / "golden_messages_2_0.txt").read_text().splitlines()
    )
}
"""What protocol 2.0 said."""

LATER = (r.Grant, r.Resume, BlockEvents, AskBlocks)

NEW_FIELDS = {
    p.Hello: {"purposes": (HANDOFF,)},
    p.Welcome: {"purposes": (HANDOFF,)},
    p.Fetch: {"purpose": HANDOFF, "tip": b"", "held": ()},
    p.Accepted: {"boundary": 0, "precision": "", "output": (), "logprobs": ()},
    p.Done: {"purpose": HANDOFF, "boundary": 0, "precision": ""},
    r.Register: {"sends": None, "receives": None},
    r.Dispatch: {"mode": "decode", "priority": 0, "prefix": None, "output": (), "leg": "", "age_s": 0.0},
    r.TransferReport: {"purpose": HANDOFF},
    r.Lease: {"links": (r.LinkStatus(ID, "prefill-0", "shm", "ready", 9.5, "fine"),), "rates": None, "pressed": ()},
}
"""What a message of 2.0 does not say, and what its silence means."""


def sealed(**others: Any) -> p.Done:
    form: dict[str, Any] = {"rank": 0, "num_ranks": 1, "num_slices": 1, "manifest": ENTRIES, "first_token": None}
    return seal(KEY, HEADER, **(form | others))


# --- the minor before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(FIRST_GOLDEN))
def test_what_the_minor_before_says_is_read_as_if_it_knew_of_handoffs_alone(name: str) -> None:
    (sample,) = [sample for sample in SAMPLES if type(sample).__name__ == name][:1]
    assert decode(FIRST_GOLDEN[name]) == replace(sample, **NEW_FIELDS.get(type(sample), {}))  # type: ignore[type-var]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda m: type(m).__name__)
def test_the_minor_before_finds_every_field_it_knows_in_what_is_said_now(message: object) -> None:
    if (before := FIRST_GOLDEN.get(type(message).__name__)) is None:
        assert type(message) in LATER, "what the minor before cannot read is sent only to workers that say they can"
        return
    old, new = msgpack.unpackb(before), msgpack.unpackb(encode(message))
    assert (old[0], old[1]) == (PROTOCOL[0], PROTOCOL[1] - 1)
    assert old[2] == new[2], "a tag keeps its meaning"
    assert old[3].keys() <= new[3].keys()


def test_handoffs_keep_their_tickets_and_seals() -> None:
    """Made by 2.0."""
    done = sealed(num_slices=2, first_token=FIRST)
    assert done.mac.hex() == "a5745daa4a5bc791892d665d2d0f769478bc6a7cab635c3057d93e8419811e56"
    minted = ticket.mint(
        KEY, transfer_id=ID, epoch=2, prefill="prefill", decode="decode", prompt=(1, 2, 300), ttl_s=600.0
    )
    assert minted.hex() == "4326b0081a09c85367dc74129d83296f20528e17096ae5e7edb3cf54633c0ae7"


def test_a_worker_that_names_no_purposes_serves_handoffs_by_its_role() -> None:
    assert told_or_first("prefill", None, None) == ((HANDOFF,), ())
    assert told_or_first("decode", None, None) == ((), (HANDOFF,))
    assert told_or_first("both", None, None) == ((), ())
    assert told_or_first("decode", (PREFIX,), ()) == ((PREFIX,), ())


def test_two_ends_share_what_one_sends_and_the_other_receives() -> None:
    assert shared((PREFIX, HANDOFF), (MOVE, HANDOFF, PREFIX)) == (HANDOFF, PREFIX)
    assert shared((HANDOFF,), (PREFIX,)) == ()
    assert shared(("later",), ("later",)) == (), "a purpose of a later version is of no use here"


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_a_worker_without_a_prefix_cache_is_neither_end_of_a_prefix(role: str) -> None:
    sends, receives = served_by(role, reuses_prefixes=False)
    assert PREFIX not in (*sends, *receives)
    with_cache = served_by(role, reuses_prefixes=True)
    assert PREFIX in with_cache[0]
    assert PREFIX in with_cache[1]


def test_a_hello_that_names_a_purpose_of_a_later_version_is_legal() -> None:
    (hello,) = [sample for sample in SAMPLES if isinstance(sample, p.Hello)]
    later = replace(hello, purposes=("handoff", "later"))
    assert decode(encode(later)) == later


@pytest.mark.parametrize("tag", [4, 8, 49])
def test_a_transfer_of_a_purpose_that_no_version_has_is_no_message(tag: int) -> None:
    (sample,) = [sample for sample in SAMPLES if type(sample) is TAGS[tag]][:1]
    with pytest.raises(ValueError, match="purpose: 'theft', expected one of"):
        replace(sample, purpose="theft")  # type: ignore[type-var, call-arg]


# --- claims and seals ---------------------------------------------------------------------------------------

CLAIMS = ticket.LegClaims(PREFIX, "a" * 32, 1, "r" * 32, "s" * 32, "k" * 32, 96, bytes(16))


def test_a_legs_ticket_admits_exactly_what_it_was_minted_for() -> None:
    assert ticket.is_leg_ticket(KEY, ticket.mint_leg(KEY, CLAIMS, 600), CLAIMS, 600.0)
    assert not ticket.is_leg_ticket(KEY[::-1], ticket.mint_leg(KEY, CLAIMS, 600.0), CLAIMS, 600.0)


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": MOVE},
        {"transfer_id": "b" * 32},
        {"epoch": 2},
        {"request": "q" * 32},
        {"source": "k" * 32},
        {"sink": "s" * 32},
        {"boundary": 80},
        {"tip": bytes(15) + b"\1"},
        {"source": "s" * 31, "sink": "s" + "k" * 32},
    ],
)
def test_a_legs_ticket_admits_nothing_else(change: dict[str, Any]) -> None:
    assert not ticket.is_leg_ticket(KEY, ticket.mint_leg(KEY, CLAIMS, 600.0), replace(CLAIMS, **change), 600.0)


def test_a_legs_ticket_has_one_lifetime() -> None:
    assert not ticket.is_leg_ticket(KEY, ticket.mint_leg(KEY, CLAIMS, 600.0), CLAIMS, 601.0)


def test_a_handoffs_ticket_is_no_legs_ticket() -> None:
    handoff = ticket.mint(KEY, transfer_id="a" * 32, epoch=1, prefill="s", decode="k", prompt=(), ttl_s=600.0)
    assert not ticket.is_leg_ticket(KEY, handoff, replace(CLAIMS, source="s", sink="k"), 600.0)


TIP = bytes(range(16))
LEG = {"boundary": 96, "tip": TIP, "precision": "float16:ab"}


@pytest.mark.parametrize("purpose", [PREFIX, MOVE])
def test_a_leg_is_sealed_with_its_boundary_tip_and_precision(purpose: str) -> None:
    done = sealed(purpose=purpose, **LEG)
    assert is_sealed(KEY, decode(encode(done)), TIP)
    assert not is_sealed(KEY, done, bytes(16))
    for change in ({"boundary": 80}, {"precision": ""}, {"precision": "float16:ac"}):
        assert not is_sealed(KEY, replace(done, **change), TIP)  # type: ignore[arg-type]


@given(first=st.sampled_from(PURPOSES), second=st.sampled_from(PURPOSES), tip=st.sampled_from([b"", TIP]))
def test_a_done_replayed_as_another_purpose_is_never_sealed(first: str, second: str, tip: bytes) -> None:
    done = sealed(purpose=first, boundary=96 * (first != HANDOFF), tip=tip)
    assert is_sealed(KEY, replace(done, purpose=second), tip) == (first == second)


def test_a_handoff_whose_kv_has_been_through_another_format_says_so_under_its_seal() -> None:
    lossy = sealed(first_token=FIRST, precision="float16:ab")
    assert is_sealed(KEY, lossy)
    assert not is_sealed(KEY, replace(lossy, precision=""))
    assert lossy.mac != sealed(first_token=FIRST).mac
