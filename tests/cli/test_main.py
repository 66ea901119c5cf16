"""The command line from outside: exit codes, one sentence on stderr, nothing heavy before it is needed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from disagg import __version__
from disagg.bench.cases import CASES
from disagg.bench.contenders import ALL
from disagg.cli.main import main


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DISAGG_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def busy_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence on stderr of a command that exits with code 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("disagg: ")
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["up", "--frobnicate"], "No such option: --frobnicate"),
        (["prefill", "--block-size"], "requires an argument"),
        (["up", "stray"], "unexpected extra argument"),
        (["decode", "--block-size", "12"], "`--block-size` is `12`: expected a power of two"),
        (["up", "--tensor-parallel-size", "2"], "workers of several ranks are not supported"),
        (["router", "--config", "/none.yaml"], "`--config` cannot be read"),
        (["router", "--port", "0"], "no cluster secret: give the same `--secret-file`"),
        (["prefill"], "no cluster secret"),
        (["both", "--secret-file", "/none"], "`--secret-file` cannot be read"),
        (["up", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_a_user_s_mistake_is_one_sentence_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(argv, capsys)


@pytest.mark.parametrize("flag", ["--port", "--admin-port", "--control-port"])
@pytest.mark.parametrize("command", ["up", "router"])
def test_a_busy_port_is_refused_before_anything_starts(
    command: str, flag: str, busy_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [command, "--port", "0", "--admin-port", "0", "--control-port", "0", "--insecure", flag, str(busy_port)]
    assert f"port {busy_port} on `127.0.0.1` is busy: choose another with `{flag}`" in refusal(argv, capsys)


def test_an_address_that_is_not_ours_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot listen on `192.0.2.1` port 8000 (`--port`)" in refusal(["up", "--host", "192.0.2.1"], capsys)


def test_a_misspelt_variable_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISAGG_BLOK_SIZE", "16")
    assert main(["router"]) == 2
    assert "no command reads `DISAGG_BLOK_SIZE`" in capsys.readouterr().err


def test_the_version_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["version"], ["--version"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == __version__ + "\n"


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["up", "--help"], ["prefill", "-h"], ["demo", "--help"], ["bench"], ["bench", "-h"]]
)
def test_help_is_a_result_without_control_characters(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["up", "demo", "plan", "router", "prefill", "decode", "both"])
def test_help_shows_no_internal_and_no_unbuilt_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert not any(flag in shown for flag in ("-fd", "tensor-parallel", "DISAGG_SECRET"))


def test_a_group_without_a_subcommand_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    bare = capsys.readouterr()
    assert main(["bench", "--help"]) == 0
    assert bare == capsys.readouterr()
    assert bare.out.startswith("Usage: disagg bench")


@pytest.mark.parametrize(
    ("argv", "path"),
    [
        (["nope"], "disagg"),
        (["plan", "--nope"], "disagg plan"),
        (["version", "x"], "disagg version"),
        (["bench", "nope"], "disagg bench"),
        (["bench", "transfer", "--rounds", "x"], "disagg bench transfer"),
    ],
)
def test_a_mistyped_command_line_is_one_sentence_that_names_the_help_to_read(
    argv: list[str], path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith(f": see `{path} --help`\n")


@pytest.mark.parametrize("path", [["up"], ["demo"], ["plan"], ["router"], ["prefill"], ["bench", "transfer"]])
def test_help_names_what_to_write_after_a_flag_in_the_words_of_the_settings(
    path: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*path, "--help"]) == 0
    flags = re.findall(r"^  (?:-\w, )?--[\w-]+ (\S+)", capsys.readouterr().out, re.MULTILINE)
    assert flags
    for value in flags:
        assert re.fullmatch(r"INT|NUMBER|FILE|TEXT|SIZE(,\.\.\.)?|[\w|-]+\|[\w-]+|/", value), value


def test_help_says_what_a_flag_takes_and_what_it_is_without(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--kv-cache-memory SIZE" in shown
    assert "--enable-prefix-caching / --no-enable-prefix-caching Keep blocks of finished requests" in shown
    assert "reuse equal prefixes [default: on]" in shown
    assert "every step runs the model's Python [default: off]" in shown


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_a_line_of_the_command_list_is_whole(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*group, "--help"]) == 0
    assert "..." not in capsys.readouterr().out.replace("[ARGS]...", "")


def test_help_of_the_benchmark_names_all_that_it_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "transfer", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())  # names are broken at their hyphens
    assert [name for name in (*ALL, *(f"{case}{case_nbytes(case)}" for case in CASES)) if name not in shown] == []


def case_nbytes(name: str) -> str:
    return f"{CASES[name].nbytes / (1 << 20):.3g}MiB"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from disagg.cli.main import main; main(['up', '--help']); "
        "print(sorted({'torch', 'transformers', 'zmq', 'starlette', 'aiohttp', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "disagg", "version"], capture_output=True, text=True, check=True)
    assert done.stdout == __version__ + "\n"


def test_a_secret_is_never_taken_from_argv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such option: --secret" in refusal(["router", "--secret", "0123456789abcdef"], capsys)
