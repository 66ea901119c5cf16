"""The benchmark of a step's fast paths runs here, and says what it cannot measure."""

from __future__ import annotations

import pytest
from support.tools import load_script


def test_each_path_is_measured_and_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_FUSED_QKV", "off")  # the benchmark sets it too, for itself
    script = load_script("benchmarks/decode_step.py")
    monkeypatch.setattr(script, "BATCHES", ((2, 1, 20),))
    script.main(["--device", "cpu", "--repeats", "3"])
    out = capsys.readouterr().out
    assert "Decode graphs are not measured: they need a CUDA device" in out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| 2 x 1")]
    assert [(row[1], row[4]) for row in rows] == [
        ("transformers' forward", "torch:write_kv"),
        ("fused QKV", "torch:preprocess_qkv"),
    ]
