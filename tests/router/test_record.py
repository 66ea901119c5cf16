"""What is remembered of requests: bounded, by either id, with a timeline that sums to the time to first token."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cluster.router_harness import make_request, target

from disagg.router.choose import Placement
from disagg.router.record import MAX_REPORTS, AttemptRecord, RecordStore, RequestRecord
from disagg.transceiver.wire.messages.router import TransferReport
from disagg.transceiver.wire.messages.values import StageTimes


def make_record(number: int = 0, request_id: str = "req") -> RequestRecord:
    return RequestRecord(make_request(request_id=request_id), f"transfer-{number}", 0.0)


def attempted(*started_at: float) -> RequestRecord:
    record = make_record()
    for epoch, at in enumerate(started_at, start=1):
        record.attempts.append(AttemptRecord(epoch, "transfer", Placement(target("d0"), target("p0")), at))
    return record


def report(worker_id: str, epoch: int = 1, **stages: float) -> TransferReport:
    return TransferReport("transfer-0", epoch, worker_id, "shm", (), StageTimes(tuple(stages.items())))


def test_only_the_last_records_are_kept() -> None:
    store = RecordStore(max_records=3)
    for number in range(10):
        store.add(make_record(number, f"req-{number % 4}"))
        store.check_invariants()
    assert len(store) == 3
    assert store.get("req-2") is None
    newest = store.get("req-1")
    assert newest is not None
    assert newest.transfer_id == "transfer-9"
    assert store.get("transfer-9") is newest


def test_a_request_id_used_twice_finds_the_newest_even_after_the_older_is_forgotten() -> None:
    store = RecordStore(max_records=2)
    for number in range(3):
        store.add(make_record(number, "same"))
    found = store.get("same")
    assert found is not None
    assert found.transfer_id == "transfer-2"
    store.check_invariants()


def test_time_lost_to_failed_attempts_is_shown_as_such() -> None:
    record = attempted(0.0, 3.0)
    record.note("p0", report("p0", epoch=2, prefill=0.5))
    record.emitted(1, 4.0)
    timeline = record.timeline()
    assert timeline is not None
    assert timeline["failed_attempts"] == 3.0
    assert timeline["prefill"] == 0.5
    assert timeline["first_token"] == 0.5


def test_a_prompt_computed_by_the_server_itself_is_its_own_prefill_stage() -> None:
    record = make_record()
    record.attempts.append(AttemptRecord(1, "serve", Placement(target("b0")), 0.0))
    record.note("b0", report("b0", prefill=0.25))
    record.emitted(1, 1.0)
    timeline = record.timeline()
    assert timeline is not None
    assert (timeline["prefill"], timeline["first_token"]) == (0.25, 0.75)
    assert record.describe()["transfer"] is None


@given(
    server=st.dictionaries(st.sampled_from(["queue", "transfer_wait", "wire", "verify", "else"]), st.floats()),
    source=st.dictionaries(st.sampled_from(["queue", "prefill"]), st.floats()),
    started_at=st.floats(0, 5),
    first_token_after=st.floats(0, 5),
)
def test_whatever_workers_report_the_timeline_sums_to_ttft_and_is_json(
    server: dict[str, float], source: dict[str, float], started_at: float, first_token_after: float
) -> None:
    record = attempted(started_at)
    record.note("d0", report("d0", **server))
    record.note("p0", report("p0", **source))
    record.emitted(1, started_at + first_token_after)
    timeline = record.timeline()
    assert timeline is not None
    assert all(0 <= seconds < math.inf for seconds in timeline.values())
    assert sum(timeline.values()) == pytest.approx(record.ttft_s)
    json.dumps(record.describe(), allow_nan=False)


def test_reports_of_strangers_and_of_other_epochs_are_not_kept_and_repeats_are_bounded() -> None:
    record = attempted(0.0)
    record.note("stranger", report("d0"))
    record.note("d0", report("d0", epoch=9))
    assert record.attempts[0].reports == []
    for _ in range(10):
        record.note("d0", report("d0"))
    assert len(record.attempts[0].reports) == MAX_REPORTS


def test_attempts_that_go_on_after_the_first_token_are_no_part_of_the_time_to_it() -> None:
    record = attempted(1.0, 3.0, 20.0)
    record.attempts[2].num_before = 4
    record.emitted(1, 5.0)
    timeline = record.timeline()
    assert timeline is not None
    assert (timeline["waiting"], timeline["failed_attempts"], sum(timeline.values())) == (1.0, 2.0, 5.0)
    assert record.num_continuations == 1
    described = record.describe()
    assert [attempt["tokens_before"] for attempt in described["attempts"]] == [0, 0, 4]


def test_the_seed_of_each_answer_is_kept() -> None:
    record = RequestRecord(make_request(num_choices=3), "t", 0.0)
    assert record.describe()["seeds"] == [7, 8, 9]
