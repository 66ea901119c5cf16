"""`disagg plan` against engines that run the family's model: what a request holds, and what its transfer must move."""

from __future__ import annotations

import contextlib
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES, VOCAB_SIZE, save_family

from disagg.cache.cache import KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, derive_layout
from disagg.cli.main import main
from disagg.engine.commands import AttemptKey, Pin, Prefill, Reserve, ReservedEvent, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model import LoadedModel, load_model
from disagg.engine.runner import Runner
from disagg.transceiver.messages.values import Sampling

torch.set_num_threads(1)
MAX_MODEL_LEN = 256
CASES = 3
"""Drawn per family, by a fixed seed: each takes two prompts through the model."""
ONE_TOKEN = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
FIRST, SECOND = (AttemptKey(name * 32, 1) for name in "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def load(name: str, folder: Path) -> LoadedModel:
    return load_model(save_family(name, folder / name), dtype="float32")


def plan(path: Path, *flags: str) -> Any:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["plan", "--model", str(path), "--dtype", "float32", "--json", *flags]) == 0
    return json.loads(out.getvalue())


def engine(model: LoadedModel, layout: CacheLayout, role: str, swa_scratch: str) -> Engine:
    cache = KVCache(layout, [500] * layout.num_pools, hasher=BlockHasher(b"key", "model"))
    config = EngineConfig(role, 4, MAX_MODEL_LEN, MAX_MODEL_LEN, check_invariants=True, swa_scratch=swa_scratch)
    return Engine(Runner(model, cache), cache, config)


def held_by_a_prefill(source: Engine, prompt: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Slots per pool when the prompt is computed, and those that were scratch in its one step."""
    source.handle(Prefill(FIRST, prompt, ONE_TOKEN))
    source.handle(Pin(FIRST))
    while source.has_work:
        source.step()
    stats = source.stats()
    return [pool.num_used for pool in stats.pools], list(stats.scratch)


def asked_by_a_decode(target: Engine, prompt: tuple[int, ...], num_cached: int) -> list[list[int]]:
    """Ordinals per group that a transfer must bring to a worker which answered the first `num_cached` tokens before."""
    if num_cached:
        target.handle(Serve(FIRST, prompt[:num_cached], ONE_TOKEN))
        while target.has_work:
            target.step()
    (reserved,) = target.handle(Reserve(SECOND, prompt, ONE_TOKEN))
    assert isinstance(reserved, ReservedEvent)
    return [[ordinal for ordinal, _ in group] for group in reserved.slots]


def per_pool(layout: CacheLayout, values: list[int]) -> list[int]:
    sums = [0] * layout.num_pools
    for pool, value in zip(layout.pool_of_group, values, strict=True):
        sums[pool] += value
    return sums


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_says_what_a_request_then_holds_and_moves(name: str, folder: Path) -> None:
    model, dice = load(name, folder), random.Random(name)
    for _ in range(CASES):
        block_size = dice.choice([1, 4, 8, 16])
        prompt = tuple(dice.randrange(3, VOCAB_SIZE) for _ in range(dice.randint(1, 150)))
        num_cached = dice.choice([0, dice.randint(0, len(prompt)), len(prompt)])
        layout = derive_layout(model.layers, block_size=block_size, max_model_len=MAX_MODEL_LEN, uses_scratch=True)
        flags = ["--prompt-len", str(len(prompt)), "--block-size", str(block_size), "--swa-scratch"]
        flags += [f"--cached={group.name}={num_cached}" for group in layout.groups]
        groups = plan(folder / name, "--max-model-len", str(MAX_MODEL_LEN), *flags)["groups"]
        said = f"{len(prompt)} tokens in blocks of {block_size}, {num_cached} cached"

        source = engine(model, layout, "prefill", "on")
        used, scratch = held_by_a_prefill(source, prompt)
        assert used == per_pool(layout, [group["live_slots"] for group in groups]), said
        assert scratch == per_pool(layout, [group["scratch_slots"] for group in groups]), said
        missing = asked_by_a_decode(engine(model, layout, "both", "off"), prompt, num_cached)
        assert missing == [group["required_blocks"] for group in groups], said
        nbytes = [len(g) * spec.slot_nbytes(block_size) for g, spec in zip(missing, layout.groups, strict=True)]
        assert nbytes == [group["bytes"] for group in groups], said


def test_a_plan_for_another_prompt_does_not_fit(folder: Path) -> None:
    """Negative control: one block more, and neither what is held nor what is moved is what was planned."""
    model = load("gemma3", folder)
    layout = derive_layout(model.layers, block_size=8, max_model_len=MAX_MODEL_LEN)
    flags = ("--prompt-len", "64", "--block-size", "8", "--max-model-len", str(MAX_MODEL_LEN))
    groups = plan(folder / "gemma3", *flags)["groups"]
    prompt = tuple(range(3, 3 + 65))
    used, _ = held_by_a_prefill(engine(model, layout, "prefill", "off"), prompt)
    assert used != per_pool(layout, [group["live_slots"] for group in groups])
    missing = asked_by_a_decode(engine(model, layout, "both", "off"), prompt, 0)
    assert missing != [group["required_blocks"] for group in groups]
