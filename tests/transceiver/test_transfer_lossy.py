"""Two cores over a link that drops, duplicates, reorders, delays and truncates, under a fake clock.

Whatever happens, both ends close, sources are released once, one verdict is given, and wrong bytes never get a licence.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.links.lossy_link import LossyLink
from support.links.transfer_pair import COMPUTE_ID, DEADLINE_S, FIRST, TRANSFER_ID, TransferPair, needed_of

from disagg.transceiver.protocol.actions import FreeReservation, ReportFailed, Verified
from disagg.transceiver.protocol.events import CancelAsked, ComputeFailed, FinishedEarly, PeerGone, SoftDropped
from disagg.transceiver.protocol.state import State
from disagg.transceiver.wire.timing import LEASE_S

ROUGH = {"drop": 0.3, "duplicate": 0.3, "truncate": 0.05, "jitter_s": 0.5}
END_S = DEADLINE_S + 3 * LEASE_S
LICENCE = Verified(TRANSFER_ID, 0, FIRST)


def run_to_the_end(pair: TransferPair) -> int:
    num_ticks = pair.advance(END_S)
    pair.check_invariants()
    assert pair.sender.is_over
    assert pair.receiver.is_over
    assert num_ticks < 400, "repeats are bounded by their doubling"
    return num_ticks


def pin_if_asked(pair: TransferPair, compute_id: int = COMPUTE_ID) -> None:
    if pair.is_pin_wanted and pair.sender.state is State.PINNING:
        pair.pin(compute_id)


@pytest.mark.parametrize("plane", ["shm", "zmq"])
@pytest.mark.parametrize("seed", range(40))
def test_a_rough_link_delays_a_transfer_and_does_not_change_its_end(seed: int, plane: str) -> None:
    pair = TransferPair(plane=plane, link=LossyLink(seed, **ROUGH))
    units = needed_of()
    pair.reserve()
    for step, batch in enumerate((units[:2], units[2:7], units[7:])):
        pair.advance(2.0 * (step + 1))
        pair.compute(batch)
        pin_if_asked(pair)
    while pair.sender.state is State.PINNING or pair.sender.state is State.WAITING:
        pair.advance(pair.now + 1)
        pin_if_asked(pair)
    pair.finish_prompt()
    run_to_the_end(pair)
    assert pair.verdicts == [LICENCE]
    assert pair.releases == ["acked"]


@pytest.mark.parametrize("seed", range(20))
def test_wrong_bytes_never_get_a_licence_over_a_rough_link(seed: int) -> None:
    pair = TransferPair(link=LossyLink(seed, **ROUGH))
    pair.corrupt = {(1, 5)}
    pair.reserve()
    pair.compute()
    pair.finish_prompt()
    while not pair.is_pin_wanted:
        pair.advance(pair.now + 1)
    pair.pin()
    run_to_the_end(pair)
    assert isinstance(pair.verdicts[0], ReportFailed)
    assert pair.releases == ["cancelled"]


def test_a_dead_link_fails_both_sides_without_a_loop() -> None:
    pair = TransferPair()
    pair.reserve()
    pair.settle()
    pair.pin()
    pair.compute()
    pair.link.drop = 1.0
    pair.has_heartbeat = False
    run_to_the_end(pair)
    assert isinstance(pair.verdicts[0], ReportFailed)
    assert pair.releases == ["lost"]


_events = st.sampled_from(
    [
        "reserve",
        "compute",
        "finish",
        "pin",
        "drop soft",
        "cancel sender",
        "cancel receiver",
        "fail",
        "finish early",
        "sender loses peer",
        "receiver loses peer",
    ]
)
_weights = st.sampled_from(["reserve", "compute", "finish", "pin"]) | _events
_schedules = st.lists(st.tuples(_weights, st.floats(0, 6)), max_size=14)


class Story:
    """Plays a schedule as an engine and a router would: only what each may say in the state it is in."""

    def __init__(self, pair: TransferPair) -> None:
        self.pair = pair
        self.compute_id = 0
        self.done: set[str] = set()
        self.has_asked_pin = False

    def play(self, name: str) -> None:
        pair, sender, receiver = self.pair, self.pair.sender, self.pair.receiver
        engine_is_running = not self.done & {"finish", "fail", "finish early"}
        match name:
            case "reserve" if name not in self.done:
                pair.reserve()
            case "compute" if engine_is_running:
                pair.compute(compute_id=self.compute_id)
            case "finish" if engine_is_running:
                pair.compute(compute_id=self.compute_id)
                pair.finish_prompt(self.compute_id)
            case "pin" if pair.is_pin_wanted and not self.has_asked_pin:
                self.has_asked_pin = True
                pair.pin(self.compute_id)
            case "drop soft" if engine_is_running and not self.has_asked_pin:
                pair.feed(sender, SoftDropped(self.compute_id))
                self.compute_id += 1
            case "fail" if engine_is_running:
                pair.feed(sender, ComputeFailed("non-finite"))
            case "finish early" if engine_is_running:
                pair.feed(sender, FinishedEarly(self.compute_id))
            case "cancel sender":
                pair.feed(sender, CancelAsked("cancelled"))
            case "cancel receiver":
                pair.feed(receiver, CancelAsked("cancelled"))
            case "sender loses peer":
                pair.feed(sender, PeerGone("reset"))
            case "receiver loses peer":
                pair.feed(receiver, PeerGone("reset"))
            case _:
                return
        self.done.add(name)


@settings(max_examples=250, deadline=None)
@given(
    _schedules,
    st.integers(0, 2**32),
    st.floats(0, 0.6),
    st.floats(0, 0.5),
    st.floats(0, 0.3),
    st.sampled_from([0.0, 0.1, 3.0]),
    st.sets(st.sampled_from([(0, 0), (0, 6), (1, 5)]), max_size=1),
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
    pair = TransferPair(plane=plane, link=LossyLink(seed, drop, duplicate, truncate, jitter_s))
    pair.corrupt = corrupt
    story = Story(pair)
    for name, pause in schedule:
        story.play(name)
        pair.check_invariants()
        pair.advance(pair.now + pause)
        pair.check_invariants()
    run_to_the_end(pair)
    if "fail" in story.done or "finish early" in story.done:
        assert LICENCE not in pair.verdicts
    if pair.verdicts == [LICENCE]:
        assert {"finish", "reserve", "pin"} <= story.done
    assert isinstance(pair.verdicts[0], Verified | ReportFailed | FreeReservation)
