"""Traces: what is read, what is refused by its line, and what is made up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from disagg.simulate.generate import KINDS, TraceShape, generate_trace
from disagg.simulate.trace import (
    MOONCAKE_BLOCK,
    Trace,
    TracedRequest,
    TraceRefused,
    parse_trace,
    read_trace,
    trace_lines,
)


def test_our_lines_are_read_with_names_as_numbers_and_in_order_of_arrival() -> None:
    lines = [
        '{"block_size": 16}',
        '{"arrival": 2, "prompt": 40, "answer": 9, "hashes": ["a", "b"], "answer_hashes": ["c"]}',
        "",
        '{"arrival": 0.5, "prompt": 33, "answer": 1, "hashes": ["a"]}',
    ]
    trace = parse_trace(lines)
    assert trace == Trace(16, (TracedRequest(0.5, 33, 1, (0,)), TracedRequest(2.0, 40, 9, (0, 1), (2,))))
    assert trace.longest == 49


def test_mooncake_lines_are_read_without_the_block_that_is_not_whole() -> None:
    line = {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": list(range(46, 60))}
    trace = parse_trace([json.dumps(line)])
    (request,) = trace.requests
    assert trace.block_size == MOONCAKE_BLOCK
    assert (request.arrival_s, request.prompt_len, request.answer_len) == (27.482, 6955, 52)
    assert len(request.hashes) == 6955 // 512 == 13


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 2: "),
        ("[1]", "line 2: '[1]', expected a JSON object"),
        ('{"arrival": "soon", "prompt": 1, "answer": 1}', "arrival is 'soon', expected a number"),
        ('{"arrival": 0, "prompt": 0, "answer": 1}', "prompt is 0, expected a whole number from 1 on"),
        ('{"arrival": 0, "prompt": 1.5, "answer": 1}', "prompt is 1.5"),
        ('{"arrival": -1, "prompt": 1, "answer": 1}', "arrival -1.0, expected seconds from 0 on"),
        ('{"arrival": 0, "prompt": 1, "answer": 1, "hashes": "ab"}', "hashes is 'ab', expected a list"),
        ('{"arrival": 0, "prompt": 20, "answer": 1, "hashes": [1, 2]}', "2 hashes, expected at most 1"),
        ('{"arrival": 0, "prompt": 20, "answer": 1, "answer_hashes": [1]}', "1 answer_hashes, expected at most 0"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_with_what_was_expected(line: str, named: str) -> None:
    with pytest.raises(TraceRefused) as refused:
        parse_trace(['{"block_size": 16}', line])
    assert named in str(refused.value)


def test_an_empty_trace_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceRefused, match="no request"):
        parse_trace([])
    with pytest.raises(TraceRefused, match="cannot be read"):
        read_trace(tmp_path / "absent")


@pytest.mark.parametrize("kind", KINDS)
def test_a_made_up_trace_is_the_same_for_a_seed_and_survives_being_written(kind: str, tmp_path: Path) -> None:
    shape = TraceShape(200, 5.0, prompt=100, answer=20)
    trace = generate_trace(kind, shape)
    assert trace == generate_trace(kind, shape)
    assert trace != generate_trace(kind, TraceShape(200, 5.0, prompt=100, answer=20, seed=1))
    assert len(trace.requests) == 200
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(trace_lines(trace)))
    again = read_trace(path)
    assert [(r.prompt_len, r.answer_len) for r in again.requests] == [
        (r.prompt_len, r.answer_len) for r in trace.requests
    ]
    assert _sharing(again) == _sharing(trace)
    assert len(read_trace(path, most=3).requests) == 3


def _sharing(trace: Trace) -> Counter[int]:
    """How many blocks occur so many times."""
    times = Counter(block for request in trace.requests for block in request.hashes)
    return Counter(times.values())


def test_turns_of_a_chat_begin_with_the_turn_before_and_its_answer() -> None:
    trace = generate_trace("chat", TraceShape(300, 5.0, prompt=100, answer=40))
    ends = {(r.hashes + r.answer_hashes)[-1]: r for r in trace.requests}
    later = [r for r in trace.requests if any(block in ends for block in r.hashes[:-1])]
    assert len(later) > 100
    for request in later:
        before = next(ends[block] for block in reversed(request.hashes[:-1]) if block in ends)
        whole = before.hashes + before.answer_hashes
        assert request.hashes[: len(whole)] == whole
        assert request.arrival_s > before.arrival_s


def test_requests_of_a_faster_trace_come_earlier_by_that_factor() -> None:
    trace = generate_trace("bursty", TraceShape(20, 1.0))
    fast = trace.faster(4.0)
    assert [r.arrival_s for r in fast.requests] == pytest.approx([r.arrival_s / 4 for r in trace.requests])
