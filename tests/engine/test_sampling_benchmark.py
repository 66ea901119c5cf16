"""The sampler's benchmark runs here, on a small vocabulary, and its contenders are what they are called."""

from __future__ import annotations

import pytest
import torch
from support.tools import load_script


def test_every_case_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("benchmarks/sampling.py")
    before = torch.get_num_threads()
    script.main(["--rows", "2", "--vocab", "500", "--repeats", "1", "--threads", "1"])
    torch.set_num_threads(before)
    out = capsys.readouterr().out
    assert "vocabulary 500" in out
    names = [line.strip("| ").split(" | ")[1] for line in out.splitlines() if line.startswith("| 2 ")]
    assert names == [case.name for case in script.CASES]


def test_transformers_filters_as_the_engine_does() -> None:
    """What is compared does the same work: tokens that both may draw are those of the same few."""
    script = load_script("benchmarks/sampling.py")
    case = script.Case("top-k", {"top_k": 3})
    logits = script.made_logits(50, 300)
    given = script.inputs(case, 50, 300)
    theirs = script.transformers_way(case, logits, given)().squeeze(1).tolist()
    ours = [one.token_id for one in script.engine(script.plain.sample, logits, given)()]
    likeliest = logits.topk(3).indices.tolist()
    assert all(a in few and b in few for a, b, few in zip(theirs, ours, likeliest, strict=True))
