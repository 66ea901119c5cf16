"""Who gets a second try: a test in real time that was late, and never one that saw something wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support.faults.wrong import Wrong, never_late, same, wrong_in
from support.tools import ROOT

FAILING_ONCE = """
import contextlib
from pathlib import Path

import pytest
from support.cluster.kept import Kept
from support.faults.wrong import Wrong, never_late, same


def raise_once(name, error):
    if not Path(name).exists():
        Path(name).touch()
        raise error


@pytest.fixture
def setting_up():
    raise_once("setup", Wrong("left over"))


@pytest.mark.processes
def test_late():
    raise_once("late", AssertionError("not within 5 s, not a Wrong: thing"))


@pytest.mark.processes
def test_late_in_a_group():
    raise_once("late group", ExceptionGroup("storm", [TimeoutError(), AssertionError("late")]))


@pytest.mark.processes
def test_wrong():
    raise_once("wrong", Wrong("tokens"))


@pytest.mark.processes
def test_wrong_in_a_group():
    raise_once("group", ExceptionGroup("storm", [TimeoutError(), ExceptionGroup("calls", [Wrong("tokens")])]))


@pytest.mark.processes
def test_wrong_and_late_in_the_end():
    if not Path("end").exists():
        try:
            same((1, 2), (1, 3), "a prompt")
        finally:
            raise_once("end", TimeoutError("did not stop"))


@pytest.mark.processes
def test_wrong_by_decree():
    with never_late():
        raise_once("decree", AssertionError("bytes"))


@pytest.mark.processes
def test_wrong_before_it_began(setting_up): ...


def test_late_but_not_in_real_time():
    raise_once("no processes", AssertionError("late"))


STARTED, ENDED = [], []


@contextlib.contextmanager
def start_system():
    STARTED.append(len(STARTED))
    yield STARTED[-1]
    ENDED.append(STARTED[-1])


@pytest.fixture(scope="module")
def systems():
    kept = Kept(start_system)
    yield kept
    kept.close()


@pytest.fixture
def system(systems, request):
    with systems.lent_to(request.node) as system:
        yield system


def test_first_of_a_system(system):
    assert system == 0


@pytest.mark.processes
def test_late_on_a_system(system):
    raise_once("system", AssertionError("the system was 0, as it should be") if system == 0 else Wrong("another"))
    assert (system, ENDED) == (1, [])


def test_last_of_a_system(system):
    assert system == 1
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What became of each try of each test of `FAILING_ONCE`, which runs under the tests' own conftest."""
    folder = tmp_path_factory.mktemp("tries")
    (folder / "test_once.py").write_text(FAILING_ONCE)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  processes: in real time\n")
    argv = [sys.executable, "-P", "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-v", "test_once.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "NO_COLOR": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    ran = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    tries: dict[str, list[str]] = {}
    for name, outcome in re.findall(r"^test_once.py::(\w+) (PASSED|FAILED|ERROR|RERUN)", ran.stdout, re.MULTILINE):
        tries.setdefault(name, []).append(outcome)
    assert tries, ran.stdout + ran.stderr
    return tries


@pytest.mark.parametrize("name", ["test_late", "test_late_in_a_group"])
def test_what_was_late_once_is_tried_again(outcomes: dict[str, list[str]], name: str) -> None:
    assert outcomes[name] == ["RERUN", "PASSED"]


@pytest.mark.parametrize(
    "name", ["test_wrong", "test_wrong_in_a_group", "test_wrong_and_late_in_the_end", "test_wrong_by_decree"]
)
def test_what_was_wrong_once_fails(outcomes: dict[str, list[str]], name: str) -> None:
    assert outcomes[name] == ["FAILED"]


def test_what_was_wrong_before_the_test_began_fails_too(outcomes: dict[str, list[str]]) -> None:
    assert outcomes["test_wrong_before_it_began"] == ["ERROR"]


def test_what_is_not_in_real_time_has_one_try(outcomes: dict[str, list[str]]) -> None:
    assert outcomes["test_late_but_not_in_real_time"] == ["FAILED"]


def test_a_failure_takes_a_shared_system_with_it_and_a_success_does_not(outcomes: dict[str, list[str]]) -> None:
    assert outcomes["test_first_of_a_system"] == ["PASSED"]
    assert outcomes["test_late_on_a_system"] == ["RERUN", "PASSED"]
    assert outcomes["test_last_of_a_system"] == ["PASSED"]


def test_wrong_is_found_wherever_it_is() -> None:
    wrong = Wrong("tokens")
    assert wrong_in(ExceptionGroup("g", [ValueError(), ExceptionGroup("h", [wrong])])) is wrong
    assert wrong_in(ExceptionGroup("g", [ValueError()])) is None
    assert wrong_in(None) is None
    with pytest.raises(KeyError) as caught:
        _fail_while_handling(wrong)
    assert wrong_in(caught.value) is wrong


def _fail_while_handling(error: Exception) -> None:
    try:
        raise error
    except AssertionError:
        {}["missing"]


def test_equal_things_are_the_same_and_others_are_named() -> None:
    same((1, 2), (1, 2))
    with pytest.raises(Wrong, match=r"a prompt: \[1\], expected \[2\]"):
        same([1], [2], "a prompt")


def test_assertions_that_are_never_late_are_wrong_and_other_errors_stay_what_they_are() -> None:
    with pytest.raises(Wrong, match="two tokens"), never_late():
        raise AssertionError("two tokens")
    with pytest.raises(TimeoutError), never_late():
        raise TimeoutError
