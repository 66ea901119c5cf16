"""`disagg up` with what cannot work: one sentence, exit code 2, and no process left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.cluster.warm import WarmPopen
from support.model.checkpoints import edit_json
from support.model.families import save_family

pytestmark = pytest.mark.processes

TIMEOUT_S = 90.0
ONE_WORKER = ("--both", "1", "--prefill", "0", "--decode", "0", "--threads", "1")


@dataclass(frozen=True)
class Refusal:
    """How a command ended. `sentences`: what it said in its own name; its children's progress and logs are others."""

    code: int
    stdout: str
    stderr: str
    left: list[int]

    @property
    def sentences(self) -> list[str]:
        return [line.removeprefix("disagg: ") for line in self.stderr.splitlines() if line.startswith("disagg: ")]


def refused(*flags: str, start: type[subprocess.Popen[str]] = WarmPopen) -> Refusal:
    """Run `disagg up` in a session of its own until it ends by itself."""
    process = start(
        [sys.executable, "-P", "-m", "disagg", "up", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        left = in_session(process.pid)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    return Refusal(process.returncode, stdout, stderr, left)


def in_session(session: int) -> list[int]:
    """Living processes of a session, from /proc: whoever `up` started is in it, whatever its parent is by now."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


def assert_one_sentence(refusal: Refusal, *words: str) -> None:
    assert refusal.code == 2, refusal.stderr
    assert len(refusal.sentences) == 1, refusal.stderr
    missing = [word for word in words if word not in refusal.sentences[0]]
    assert not missing, f"{missing} not in: {refusal.sentences[0]}"
    assert "Traceback" not in refusal.stderr
    assert refusal.stdout == ""
    assert refusal.left == []


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_processes_of_a_session_are_found() -> None:
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    assert in_session(sleeper.pid) == [sleeper.pid]
    sleeper.kill()
    sleeper.wait()
    assert in_session(sleeper.pid) == []


def test_a_missing_model_folder(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    assert_one_sentence(refused("--port", "0", "--model", str(folder)), str(folder), "does not exist")


def test_a_busy_port(busy_port: int) -> None:
    assert_one_sentence(refused("--port", str(busy_port)), f"port {busy_port}", "`--port`")


def test_an_unknown_flag() -> None:
    assert_one_sentence(refused("--prefil", "2"), "--prefil", "--help")


def test_a_flag_with_a_value_that_it_cannot_have() -> None:
    assert_one_sentence(refused("--block-size", "24"), "`--block-size` is `24`", "power of two")


def test_memory_in_which_no_sequence_fits(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "llama")
    flags = ("--max-model-len", "256", "--dtype", "float32", "--kv-cache-memory", "128KiB", *ONE_WORKER)
    refusal = refused("--port", "0", "--model", str(folder), *flags)
    # a token takes 4 layers x K and V x 2 heads x 16 x 4 bytes = 1 KiB, two blocks are reserved
    assert_one_sentence(refusal, "`--kv-cache-memory`: 131072 bytes", f"{(256 + 2 * 16) * 1024}", "`--max-model-len`")


def test_a_window_in_which_not_even_the_query_fits(tmp_path: Path) -> None:
    """Once, not once per restart: the worker says that this is the user's. Its processes are fresh ones."""
    folder = save_family("mistral", tmp_path / "mistral")
    edit_json(folder / "config.json", sliding_window=0)
    refusal = refused("--port", "0", "--model", str(folder), *ONE_WORKER, start=subprocess.Popen)
    assert_one_sentence(refusal, "layer 0: window 0, expected at least 1", "`sliding_window` in config.json")
    assert "restarting" not in refusal.stderr


def test_a_model_larger_than_the_memory(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "llama")
    edit_json(folder / "config.json", intermediate_size=2**36)  # 4 layers x 3 x 64 x 2**36 weights: 192 TiB
    refusal = refused("--port", "0", "--model", str(folder), *ONE_WORKER)
    assert_one_sentence(refusal, str(folder), "does not fit", "GiB of memory available")


def test_a_model_with_a_slow_tokenizer_only(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "llama")
    (folder / "tokenizer.json").unlink()
    refusal = refused("--port", "0", "--model", str(folder), *ONE_WORKER)
    assert_one_sentence(refusal, str(folder), "no tokenizer.json", "fast tokenizer")
    assert "restarting" not in refusal.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there are GPUs here")
def test_a_device_that_is_not_there() -> None:
    refusal = refused("--port", "0", "--decode-devices", "cuda:0")
    assert_one_sentence(refusal, "`--decode-devices` is `cuda:0`", "or `cpu`")
    assert "starting" not in refusal.stderr, "it is known before a process starts"
