"""`make test` runs two kinds of tests at once, shows both reports and hides no failure of either."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.tools import ROOT

PYTEST = """#!/bin/sh
case "$2" in
*"not processes"*) sleep 0.5; echo "beside, nice $(nice), $*"; exit {beside};;
*) echo "alone, nice $(nice), $*"; exit {alone};;
esac
"""


def run(folder: Path, *, alone: int = 0, beside: int = 0) -> subprocess.CompletedProcess[str]:
    """`tools/run_tests.py` of an environment whose pytest only says how it was started."""
    python = folder / "python"
    python.symlink_to(sys.executable)
    (folder / "pytest").write_text(PYTEST.format(alone=alone, beside=beside))
    (folder / "pytest").chmod(0o755)
    argv = [str(python), str(ROOT / "tools" / "run_tests.py"), "tests/cache"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


def test_each_test_is_in_one_of_the_two_runs_and_both_reports_are_shown(tmp_path: Path) -> None:
    done = run(tmp_path)
    first, second = [line for line in done.stdout.splitlines() if not line.startswith("==")]
    assert done.returncode == 0, done.stderr
    assert first.startswith("alone, nice ")
    assert "-m not slow and not gpu and processes " in first
    assert second.startswith("beside, nice ")
    assert "-m not slow and not gpu and not processes " in second
    assert first.endswith("tests/cache")
    assert second.endswith("tests/cache")


def test_the_run_beside_leaves_the_cores_to_the_other(tmp_path: Path) -> None:
    alone, beside = (int(line.split()[2].rstrip(",")) for line in run(tmp_path).stdout.splitlines() if "nice" in line)
    assert beside > alone or alone == 19


@pytest.mark.parametrize(("alone", "beside", "code"), [(1, 0, 1), (0, 2, 2), (1, 2, 1)])
def test_a_failure_of_either_run_fails_both(tmp_path: Path, alone: int, beside: int, code: int) -> None:
    assert run(tmp_path, alone=alone, beside=beside).returncode == code
