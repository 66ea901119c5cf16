"""What a budget is said to seat really runs at once, on a real model: the published example at a test's size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from support.model.engine_pair import greedy, key, prompt_of
from support.model.families import MIN_GAP, VOCAB_SIZE, save_family
from support.oracles.cache_oracle import num_seats

from disagg.cache.budget import num_seated, num_seated_by_length, split_budget
from disagg.cache.cache import KVCache
from disagg.cache.layout import CacheLayout, derive_layout
from disagg.engine.commands import FinishedEvent, Serve, TokensEvent
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.runner import Runner
from disagg.transceiver.wire.messages.values import TokenLogprobs

LIMITS = {"max_model_len": 256, "max_num_batched_tokens": 64}
NBYTES = 3 << 19  # 6 sequences of 256 tokens when every layer keeps all of them
PROMPT_LEN = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Three windowed layers (W 24) to a full one."""
    torch.set_num_threads(1)
    return load_model(save_family("gemma3", tmp_path_factory.mktemp("model")))


@pytest.fixture
def layout(model: LoadedModel) -> CacheLayout:
    return derive_layout(model.layers, block_size=4, max_model_len=LIMITS["max_model_len"])


class Crowd:
    """Answers of the greatest length, all asked for at once. `most`: how many were being decoded in one step."""

    def __init__(
        self, model: LoadedModel, layout: CacheLayout, num_slots: Sequence[int], numbers: Sequence[int]
    ) -> None:
        cache = KVCache(layout, num_slots)
        config = EngineConfig("both", len(numbers), vocab_size=VOCAB_SIZE, **LIMITS)
        engine = Engine(Runner(model, cache), cache, config)
        sampling = greedy(LIMITS["max_model_len"] - PROMPT_LEN, ignore_eos=True, num_logprobs=2)
        for number in numbers:
            engine.handle(Serve(key(number), prompt_of(PROMPT_LEN, number), sampling))
        self.most, self.num_finished = 0, 0
        self.tokens: defaultdict[int, list[tuple[int, TokenLogprobs]]] = defaultdict(list)
        while engine.has_work:
            self.most = max(self.most, len(engine._scheduler.answers))
            for event in engine.step():
                self.num_finished += isinstance(event, FinishedEvent)
                if isinstance(event, TokensEvent):
                    self.tokens[int(event.key.transfer_id, 16)] += zip(event.token_ids, event.logprobs, strict=True)
        self.num_preemptions, self.num_used = engine.stats().num_preemptions, engine.stats().num_used_slots
        cache.close()


def certain(tokens: Sequence[tuple[int, TokenLogprobs]]) -> list[int]:
    """Ids before the first near-tie, which the shape of a batch may decide."""
    ids = []
    for token_id, logprobs in tokens:
        (_, first), (_, second) = logprobs.top
        if first - second < MIN_GAP:
            break
        ids.append(token_id)
    return ids


def test_a_model_runs_as_many_of_the_longest_as_the_budget_seats(model: LoadedModel, layout: CacheLayout) -> None:
    """At least 2.5 times the max-length split, none preempted, each answering as if alone."""
    count = num_seated(layout, NBYTES, **LIMITS)
    assert count >= 2.5 * num_seated_by_length(layout, NBYTES, max_model_len=LIMITS["max_model_len"])
    slots = split_budget(layout, nbytes=NBYTES, max_num_seqs=count, **LIMITS)
    assert num_seats(layout, slots, **LIMITS) == count
    crowd = Crowd(model, layout, slots, range(count))
    assert (crowd.most, crowd.num_finished, crowd.num_preemptions, crowd.num_used) == (count, count, 0, 0)
    for number in (0, count // 2, count - 1):
        alone = certain(Crowd(model, layout, slots, [number]).tokens[number])
        assert len(set(alone)) > 10, "the answer says nothing"
        assert [token_id for token_id, _ in crowd.tokens[number]][: len(alone)] == alone


def test_one_more_than_the_budget_seats_has_to_wait_or_give_way(model: LoadedModel, layout: CacheLayout) -> None:
    """Negative control."""
    count = num_seated(layout, NBYTES, **LIMITS)
    slots = split_budget(layout, nbytes=NBYTES, max_num_seqs=count, **LIMITS)
    crowd = Crowd(model, layout, slots, range(count + 1))
    assert crowd.num_finished == count + 1
    assert crowd.num_preemptions > 0 or crowd.most <= count
