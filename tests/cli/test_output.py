"""Output that cannot be shown or written ends no run, and a lost result is no success."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.cli.output import Descriptor

FORGIVING = "import sys; from disagg.cli import output; output.open_closed_descriptors(); output.forgive_output(); "


def run(code: str, *, shell: str = "", **environ: str) -> subprocess.CompletedProcess[bytes]:
    """A Python program with our streams. `shell`: redirections that it is started with."""
    argv = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-P", "-c", FORGIVING + code]
    return subprocess.run(argv, capture_output=True, env={**os.environ, **environ}, check=False)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("latin-1", b"mod\xe8le-?\n"),
        ("ascii", b"mod?le-?\n"),
        ("utf-8", "modèle-🦙\n".encode()),
        ("cp1252:strict", b"mod\xe8le-?\n"),
    ],
)
def test_what_the_terminal_has_no_letters_for_is_a_question_mark(encoding: str, shown: bytes) -> None:
    done = run(r"print('mod\xe8le-\U0001f999', flush=True)", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_text_that_is_no_unicode_is_shown_somehow(stream: str) -> None:
    done = run(rf"print('\udcff', file=sys.{stream}); sys.exit(3)")
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("shell", [">/dev/full", "2>/dev/full", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_program_goes_on_when_its_output_cannot_be_written(shell: str, tmp_path: Path) -> None:
    code = (
        "import pathlib\nfor stream in (sys.stdout, sys.stderr):\n print('a', file=stream, flush=True)\n"
        f"pathlib.Path({str(tmp_path / 'end')!r}).write_text('reached')"
    )
    done = run(code, shell=shell)
    assert (done.returncode, (tmp_path / "end").read_text()) == (0, "reached")
    assert b"rror" not in done.stderr


def test_a_reader_that_went_away_is_no_error() -> None:
    code = "for n in range(100_000): print('a line', n, flush=n < 3)\nprint('end', file=sys.stderr)"
    with subprocess.Popen(
        [sys.executable, "-P", "-c", FORGIVING + "\n" + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"end\n"
        assert process.wait() == 0


def test_descriptors_that_were_closed_are_taken_before_a_socket_takes_them() -> None:
    done = run("import os, socket; os.write(4, str(socket.socket().fileno()).encode())", shell="4>&1 1>&- 0<&-")
    assert int(done.stdout) > 2


def test_a_descriptor_that_does_not_block_is_waited_for() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    raw = Descriptor(write_end)
    while raw.failure is None:  # until the pipe is full and its reader was waited for
        raw.write(b"x" * 65536)
    assert isinstance(raw.failure, BlockingIOError)
    raw.failure = None
    os.read(read_end, 65536)
    assert raw.write(b"y") == 1
    assert raw.failure is None
    os.close(read_end)
    raw.write(b"z")
    assert raw.failure is not None
    assert raw.failure.errno == errno.EPIPE
    os.close(write_end)


def test_a_result_that_a_full_disk_swallowed_is_no_success() -> None:
    argv = ["sh", "-c", f"exec {sys.executable} -P -m disagg version >/dev/full"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "disagg: the result cannot be written: no space left on device\n")
