"""The two cores of a `prefix`: what moves, what is refused, and that nothing but a prefix ever comes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.links.lossy_link import LossyLink
from support.links.prefix_pair import (
    NOTHING,
    Prefix,
    PrefixPair,
    make_prefix_receiver,
    make_prefix_sender,
    runs,
    tips_of,
)
from support.links.transfer_pair import (
    COMPUTE_ID,
    DEADLINE_S,
    FIRST,
    GEOMETRY,
    KEYS,
    TransferPair,
    make_receiver,
    make_reserved,
    make_ticket,
)

from disagg.transceiver.protocol.actions import (
    AskPin,
    AskPrefix,
    AskRoom,
    FreeReservation,
    Land,
    PrefixVerified,
    ReportFailed,
    Send,
    Verified,
)
from disagg.transceiver.protocol.events import (
    CancelAsked,
    FetchWanted,
    MessageArrived,
    Pinned,
    Reserved,
    UnitsFinal,
)
from disagg.transceiver.protocol.manifest import seal
from disagg.transceiver.protocol.state import State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import GroupRuns, UnitRun
from disagg.transceiver.wire.purposes import HANDOFF, MOVE, PREFIX
from disagg.transceiver.wire.ticket import mint_leg
from disagg.transceiver.wire.timing import LEASE_S

EVERY = frozenset(range(6))


def fetch_of(receiver: Any) -> p.Fetch:
    (action,) = receiver.handle(FetchWanted(), 0.0)
    assert isinstance(action, Send)
    assert isinstance(action.message, p.Fetch)
    return action.message


def answer_to(fetch: p.Fetch, prefix: Prefix | None = None) -> list[Any]:
    return list(make_prefix_sender(prefix or Prefix()).handle(MessageArrived(fetch), 0.0))


# --- what moves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["shm", "zmq"])
def test_a_prefix_moves_what_both_ends_need_and_the_sink_has_not(plane: str) -> None:
    pair = PrefixPair(Prefix(held=(frozenset({0, 2}), frozenset())), plane=plane)
    pair.want()
    pair.settle()
    assert pair.verdicts == [PrefixVerified(pair.receiver.ends.transfer_id, 0, 24)]
    assert pair.landed == [{1, 3, 4, 5}, {4, 5}], "of the window of 8 only what is read behind token 24"
    assert pair.releases == ["acked"]
    assert pair.payloads if plane == "zmq" else not pair.payloads
    pair.check_invariants()


def test_a_prefix_never_yields_the_licence_to_decode() -> None:
    pair = PrefixPair()
    pair.want()
    pair.settle()
    assert not pair.of("receiver", Verified)
    assert not pair.of("sender", AskPin), "no prompt is pinned: cached blocks are lent"


def test_a_source_that_has_nothing_answers_so_under_its_seal() -> None:
    pair = PrefixPair(Prefix(resident=NOTHING))
    pair.want()
    pair.settle()
    assert pair.verdicts == [PrefixVerified(pair.receiver.ends.transfer_id, 0, 0)]
    assert pair.room is None
    assert pair.releases == ["acked"]


def test_a_source_of_part_of_it_sends_up_to_a_common_boundary() -> None:
    pair = PrefixPair(Prefix(resident=(frozenset(range(5)), frozenset({2, 3}))))
    pair.want()
    pair.settle()
    assert pair.verdicts == [PrefixVerified(pair.receiver.ends.transfer_id, 0, 16)]
    assert pair.landed == [{0, 1, 2, 3}, {2, 3}]


def test_slices_that_come_before_there_is_room_are_landed_after() -> None:
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.find()
    pair.settle()
    assert not pair.jobs
    assert not pair.of("receiver", Land)
    assert pair.receiver.state is State.LANDING
    pair.make_room()
    pair.settle()
    assert pair.verdicts[0].boundary == 24


def test_nothing_is_accepted_before_the_boundary_is_known() -> None:
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.advance(1.0)
    assert pair.sender.state is State.PINNING
    assert pair.receiver.state is State.FETCHING, "its repeats changed nothing"
    assert [a for a in pair.of("sender", Send) if isinstance(a.message, p.Accepted)] == []


def test_a_slice_and_a_done_that_overtake_the_acceptance_are_said_again() -> None:
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.flying.clear()
    pair.find()
    said = list(pair.flying)
    pair.flying = [item for item in said if b"queue_position" not in item[3]]
    assert len(pair.flying) == len(said) - 1
    pair.settle()
    assert pair.receiver.state is State.LANDING
    pair.is_prompt = True
    pair.advance(3.0)
    assert pair.verdicts[0] == PrefixVerified(pair.receiver.ends.transfer_id, 0, 24)


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    source, sink = draw(st.sampled_from([(4, 4), (2, 4), (4, 2), (8, 2), (2, 8), (3, 6)]))
    coarser = max(source, sink)
    boundary = draw(st.integers(1, 6)) * coarser

    def blocks(size: int) -> tuple[frozenset[int], ...]:
        every = frozenset(range(boundary // size))
        few = st.frozensets(st.sampled_from(sorted(every)))
        return tuple(draw(few) if draw(st.booleans()) else every for _ in GEOMETRY.groups)

    def some(size: int) -> tuple[frozenset[int], ...]:
        return tuple(draw(st.frozensets(st.integers(0, boundary // size - 1))) for _ in GEOMETRY.groups)

    return Prefix(boundary, blocks(source), some(sink), source, sink)


@given(prefix=prefixes(), seed=st.integers(0, 2**32), plane=st.sampled_from(["shm", "zmq"]), is_rough=st.booleans())
@settings(max_examples=150)
def test_over_any_link_a_prefix_is_whole_or_is_not_there(prefix: Prefix, seed: int, plane: str, is_rough: bool) -> None:
    rough = LossyLink(seed, drop=0.2, duplicate=0.2, truncate=0.05, jitter_s=0.3)
    pair = PrefixPair(prefix, plane=plane, link=rough if is_rough else LossyLink(seed))
    pair.want()
    pair.advance(DEADLINE_S * 2)
    pair.check_invariants()
    assert pair.receiver.is_over
    assert pair.sender.is_over
    (verdict,) = pair.verdicts
    assert isinstance(verdict, PrefixVerified), "a link that drops a fifth of all lets a minute of repeats through"
    units = {(group, ordinal) for group, some in enumerate(pair.landed) for ordinal in some}
    assert units == {(g, o) for g, o in pair.required_keys}


@given(prefix=prefixes(), seed=st.integers(0, 2**32), at=st.integers(0, 12))
@settings(max_examples=100)
def test_an_end_that_gives_up_at_any_moment_leaves_nothing_behind(prefix: Prefix, seed: int, at: int) -> None:
    pair = PrefixPair(prefix, link=LossyLink(seed, jitter_s=0.1))
    pair.want()
    for _ in range(at):
        pair.deliver_one()
        if pair.jobs:
            pair.land_one()
        pair.now += 0.02
    end = pair.sender if seed % 2 else pair.receiver
    pair.feed(end, CancelAsked(reasons.EVICTED if seed % 2 else reasons.CANCELLED))
    pair.advance(DEADLINE_S * 2)
    pair.check_invariants()
    assert len(pair.releases) == len(pair.verdicts) == 1


# --- what is refused ----------------------------------------------------------------------------------------

RIGHT = fetch_of(make_prefix_receiver(Prefix()))


def test_the_right_fetch_is_admitted() -> None:
    assert answer_to(RIGHT) == [AskPrefix(())]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ticket": bytes(32)}, "ticket"),
        ({"ticket": make_ticket()}, "ticket"),
        ({"purpose": HANDOFF}, "purpose"),
        ({"purpose": MOVE}, "purpose"),
        ({"prompt_len": 20}, "prompt_len"),
        ({"plane": "ucx"}, "plane"),
        ({"tip": bytes(16)}, "tip"),
        ({"tip": tips_of(5, 4)[-1]}, "tip"),
        ({"required": (GroupRuns(0, ((0, 1),)),)}, "required"),
        ({"held": (GroupRuns(0, ((6, 1),)),)}, "held"),
        ({"held": (GroupRuns(0, ((0, 2**24 - 1),)),)}, "held"),
        ({"held": (GroupRuns(2, ((0, 1),)),)}, "held"),
        ({"held": (GroupRuns(1, ((0, 1),)), GroupRuns(0, ((0, 1),)))}, "held"),
    ],
)
def test_a_fetch_of_what_its_ticket_does_not_allow_is_refused_by_its_field(change: dict[str, Any], field: str) -> None:
    (action,) = answer_to(replace(RIGHT, **change))
    assert isinstance(action, Send)
    assert isinstance(action.message, p.Refused)
    assert action.message.field == field


@pytest.mark.parametrize(
    "change",
    [{"purpose": MOVE}, {"boundary": 20}, {"tip": bytes(16)}, {"request": "q" * 32}, {"sink": "x" * 32}, {"epoch": 1}],
)
def test_a_ticket_for_another_leg_is_refused(change: dict[str, Any]) -> None:
    other = mint_leg(KEYS.ticket, replace(Prefix().claims, **change), DEADLINE_S)
    (action,) = answer_to(fetch_of(make_prefix_receiver(Prefix(), ticket=other)))
    assert action.message.field == "ticket"


def test_a_handoff_refuses_the_fetch_of_a_prefix() -> None:
    pair = TransferPair()
    pair.feed(pair.sender, MessageArrived(replace(RIGHT, ticket=make_ticket(), prompt_len=26, tip=b"")))
    (action,) = pair.of("sender", Send)
    assert (action.message.field, action.message.theirs) == ("purpose", PREFIX)


def accepted_receiver(prefix: Prefix | None = None) -> PrefixPair:
    """A receiver whose source has said how far it reaches, and that has room."""
    pair = PrefixPair(prefix, is_prompt=False)
    pair.want()
    pair.settle()
    pair.feed(pair.sender, Pinned(COMPUTE_ID, 24))
    pair.settle()
    pair.make_room()
    return pair


@pytest.mark.parametrize("units", [(UnitRun(1, 0, 1),), (UnitRun(0, 0, 6), UnitRun(0, 6, 1)), (UnitRun(0, 0, 7),)])
def test_blocks_that_were_not_asked_for_are_refused(units: tuple[UnitRun, ...]) -> None:
    pair = accepted_receiver()
    header = p.Header(pair.sender.ends.me, pair.receiver.ends.me, pair.receiver.ends.transfer_id, 0, 9)
    pair.feed(pair.receiver, MessageArrived(p.Slice(header, 0, units)))
    assert pair.verdicts == [ReportFailed(reasons.PROTOCOL)]


@pytest.mark.parametrize(("boundary", "precision"), [(28, ""), (22, ""), (8, ""), (4, ""), (24, "float16:ab")], ids=str)
def test_a_boundary_that_no_honest_source_names_ends_the_transfer(boundary: int, precision: str) -> None:
    pair = PrefixPair(Prefix(own=8), is_prompt=False)
    pair.want()
    header = p.Header(pair.sender.ends.me, pair.receiver.ends.me, pair.receiver.ends.transfer_id, 0, 9)
    pair.feed(pair.receiver, MessageArrived(p.Accepted(header, 0, boundary, precision)))
    assert pair.verdicts == [ReportFailed(reasons.PROTOCOL)]
    assert not pair.of("receiver", AskRoom)


def done_of(pair: PrefixPair, **change: Any) -> p.Done:
    (send,) = [a for a in pair.of("sender", Send) if isinstance(a.message, p.Done)][:1]
    done: p.Done = send.message
    form: dict[str, Any] = {
        "rank": 0,
        "num_ranks": 1,
        "num_slices": done.num_slices,
        "manifest": done.manifest,
        "first_token": None,
        "purpose": PREFIX,
        "boundary": 24,
        "tip": tips_of(6, 4)[-1],
    }
    return seal(KEYS.manifest_mac, done.header, **(form | change))


def verdict_on(**change: Any) -> Any:
    """Of a receiver in which all has landed and that hears this DONE in place of the right one."""
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.find()
    done = done_of(pair, **change)
    pair.flying = [item for item in pair.flying if b"num_slices" not in item[3]]
    pair.settle()
    pair.make_room()
    pair.settle()
    assert not pair.verdicts
    pair.feed(pair.receiver, MessageArrived(done))
    return pair.verdicts[0]


def test_the_right_done_is_believed() -> None:
    assert isinstance(verdict_on(), PrefixVerified)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"purpose": HANDOFF}, reasons.PURPOSE),
        ({"purpose": HANDOFF, "first_token": FIRST}, reasons.PURPOSE),
        ({"purpose": MOVE}, reasons.PURPOSE),
        ({"tip": tips_of(5, 4)[-1]}, reasons.MAC),
        ({"boundary": 20}, reasons.MAC),
        ({"precision": "float16:ab"}, reasons.PROTOCOL),
        ({"first_token": FIRST}, reasons.PROTOCOL),
        ({"num_slices": 2}, reasons.PROTOCOL),
    ],
    ids=str,
)
def test_a_done_of_something_else_is_not_believed(change: dict[str, Any], reason: str) -> None:
    assert verdict_on(**change) == ReportFailed(reason)


def test_the_done_of_a_prefix_ends_no_handoff() -> None:
    """Sealed with the cluster's key for the very transfer: the purpose alone is another."""
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.compute()
    pair.settle()
    pair.feed(pair.receiver, MessageArrived(done_for(pair, purpose=PREFIX)))
    assert pair.verdicts == [ReportFailed(reasons.PURPOSE)]


def done_for(pair: TransferPair, **change: Any) -> p.Done:
    """What the sender of a handoff would say, sealed for a purpose of one's choice."""
    pair.finish_prompt()
    (send,) = [a for a in pair.of("sender", Send) if isinstance(a.message, p.Done)]
    done: p.Done = send.message
    counts = {"rank": 0, "num_ranks": 1, "num_slices": done.num_slices}
    return seal(
        KEYS.manifest_mac,
        done.header,
        manifest=done.manifest,
        first_token=None,
        **counts,  # type: ignore[arg-type]
        **change,
    )


def test_a_landed_block_that_is_not_what_was_hashed_is_named_to_the_source() -> None:
    pair = PrefixPair()
    pair.corrupt = {(0, 3)}
    pair.want()
    pair.settle()
    assert pair.verdicts[0].reason == reasons.DIGEST
    assert pair.unregistered == [(0, 3)]


# --- endings ------------------------------------------------------------------------------------------------


def test_a_source_that_evicts_what_it_sends_says_so() -> None:
    pair = PrefixPair(is_prompt=False, plane="zmq")
    pair.want()
    pair.settle()
    pair.feed(pair.sender, Pinned(COMPUTE_ID, 24))
    pair.feed(pair.sender, UnitsFinal(COMPUTE_ID, pair.prefix.units(24)[:2]))
    pair.settle()
    pair.feed(pair.sender, CancelAsked(reasons.EVICTED))
    pair.settle()
    assert pair.verdicts == [ReportFailed(reasons.EVICTED)]
    assert pair.releases == ["cancelled"]


def test_a_source_that_evicts_after_its_last_word_lets_the_digests_decide() -> None:
    pair = PrefixPair()
    pair.want()
    while pair.sender.state is not State.DECIDED:
        pair.deliver_one()
    pair.feed(pair.sender, CancelAsked(reasons.EVICTED))
    pair.corrupt = {(0, 0)}
    pair.settle()
    assert pair.verdicts[0].reason == reasons.DIGEST


def test_a_worker_without_room_gives_the_prefix_up() -> None:
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.find()
    pair.settle()
    pair.feed(pair.receiver, CancelAsked("no room"))
    pair.settle()
    assert pair.verdicts == [FreeReservation("no room")]
    pair.make_room()  # the engine had not read that
    assert pair.verdicts == [FreeReservation("no room")]
    assert pair.releases == ["cancelled"]


def test_room_for_other_units_than_were_asked_for_is_this_workers_fault() -> None:
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.find()
    pair.settle()
    with pytest.raises(LocalProtocolError, match="room for other units"):
        pair.feed(pair.receiver, Reserved(runs((EVERY, EVERY)), 24))
    pair.make_room()
    with pytest.raises(LocalProtocolError, match="or twice"):
        pair.make_room()


def test_no_room_is_made_before_the_source_has_answered() -> None:
    with pytest.raises(LocalProtocolError, match="asked for before there is room"):
        make_prefix_receiver(Prefix()).handle(Reserved((), 24), 0.0)


def test_a_handoff_has_its_room_first() -> None:
    receiver = make_receiver()
    with pytest.raises(LocalProtocolError, match="fetched once there is room"):
        receiver.handle(FetchWanted(), 0.0)
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    with pytest.raises(LocalProtocolError, match="room for this handoff before"):
        pair.feed(pair.receiver, make_reserved())


def test_more_units_than_one_done_names_are_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.transceiver.protocol.sender.MAX_MANIFEST_ENTRIES", 1)
    pair = PrefixPair()
    pair.want()
    pair.settle()
    assert pair.verdicts == [ReportFailed(reasons.INCOMPLETE)]


def test_a_source_whose_sink_falls_silent_lets_go_after_a_lease() -> None:
    pair = PrefixPair(is_prompt=False)
    pair.want()
    pair.settle()
    pair.find()
    pair.flying.clear()
    pair.now = LEASE_S + 1
    pair.tick(pair.sender)
    assert pair.releases == ["lost"]
    pair.check_invariants()
