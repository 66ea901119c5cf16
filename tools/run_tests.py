"""`make test`: two runs of pytest at once, and the exit code of the first that failed. Arguments are for both runs.

What starts processes or runs in true time goes one by one, since two of it would make each other late, and waits half
of its time. Beside it, all other tests take what the cores have left, at a lower priority and with their report kept
until the first run has ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

PYTEST: Final = str(Path(sys.executable).with_name("pytest"))
SELECTED: Final = "not slow and not gpu"
OPTIONS: Final = ("--hypothesis-profile=ci", "--durations=15")
WORKERS: Final = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")  # a file's models are built in one worker
NICE: Final = 5  # a third of the share of what runs in true time: enough for it not to be late, and for these to go on
SHOWN_EVERY_S: Final = 0.2


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryFile() as report:
        beside = subprocess.Popen(
            [PYTEST, "-m", f"{SELECTED} and not processes", *WORKERS, *OPTIONS, *arguments],
            stdout=report,
            stderr=report,
            preexec_fn=_be_nice,
        )
        print("== tests with processes or in true time; the others run beside them", flush=True)
        alone = [PYTEST, "-m", f"{SELECTED} and processes", *OPTIONS, *arguments]
        code = subprocess.run(alone, check=False).returncode
        print("== the others", flush=True)
        shown = 0
        while True:
            has_ended = beside.poll() is not None
            shown += _show(report.fileno(), shown)
            if has_ended:
                return code or beside.returncode
            time.sleep(SHOWN_EVERY_S)


def _be_nice() -> None:
    os.nice(NICE)


def _show(fd: int, start: int) -> int:
    """Write what follows `start` to stdout; how much that was."""
    text = os.pread(fd, os.fstat(fd).st_size - start, start)
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    return len(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
