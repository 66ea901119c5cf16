"""Whole models over the Triton kernels, interpreted: every family's answers are transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.model.continuous import greedy, largest_error, make_cache
from support.model.families import FAMILIES, WINDOW, safe_prompts, save_family
from support.model.interpreter import missing_interpreter

from disagg.engine.model.load import load_model
from disagg.engine.run.runner import Runner
from disagg.kernels.dispatch import CALLS, forced

pytestmark = pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))

NUM_TOKENS = 4  # a step costs a tenth of a second and more
QUICK = "gpt_oss"  # windows, sink logits and a full layer
LOGPROB_TOLERANCE = 2e-3


@pytest.mark.timeout(400)
@pytest.mark.parametrize("uses_scratch", [False, True])
@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_answers_as_transformers_does(name: str, uses_scratch: bool, tmp_path: Path) -> None:
    model = load_model(save_family(name, tmp_path))
    references = safe_prompts(model.module, (5, 2 * WINDOW + 3), NUM_TOKENS)
    runner = Runner(model, make_cache(model, block_size=8, num_slots=60, uses_scratch=uses_scratch))
    CALLS.clear()
    with forced("triton"):
        lives = greedy(runner, [reference.prompt for reference in references], NUM_TOKENS, chunk=37)
    assert CALLS["kernel:prefill_attention"] > 0
    assert CALLS["kernel:decode_attention"] > 0
    assert not [name for name in CALLS if name.startswith("torch:")]
    for live, reference in zip(lives, references, strict=True):
        assert live.answer == reference.token_ids
        assert largest_error(live, reference) < LOGPROB_TOLERANCE
    runner.cache.close()
