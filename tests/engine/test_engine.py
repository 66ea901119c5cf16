from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import LAYOUT, TestedEngine, greedy, key, prompt_of
from support.model.fake_runner import reference_tokens
from support.oracles.cache_oracle import tiny_layout

from disagg.cache.table import HOLE
from disagg.engine import sampler
from disagg.engine.commands import (
    Decode,
    FailedEvent,
    FinishedEvent,
    Pin,
    Prefill,
    Release,
    Reserve,
    Serve,
    TokensEvent,
)
from disagg.engine.engine import EngineConfig
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.wire.messages.values import FirstToken, Sampling, SamplingState

torch.set_num_threads(1)


def serve(number, length, sampling):
    return Serve(key(number), prompt_of(length, number), sampling)


def test_an_answer_is_what_a_model_without_blocks_gives():
    engine = TestedEngine()
    engine.serve_all([serve(1, 21, greedy(30))])
    assert engine.tokens(key(1)) == reference_tokens(LAYOUT, prompt_of(21, 1), greedy(30))
    assert engine.ending(key(1)) == FinishedEvent(key(1), 30, "length")
    assert engine.num_used == 0


REQUESTS = st.lists(st.tuples(st.integers(1, 45), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=25)
@given(REQUESTS, st.integers(4, 40), st.integers(1, 4))
def test_batched_answers_equal_those_computed_alone(requests, batched_tokens, max_num_seqs):
    engine = TestedEngine(max_num_seqs=max_num_seqs, max_num_batched_tokens=batched_tokens)
    commands = []
    for number, (length, max_tokens, kind) in enumerate(requests):
        sampling = greedy(max_tokens) if kind == 0 else Sampling(max_tokens=max_tokens, seed=kind)
        commands.append(serve(number, length, sampling))
    engine.serve_all(commands)
    for command in commands:
        assert engine.tokens(command.key) == reference_tokens(LAYOUT, command.prompt, command.sampling)
    assert all(sum(count for _, count, _ in batch) <= batched_tokens for batch in engine.runner.batches)
    assert engine.num_used == 0
    assert not engine.stats().live_keys


@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 8, 12, 13, 24, 25])
def test_every_prompt_length_around_blocks_and_windows_is_exact(length):
    engine = TestedEngine(max_num_batched_tokens=9)
    engine.serve_all([serve(1, length, greedy(14))])
    assert engine.tokens(key(1)) == reference_tokens(LAYOUT, prompt_of(length, 1), greedy(14))


def test_a_block_that_was_overwritten_shows_in_the_tokens():
    """Negative control of the fake runner: what it computes does depend on the blocks."""
    engine = TestedEngine()
    engine.handle(serve(1, 20, greedy(20)))
    for _ in range(4):
        engine.step()
    table = engine._scheduler.live[key(1)].cached.tables[1]
    engine.cache.group_view(1)[int(table[table != HOLE][0]), 0, 0, 0, 0] += 1
    engine.run()
    assert engine.tokens(key(1)) != reference_tokens(LAYOUT, prompt_of(20, 1), greedy(20))


def test_a_model_without_windows_or_with_one_pool_runs_too():
    for layout, room in ((tiny_layout(None, None), (40,)), (tiny_layout(5, None), (60,))):
        engine = TestedEngine(layout=layout, num_slots=room)
        engine.serve_all([serve(n, 10 + n, greedy(9)) for n in range(4)])
        for n in range(4):
            assert engine.tokens(key(n)) == reference_tokens(layout, prompt_of(10 + n, n), greedy(9))


# --- ends -----------------------------------------------------------------------------------------------------


def answer(length=9, max_tokens=12):
    return reference_tokens(LAYOUT, prompt_of(length, 1), greedy(max_tokens))


def test_an_eos_token_stops_the_answer_and_is_its_last_token():
    tokens = answer()
    engine = TestedEngine()
    engine.serve_all([serve(1, 9, greedy(12, eos_token_ids=(tokens[4],)))])
    end = tokens.index(tokens[4]) + 1
    assert engine.tokens(key(1)) == tokens[:end]
    assert engine.ending(key(1)) == FinishedEvent(key(1), end, "stop", tokens[4])


def test_a_stop_token_stops_even_when_eos_is_ignored():
    tokens = answer()
    engine = TestedEngine()
    sampling = greedy(12, eos_token_ids=(tokens[1],), ignore_eos=True, stop_token_ids=(tokens[5],))
    engine.serve_all([serve(1, 9, sampling)])
    assert engine.tokens(key(1)) == reference_tokens(LAYOUT, prompt_of(9, 1), sampling)
    assert engine.ending(key(1)).stop_token_id == tokens[5]


def test_nothing_stops_before_min_tokens():
    tokens = answer()
    engine = TestedEngine()
    sampling = greedy(12, eos_token_ids=(tokens[1],), min_tokens=6)
    engine.serve_all([serve(1, 9, sampling)])
    assert engine.tokens(key(1)) == reference_tokens(LAYOUT, prompt_of(9, 1), sampling)
    assert len(engine.tokens(key(1))) >= 6


def test_one_token_needs_no_decode_step():
    engine = TestedEngine(max_num_batched_tokens=32)
    engine.serve_all([serve(1, 20, greedy(1))])
    assert engine.tokens(key(1)) == answer(20, 1)
    assert len(engine.runner.batches) == 1


def test_blocks_are_free_before_the_end_is_told():
    engine = TestedEngine()
    engine.handle(serve(1, 9, greedy(3)))
    while not any(isinstance(event, FinishedEvent) for event in engine.step()):
        assert engine.num_used > 0
    assert engine.num_used == 0


def test_logprobs_come_with_their_tokens():
    engine = TestedEngine()
    engine.serve_all([serve(1, 9, greedy(3, num_logprobs=2)), serve(2, 9, greedy(3))])
    assert [len(event.logprobs) for event in engine.of(key(1), TokensEvent)] == [1, 1, 1]
    assert [len(event.logprobs) for event in engine.of(key(2), TokensEvent)] == [0, 0, 0]


# --- refusals and failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (Serve(key(1), prompt_of(190), greedy(11)), "190 prompt tokens and max_tokens 11 make 201"),
        (Prefill(key(1), prompt_of(190), greedy(11)), "`--max-model-len` is 200"),
        (Reserve(key(1), prompt_of(190), greedy(11)), "`--max-model-len` is 200"),
        (Serve(key(1), (), greedy(1)), "the prompt is empty"),
        (Serve(key(1), (3, 40), greedy(1)), "prompt token id 40 is not in the vocabulary of 40"),
        (Serve(key(1), (3, -1), greedy(1)), "prompt token id -1"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_its_numbers(command, words):
    engine = TestedEngine()
    (event,) = engine.handle(command)
    assert isinstance(event, FailedEvent)
    assert event.status == 400
    assert words in event.message
    assert not engine.stats().live_keys


def test_a_request_larger_than_an_empty_pool_is_refused_with_its_numbers():
    engine = TestedEngine(num_slots=(60, 20))
    (event,) = engine.handle(serve(1, 60, greedy(20)))
    assert (event.status, event.message) == (
        400,
        "60 prompt tokens and max_tokens 20 need 29 blocks of a KV pool of 18; "
        "shorten the prompt, lower max_tokens or raise `--kv-cache-memory`",
    )


@pytest.mark.parametrize(
    ("role", "command"), [("prefill", Reserve(key(1), (1,), greedy(1))), ("decode", Prefill(key(1), (1,), greedy(1)))]
)
def test_a_command_against_the_role_is_refused(role, command):
    (event,) = TestedEngine(role=role).handle(command)
    assert event.status == 400
    assert role in event.message


@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_logits_that_are_not_finite_end_their_own_request_only(when):
    clean = reference_tokens(LAYOUT, prompt_of(12, 2), greedy(8))
    poison = next(t for t in range(40) if t not in prompt_of(12, 2) and t not in clean and t not in (1, 2, 3))
    bad = (1, 2, poison, 3) if when == "prompt" else (1, 2, 3)
    bias = ((poison, 1e9),) if when == "answer" else ()
    engine = TestedEngine(poison=poison)
    engine.serve_all([Serve(key(1), bad, greedy(5, logit_bias=bias)), serve(2, 12, greedy(8))])
    assert engine.ending(key(1)) == FailedEvent(key(1), 500, "non-finite logits after position 3")
    assert engine.tokens(key(2)) == clean
    assert engine.num_used == 0


def test_blocks_that_may_not_be_finite_are_zeroed_when_they_are_freed():
    engine = TestedEngine(poison=7)
    engine.serve_all([Serve(key(1), (1, 2, 7, 3), greedy(5))])
    assert isinstance(engine.ending(key(1)), FailedEvent)
    assert not any(engine.cache.group_view(group).any() for group in range(3))


@pytest.mark.parametrize("command", [Serve, Prefill])
def test_a_row_that_cannot_be_sampled_ends_its_own_request_only(command, monkeypatch):
    clean = {
        number: reference_tokens(LAYOUT, prompt_of(12, number), Sampling(max_tokens=8, seed=3)) for number in (1, 3)
    }
    plan_row = sampler.plan_row

    def faulty(given, vocab_size):
        if given.sampling.seed == 7:
            raise ZeroDivisionError("of this row")
        return plan_row(given, vocab_size)

    monkeypatch.setattr(sampler, "plan_row", faulty)
    engine = TestedEngine()
    wrong = command(key(2), prompt_of(12, 2), Sampling(max_tokens=8, seed=7))
    others = [serve(number, 12, Sampling(max_tokens=8, seed=3)) for number in (1, 3)]
    engine.serve_all([others[0], wrong, others[1]])
    why = "sampling after position 11 failed: ZeroDivisionError: of this row"
    assert engine.ending(key(2)) == FailedEvent(key(2), 500, why)
    assert {number: engine.tokens(key(number)) for number in (1, 3)} == clean
    assert engine.num_used == 0


# --- commands that come twice or late -------------------------------------------------------------------------


def test_commands_for_unknown_keys_and_repeats_change_nothing():
    engine = TestedEngine()
    verified = Verified(key(9).transfer_id, 1, FirstToken(1, None, SamplingState(0)))
    for command in (Release(key(9)), Pin(key(9)), Decode(key(9), verified)):
        assert engine.handle(command) == []
    engine.handle(serve(1, 9, greedy(3)))
    assert engine.handle(serve(1, 30, greedy(3))) == []
    assert engine.handle(Pin(key(1))) == []
    engine.run()
    assert engine.tokens(key(1)) == answer(9, 3)


def test_a_step_without_work_does_nothing():
    engine = TestedEngine()
    assert not engine.has_work
    assert engine.step() == []
    assert engine.stats().steps == 0


def test_stats_count_what_was_done_and_is_held():
    engine = TestedEngine(max_num_seqs=1, max_num_batched_tokens=10)
    engine.handle(serve(1, 12, greedy(3)))
    engine.handle(serve(2, 5, greedy(2)))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.prompt_tokens_computed) == (1, 1, 10)
    assert stats.live_keys == (key(1), key(2))
    assert stats.num_used_slots == sum(pool.num_used for pool in engine.cache.pools) > 0
    engine.run()
    stats = engine.stats()
    assert (stats.prompt_tokens_computed, stats.tokens_generated, stats.answer_tokens) == (17, 5, 3)
    assert stats.num_used_slots == 0
    assert all(pool.peak_used > 0 for pool in stats.pools)
    assert stats.steps == len(engine.runner.batches)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"role": "context"}, "role: `context`"),
        ({"max_num_seqs": 0}, "`--max-num-seqs`: 0"),
        ({"max_num_batched_tokens": 3}, r"`--max-num-batched-tokens`: 3, expected at least `--max-num-seqs` \(4\)"),
        ({"max_model_len": 1}, "`--max-model-len`: 1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(wrong, words):
    right = {"role": "both", "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}
    with pytest.raises(ValueError, match=words):
        EngineConfig(**(right | wrong))
