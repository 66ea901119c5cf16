"""What `benchmarks/scratch.py` counts, and that its figures can differ."""

from __future__ import annotations

from random import Random
from types import ModuleType

import pytest
from support.tools import load_script


@pytest.fixture(scope="module")
def scratch() -> ModuleType:
    return load_script("benchmarks/scratch.py")


def test_a_chat_loses_no_reuse_and_a_shared_beginning_does(scratch: ModuleType) -> None:
    """A prompt's end keeps its window; a beginning that others share lies where a step put scratch blocks."""
    shape = scratch.SHAPES[0]
    for workload, is_lost in ((scratch.chats, False), (scratch.shared, True)):
        prompts = list(workload(Random(1)))
        off, on, _ = (scratch.computed_share(shape, mode, prompts, 8192) for mode in scratch.MODES)
        assert (on > off + 0.01) == is_lost


def test_reuse_mode_keeps_what_the_same_prompt_begins_with(scratch: ModuleType) -> None:
    prompts = list(scratch.repeated(Random(1), num_prompts=2))
    shares = [scratch.computed_share(scratch.SHAPES[0], mode, prompts, 8192) for mode in scratch.MODES]
    assert shares[1] == 1.0
    assert shares[2] == pytest.approx(shares[0])


def test_scratch_takes_less_of_long_steps_and_bytes_are_the_models(scratch: ModuleType) -> None:
    shape = scratch.SHAPES[0]
    off, on = (scratch.peak_nbytes(shape, mode, 8192) for mode in ("off", "on"))
    assert on < 0.6 * off
    full = scratch.LONG * shape.num_layers // shape.period * shape.token_nbytes
    windowed = (8192 + shape.window) * (shape.num_layers - shape.num_layers // shape.period) * shape.token_nbytes
    assert off == pytest.approx(full + windowed, rel=0.01)


def test_no_mode_computes_less_than_the_new_tokens(scratch: ModuleType) -> None:
    prompts = list(scratch.shared(Random(1), num_users=4))
    new = len(prompts[0]) + sum(len(prompt) - 3000 for prompt in prompts[1:])
    assert scratch.computed_share(scratch.SHAPES[1], "off", prompts, 512) >= new / sum(map(len, prompts))
