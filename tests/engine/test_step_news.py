"""Before each step the engine says which attempts in it are young: those with fewer than eight tokens here."""

from __future__ import annotations

from support.model.engine_pair import TestedEngine, greedy, key, prompt_of

from disagg.engine.commands import Prefill, Serve
from disagg.transceiver.wire.messages.router import YOUNG_TOKENS


def test_a_request_is_young_until_it_emitted_eight_tokens() -> None:
    engine, told = TestedEngine(), []
    engine.on_step = lambda keys: told.append(tuple(keys))
    engine.serve_all([Serve(key(1), prompt_of(40), greedy(20, ignore_eos=True))])
    num_young = sum(key(1) in keys for keys in told)
    num_chunks = len(told) - 19  # each step after the prompt's last one emits one token
    assert num_young == num_chunks + YOUNG_TOKENS - 1
    assert told == [(key(1),)] * num_young + [()] * (len(told) - num_young)


def test_a_step_is_told_before_it_runs_with_all_its_young_requests_and_no_waiting_one() -> None:
    engine, told = TestedEngine(max_num_batched_tokens=16), []
    engine.on_step = lambda keys: told.append((tuple(keys), len(engine.runner.batches)))
    for number in (1, 2):
        engine.handle(Serve(key(number), prompt_of(8, number), greedy(2, ignore_eos=True)))
    engine.handle(Prefill(key(3), prompt_of(30), greedy(2)))
    engine.run()
    assert told[0] == ((key(1), key(2)), 0)
    assert [count for _, count in told] == list(range(len(told))), "told once per step, before it"
    assert any(key(3) in keys for keys, _ in told)
