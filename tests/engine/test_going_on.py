"""Answers begun on an engine that is gone: others go on with their tokens, as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_tokens

from disagg.engine.commands import (
    AttemptKey,
    Decode,
    FailedEvent,
    FinishedEvent,
    Pin,
    Prefill,
    PromptComputedEvent,
    Release,
    Reserve,
    Serve,
    TokensEvent,
)
from disagg.engine.engine import Engine
from disagg.transceiver.wire.messages.router import YOUNG_TOKENS
from disagg.transceiver.wire.messages.values import Ending, Sampling

MIXED = Sampling(
    max_tokens=20,
    seed=11,
    temperature=1.2,
    top_p=0.95,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    min_tokens=9,
    stop_token_ids=tuple(range(0, 40, 9)),
)
"""All that depends on the tokens before."""


def whole(length: int, sampling: Sampling) -> list[int]:
    return reference_tokens(LAYOUT, prompt_of(length, 1), sampling)


FIRST = key(1)


def said(engine: TestedEngine, first: int, wanted: AttemptKey = FIRST) -> list[int]:
    """Tokens of an answer that went on at index `first`, checked to be numbered from there."""
    tokens: list[int] = []
    for event in engine.of(wanted, TokensEvent):
        assert isinstance(event, TokensEvent)
        assert event.index == first + len(tokens)
        assert event.num_cached_tokens == 0
        tokens += event.token_ids
    return tokens


def served(length: int, sampling: Sampling, output: list[int], **limits: object) -> TestedEngine:
    engine = TestedEngine(**limits)  # type: ignore[arg-type]
    engine.serve_all([Serve(key(1), prompt_of(length, 1), sampling, output=tuple(output))])
    return engine


def handed_on(length: int, sampling: Sampling, output: list[int], **limits: object) -> TestedEngine:
    """As a pair: what the client has is computed at the one and decoded at the other, unless the next token ends it."""
    source, target = TestedEngine(role="prefill", **limits), TestedEngine(role="decode", **limits)  # type: ignore[arg-type]
    fields = {"prompt": prompt_of(length, 1), "sampling": sampling, "output": tuple(output)}
    target.handle(Reserve(key(1), **fields))  # type: ignore[arg-type]
    source.serve_all([Prefill(key(1), **fields), Pin(key(1))])  # type: ignore[arg-type]
    (computed,) = source.of(key(1), PromptComputedEvent)
    assert isinstance(computed, PromptComputedEvent)
    verified = transfer(source, target, key(1), length + len(output))
    source.handle(Release(key(1)))
    target.handle(Decode(key(1), verified))
    target.run()
    assert source.num_used == 0
    assert target.stats().prompt_tokens_computed == 0
    return target


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 19), st.booleans(), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_an_answer_that_goes_on_has_the_tokens_of_one_that_was_never_interrupted(
    length: int, cut: int, moves: bool, ahead: int | None, reuses: bool, is_mixed: bool
) -> None:
    sampling = MIXED if is_mixed else greedy(20)
    answer = whole(length, sampling)
    cut = min(cut, len(answer) - 1)
    go_on = handed_on if moves else served
    engine = go_on(length, sampling, answer[:cut], steps_ahead=ahead, hasher=HASHER if reuses else None)
    assert answer[:cut] + said(engine, cut) == answer
    ending = engine.ending(key(1))
    assert isinstance(ending, FinishedEvent)
    assert ending.index == len(answer)
    assert Ending(ending.reason, ending.stop_token_id) == sampling.ending_after(answer[-1], len(answer))
    assert engine.num_used == 0


@pytest.mark.parametrize("go_on", [served, handed_on])
def test_a_token_left_out_or_given_twice_shows(go_on: object) -> None:
    """Negative control: the tokens that follow depend on each of those before."""
    answer = whole(17, MIXED)
    for wrong in (answer[:5] + answer[6:8], [*answer[:8], answer[7]]):
        assert wrong + said(go_on(17, MIXED, wrong), len(wrong)) != answer  # type: ignore[operator]


def test_what_was_emitted_counts_against_max_tokens_and_min_tokens() -> None:
    answer = whole(10, MIXED)
    assert len(answer) > MIXED.min_tokens, "else a stop could have come at any time"
    other = replace(MIXED, min_tokens=len(answer) + 1)
    longer = whole(10, other)
    assert longer[: len(answer) - 1] == answer[:-1]
    assert longer[len(answer) - 1] != answer[-1], "a stop may not come yet"
    engine = served(10, other, answer[:-1])
    assert said(engine, len(answer) - 1) == longer[len(answer) - 1 :]


def test_answers_that_go_on_are_preempted_and_computed_anew_like_others() -> None:
    engine = TestedEngine(num_slots=(2 + 60, 2 + 44), max_num_batched_tokens=16)  # blocks of the full group are short
    answers = {number: reference_tokens(LAYOUT, prompt_of(8, number), greedy(40)) for number in range(8)}
    for number, answer in answers.items():
        engine.handle(Serve(key(number), prompt_of(8, number), greedy(40), output=tuple(answer[: 2 * number])))
    engine.run()
    for number, answer in answers.items():
        assert said(engine, 2 * number, key(number)) == answer[2 * number :]
    assert engine.stats().num_preemptions > 0
    assert engine.num_used == 0


def test_an_answer_that_goes_on_stands_before_new_ones() -> None:
    engine = TestedEngine(max_num_seqs=1)
    engine.handle(Serve(key(1), prompt_of(4, 1), greedy(3)))
    engine.handle(Serve(key(2), prompt_of(4, 2), greedy(3)))
    engine.handle(Reserve(key(3), prompt_of(4, 3), greedy(3), output=(5,)))
    while not engine.of(key(1), FinishedEvent):
        engine.step()
    assert engine.reserved(key(3)) is not None
    assert not engine.of(key(2))


def test_each_of_several_answers_goes_on_with_its_own_seed_and_reuses_the_prompt() -> None:
    sampling = Sampling(max_tokens=12, seed=5, temperature=1.0, num_choices=3)
    prompt = prompt_of(25, 1)
    engine = TestedEngine(hasher=HASHER)
    for choice, cut in ((0, 4), (2, 7)):
        alone = replace(sampling.of_choice(choice), num_choices=1)
        answer = reference_tokens(LAYOUT, prompt, alone)
        own = replace(key(1), choice=choice)
        engine.serve_all([Serve(own, prompt, alone, True, output=tuple(answer[:cut]))])
        assert said(engine, cut, own) == answer[cut:]
    assert engine.stats().prompt_tokens_computed < 2 * 25 + 4 + 7
    assert engine.num_used == 0


def test_an_id_beyond_the_vocabulary_is_refused_among_emitted_tokens_too() -> None:
    failure = served(10, greedy(5), [40]).ending(key(1))
    assert isinstance(failure, FailedEvent)
    assert (failure.status, failure.message) == (400, "prompt token id 40 is not in the vocabulary of 40")


def test_an_answer_is_young_until_it_has_emitted_eight_tokens_here() -> None:
    engine: Engine = TestedEngine()
    young: list[bool] = []
    engine.on_step = lambda keys: young.append(bool(keys))
    answer = whole(5, greedy(20))
    engine.handle(Serve(key(1), prompt_of(5, 1), greedy(20), output=tuple(answer[:10])))
    while engine.has_work:
        engine.step()
    assert young == [True] * YOUNG_TOKENS + [False] * (10 - YOUNG_TOKENS)
