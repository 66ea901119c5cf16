"""The table of the engine's benchmarks: every row once, and none that lacks a cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/engine_table.py"
KINDS = ["decode", "prefill", "share of a step", *["sampling"] * 4, "share of a step"]


def table(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--dry", "--models", "demo", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_a_dry_run_has_every_row_at_every_width() -> None:
    done = table("--billion")
    assert done.returncode == 0, done.stderr
    head, _, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert all(row.count("|") == head.count("|") for row in rows)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    for width in {row[0] for row in cells}:
        assert [row[1] for row in cells if row[0] == width] == KINDS


def test_a_python_without_vllm_is_a_sentence() -> None:
    done = table("--vllm", sys.executable)
    assert done.returncode == 1
    assert "its sampler cannot be run: ModuleNotFoundError" in done.stderr
