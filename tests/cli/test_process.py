"""One process: what it announces and how it ends."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from disagg.cli.announce import Announce, announcer, parse_announcement
from disagg.cli.process import run_router, run_worker
from disagg.config.errors import ConfigError
from disagg.config.secret import INSECURE_SECRET
from disagg.config.settings import RouterSettings, WorkerSettings


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def fake(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[..., int]) -> None:
    module = ModuleType(name)
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


def events(fd: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in os.read(fd, 1 << 16).splitlines()]


def test_a_worker_is_run_with_its_role_its_name_and_the_secret(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    seen: list[object] = []

    def run(settings: WorkerSettings, role: str, secret: bytes, announce: Announce) -> int:
        seen.extend((settings.worker_id, role, secret))
        announce({"event": "ready", "worker_id": settings.worker_id})
        return 0

    fake(monkeypatch, "disagg.worker.main", run)
    assert run_worker("decode", WorkerSettings(insecure=True, worker_id="d7"), announce_fd=pipe[1]) == 0
    assert seen == ["d7", "decode", INSECURE_SECRET]
    assert [event["event"] for event in events(pipe[0])] == ["progress", "ready"]


def test_a_user_s_mistake_is_announced_to_the_supervisor_and_not_printed_twice(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: RouterSettings, secret: bytes, announce: Announce) -> int:
        raise ConfigError("the model is too large")

    fake(monkeypatch, "disagg.api.main", run)
    settings = RouterSettings(insecure=True, port=0, admin_port=0, control_port=0)
    assert run_router(settings, announce_fd=pipe[1]) == 2
    assert events(pipe[0]) == [{"event": "error", "message": "the model is too large"}]
    assert run_router(settings) == 2
    assert capsys.readouterr().err == "disagg: the model is too large\n"


@pytest.mark.parametrize(("exc", "code"), [(KeyboardInterrupt, 130), (RuntimeError, 1)])
def test_other_ends_have_their_own_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], exc: type[BaseException], code: int
) -> None:
    def run(*args: object) -> int:
        raise exc("ours")

    fake(monkeypatch, "disagg.worker.main", run)
    assert run_worker("prefill", WorkerSettings(insecure=True)) == code
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("ts=") for line in lines)
    assert any("RuntimeError: ours" in line for line in lines) == (exc is RuntimeError)


def test_a_process_without_a_supervisor_logs_what_it_would_announce(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        announcer(None)({"event": "ready", "url": "http://127.0.0.1:1", "pid": 3})
        announcer(None)({"event": "error", "message": "printed by the command"})
    assert [record.getMessage() for record in caplog.records] == ["ready"]
    assert caplog.records[0].url == "http://127.0.0.1:1"


def test_a_supervisor_that_is_gone_does_not_end_the_announcing_code(caplog: pytest.LogCaptureFixture) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    announcer(write_end)({"event": "ready"})
    os.close(write_end)
    assert "the supervisor is gone" in caplog.text


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"3", b'{"event": 1}', b"\xff\xfe", b"{}"])
def test_a_line_that_is_no_announcement_is_none(line: bytes) -> None:
    assert parse_announcement(line) is None
