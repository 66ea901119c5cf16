from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import TestedEngine, greedy, key, prompt_of

from disagg.engine.batch import share_tokens
from disagg.engine.beside import RoomBeside
from disagg.engine.commands import FinishedEvent, Pin, Prefill, Release, Reserve, ReservedEvent, Serve, TokensEvent

torch.set_num_threads(1)


def serve(number, length, max_tokens=2):
    return Serve(key(number), prompt_of(length, number), greedy(max_tokens))


def order_of_first_tokens(engine):
    return [int(e.key.transfer_id, 16) for e in engine.events if isinstance(e, TokensEvent) and e.index == 0]


# --- the token budget -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 500), max_size=20), st.integers(0, 300), st.integers(0, 10))
def test_shares_use_the_budget_and_never_pass_it(remaining, budget, max_chunks):
    shares = share_tokens(remaining, budget, max_chunks)
    assert all(0 <= share <= want for share, want in zip(shares, remaining, strict=True))
    assert sum(shares) <= budget
    assert sum(share > 0 for share in shares) <= max_chunks
    if len(remaining) <= max_chunks:
        assert sum(shares) == min(budget, sum(remaining))


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.integers(1, 300), st.integers(1, 10))
def test_the_oldest_prompt_always_gets_half_the_budget(remaining, budget, max_chunks):
    assert share_tokens(remaining, budget, max_chunks)[0] >= min(remaining[0], (budget + 1) // 2)


def test_the_others_are_served_nearest_to_their_end_first():
    assert share_tokens([100, 30, 5, 8], 32, 8) == [16, 3, 5, 8]
    assert share_tokens([100], 32, 8) == [32]
    assert share_tokens([100, 4], 32, 8) == [28, 4]
    assert share_tokens([2, 100], 32, 8) == [2, 30]


def test_a_short_prompt_answers_before_a_long_one_that_came_first():
    engine = TestedEngine(num_slots=(200, 400), max_num_batched_tokens=16)
    engine.handle(serve(1, 180))
    engine.step()
    engine.handle(serve(2, 6))
    engine.run()
    assert order_of_first_tokens(engine) == [2, 1]


def test_a_long_prompt_is_not_starved_by_short_ones_that_keep_coming():
    engine = TestedEngine(num_slots=(200, 400), max_num_batched_tokens=16, max_num_seqs=4)
    engine.handle(serve(1, 160))
    number = 2
    while not engine.of(key(1), TokensEvent):
        engine.handle(serve(number, 8, 1))
        engine.handle(serve(number + 1, 8, 1))
        engine.step()
        number += 2
        assert number < 70, "the long prompt starves"


def test_answers_get_their_token_in_every_step_of_a_long_prefill():
    engine = TestedEngine(num_slots=(200, 400), max_num_batched_tokens=16, max_num_seqs=4)
    engine.handle(serve(1, 5, 40))
    engine.step()
    engine.handle(serve(2, 150))
    while not engine.of(key(2), TokensEvent):
        before = len(engine.tokens(key(1)))
        engine.step()
        assert len(engine.tokens(key(1))) == before + 1


# --- admission ------------------------------------------------------------------------------------------------


def steps(engine, count):
    for _ in range(count):
        engine.step()


def order_of_starts(engine):
    """Lengths of the prompts in order of their first chunk."""
    return [piece[1] for batch in engine.runner.batches for piece in batch if piece[0] == 0]


def test_equal_requests_start_in_order_of_arrival():
    engine = TestedEngine(num_slots=(40, 30), max_num_batched_tokens=64)
    for number, length in enumerate((40, 41, 42, 43)):
        engine.handle(serve(number, length, 4))
    assert engine.stats().num_waiting == 3
    engine.run()
    assert order_of_starts(engine) == [40, 41, 42, 43]


def test_the_lowest_priority_value_starts_first_and_one_place_in_four_is_the_oldest_s():
    engine = TestedEngine(num_slots=(40, 30), max_num_batched_tokens=64)
    engine.handle(serve(0, 40, 4))
    for number, priority in enumerate((5, 0, -1, 0, -1, -1), start=1):
        engine.handle(Serve(key(number), prompt_of(40 + number, number), greedy(4), priority=priority))
    engine.run()
    assert [length - 40 for length in order_of_starts(engine)] == [0, 3, 5, 1, 6, 2, 4]


def test_a_short_request_starts_beside_a_long_reservation_that_waits_for_room():
    engine = TestedEngine(num_slots=(60, 60), max_num_batched_tokens=64)
    engine.handle(serve(1, 60, 40))
    steps(engine, 3)
    engine.handle(Reserve(key(2), prompt_of(100, 2), greedy(60)))
    for number in (3, 4, 5):
        engine.handle(serve(number, 4, 2))
    steps(engine, 4)
    assert [len(engine.tokens(key(number))) for number in (3, 4, 5)] == [2, 2, 2]
    assert not engine.of(key(2), ReservedEvent)
    assert len(engine.tokens(key(1))) < 40


def serve_flood_beside(engine, big, most_steps=120):
    """Short requests without end beside a long one, from its arrival to its start; how many of them ended by then."""
    number = 10
    for _ in range(most_steps):
        engine.handle(serve(number, 4, 6))
        engine.handle(serve(number + 1, 12, 6))
        engine.step()
        number += 2
        if engine.of(big, ReservedEvent):
            return len(order_of_first_tokens(engine))
    raise AssertionError("the long request starves")


def test_a_long_reservation_is_served_beside_a_flood_of_short_requests_which_go_on_meanwhile():
    engine = TestedEngine(num_slots=(60, 60), max_num_batched_tokens=64)
    engine.handle(serve(1, 60, 40))
    steps(engine, 3)
    engine.handle(Reserve(key(2), prompt_of(100, 2), greedy(60)))
    assert serve_flood_beside(engine, key(2)) > 5


def test_without_room_kept_for_it_the_long_reservation_would_starve(monkeypatch):
    """The control of the one above."""
    monkeypatch.setattr(RoomBeside, "fits", lambda *_: True)
    engine = TestedEngine(num_slots=(60, 60), max_num_batched_tokens=64)
    engine.handle(serve(1, 60, 40))
    steps(engine, 3)
    engine.handle(Reserve(key(2), prompt_of(100, 2), greedy(60)))
    with pytest.raises(AssertionError, match="starves"):
        serve_flood_beside(engine, key(2))


def test_without_passing_the_long_reservation_would_stop_the_short_ones(monkeypatch):
    """The control of the two above: a line in order of arrival."""
    monkeypatch.setattr(RoomBeside, "fits", lambda *_: False)
    engine = TestedEngine(num_slots=(60, 60), max_num_batched_tokens=64)
    engine.handle(serve(1, 60, 40))
    steps(engine, 3)
    engine.handle(Reserve(key(2), prompt_of(100, 2), greedy(60)))
    engine.handle(serve(3, 4, 2))
    steps(engine, 20)
    assert not engine.tokens(key(3))


@pytest.mark.parametrize(("priority", "ended"), [(0, [1, 2]), (1, [2, 1])])
def test_the_least_important_gives_way_first_and_of_equals_the_newest(priority, ended):
    engine = TestedEngine(num_slots=(48, 46), max_num_seqs=4)
    engine.handle(Serve(key(1), prompt_of(20, 1), greedy(80), priority=priority))
    engine.handle(serve(2, 20, 80))
    engine.run()
    assert engine.stats().num_preemptions > 0
    finished = [int(event.key.transfer_id, 16) for event in engine.events if isinstance(event, FinishedEvent)]
    assert finished == ended


def test_max_num_seqs_bounds_what_is_computed_at_once():
    engine = TestedEngine(max_num_seqs=2, max_num_batched_tokens=64)
    engine.serve_all([serve(n, 4, 5) for n in range(6)])
    assert max(len(batch) for batch in engine.runner.batches) == 2
    assert sorted(order_of_first_tokens(engine)) == list(range(6))


def test_held_prompts_take_no_seat():
    engine = TestedEngine(max_num_seqs=1, max_num_batched_tokens=64)
    for number in range(3):
        engine.handle(Prefill(key(number), prompt_of(4, number), greedy(4)))
        engine.handle(Pin(key(number)))
    engine.run()
    assert engine.stats().num_held == 3


def test_a_reservation_takes_a_seat_until_it_is_released():
    engine = TestedEngine(max_num_seqs=1, max_num_batched_tokens=64)
    engine.handle(Reserve(key(1), prompt_of(4, 1), greedy(4)))
    engine.handle(serve(2, 4))
    assert not engine.has_work
    engine.handle(Release(key(1)))
    engine.run()
    assert len(engine.tokens(key(2))) == 2


def test_a_promise_shrinks_once_the_prompt_is_computed():
    """While 1 computes its prompt in one chunk nobody fits beside it; as an answer it needs its windows only."""
    engine = TestedEngine(num_slots=(40, 46), max_num_batched_tokens=64)
    engine.handle(serve(1, 60, 8))
    engine.handle(serve(2, 40, 2))
    assert engine.stats().num_waiting == 1
    engine.step()
    assert engine.stats().num_waiting == 0
    engine.run()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=10))
def test_promises_are_never_exceeded_and_everything_ends(requests):
    engine = TestedEngine(num_slots=(30, 44), max_num_batched_tokens=12)
    engine.serve_all([serve(n, length, max_tokens) for n, (length, max_tokens) in enumerate(requests)])
    stats = engine.stats()
    assert (stats.live_keys, stats.num_used_slots) == ((), 0)
    assert all(pool.peak_used <= pool.num_slots - 2 for pool in stats.pools)


# --- the cost of a step ---------------------------------------------------------------------------------------


def test_an_answers_tables_change_once_a_block_and_the_lists_of_the_living_stay(monkeypatch):
    engine = TestedEngine(max_num_batched_tokens=64)
    sized = []
    resize = engine.cache.resize
    monkeypatch.setattr(
        engine.cache, "resize", lambda sequence, **cursors: sized.append(cursors) or resize(sequence, **cursors)
    )
    engine.handle(serve(1, 8, 42))
    engine.step()
    assert len(sized) == 2  # the prompt's one chunk, before and after
    answers = engine._scheduler.answers
    for _ in range(40):
        engine.step()
        assert engine._scheduler.answers is answers
    assert [cursors["history"] for cursors in sized[2:]] == list(range(8, 48, 4))
