"""Log-probabilities of the prompt's own tokens: each position's once, whatever chunks, cache and pools do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.model.continuous import make_cache
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine, greedy, key, prompt_of, transfer
from support.model.fake_runner import reference_logits, reference_tokens
from support.model.families import save_family

from disagg.engine.commands import Decode, FailedEvent, Pin, Prefill, PromptScoredEvent, Release, Reserve, Serve
from disagg.engine.model.load import load_model
from disagg.engine.run import scoring
from disagg.engine.run.runner import Chunk, Runner
from disagg.engine.run.scoring import Scoring

torch.set_num_threads(1)


def scored(max_tokens=2, num_top=3):
    return greedy(max_tokens, num_prompt_logprobs=num_top)


def found(engine, wanted):
    """Rows by position; a repeat must equal what it repeats."""
    rows = {}
    for event in engine.of(wanted, PromptScoredEvent):
        for position, row in enumerate(event.scores.rows(), event.scores.start):
            assert rows.setdefault(position, row) == row
    return rows


def check(rows, prompt, num_top=3):
    assert sorted(rows) == list(range(1, len(prompt)))
    for position, (rank, logprobs) in rows.items():
        expected = reference_logits(LAYOUT, prompt[:position]).log_softmax(-1)
        own = expected[prompt[position]]
        assert abs(logprobs.logprob - own) < 1e-5
        assert rank == int((expected > own).sum()) + 1
        assert [token_id for token_id, _ in logprobs.top] == expected.topk(num_top).indices.tolist()


@pytest.mark.parametrize(("length", "budget"), [(1, 8), (2, 8), (8, 8), (9, 8), (29, 9), (30, 64)])
def test_every_position_is_scored_once_whatever_the_chunks(length, budget):
    engine = TestedEngine(max_num_batched_tokens=budget)
    prompt = prompt_of(length, 1)
    engine.serve_all([Serve(key(1), prompt, scored())])
    check(found(engine, key(1)), prompt)
    assert sum(event.scores.count for event in engine.of(key(1), PromptScoredEvent)) == length - 1
    assert engine.tokens(key(1)) == reference_tokens(LAYOUT, prompt, greedy(2))


def test_a_prompt_that_is_cached_is_computed_again_for_its_scores():
    engine = TestedEngine(hasher=HASHER)
    prompt = prompt_of(29, 1)
    engine.serve_all([Serve(key(1), prompt, greedy(2))])
    engine.serve_all([Serve(key(2), prompt, scored())])
    check(found(engine, key(2)), prompt)
    engine.serve_all([Serve(key(3), prompt, greedy(2))])
    assert [engine.of(key(n))[0].num_cached_tokens for n in (1, 3)] == [0, 28]  # and a scored one is found later


def test_scores_come_from_the_worker_that_computes_the_prompt_before_its_last_word():
    source, target = TestedEngine(role="prefill"), TestedEngine(role="decode")
    prompt = prompt_of(23, 1)
    source.serve_all([Prefill(key(1), prompt, scored(5)), Pin(key(1))])
    check(found(source, key(1)), prompt)
    assert isinstance(source.of(key(1))[-2], PromptScoredEvent) or source.computed(key(1)) is source.of(key(1))[-1]
    target.handle(Reserve(key(1), prompt, scored(5)))
    target.handle(Decode(key(1), transfer(source, target, key(1), len(prompt))))
    target.run()
    source.handle(Release(key(1)))
    assert target.tokens(key(1)) == reference_tokens(LAYOUT, prompt, greedy(5))
    assert not found(target, key(1))
    assert source.num_used == target.num_used == 0


def test_an_answer_that_was_preempted_is_not_scored_again():
    engine = TestedEngine(num_slots=(14, 22), max_num_seqs=4)
    prompts = {n: prompt_of(12, n) for n in range(4)}
    engine.serve_all([Serve(key(n), prompt, scored(24)) for n, prompt in prompts.items()])
    assert engine.stats().num_preemptions > 0
    for n, prompt in prompts.items():
        check(found(engine, key(n)), prompt)
        assert engine.tokens(key(n)) == reference_tokens(LAYOUT, prompt, greedy(24))


def test_scores_of_poisoned_kv_fail_the_request():
    engine = TestedEngine(poison=prompt_of(20, 1)[3], max_num_batched_tokens=8)
    engine.handle(Serve(key(1), prompt_of(20, 1), scored()))
    engine.step()
    assert isinstance(engine.ending(key(1)), FailedEvent)
    assert engine.num_used == 0


def test_scoring_in_pieces_equals_scoring_at_once():
    logits, targets = torch.randn(2500, 50), [n % 50 for n in range(2500)]
    whole, pieces = Scoring(7, targets, 4), Scoring(7, targets, 4)
    whole.add(logits)
    for rows in scoring.in_pieces(0, 2500, scoring.MAX_LOGITS // 100):
        pieces.add(logits[rows.start : rows.stop])
    assert whole.scores() == pieces.scores()
    assert [part.start for part in whole.scores()] == [7, 1031, 2055]
    assert max(part.count for part in whole.scores()) == 1024


def test_a_score_of_another_row_is_seen():
    """Negative control of `check`."""
    engine = TestedEngine()
    prompt = prompt_of(12, 1)
    engine.serve_all([Serve(key(1), prompt, scored())])
    rows = found(engine, key(1))
    with pytest.raises(AssertionError):
        check(rows | {5: rows[6]}, prompt)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3n", "gemma4", "gpt_oss"])
def test_scores_of_a_real_model_are_those_of_its_whole_logits(family, tmp_path, monkeypatch):
    """Soft caps included: the head that runs apart is the model's own."""
    monkeypatch.setattr(scoring, "MAX_LOGITS", 4000)  # several pieces
    model = load_model(save_family(family, tmp_path), dtype="float32")
    cache = make_cache(model, block_size=8, num_slots=40)
    runner, ids = Runner(model, cache), [(7 * n * n + 5) % 97 + 3 for n in range(40)]
    sequence = cache.open("a")
    rows = []
    for start, end in ((0, 17), (17, 40)):
        assert cache.resize(sequence, capacity=end, history=start)
        chunk = Scoring(start + 1, ids[start + 1 : end + 1], 2)
        last = runner.execute([Chunk(sequence.tables, ids[start:end], start, end == 40, scoring=chunk)])
        rows += [row for part in chunk.scores() for row in part.rows()]
    expected = np.array(whole_logits(model, cache, ids))
    assert len(rows) == 39
    for row, logits, target in zip(rows, expected[:-1], ids[1:], strict=True):
        logprobs = torch.from_numpy(logits).log_softmax(-1)
        assert abs(row[1].logprob - logprobs[target]) < 1e-4
        assert abs(row[1].top[0][1] - logprobs.max()) < 1e-4
    assert torch.allclose(last[0], torch.from_numpy(expected[-1]), atol=1e-4)


def whole_logits(model, cache, ids):
    """The logits after each prefix, each computed as a prompt's last."""
    runner, rows = Runner(model, cache), []
    for end in range(1, len(ids) + 1):
        sequence = cache.open(end)
        assert cache.resize(sequence, capacity=end, history=0)
        rows.append(runner.execute([Chunk(sequence.tables, ids[:end], 0, True)])[0].numpy())
        cache.close_sequence(sequence)
    return rows
