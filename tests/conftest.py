"""What every test gets: hypothesis profiles, one torch thread, tracebacks of crashes, honest skips."""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from support.cluster.kept import FAILED
from support.faults.wrong import Wrong, wrong_in

faulthandler.enable()

# Triton reads this when it is first imported, and decides then whether kernels are compiled or interpreted. Where there
# is an NVIDIA device they are compiled.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Seconds after which Python lets another thread run; 1e-6 makes races of threads frequent that load makes seldom.
if interval := os.environ.get("DISAGG_TEST_SWITCH_INTERVAL"):
    sys.setswitchinterval(float(interval))

# No deadlines: the machines that run this are shared, and a slow example is not a wrong one.
settings.register_profile("dev", deadline=None, max_examples=50)
# The same examples each time, so that a red CI is about the change; `dev` and `explore` look for new ones.
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
settings.register_profile(
    "explore",
    deadline=None,
    max_examples=5000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("dev")  # pytest's --hypothesis-profile, applied later, wins


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures-to", type=Path, help="append a line of JSON for each failure (tools/run_tests.py)")


def pytest_configure(config: pytest.Config) -> None:
    if (file := config.getoption("--failures-to")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresFile(file))


class FailuresFile:
    """Tells what failed, and whether a machine that is too busy may be the reason: not of a `Wrong`, and not of a
    test that ended its process, of which there is no traceback."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        may_be_late = crash is not None and not crash.message.startswith(f"{Wrong.__module__}.{Wrong.__name__}")
        with self._file.open("a") as file:
            file.write(json.dumps([report.nodeid, may_be_late]) + "\n")


def pytest_collection_finish() -> None:
    """One thread: what is tested is results, and the tests' own processes share the cores. No collection looks at what
    is here for good: with torch and some thousand tests each would take a third of a second."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command under test configures the root logger, with a stream that is captured and soon closed."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    # pytest's own handlers come and go between the phases of a test: take away only what the test added.
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in real time get a second try, which the report shows: on a shared machine a process that is not run for
    three seconds *is* lost, and says so. What is `Wrong` is so at once; every other test has one try."""
    items.sort(key=lambda item: "abuse" in item.path.parts)  # judged by delays: last, when nothing runs beside
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.processes)
        if "processes" in item.keywords:
            item.add_marker(pytest.mark.flaky(reruns=1, rerun_except=f"^{Wrong.__name__}: "))
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if gpu_items and (missing := missing_gpu()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What decides on a second try reads an error's name: `Wrong` must not hide in a group or behind another."""
    try:
        yield
    except (Exception, BaseExceptionGroup) as error:
        if isinstance(error, Wrong) or (wrong := wrong_in(error)) is None:
            raise
        raise Wrong(str(wrong)) from error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """What a test did to a system it shares is known by how it ended."""
    report = yield
    if call.when == "call":
        item.stash[FAILED] = call.excinfo is not None
    return report


def missing_gpu() -> str | None:
    """Why the tests marked `gpu` cannot run here."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install the CUDA build to run this"
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    return None
