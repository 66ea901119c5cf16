from __future__ import annotations

from dataclasses import replace

import pytest
from support.links.sample_messages import HEADER, SAMPLES

from disagg.transceiver.protocol.tombstones import EXPIRE_S, Tombstones, answer_unknown
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages.peer import (
    Ack,
    Cancel,
    Cancelled,
    Closed,
    Done,
    Failed,
    Fetch,
    Header,
    Received,
    Slice,
    TransferMessage,
)

KEY = (HEADER.transfer_id, HEADER.epoch)
OF = {type(sample): sample for sample in SAMPLES}
FORTH = HEADER  # from "prefill" to "decode"
BACK = Header("decode", "prefill", HEADER.transfer_id, HEADER.epoch, 77)


def ask(last_word: TransferMessage | None, kind: type, header: Header) -> TransferMessage | None:
    stones = Tombstones()
    stones.add(KEY, header.source, last_word, 100.0)
    return stones.answer(replace(OF[kind], header=header), 77)


@pytest.mark.parametrize("last_word", [Failed(FORTH, "deadline"), Cancelled(FORTH, "finished"), Closed(FORTH)])
def test_a_late_fetch_hears_the_senders_last_word(last_word: TransferMessage) -> None:
    answer = ask(last_word, Fetch, BACK)
    assert answer == replace(last_word, header=Header("prefill", "decode", *KEY, 77))


@pytest.mark.parametrize("last_word", [Failed(FORTH, "deadline"), Cancelled(FORTH, "cancelled")])
def test_a_receiver_that_waits_for_bytes_hears_why_they_will_not_come(last_word: TransferMessage) -> None:
    assert ask(last_word, Received, BACK) == replace(last_word, header=Header("prefill", "decode", *KEY, 77))


@pytest.mark.parametrize("kind", [Ack, Cancel, Received])
@pytest.mark.parametrize("last_word", [Closed(FORTH), None])
def test_whoever_asks_hears_closed(last_word: TransferMessage | None, kind: type) -> None:
    assert ask(last_word, kind, BACK) == Closed(Header("prefill", "decode", *KEY, 77))


@pytest.mark.parametrize("kind", [Done, Failed, Cancelled])
@pytest.mark.parametrize("last_word", [Ack(BACK), Cancel(BACK, "digest")])
def test_a_late_terminal_word_hears_the_receivers_answer_again(last_word: TransferMessage, kind: type) -> None:
    assert ask(last_word, kind, FORTH) == replace(last_word, header=BACK)


@pytest.mark.parametrize(
    ("last_word", "kind"), [(Ack(BACK), Slice), (None, Fetch), (Ack(BACK), Fetch), (OF[Fetch], Done)]
)
def test_other_late_messages_want_no_answer(last_word: TransferMessage | None, kind: type) -> None:
    assert ask(last_word, kind, FORTH) is None


def test_a_stranger_gets_no_answer() -> None:
    stones = Tombstones()
    stones.add(KEY, "decode", Closed(FORTH), 100.0)
    assert stones.answer(Ack(replace(BACK, source="other")), 1) is None
    assert stones.answer(Ack(replace(BACK, epoch=9)), 1) is None


def test_time_and_number_bound_the_store() -> None:
    stones = Tombstones(capacity=2)
    for epoch in range(3):
        stones.add(("t", epoch), "peer", None, until=10.0 * epoch)
    assert [stones.knows(("t", epoch)) for epoch in range(3)] == [False, True, True]
    stones.expire(10.0)
    assert len(stones) == 1
    assert stones.knows(("t", 2))


def test_all_are_looked_through_once_a_second_however_often_time_is_told() -> None:
    stones = Tombstones()
    stones.expire(10.0)
    stones.add(("t", 1), "peer", None, until=10.2)
    stones.expire(10.5)
    assert stones.knows(("t", 1))
    stones.expire(10.0 + EXPIRE_S)
    assert not stones.knows(("t", 1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Ack, Closed),
        (Cancel, Closed),
        (Fetch, Failed),
        (Received, Closed),
        (Done, Cancel),
        (Failed, Cancel),
        (Cancelled, Cancel),
        (Slice, None),
        (Closed, None),
    ],
)
def test_unknown_transfers_are_answered_so_that_the_peer_can_stop(kind: type, expected: type | None) -> None:
    answer = answer_unknown(replace(OF[kind], header=BACK), "prefill", 77)
    if expected is None:
        assert answer is None
    else:
        assert type(answer) is expected
        assert answer.header == Header("prefill", "decode", *KEY, 77)
        assert getattr(answer, "reason", reasons.UNKNOWN) == reasons.UNKNOWN
