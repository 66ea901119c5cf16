"""How far a prompt is, and which steps lead from there."""

from __future__ import annotations

import pytest

from disagg.engine.commands import AttemptKey
from disagg.engine.sequence import _NEXT, Claim, PromptSequence, Request, Stage, state_of
from disagg.transceiver.wire.messages.values import Sampling


def prompt(claim: Claim = Claim.SOFT) -> PromptSequence:
    return PromptSequence(Request(AttemptKey("t", 1), (1, 2), Sampling(max_tokens=2)), claim)


@pytest.mark.parametrize("last", Stage)
@pytest.mark.parametrize("stage", Stage)
def test_a_step_that_no_row_names_raises_and_leaves_the_stage(stage: Stage, last: Stage) -> None:
    sequence = prompt()
    sequence.stage = last
    if stage in _NEXT[last]:
        sequence.enter(stage)
        assert sequence.stage is stage
    else:
        with pytest.raises(AssertionError, match=f"from {last.name} to {stage.name}"):
            sequence.enter(stage)
        assert sequence.stage is last


def test_nothing_is_held_that_was_not_computed_and_nothing_parked_starts_without_a_pin() -> None:
    assert {stage for stage, row in _NEXT.items() if Stage.HELD in row} == {Stage.COMPUTING}
    assert _NEXT[Stage.PARKED] == {Stage.PARKED, Stage.WAITING}
    assert set(_NEXT) == set(Stage)


def test_a_prompt_starts_waiting_and_its_claim_says_whether_it_is_soft() -> None:
    assert state_of(prompt()) == "waiting"
    assert [prompt(claim).is_soft for claim in (Claim.OWN, Claim.SOFT, Claim.PINNED)] == [False, True, False]
    assert [prompt(claim).serves for claim in (Claim.OWN, Claim.SOFT, Claim.PINNED)] == [True, False, False]
