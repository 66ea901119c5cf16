from __future__ import annotations

import io
import json
import logging
import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.cli.display import LiveDisplay, PlainDisplay
from disagg.cli.logs import LogfmtFormatter, quoted


def line(msg: str, *args: object, exc: BaseException | None = None, **extra: object) -> str:
    info = None if exc is None else (type(exc), exc, exc.__traceback__)
    record = logging.LogRecord("disagg.worker", logging.WARNING, __file__, 1, msg, args, info)
    vars(record).update(extra)
    return LogfmtFormatter(role="decode", worker="d0").format(record)


def test_a_line_has_time_level_process_logger_message_and_what_the_caller_adds() -> None:
    text = line("lost %s", "p0", request_id="req-1", nbytes=3)
    assert re.match(r"ts=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=warning role=decode worker=d0 ", text)
    assert text.endswith('logger=disagg.worker msg="lost p0" request_id=req-1 nbytes=3')


def test_a_traceback_stays_in_its_line() -> None:
    text = line("failed", exc=ValueError("two\nlines"))
    assert "\n" not in text
    assert r"ValueError: two\nlines" in text


@given(st.text())
def test_every_value_is_one_word_and_can_be_read_back(value: str) -> None:
    text = quoted(value)
    assert len(text.splitlines()) == 1 or not value.isascii()
    assert (json.loads(text) if text.startswith('"') else text) == value
    assert "\n" not in text


def test_a_plain_word_is_not_quoted() -> None:
    assert quoted("tcp://127.0.0.1:80") == "tcp://127.0.0.1:80"
    assert shlex.split(f"a={quoted('x y')}") == ["a=x y"]


def test_plain_display_is_lines_without_control_characters() -> None:
    stream = io.StringIO()
    with PlainDisplay(stream) as shown:
        shown.progress("prefill-0", "loading model")
        shown.ready("prefill-0")
        shown.settle()
        shown.say("done")
    assert stream.getvalue() == "prefill-0: loading model\nprefill-0: ready\ndisagg: done\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_live_display_shows_stages_and_passes_log_lines_through(terminal: Terminal) -> None:
    with LiveDisplay(terminal) as shown:
        shown.progress("prefill-0", "loading model")
        shown.log('ts=1 msg="[bold]:smile:"')
        shown.ready("prefill-0")
        shown.settle()
        shown.ready("prefill-0")
    text = terminal.getvalue()
    assert "loading model" in text
    assert 'ts=1 msg="[bold]:smile:"' in text
    assert text.endswith("prefill-0: ready\n")


def test_live_display_has_no_colour_under_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with LiveDisplay(terminal) as shown:
        shown.progress("prefill-0", "loading model")
    assert not re.search(r"\x1b\[[0-9;]*[34]\d", terminal.getvalue())


def test_a_terminal_that_was_closed_ends_nothing() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    PlainDisplay(Closed()).say("anyone?")
