from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from disagg.config.descriptors import raise_descriptor_limit
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(("soft", "hard", "expected"), [(256, 2048, 2048), (512, 512, 512)])
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int, expected: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(soft), str(hard)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(expected), str(expected), str(hard)]
