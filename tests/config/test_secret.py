from __future__ import annotations

import os
from pathlib import Path

import pytest

from disagg.config.errors import ConfigError
from disagg.config.secret import INSECURE_SECRET, NUM_SECRET_BYTES, draw_secret, read_secret

GOOD = "0123456789abcdef"


def written(path: Path, content: str = GOOD, mode: int = 0o600) -> Path:
    path.write_text(content)
    path.chmod(mode)
    return path


def test_two_draws_differ() -> None:
    assert len(draw_secret()) == NUM_SECRET_BYTES
    assert draw_secret() != draw_secret()


def test_the_published_secret_is_as_long_as_a_drawn_one() -> None:
    assert len(INSECURE_SECRET) == NUM_SECRET_BYTES


def test_the_file_beats_the_environment_and_loses_its_line_end(tmp_path: Path) -> None:
    path = written(tmp_path / "secret", GOOD + "\n")
    environ = {"DISAGG_SECRET": "another secret of ours"}
    assert read_secret(secret_file=path, insecure=False, environ=environ) == GOOD.encode()
    assert read_secret(secret_file=None, insecure=False, environ=environ) == b"another secret of ours"


def test_insecure_uses_the_published_secret() -> None:
    assert read_secret(secret_file=None, insecure=True, environ={}) == INSECURE_SECRET


def test_no_secret_is_refused_with_a_next_step() -> None:
    with pytest.raises(ConfigError, match="no cluster secret: give the same `--secret-file`"):
        read_secret(secret_file=None, insecure=False, environ={})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="others can read it: run `chmod 600"):
        read_secret(secret_file=written(tmp_path / "secret", mode=mode), insecure=False, environ={})


def test_a_short_secret_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 5 bytes: expected 16 or more") as caught:
        read_secret(secret_file=written(tmp_path / "secret", "hello"), insecure=False, environ={})
    assert "hello" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`--secret-file` cannot be read: `.*none`: no such file"):
        read_secret(secret_file=tmp_path / "none", insecure=False, environ={})


@pytest.mark.parametrize("text", [f"{GOOD}\n", f"\n {GOOD}\t\r\n"])
def test_white_space_around_a_secret_is_no_part_of_it(text: str, tmp_path: Path) -> None:
    """From either origin alike: processes may be told in different ways."""
    path = written(tmp_path / "secret", text)
    assert read_secret(secret_file=path, insecure=False, environ={}) == GOOD.encode()
    assert read_secret(secret_file=None, insecure=False, environ={"DISAGG_SECRET": text}) == GOOD.encode()


def test_bytes_that_are_no_text_are_the_same_secret_from_either_origin(tmp_path: Path) -> None:
    raw = b"\xff\xfe0123456789abcdef\x85"
    path = tmp_path / "secret"
    path.write_bytes(raw + b"\n")
    path.chmod(0o600)
    assert read_secret(secret_file=path, insecure=False, environ={}) == raw
    assert read_secret(secret_file=None, insecure=False, environ={"DISAGG_SECRET": os.fsdecode(raw)}) == raw


@pytest.mark.parametrize("text", ["\n", " \t\n "])
def test_a_secret_of_white_space_is_none(text: str, tmp_path: Path) -> None:
    for file, environ in ((written(tmp_path / "secret", text), {}), (None, {"DISAGG_SECRET": text})):
        with pytest.raises(ConfigError, match="holds 0 bytes: expected 16 or more"):
            read_secret(secret_file=file, insecure=False, environ=environ)
