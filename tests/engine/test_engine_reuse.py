"""Prefix reuse in the engine: the fake runner reads tokens back from the cache, so a block reused wrongly shows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens
from support.oracles.cache_oracle import needed_blocks

from disagg.cache.identity import blocks_of
from disagg.engine import scheduler
from disagg.engine.commands import (
    Decode,
    DropSoft,
    FailedEvent,
    Pin,
    PinnedEvent,
    Prefill,
    Release,
    Reserve,
    Serve,
    TokensEvent,
    UnitsFinalEvent,
    Unregister,
)
from disagg.transceiver.wire.messages.values import Sampling, UnitName

torch.set_num_threads(1)
T = LAYOUT.block_size


def engine(**limits):
    return TestedEngine(hasher=HASHER, **limits)


def pair(**limits):
    return engine(role="prefill", **limits), engine(role="decode", **limits)


def computed_tokens(source, command):
    """How many prompt tokens this command made the engine compute."""
    before = source.stats().prompt_tokens_computed
    source.serve_all([command])
    return source.stats().prompt_tokens_computed - before


def num_cached(tested, wanted):
    return tested.of(wanted, TokensEvent)[0].num_cached_tokens


def hand_over(source, target, number, prompt, sampling):
    """One request through both engines; ordinals received per group."""
    target.handle(Reserve(key(number), prompt, sampling))
    source.handle(Prefill(key(number), prompt, sampling))
    source.handle(Pin(key(number)))
    source.run()
    verified = transfer(source, target, key(number), len(prompt))
    source.handle(Release(key(number)))
    received = [[ordinal for ordinal, _ in group] for group in target.reserved(key(number)).slots]
    target.handle(Decode(key(number), verified))
    target.run()
    assert target.tokens(key(number)) == reference_tokens(LAYOUT, prompt, sampling)
    return received


def missing(prompt_len, num_held):
    return [
        [o for o in needed_blocks(prompt_len, g.window, g.num_sink_tokens, T) if o >= num_held] for g in LAYOUT.groups
    ]


# --- served here ----------------------------------------------------------------------------------------------


def test_an_equal_prompt_computes_its_last_block_only_and_answers_the_same():
    tested = engine()
    assert computed_tokens(tested, Serve(key(1), prompt_of(24), greedy(5))) == 24
    assert computed_tokens(tested, Serve(key(2), prompt_of(24), greedy(5))) == 4
    assert tested.tokens(key(1)) == tested.tokens(key(2)) == reference_tokens(LAYOUT, prompt_of(24), greedy(5))
    assert (num_cached(tested, key(1)), num_cached(tested, key(2))) == (0, 20)
    assert tested.num_used == 0


def test_only_the_first_token_says_what_was_cached():
    tested = engine()
    tested.serve_all([Serve(key(n), prompt_of(24), greedy(3)) for n in (1,)])
    tested.serve_all([Serve(key(2), prompt_of(24), greedy(3))])
    assert [event.num_cached_tokens for event in tested.of(key(2), TokensEvent)] == [20, 0, 0]


@pytest.mark.parametrize("max_tokens", [1, 4, 5, 6, 9])
def test_what_generation_filled_is_reused_its_last_block_included(max_tokens):
    tested = engine()
    prompt = prompt_of(22)
    tested.serve_all([Serve(key(1), prompt, greedy(max_tokens))])
    stored = 22 + max_tokens - 1  # the last token's KV is never computed
    more = (*prompt, *tested.tokens(key(1)), 1, 2, 3, 4)
    assert computed_tokens(tested, Serve(key(2), more, greedy(3))) == len(more) - stored // T * T
    assert tested.tokens(key(2)) == reference_tokens(LAYOUT, more, greedy(3))


PROMPTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 40), st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=9
)


@settings(deadline=None, max_examples=40)
@given(PROMPTS, st.integers(4, 40), st.sampled_from([(60, 120), (24, 36)]))
def test_requests_with_common_beginnings_are_answered_as_if_alone(requests, batched_tokens, room):
    tested = engine(num_slots=room, max_num_seqs=4, max_num_batched_tokens=batched_tokens)
    commands = []
    for number, (stem, cut, tail, max_tokens) in enumerate(requests):
        prompt = prompt_of(cut, stem) + (tail,) * tail
        command = Serve(key(number), prompt, Sampling(max_tokens=max_tokens, seed=tail, cache_salt="x" * (stem == 2)))
        commands.append(command)
        tested.handle(command)
        tested.step()
    tested.run()
    for command in commands:
        assert tested.tokens(command.key) == reference_tokens(LAYOUT, command.prompt, command.sampling)
    assert tested.num_used == 0


def test_a_block_reused_under_a_wrong_name_shows_in_the_tokens():
    """Negative control: the tree says that another prompt's blocks are this one's."""
    tested = engine()
    tested.serve_all([Serve(key(1), prompt_of(24, 1), greedy(5))])
    tree = tested.cache.prefixes.tree
    wrong = tree.match("", blocks_of(prompt_of(24, 1), T))
    tree.match = lambda salt, blocks, precision: wrong[: len(list(blocks))]
    tested.serve_all([Serve(key(2), prompt_of(24, 2), greedy(5))])
    assert tested.tokens(key(2)) != reference_tokens(LAYOUT, prompt_of(24, 2), greedy(5))


def test_salts_separate():
    tested = engine()
    salted = [Sampling(max_tokens=2, temperature=0.0, cache_salt=salt) for salt in ("mine", "yours", "mine")]
    counts = [computed_tokens(tested, Serve(key(n), prompt_of(24), s)) for n, s in enumerate(salted)]
    assert counts == [24, 24, 4]


def test_without_a_hasher_everything_is_computed():
    tested = TestedEngine()
    counts = [computed_tokens(tested, Serve(key(n), prompt_of(24), greedy(2))) for n in range(2)]
    assert counts == [24, 24]
    assert tested.stats().reuse == ()


def test_a_prompt_whose_logits_are_not_finite_leaves_nothing_to_reuse():
    tested = engine(poison=7)
    tested.handle(Serve(key(1), (1, 2, 3, 4, 5, 6, 8, 9, 7, 1), greedy(3)))
    tested.run()
    assert isinstance(tested.ending(key(1)), FailedEvent)
    assert computed_tokens(tested, Serve(key(2), (1, 2, 3, 4, 5, 6, 8, 9, 9, 9), greedy(3))) == 10
    assert tested.num_used == 0


# --- handed over ----------------------------------------------------------------------------------------------


def test_three_turns_compute_and_receive_only_what_is_new():
    source, target = pair()
    prompt, num_stored, last_len = prompt_of(26, 1), 0, 0
    for turn in range(3):
        before = source.stats().prompt_tokens_computed
        received = hand_over(source, target, turn, prompt, greedy(7))
        assert received == missing(len(prompt), num_stored // T)
        assert source.stats().prompt_tokens_computed - before == len(prompt) - last_len // T * T
        assert num_cached(target, key(turn)) == last_len // T * T
        last_len, num_stored = len(prompt), len(prompt) + 6
        prompt = prompt + tuple(target.tokens(key(turn))) + prompt_of(5, turn)
    assert source.num_used == target.num_used == 0


def test_a_prompt_that_is_held_whole_receives_nothing():
    source, target = pair()
    hand_over(source, target, 1, prompt_of(24), greedy(4))
    assert hand_over(source, target, 2, prompt_of(24), greedy(4)) == [[], [], []]


def begin_received(monkeypatch, *, at_once, max_tokens):
    """A decode worker that registers so many blocks at once, at the first token of a received prompt of 40 tokens."""
    monkeypatch.setattr(scheduler, "REGISTERED_AT_ONCE", at_once)
    source, target = pair(max_num_batched_tokens=64)
    target.handle(Reserve(key(1), prompt_of(40), greedy(max_tokens)))
    source.handle(Prefill(key(1), prompt_of(40), greedy(max_tokens)))
    source.run()
    target.handle(Decode(key(1), transfer(source, target, key(1), 40)))
    return target


def test_a_long_received_prompt_is_registered_over_several_steps(monkeypatch):
    target = begin_received(monkeypatch, at_once=3, max_tokens=9)
    cached = target.cache._sequences[key(1)]
    committed = [cached.committed // T]
    while committed[-1] < 10:
        target.step()
        committed.append(cached.committed // T)
    assert committed == [3, 6, 9, 10]
    target.run()
    answer = target.tokens(key(1))
    assert answer == reference_tokens(LAYOUT, prompt_of(40), greedy(9))
    assert computed_tokens(target, Serve(key(2), (*prompt_of(40), *answer, 1, 2), greedy(2))) == 51 - 48


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_an_answer_that_ends_before_registers_the_rest_of_its_prompt(monkeypatch, is_cancelled):
    target = begin_received(monkeypatch, at_once=3, max_tokens=9 if is_cancelled else 2)
    target.step()
    if is_cancelled:
        target.handle(Release(key(1)))
    assert not target.stats().live_keys
    assert computed_tokens(target, Serve(key(2), prompt_of(40) + prompt_of(9, 3), greedy(2))) == 9


def test_a_windowed_miss_with_a_full_hit_receives_only_the_windowed_blocks():
    source, target = pair()
    hand_over(source, target, 1, prompt_of(24), greedy(4))
    lone = target.cache.pools[target.cache.layout.pool_of_group[0]]
    assert lone is not target.cache.pools[target.cache.layout.pool_of_group[1]]
    lone.free(lone.allocate(lone.num_free))
    needed = needed_blocks(24, 6, 3, T)
    assert hand_over(source, target, 2, prompt_of(24), greedy(4)) == [needed, [], []]


def test_reused_blocks_are_final_at_once():
    source = engine(role="prefill")
    source.serve_all([Prefill(key(1), prompt_of(30), greedy(4))])
    source.handle(Release(key(1)))
    source.handle(Prefill(key(2), prompt_of(30), greedy(4)))
    (event,) = source.of(key(2), UnitsFinalEvent)
    assert {unit.ordinal for unit in event.units if unit.group == 1} == set(range(7))
    source.run()
    units = [(unit.group, unit.ordinal) for unit in source.final_units(key(2), 0)]
    assert sorted(units) == [(g, o) for g, group in enumerate(missing(30, 0)) for o in group]


def test_a_dropped_prompt_finds_its_own_blocks_again_and_does_not_call_them_cached():
    source = engine(role="prefill")
    source.serve_all([Prefill(key(1), prompt_of(30), greedy(4))])
    source.handle(DropSoft(key(1)))
    assert source.num_used == 0
    assert computed_tokens(source, Pin(key(1))) == 2
    assert source.of(key(1), PinnedEvent) == [PinnedEvent(key(1), 1)]
    assert source.computed(key(1)).first_token.num_cached_tokens == 0


def test_blocks_of_a_transfer_that_failed_are_not_reused():
    _, target = pair()
    target.handle(Reserve(key(1), prompt_of(24), greedy(4)))
    target.handle(Release(key(1)))
    assert target.stats().pools[0].num_cached == target.stats().pools[1].num_cached == 0
    assert computed_tokens(target, Serve(key(2), prompt_of(24), greedy(2))) == 24


def test_blocks_that_failed_verification_are_computed_again():
    source = engine(role="prefill")
    source.serve_all([Prefill(key(1), prompt_of(30), greedy(4))])
    source.handle(Unregister(key(1), (UnitName(0, 3), UnitName(1, 2))))
    source.handle(Unregister(key(9), (UnitName(0, 3),)))  # delivered late: nothing to do
    source.handle(Release(key(1)))
    assert computed_tokens(source, Prefill(key(2), prompt_of(30), greedy(4))) == 30 - 2 * T


def counts(tested):
    return [(count.num_queried, count.num_hit) for count in tested.stats().reuse]


def test_reuse_is_counted_per_group():
    source, target = pair()
    for number in (1, 2):
        hand_over(source, target, number, prompt_of(24), greedy(4))
    assert counts(source) == [(2 * len(group), len(group)) for group in missing(20, 0)]  # where the last block begins
    assert counts(target) == [(2 * len(group), len(group)) for group in missing(24, 0)]


def test_the_group_that_misses_shows_in_its_own_hit_rate():
    tested = engine()
    tested.serve_all([Serve(key(1), prompt_of(24), greedy(2))])
    lone = tested.cache.pools[tested.cache.layout.pool_of_group[0]]
    lone.free(lone.allocate(lone.num_free))
    assert computed_tokens(tested, Serve(key(2), prompt_of(24), greedy(2))) == 24
    assert counts(tested) == [(2 * len(group), hit) for group, hit in zip(missing(20, 0), [0, 5, 4], strict=True)]


def test_a_request_is_counted_once_however_often_it_begins():
    source = engine(role="prefill", num_slots=(60, 120))
    source.serve_all([Prefill(key(1), prompt_of(24), greedy(2))])
    first = counts(source)
    for command in (DropSoft(key(1)), Pin(key(1))):
        source.serve_all([command])
    assert source.computed(key(1)) is not None
    assert counts(source) == first == [(len(group), 0) for group in missing(20, 0)]
