"""The benchmark of a step's fast paths runs here, and says what it cannot measure."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from support.tools import load_script


def test_each_path_is_measured_and_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISAGG_FUSED_QKV", raising=False)
    script = load_script("benchmarks/decode_step.py")
    monkeypatch.setattr(script, "BATCHES", ((2, 1, 20),))
    script.main(["--device", "cpu", "--repeats", "3"])
    assert "DISAGG_FUSED_QKV" not in os.environ, "what it sets for itself stays set"
    out = capsys.readouterr().out
    assert "Decode graphs are not measured: they need a CUDA device" in out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| 2 x 1")]
    assert [(row[1], row[4]) for row in rows] == [
        ("transformers' forward", "torch:write_kv"),
        ("fused QKV", "torch:preprocess_qkv"),
    ]


def test_a_way_that_was_not_taken_is_an_error() -> None:
    script = load_script("benchmarks/decode_step.py")
    plain, fused = script.contenders("cpu")
    script.measure([plain, fused], 1, 1, 20, 2)
    with pytest.raises(SystemExit, match="`torch:preprocess_qkv` was not counted"):
        script.measure([replace(plain, claim=fused.claim)], 2, 1, 20, 2)
