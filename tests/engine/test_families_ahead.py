"""Every family answers the same when a step is launched before the tokens of the one before it are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model.engine_pair import key
from support.model.families import FAMILIES, Reference
from support.model.graphed import BLOCK_SIZE, LENGTHS, GraphedRunner, load_case

from disagg.cache.cache import KVCache
from disagg.cache.layout import derive_layout
from disagg.engine.commands import Serve, TokensEvent
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.run.runner import Runner, StepRunner
from disagg.transceiver.wire.messages.values import Sampling

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("families")


def answers(runner: StepRunner, cache: KVCache, references: tuple[Reference, ...]) -> list[tuple[int, ...]]:
    """One more prompt arrives at every step."""
    config = EngineConfig("both", 4, 61, 128, check_invariants=True, steps_ahead=1)
    engine = Engine(runner, cache, config)
    found: dict[object, list[int]] = {key(number): [] for number in range(len(references))}
    waiting = list(enumerate(references))
    while waiting or engine.has_work:
        if waiting:
            number, reference = waiting.pop(0)
            sampling = Sampling(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
            engine.handle(Serve(key(number), tuple(reference.prompt), sampling))
        for event in engine.step():
            if isinstance(event, TokensEvent):
                found[event.key] += event.token_ids
    cache.close()
    return [tuple(tokens) for tokens in found.values()]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_transformers_does_with_steps_ahead(name: str, folder: Path) -> None:
    model, references = load_case(name, folder, NUM_TOKENS)
    assert len(references) == len(LENGTHS)
    layout = derive_layout(model.layers, block_size=BLOCK_SIZE, max_model_len=128)
    cache = KVCache(layout, [120] * layout.num_pools)
    assert answers(Runner(model, cache), cache, references) == [reference.token_ids for reference in references]


def test_captured_steps_are_filled_in_with_the_tokens_of_the_step_before(folder: Path) -> None:
    model, references = load_case("gemma3", folder, NUM_TOKENS)
    runner = GraphedRunner(model)
    assert answers(runner, runner.cache, references) == [reference.token_ids for reference in references]
    assert any(runner.buckets)
