"""The engine's benchmark: every contender answers, and ours is the path that workers run."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from support.tools import load_script

from disagg.kernels import native_attention, native_matmul
from disagg.kernels.dispatch import CALLS
from disagg.kernels.native_decoder import DECODER


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    torch.set_num_threads(1)
    return load_script("benchmarks/engine.py")


@pytest.fixture(scope="module")
def contest(benchmark: ModuleType) -> Any:
    return benchmark.Contest("demo", benchmark.demo_model(), [3], 2, cb=False)


def test_every_contender_takes_the_steps_asked_for(benchmark: ModuleType, contest: Any) -> None:
    load = benchmark.Load("mixed", (5, 70, 41), 2)
    for contender in (contest.ours, *contest.generates):
        assert len(contender.run(load)) == 2, contender.name
    for bare in contest.bares:
        assert len(bare.run(benchmark.equal(3, 70, 2))) == 2


def test_ours_decodes_all_sequences_in_each_step_with_packed_weights(benchmark: ModuleType, contest: Any) -> None:
    batches: list[int] = []
    plain = contest.ours._runner.execute

    def counted(chunks: Any, drawn: torch.Tensor | None = None) -> torch.Tensor:
        batches.append(len(chunks))
        logits: torch.Tensor = plain(chunks, drawn)
        return logits

    contest.ours._runner.execute = counted
    CALLS.clear()
    contest.ours.run(benchmark.Load("mixed", (5, 70, 41), 2))
    assert batches == [3, 3]
    assert CALLS["torch:plan"] == 2 * 2, "a plan per step and layer group"
    if native_matmul.serves(torch.float32):
        assert CALLS[DECODER] == 2 * 4, "a call per step and layer"
        assert CALLS["packed_linear"] == 2, "the head"


def test_another_path_than_the_one_that_is_claimed_is_an_error(benchmark: ModuleType, contest: Any) -> None:
    if not native_attention.is_loaded():
        pytest.skip("the compiled helper is not built: torch operations are what is claimed")
    claimed = benchmark.our_path()[1][0]
    with native_attention.left_out(), pytest.raises(SystemExit, match=f"`{claimed}` was not counted"):
        contest.ours.run(benchmark.Load("mixed", (5, 70, 41), 2))


def test_a_row_has_a_cell_for_each_column(benchmark: ModuleType, contest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LONGEST", 24)
    for row in contest.rows(1):
        assert row.count("|") == benchmark.HEADER.splitlines()[0].count("|")
