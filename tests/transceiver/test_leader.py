"""The leader of several ranks decides once: when every part is verified, or at the first that ends otherwise."""

from __future__ import annotations

from itertools import permutations

import pytest

from disagg.transceiver.protocol.actions import PartVerified, ReportFailed, Verified
from disagg.transceiver.protocol.leader import Leader, part_key
from disagg.transceiver.wire.errors import LocalProtocolError
from disagg.transceiver.wire.messages.values import AttemptKey, FirstToken, SamplingState

KEY = AttemptKey("a" * 32, 3)
FIRST = FirstToken(7, None, SamplingState(0))
PARTS = {
    (0, 0): PartVerified(FIRST),
    (0, 1): PartVerified(None),
    (1, 0): PartVerified(FIRST),
    (1, 2): PartVerified(None),
}


@pytest.mark.parametrize("order", list(permutations(PARTS)))
def test_the_last_part_in_any_order_gives_the_one_licence(order: tuple[tuple[int, int], ...]) -> None:
    leader = Leader(KEY, PARTS)
    answers = [leader.verified(pair, PARTS[pair]) for pair in order]
    assert answers == [None, None, None, Verified(KEY.transfer_id, KEY.epoch, FIRST)]
    assert not leader.ended(ReportFailed("late"))


@pytest.mark.parametrize("count", range(4))
def test_the_first_failure_decides_and_nothing_after_it_does(count: int) -> None:
    leader = Leader(KEY, PARTS)
    for pair in list(PARTS)[:count]:
        leader.verified(pair, PARTS[pair])
    assert leader.ended(ReportFailed("lost"))
    assert not leader.ended(ReportFailed("digest"))
    assert all(leader.verified(pair, PARTS[pair]) is None for pair in list(PARTS)[count:])
    assert leader.decision == ReportFailed("lost")


def test_a_part_counts_once_and_the_first_token_must_have_come() -> None:
    leader = Leader(KEY, PARTS)
    leader.verified((0, 1), PARTS[0, 1])
    with pytest.raises(LocalProtocolError, match="no open part"):
        leader.verified((0, 1), PARTS[0, 1])
    with pytest.raises(LocalProtocolError, match="rank 0"):
        Leader(KEY, [(0, 1)]).verified((0, 1), PartVerified(None))


def test_parts_have_names_of_their_own() -> None:
    names = {part_key(KEY, pair) for pair in PARTS} | {part_key(AttemptKey("b" * 32, 3), pair) for pair in PARTS}
    assert len(names) == 8
    assert {len(name.transfer_id) for name in names} == {32}
