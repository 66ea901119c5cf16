"""Pools for eight sequences, sixty-four mixed requests at once: all end, with the tokens of an unloaded run."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.families import VOCAB_SIZE, build_family, save_family
from support.system import System, running
from support.wrong import same

from disagg.cache.admission import peak_slots
from disagg.cache.layout import LayerSpec, derive_layout

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_REQUESTS = 64
NUM_DRAWN = 110  # some answers hold a near-tie, which the order of additions may decide either way
MIN_GAP = 1e-3  # batch shapes spread float32 logits by less here; the families' fixtures ask 5e-3 of shorter answers
NUM_AT_ONCE = 4  # unloaded: half of what the pools seat to the end
MAX_MODEL_LEN, BLOCK_SIZE, BATCHED = 128, 8, 64
POOLS_SEAT = 8
ROLES = {
    "decode": ("--prefill", "1", "--decode", "1", "--swa-scratch"),
    "both": ("--prefill", "0", "--decode", "0", "--both", "1"),
}


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any]


def draw(number: int) -> Asked:
    dice = random.Random(number)
    # Answers are long beside the two blocks that they are let in with: whoever is let in must grow.
    prompt = [dice.randrange(3, VOCAB_SIZE) for _ in range(dice.choice([3, 17, 40, 70]))]
    sampling = {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
    return Asked(prompt, dice.choice([36, 44, 52, 56]), sampling)


def pools_nbytes() -> int:
    """Bytes of pools that hold eight sequences of the longest, as a prompt of one step each, and no more."""
    config = build_family("gemma3").config
    layers = [
        LayerSpec(i, config.sliding_window if kind == "sliding_attention" else None, 0, 2, 16, "float32", i)
        for i, kind in enumerate(config.layer_types)
    ]
    layout = derive_layout(layers, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
    peaks = peak_slots(layout, total_tokens=MAX_MODEL_LEN, history=0, step_tokens=BATCHED)
    return sum((POOLS_SEAT * peak + 2) * size for peak, size in zip(peaks, layout.slot_nbytes, strict=True))


def ask(system: System, asked: Asked, logprobs: int | None = None) -> Any:
    extra = {} if logprobs is None else {"logprobs": logprobs}
    body = {"max_tokens": asked.max_tokens, "ignore_eos": True, **asked.sampling, **extra}
    status, answer = system.complete(asked.prompt, **body)
    assert status == 200, answer
    return answer["choices"][0]


def is_safe(choice: Any) -> bool:
    """No step's two likeliest tokens are a near-tie. Sampled steps are decided by noise: a tie there is as rare."""
    tops = [sorted(step.values(), reverse=True) for step in choice["logprobs"]["top_logprobs"]]
    return all(top[0] - top[1] >= MIN_GAP for top in tops if len(top) > 1)


@pytest.mark.parametrize("role", list(ROLES))
def test_sixty_four_requests_over_pools_for_eight_end_as_unloaded(role: str, tmp_path: Path) -> None:
    folder = save_family("gemma3", tmp_path / "model")
    num_workers = 2 if role == "decode" else 1
    flags = (
        *("--model", str(folder), "--dtype", "float32", "--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64", "--max-num-batched-tokens", str(BATCHED)),
        # One thread: two of them wait for each other where other processes want the cores.
        *("--kv-cache-memory", str(num_workers * pools_nbytes()), "--threads", "1"),
    )
    with running(*flags, *ROLES[role]) as system:
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            drawn = list(pool.map(lambda number: ask(system, draw(number), logprobs=2), range(NUM_DRAWN)))
        safe = [(number, choice["token_ids"]) for number, choice in enumerate(drawn) if is_safe(choice)]
        unloaded = dict(safe[:NUM_REQUESTS])
        assert len(unloaded) == NUM_REQUESTS, f"only {len(unloaded)} answers without a near-tie"
        assert len({tuple(ids) for ids in unloaded.values()}) > NUM_REQUESTS // 2, "the answers say nothing"
        system.settle()
        assert system.total("disagg_preemptions_total") == 0
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            answers = list(pool.map(lambda number: ask(system, draw(number)), unloaded))
        for (number, expected), choice in zip(unloaded.items(), answers, strict=True):
            same(choice["token_ids"], expected, f"request {number}")
            assert choice["finish_reason"] == "length"
        system.settle()
        system.wait_until_idle()
        assert system.total("disagg_preemptions_total", worker=f"{role}-0") > 0
        for name in ("total", "used", "free", "peak", "scratch", "cached"):
            assert system.samples(f"disagg_kv_blocks_{name}", worker=f"{role}-0"), name
