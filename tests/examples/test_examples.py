"""The examples do what they say, run as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.processes
def test_tensors_move_between_two_processes_of_unequal_layouts() -> None:
    command = [sys.executable, "-P", "-W", "error", str(EXAMPLES / "move_tensors.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("40 tokens of 2 layers in 5 units of 8192 bytes: equal\nthe first token is 7\n")
    assert done.stderr == ""
