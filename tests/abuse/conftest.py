"""The pair under abuse, and what honest clients ask it for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.abuse.honest import Ask
from support.abuse.pair import MAX_MODEL_LEN, Pair, running_pair
from support.cluster.kept import Kept
from support.faults.wrong import Wrong
from support.model.families import MIN_GAP, reference_generate

from disagg.config.demo import demo_model_folder
from disagg.engine.model.hf import transformers as hf

PLANES = "tcp,shm,zmq,ucx"  # all of them have a door; tcp's, which is first, is what a stranger reaches best
NUM_STREAMS = 8
PROMPT_LENGTHS = (12, 40, 90, 260)
NUM_CHECKED_TOKENS = 6
MAX_RESEEDS = 50


@pytest.fixture(scope="package")
def pairs() -> Iterator[Kept[Pair]]:
    kept = Kept(lambda: running_pair(PLANES), Pair.ended)
    yield kept
    kept.close()


@pytest.fixture
def pair(pairs: Kept[Pair], request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pairs.lent_to(request.node) as pair:
        yield pair


@pytest.fixture(scope="package")
def asks() -> list[Ask]:
    """Half of the streams are long and live through the abuse, half come anew all the time, each prompt with an answer
    that no rounding decides."""
    model = hf.AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()
    prompts = [_safe_prompt(model, length) for length in PROMPT_LENGTHS]
    return [
        Ask(prompt, (MAX_MODEL_LEN - len(prompt)) if number % 2 else 24, expected)
        for number in range(NUM_STREAMS)
        for prompt, expected in [prompts[number // 2]]
    ]


def _safe_prompt(model: torch.nn.Module, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    for seed in range(MAX_RESEEDS):
        generator = torch.Generator().manual_seed(length * 1009 + seed)
        prompt = torch.randint(3, 2048, (length,), generator=generator).tolist()
        reference = reference_generate(model, prompt, NUM_CHECKED_TOKENS)
        if reference.min_gap >= MIN_GAP:
            return tuple(prompt), reference.token_ids
    raise Wrong(f"no prompt of {length} tokens without a near-tie")
