"""The two ends of a move: what they say, what moves, and that any link and any end leaves one owner of the answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.links.lossy_link import LossyLink
from support.links.move_pair import (
    BOUNDARY,
    FIRST_INDEX,
    FROZEN,
    KNOWN,
    LICENCE,
    LOGPROBS,
    OUTPUT,
    MovePair,
    make_move_sink,
    make_move_source,
    move_ticket,
    room_made,
)
from support.links.transfer_pair import DEADLINE_S, GEOMETRY, PROMPT, TRANSFER_ID, TransferPair, make_ticket
from support.oracles.cache_oracle import needed_blocks

from disagg.transceiver.protocol.actions import AskExtension, FreeReservation, Land, ReportFailed, Send, Verified
from disagg.transceiver.protocol.events import CancelAsked, ComputeFailed, FinishedEarly, MessageArrived, PeerGone
from disagg.transceiver.protocol.state import State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import GroupRuns
from disagg.transceiver.wire.purposes import MOVE, PREFIX
from disagg.transceiver.wire.timing import LEASE_S

END_S = DEADLINE_S + 3 * LEASE_S
ROUGH = {"drop": 0.3, "duplicate": 0.3, "truncate": 0.05, "jitter_s": 0.5}


def moved(**options: Any) -> MovePair:
    pair = MovePair(**options)
    pair.begin()
    pair.settle()
    return pair


def sent(pair: TransferPair, name: str, kind: type) -> list[Any]:
    return [action.message for action in pair.of(name, Send) if isinstance(action.message, kind)]


# --- what is said -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", ["shm", "zmq"])
def test_the_answer_arrives_with_its_newest_token_and_is_over_where_it_was(plane: str) -> None:
    pair = moved(plane=plane)
    pair.check_invariants()
    assert pair.verdicts == [LICENCE]
    assert pair.releases == ["acked"]


def test_the_sink_hears_what_the_router_has_not_and_no_more() -> None:
    pair = moved()
    (accepted,) = sent(pair, "sender", p.Accepted)
    assert (accepted.output, accepted.logprobs) == (OUTPUT[FIRST_INDEX:], LOGPROBS)
    assert accepted.boundary == BOUNDARY
    assert pair.of("receiver", AskExtension) == [AskExtension(OUTPUT, LOGPROBS)]


def test_a_router_that_has_every_token_is_told_none_again() -> None:
    pair = MovePair(freezes=False)
    pair.begin()
    pair.settle()
    frozen = replace(FROZEN, output=OUTPUT[:FIRST_INDEX], logprobs=())
    pair.feed(pair.sender, frozen)
    pair.extends = False
    pair.settle()
    assert pair.of("receiver", AskExtension) == [AskExtension(OUTPUT[:FIRST_INDEX], ())]


@pytest.mark.parametrize("held", [(set(), set()), ({0, 1, 2}, set()), ({0, 1, 2, 5, 6}, {6}), ({4}, {0, 1, 6})])
def test_exactly_what_is_read_next_and_not_held_moves(held: tuple[set[int], ...]) -> None:
    pair = moved(held=held)
    assert pair.verdicts == [LICENCE]
    landed = sorted(
        (run.group, run.first + i)
        for action in pair.of("receiver", Land)
        for run in action.message.units
        for i in range(run.count)
    )
    wanted = [
        (number, ordinal)
        for number, group in enumerate(GEOMETRY.groups)
        for ordinal in needed_blocks(BOUNDARY, group.window, group.num_sink_tokens, GEOMETRY.block_size)
        if ordinal not in held[number]
    ]
    assert landed == wanted


def test_nothing_leaves_before_the_sink_has_room() -> None:
    pair = MovePair(extends=False)
    pair.begin()
    pair.settle()
    assert pair.sender.state is State.SENDING
    assert not sent(pair, "sender", p.Slice)
    assert not sent(pair, "sender", p.Done)
    pair.extend()
    pair.settle()
    assert pair.verdicts == [LICENCE]


def test_an_answer_that_does_not_stand_still_yet_is_not_accepted() -> None:
    pair = MovePair(freezes=False)
    pair.begin()
    pair.advance(1.0)
    assert pair.sender.state is State.PINNING
    assert not sent(pair, "sender", p.Accepted)
    pair.freeze()
    pair.settle()
    assert pair.verdicts == [LICENCE]


# --- endings ------------------------------------------------------------------------------------------------


def test_no_room_for_what_the_answer_has_become_leaves_it_where_it_is() -> None:
    pair = MovePair(extends=False)
    pair.begin()
    pair.settle()
    pair.refuse_room()
    pair.settle()
    assert pair.verdicts == [ReportFailed("no_room")]
    assert pair.releases == ["cancelled"], "not acked: it is the source's"


@pytest.mark.parametrize("when", ["before FETCH", "before it stands still"])
def test_an_answer_that_ends_meanwhile_frees_the_sink_without_a_failure(when: str) -> None:
    pair = MovePair(freezes=False)
    if when != "before FETCH":
        pair.begin()
        pair.settle()
    pair.feed(pair.sender, FinishedEarly(0))
    if when == "before FETCH":
        pair.begin()  # the tombstone's answer is the shell's: here the end itself repeats its word
    pair.settle()
    assert pair.releases == ["finished"]
    if when != "before FETCH":
        assert pair.verdicts == [FreeReservation("finished")]


@pytest.mark.parametrize("end", ["sender", "receiver"])
@pytest.mark.parametrize("freezes", [True, False])
def test_a_lost_peer_is_never_an_acknowledgement(end: str, freezes: bool) -> None:
    pair = MovePair(freezes=freezes, extends=False)
    pair.begin()
    pair.settle()
    pair.feed(pair.sender if end == "sender" else pair.receiver, PeerGone("reset"))
    pair.settle()
    if end == "sender":
        assert pair.releases == ["lost"]
    else:
        assert pair.verdicts == [ReportFailed("lost")]


def test_an_engine_that_cannot_freeze_the_answer_fails_the_move() -> None:
    pair = MovePair(freezes=False)
    pair.begin()
    pair.settle()
    pair.feed(pair.sender, ComputeFailed("it is being computed anew"))
    pair.settle()
    assert pair.verdicts == [ReportFailed("it is being computed anew")]


# --- what is refused ----------------------------------------------------------------------------------------


def refusal(**changes: Any) -> str:
    """The field of a FETCH that the source does not admit; "" when it does."""
    source = make_move_source()
    header = p.Header("d" * 32, "p" * 32, TRANSFER_ID, 0, 1)
    fields: dict[str, Any] = {"ticket": move_ticket(), "prompt_len": KNOWN, "required": (), "plane": "shm"}
    fields |= {"purpose": MOVE} | changes
    actions = source.handle(MessageArrived(p.Fetch(header, **fields)), 0.0)
    named = [a.message.field for a in actions if isinstance(a, Send) and isinstance(a.message, p.Refused)]
    return named[0] if named else ""


HELD = (GroupRuns(0, ((0, 7),)), GroupRuns(1, ((2, 1), (6, 1))))


def test_the_routers_own_fetch_is_admitted() -> None:
    assert refusal() == refusal(held=HELD) == ""


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ticket": make_ticket()}, "ticket"),
        ({"ticket": move_ticket(1)}, "ticket"),
        ({"ticket": move_ticket(request="e" * 32)}, "ticket"),
        ({"ticket": move_ticket(prompt=PROMPT[:-1])}, "ticket"),
        ({"ticket": move_ticket(num_tokens=FIRST_INDEX + 1)}, "ticket"),
        ({"ticket": move_ticket(sink="e" * 32)}, "ticket"),
        ({"purpose": PREFIX}, "purpose"),
        ({"purpose": "handoff"}, "purpose"),
        ({"prompt_len": KNOWN + 1}, "prompt_len"),
        ({"plane": "ucx"}, "plane"),
        ({"held": (GroupRuns(0, ((0, 8),)),)}, "held"),
        ({"held": (GroupRuns(2, ((0, 1),)),)}, "held"),
        ({"required": (GroupRuns(0, ((0, 1),)),)}, "held"),
    ],
)
def test_a_fetch_of_anything_else_is_refused_and_changes_nothing(changes: dict[str, Any], field: str) -> None:
    assert refusal(**changes) == field


def test_a_move_that_is_told_tokens_it_cannot_be_ends() -> None:
    for change in ({"boundary": BOUNDARY - 1}, {"logprobs": LOGPROBS[1:]}, {"precision": "float16:ab"}):
        pair = MovePair(extends=False)
        pair.begin()
        pair.settle()
        (accepted,) = sent(pair, "sender", p.Accepted)
        pair = MovePair(freezes=False)
        pair.begin()
        pair.settle()
        pair.feed(pair.receiver, MessageArrived(replace(accepted, **change)))
        pair.settle()
        assert pair.verdicts == [ReportFailed(reasons.PROTOCOL)]


@pytest.mark.parametrize("change", [{"boundary": BOUNDARY - 1}, {"purpose": PREFIX}, {"mac": bytes(32)}])
def test_a_done_of_another_boundary_purpose_or_answer_gives_no_licence(change: dict[str, Any]) -> None:
    pair, honest = MovePair(), moved()
    (done,) = sent(honest, "sender", p.Done)
    pair.begin()
    while pair.receiver.state is not State.LANDING:
        pair.deliver_one()
    pair.feed(pair.receiver, MessageArrived(replace(done, **change)))
    pair.settle()
    assert pair.verdicts == [ReportFailed(reasons.PURPOSE if "purpose" in change else reasons.MAC)]
    assert pair.releases == ["cancelled"]


def test_tokens_changed_on_the_way_break_the_seal() -> None:
    """ACCEPTED has no seal of its own: DONE's binds every token of the answer."""
    pair = MovePair(freezes=False, extends=False)
    pair.begin()
    pair.settle()
    honest = moved()
    (accepted,) = sent(honest, "sender", p.Accepted)
    (done,) = sent(honest, "sender", p.Done)
    wrong = (*accepted.output[:2], 7, *accepted.output[3:])
    pair.feed(pair.receiver, MessageArrived(replace(accepted, output=wrong)))
    pair.extend()
    pair.feed(pair.receiver, MessageArrived(done))
    assert [a.reason for a in pair.of("receiver", ReportFailed)] == [reasons.MAC]


@pytest.mark.parametrize("output", [OUTPUT[: FIRST_INDEX - 1], (*OUTPUT, *range(300))])
def test_a_router_that_is_ahead_or_too_far_behind_is_this_processs_mistake(output: tuple[int, ...]) -> None:
    pair = MovePair(freezes=False)
    pair.begin()
    pair.settle()
    with pytest.raises(LocalProtocolError, match="the router has 5"):
        pair.feed(pair.sender, replace(FROZEN, output=output, logprobs=()))


def test_room_for_other_blocks_than_are_to_come_is_this_processs_mistake() -> None:
    pair = MovePair(extends=False)
    pair.begin()
    pair.settle()
    pair.held = ({0}, set())
    with pytest.raises(LocalProtocolError, match="other blocks"):
        pair.extend()


def test_a_sink_asks_again_until_it_is_answered() -> None:
    sink = make_move_sink()
    (first,) = sink.handle(room_made(), 0.0)
    assert isinstance(first, Send)
    assert isinstance(first.message, p.Fetch)
    assert (first.message.purpose, first.message.prompt_len, first.message.required) == (MOVE, KNOWN, ())
    assert sink.next_wakeup() is not None


# --- any link -----------------------------------------------------------------------------------------------


def run_to_the_end(pair: MovePair) -> None:
    assert pair.advance(END_S) < 400, "repeats are bounded by their doubling"
    pair.check_invariants()
    assert pair.sender.is_over
    assert pair.receiver.is_over
    if pair.releases == ["acked"]:
        assert pair.verdicts == [LICENCE], "an answer that is over at its source goes on at its sink"


@pytest.mark.parametrize("plane", ["shm", "zmq"])
@pytest.mark.parametrize("seed", range(40))
def test_a_rough_link_delays_a_move_and_does_not_change_its_end(seed: int, plane: str) -> None:
    pair = MovePair(plane=plane, link=LossyLink(seed, **ROUGH))
    pair.begin()
    run_to_the_end(pair)
    assert pair.verdicts == [LICENCE]
    assert pair.releases == ["acked"]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["begin", "freeze", "extend"] * 3
            + ["refuse room", "finish early", "cannot freeze", "cancel sender", "cancel receiver"]
            + ["sender loses peer", "receiver loses peer", "silence"]
        ),
        st.floats(0, 6),
    ),
    max_size=14,
)


class Story:
    """Plays a schedule as engines and routers would: only what each may say in the state it is in."""

    def __init__(self, pair: MovePair) -> None:
        self.pair, self.done = pair, set[str]()

    def play(self, name: str) -> None:
        pair = self.pair
        asked = bool(pair.of("receiver", AskExtension)) and not self.done & {"extend", "refuse room"}
        decodes = not pair.is_frozen and not self.done & {"finish early", "cannot freeze"}
        match name:
            case "begin" if name not in self.done:
                pair.begin()
            case "freeze" if pair.is_pin_wanted and decodes:
                pair.freeze()
            case "cannot freeze" if pair.is_pin_wanted and decodes:
                pair.feed(pair.sender, ComputeFailed("not decoded"))
            case "finish early" if decodes:
                pair.feed(pair.sender, FinishedEarly(0))
            case "extend" if asked:
                pair.extend()
            case "refuse room" if asked:
                pair.refuse_room()
            case "cancel sender" | "cancel receiver":
                pair.feed(pair.sender if name == "cancel sender" else pair.receiver, CancelAsked("cancelled"))
            case "sender loses peer" | "receiver loses peer":
                pair.feed(pair.sender if "sender" in name else pair.receiver, PeerGone("reset"))
            case "silence":
                pair.has_heartbeat = not pair.has_heartbeat
            case _:
                return
        self.done.add(name)


@settings(max_examples=250, deadline=None)
@given(
    STEPS,
    st.integers(0, 2**32),
    st.floats(0, 0.6),
    st.floats(0, 0.5),
    st.floats(0, 0.3),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sets(st.sampled_from([(0, 0), (0, 9), (1, 8)]), max_size=1),
    st.sampled_from(["shm", "zmq"]),
)
def test_every_schedule_over_every_link_ends_once_on_both_sides(
    schedule: list[tuple[str, float]],
    seed: int,
    drop: float,
    duplicate: float,
    truncate: float,
    jitter_s: float,
    corrupt: set[tuple[int, int]],
    plane: str,
) -> None:
    link = LossyLink(seed, drop, duplicate, truncate, jitter_s)
    pair = MovePair(plane=plane, link=link, freezes=False, extends=False)
    pair.corrupt = corrupt
    story = Story(pair)
    for name, pause in schedule:
        story.play(name)
        pair.check_invariants()
        pair.advance(pair.now + pause)
        pair.check_invariants()
    run_to_the_end(pair)
    if story.done & {"finish early", "cannot freeze", "refuse room"}:
        assert LICENCE not in pair.verdicts
    if pair.verdicts == [LICENCE]:
        assert {"begin", "freeze", "extend"} <= story.done
    assert isinstance(pair.verdicts[0], Verified | ReportFailed | FreeReservation)
