"""Pools for few sequences, eight times as many mixed requests at once: all end, with the tokens of an unloaded run."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cluster.system import System, running
from support.faults.wrong import same
from support.model.families import VOCAB_SIZE, build_family, save_family

from disagg.cache.admission import peak_slots
from disagg.cache.layout import LayerSpec, derive_layout

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

MIN_GAP = 1e-3  # batch shapes spread float32 logits by less here; the families' fixtures ask 5e-3 of shorter answers
MAX_MODEL_LEN, BLOCK_SIZE, BATCHED = 128, 8, 64
ROLES = {
    "decode": ("--prefill", "1", "--decode", "1", "--swa-scratch"),
    "both": ("--prefill", "0", "--decode", "0", "--both", "1"),
}


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """`num_drawn`: more than are asked, as some answers hold a near-tie, which the order of additions may decide.

    `num_copies`: how often each is asked, every time under a salt of its own. `num_at_once`: in the unloaded run.
    """

    pools_seat: int
    num_requests: int
    num_copies: int
    num_drawn: int
    num_at_once: int

    @property
    def num_distinct(self) -> int:
        return self.num_requests // self.num_copies


SMALL = Scale(pools_seat=3, num_requests=24, num_copies=2, num_drawn=22, num_at_once=2)
FULL = Scale(pools_seat=8, num_requests=64, num_copies=1, num_drawn=110, num_at_once=4)


def draw(number: int) -> Asked:
    dice = random.Random(number)
    # Answers are long beside the two blocks that they are let in with, and most prompts short: whoever is let in must
    # grow, from one windowed block to five.
    prompt = [dice.randrange(3, VOCAB_SIZE) for _ in range(dice.choice([3, 3, 3, 3, 17, 40, 70]))]
    sampling = {"temperature": 0} if number % 2 else {"temperature": 0.8, "seed": number}
    return Asked(prompt, dice.choice([36, 44, 52, 56]), sampling)


def pools_nbytes(num_seqs: int) -> int:
    """Bytes of pools that hold so many sequences of the longest, as a prompt of one step each, and no more."""
    config = build_family("gemma3").config
    layers = [
        LayerSpec(i, config.sliding_window if kind == "sliding_attention" else None, 0, 2, 16, "float32", i)
        for i, kind in enumerate(config.layer_types)
    ]
    layout = derive_layout(layers, block_size=BLOCK_SIZE, max_model_len=MAX_MODEL_LEN)
    peaks = peak_slots(layout, total_tokens=MAX_MODEL_LEN, history=0, step_tokens=BATCHED)
    return sum((num_seqs * peak + 2) * size for peak, size in zip(peaks, layout.slot_nbytes, strict=True))


def ask(system: System, asked: Asked, **extra: Any) -> Any:
    body = {"max_tokens": asked.max_tokens, "ignore_eos": True, **asked.sampling, **extra}
    status, answer = system.complete(asked.prompt, **body)
    assert status == 200, answer
    return answer["choices"][0]


def is_safe(choice: Any) -> bool:
    """No step's two likeliest tokens are a near-tie. Sampled steps are decided by noise: a tie there is as rare."""
    tops = [sorted(step.values(), reverse=True) for step in choice["logprobs"]["top_logprobs"]]
    return all(top[0] - top[1] >= MIN_GAP for top in tops if len(top) > 1)


def unloaded(system: System, scale: Scale) -> dict[int, list[int]]:
    """Answers by number, with few requests at a time: nobody is preempted."""
    with ThreadPoolExecutor(scale.num_at_once) as pool:
        drawn = list(pool.map(lambda number: ask(system, draw(number), logprobs=2), range(scale.num_drawn)))
    safe = [(number, choice["token_ids"]) for number, choice in enumerate(drawn) if is_safe(choice)]
    answers = dict(safe[: scale.num_distinct])
    assert len(answers) == scale.num_distinct, f"only {len(answers)} answers without a near-tie"
    assert len({tuple(ids) for ids in answers.values()}) > scale.num_distinct // 2, "the answers say nothing"
    system.settle()
    assert system.total("disagg_preemptions_total") == 0
    return answers


def check_overload(role: str, scale: Scale, folder: Path) -> None:
    save_family("gemma3", folder)
    num_workers = 2 if role == "decode" else 1
    flags = (
        *("--model", str(folder), "--dtype", "float32", "--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64", "--max-num-batched-tokens", str(BATCHED)),
        # One thread: two of them wait for each other where other processes want the cores.
        *("--kv-cache-memory", str(num_workers * pools_nbytes(scale.pools_seat)), "--threads", "1"),
    )
    with running(*flags, *ROLES[role]) as system:
        expected = unloaded(system, scale)
        asked = [(number, copy) for copy in range(scale.num_copies) for number in expected]
        with ThreadPoolExecutor(scale.num_requests) as pool:
            answers = list(pool.map(lambda one: ask(system, draw(one[0]), cache_salt=f"copy {one[1]}"), asked))
        for (number, copy), choice in zip(asked, answers, strict=True):
            same(choice["token_ids"], expected[number], f"request {number}, copy {copy}")
            assert choice["finish_reason"] == "length"
        system.settle()
        system.wait_until_idle()
        assert system.total("disagg_preemptions_total", worker=f"{role}-0") > 0
        for name in ("total", "used", "free", "peak", "scratch", "cached"):
            assert system.samples(f"disagg_kv_blocks_{name}", worker=f"{role}-0"), name


def test_twenty_four_requests_over_pools_for_three_end_as_unloaded(tmp_path: Path) -> None:
    check_overload("decode", SMALL, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("role", list(ROLES))
def test_sixty_four_requests_over_pools_for_eight_end_as_unloaded(role: str, tmp_path: Path) -> None:
    check_overload(role, FULL, tmp_path / "model")
