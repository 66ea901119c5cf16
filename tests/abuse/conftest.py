"""The pair under abuse, and what honest clients ask it for. A test that fails takes the pair with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support.abuse.honest import Ask
from support.abuse.pair import MAX_MODEL_LEN, Pair, running_pair
from support.faults.wrong import Wrong
from support.model.families import MIN_GAP, reference_generate

from disagg.config.demo import demo_model_folder
from disagg.engine.model.hf import transformers as hf

PLANES = "tcp,shm,zmq,ucx"  # all of them have a door; tcp's, which is first, is what a stranger reaches best
NUM_STREAMS = 8
PROMPT_LENGTHS = (12, 40, 90, 260)
NUM_CHECKED_TOKENS = 6
MAX_RESEEDS = 50


class Pairs:
    """One pair at a time, kept from test to test while nothing is wrong with it."""

    def __init__(self) -> None:
        self._stack: contextlib.ExitStack | None = None
        self._pair: Pair | None = None

    def get(self) -> Pair:
        if self._pair is not None and self._pair.ended():
            self.drop()
        if self._pair is None:
            self._stack = contextlib.ExitStack()
            self._pair = self._stack.enter_context(running_pair(PLANES))
        return self._pair

    def drop(self) -> None:
        """Without asking how it ends: something was wrong with it already."""
        stack, self._stack, self._pair = self._stack, None, None
        if stack is not None:
            with contextlib.suppress(AssertionError):
                stack.__exit__(AssertionError, AssertionError(), None)

    def close(self) -> None:
        if self._stack is not None:
            self._stack.close()


@pytest.fixture(scope="package")
def pairs() -> Iterator[Pairs]:
    kept = Pairs()
    yield kept
    kept.close()


@pytest.fixture
def pair(pairs: Pairs, request: pytest.FixtureRequest) -> Iterator[Pair]:
    yield pairs.get()
    if request.node.stash.get(FAILED, False):
        pairs.drop()


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if call.when == "call":
        item.stash[FAILED] = call.excinfo is not None
    return report


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
