"""`make test`: two runs of pytest at once, then once more, alone, what failed in them. Arguments are for both runs.

What starts processes or runs in true time goes one by one, since two of it would make each other late, and waits half
of its time. Beside it, all other tests take what the cores have left, at a lower priority and with their report kept
until the first run has ended. A test that fails beside the others and passes alone depends on the machine's load: it is
named at the end and fails nothing. One that saw something wrong, or ended its process, fails at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

PYTEST: Final = str(Path(sys.executable).with_name("pytest"))
SELECTED: Final = "not slow and not gpu"
OPTIONS: Final = ("--hypothesis-profile=ci", "--durations=15")
WORKERS: Final = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")  # a file's models are built in one worker
NICE: Final = 10  # a tenth of the share of what runs in true time, and all that it leaves: it is what takes longest
SHOWN_EVERY_S: Final = 0.2
MAX_TRIED_ALONE: Final = 12  # more than load has ever failed, few enough for a broken change to be told at once
PASSED, FAILED, NOTHING_TO_RUN = 0, 1, 5  # of pytest's exit codes


@dataclass(frozen=True)
class Failure:
    test: str
    may_be_late: bool
    """Whether a busy machine can be the reason."""


def main(arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        codes = _run_both(arguments, Path(folder))
        failures = [failure for file in sorted(Path(folder).iterdir()) for failure in _read(file)]
    bad = [code for code in codes if code not in (PASSED, NOTHING_TO_RUN)]
    if not bad:
        return NOTHING_TO_RUN if set(codes) == {NOTHING_TO_RUN} else PASSED
    if set(bad) != {FAILED} or not failures:  # interrupted, or an error of pytest's own
        return bad[0]
    if reason := _reason_to_stop(failures):
        print(f"== {reason}: nothing is tried alone", flush=True)
        return FAILED
    return _try_alone([failure.test for failure in failures])


def _run_both(arguments: Sequence[str], folder: Path) -> tuple[int, int]:
    """Exit codes. `folder`: what failed, a file for each run."""
    with tempfile.TemporaryFile() as report:
        beside = subprocess.Popen(
            [PYTEST, "-m", f"{SELECTED} and not processes", _to(folder / "2"), *WORKERS, *OPTIONS, *arguments],
            stdout=report,
            stderr=report,
            preexec_fn=_be_nice,
        )
        print("== tests with processes or in true time; the others run beside them", flush=True)
        alone = [PYTEST, "-m", f"{SELECTED} and processes", _to(folder / "1"), *OPTIONS, *arguments]
        code = subprocess.run(alone, check=False).returncode
        print("== the others", flush=True)
        _show_until_end(beside, report)
        return code, beside.returncode


def _be_nice() -> None:
    os.nice(NICE)


def _show_until_end(beside: subprocess.Popen[bytes], report: IO[bytes]) -> None:
    shown = 0
    while True:
        has_ended = beside.poll() is not None
        shown += _show(report.fileno(), shown)
        if has_ended:
            return
        time.sleep(SHOWN_EVERY_S)


def _show(fd: int, start: int) -> int:
    """Write what follows `start` to stdout; how much that was."""
    text = os.pread(fd, os.fstat(fd).st_size - start, start)
    sys.stdout.buffer.write(text)
    sys.stdout.flush()
    return len(text)


# --- what failed ----------------------------------------------------------------------------------------------


def _to(file: Path) -> str:
    """The option by which `tests/conftest.py` writes there what failed."""
    return f"--failures-to={file}"


def _read(file: Path) -> list[Failure]:
    """Each test once, in the order in which they failed."""
    failures: dict[str, Failure] = {}
    for line in file.read_text().splitlines():
        test, may_be_late = json.loads(line)
        failures[test] = Failure(test, may_be_late and (test not in failures or failures[test].may_be_late))
    return list(failures.values())


def _reason_to_stop(failures: Sequence[Failure]) -> str:
    if wrong := [failure.test for failure in failures if not failure.may_be_late]:
        return f"no load explains the failure of {' '.join(wrong)}"
    if len(failures) > MAX_TRIED_ALONE:
        return f"{len(failures)} tests failed, and at most {MAX_TRIED_ALONE} are tried again"
    return ""


def _try_alone(tests: Sequence[str]) -> int:
    print(f"== once more, alone: {' '.join(tests)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "alone"
        command = [PYTEST, "-n", "0", _to(file), *OPTIONS, *tests]
        code = subprocess.run(command, check=False).returncode
        failed = [failure.test for failure in _read(file)] if file.exists() else []
    if code not in (PASSED, FAILED):
        return code
    _name("FAILED ALONE TOO", failed)
    _name("FAILED BESIDE THE OTHERS, PASSED ALONE, so they depend on the machine's load", set(tests) - set(failed))
    return code


def _name(what: str, tests: Sequence[str] | set[str]) -> None:
    if tests:
        print("\n  ".join([f"== {what}:", *sorted(tests)]), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
