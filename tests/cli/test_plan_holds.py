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
from support.model.families import FAMILIES, VOCAB_SIZE, save_family

from disagg.cache.cache import CachedSequence, KVCache
from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout, derive_layout
from disagg.cli.main import main
from disagg.engine.commands import AttemptKey, Pin, Prefill, Reserve, ReservedEvent, Serve
from disagg.engine.engine import Engine, EngineConfig
from disagg.engine.model.load import LoadedModel, load_model
from disagg.engine.run.runner import Runner
from disagg.transceiver.wire.messages.values import Sampling

torch.set_num_threads(1)
MAX_MODEL_LEN = 256
CASES = 2
"""Drawn per family and mode, by a fixed seed: each takes two prompts through the model."""
MODES = ("off", "on", "reuse")
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


class WatchedCache(KVCache):
    """Notes the most scratch slots that each group had in any step."""

    def __init__(self, layout: CacheLayout) -> None:
        super().__init__(layout, [500] * layout.num_pools, hasher=BlockHasher(b"key", "model"))
        self.most_scratch = [0] * layout.num_groups

    def resize(self, sequence: CachedSequence, **sizes: int) -> bool:
        done = super().resize(sequence, **sizes)
        for group, scratch in enumerate(sequence.scratch):
            self.most_scratch[group] = max(self.most_scratch[group], len(scratch.slots) if scratch else 0)
        return done


def engine(model: LoadedModel, cache: KVCache, role: str, mode: str = "off", step: int = MAX_MODEL_LEN) -> Engine:
    config = EngineConfig(role, 4, step, MAX_MODEL_LEN, check_invariants=True, swa_scratch=mode)
    return Engine(Runner(model, cache), cache, config)


def held_by_a_prefill(
    model: LoadedModel,
    layout: CacheLayout,
    prompt: tuple[int, ...],
    mode: str = "off",
    step: int = MAX_MODEL_LEN,
) -> tuple[list[int], list[int]]:
    """Slots per pool when the prompt is computed in chunks of `step`; scratch slots per group in the step with most."""
    cache = WatchedCache(layout)
    source = engine(model, cache, "prefill", mode, step)
    source.handle(Prefill(FIRST, prompt, ONE_TOKEN))
    source.handle(Pin(FIRST))
    while source.has_work:
        source.step()
    return [pool.num_used for pool in source.stats().pools], cache.most_scratch


def asked_by_a_decode(
    model: LoadedModel, layout: CacheLayout, prompt: tuple[int, ...], num_cached: int
) -> list[list[int]]:
    """Ordinals per group that a transfer must bring to a worker which answered the first `num_cached` tokens before."""
    target = engine(model, WatchedCache(layout), "both")
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_says_what_a_request_then_holds_and_moves(name: str, mode: str, folder: Path) -> None:
    model, dice = load(name, folder), random.Random(f"{name} {mode}")
    for _ in range(CASES):
        block_size = dice.choice([1, 4, 8, 16])
        prompt = tuple(dice.randrange(3, VOCAB_SIZE) for _ in range(dice.randint(1, 150)))
        num_cached = dice.choice([0, dice.randint(0, len(prompt)), len(prompt)])
        step = dice.choice([dice.randint(4, 60), MAX_MODEL_LEN])
        layout = derive_layout(
            model.layers, block_size=block_size, max_model_len=MAX_MODEL_LEN, uses_scratch=mode != "off"
        )
        flags = ["--prompt-len", str(len(prompt)), "--block-size", str(block_size), f"--swa-scratch={mode}"]
        flags += [f"--cached={group.name}={num_cached}" for group in layout.groups]
        flags += ["--max-num-batched-tokens", str(step)]
        groups = plan(folder / name, "--max-model-len", str(MAX_MODEL_LEN), *flags)["groups"]
        said = f"{len(prompt)} tokens in blocks of {block_size} and steps of {step}, {num_cached} cached"

        used, scratch = held_by_a_prefill(model, layout, prompt, mode, step)
        assert used == per_pool(layout, [group["live_slots"] for group in groups]), said
        assert scratch == [group["scratch_slots"] for group in groups], said
        missing = asked_by_a_decode(model, layout, prompt, num_cached)
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
    used, _ = held_by_a_prefill(model, layout, prompt)
    assert used != per_pool(layout, [group["live_slots"] for group in groups])
    missing = asked_by_a_decode(model, layout, prompt, 0)
    assert missing != [group["required_blocks"] for group in groups]


def test_a_plan_for_another_mode_does_not_fit(folder: Path) -> None:
    """Negative control: what `on` puts into a scratch slot at the end of this prompt, `reuse` keeps."""
    model = load("gemma3", folder)
    layout = derive_layout(model.layers, block_size=8, max_model_len=MAX_MODEL_LEN, uses_scratch=True)
    prompt = tuple(range(3, 3 + 32))
    flags = ("--prompt-len", "32", "--block-size", "8", "--max-model-len", str(MAX_MODEL_LEN), "--swa-scratch=on")
    planned = [group["scratch_slots"] for group in plan(folder / "gemma3", *flags)["groups"]]
    assert [held_by_a_prefill(model, layout, prompt, mode)[1] == planned for mode in MODES] == [False, True, False]
