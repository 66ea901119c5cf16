"""What no worker can be started with: the same sentence from `disagg plan` and from the worker, and exit code 2."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.model.checkpoints import edit_json
from support.model.families import save_family

from disagg.cli.main import main

COMMANDS = {
    "plan": ["plan"],
    **{role: [role, "--insecure", "--threads", "1"] for role in ("prefill", "decode", "both")},
}
BUDGET_FLAG = {"plan": "--budget"}
PER_TOKEN = 4 * 2 * 2 * 16 * 4  # layers, K and V, heads, dimensions, bytes
ENOUGH = (256 + 2 * 16) * PER_TOKEN  # two blocks of 16 are reserved

MISTAKES: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a window of nothing": (
        {"sliding_window": 0},
        [],
        "layer 0: window 0, expected at least 1, the query itself; give the window the model was trained with",
    ),
    "a window below nothing": ({"sliding_window": -7}, [], "layer 0: window -7, expected at least 1"),
    "a block size between powers of two": (
        {},
        ["--block-size", "24"],
        "`--block-size` is `24`: expected a power of two, such as 16 or 32",
    ),
    "a length beyond the model": (
        {},
        ["--max-model-len", "600"],
        "`--max-model-len`: 600, but the model was made for at most 512 tokens; give 512 or less",
    ),
    "memory for less than a sequence": (
        {"sliding_window": None},
        ["--max-model-len", "256", "--kv-cache-memory", "128KiB"],
        f"`--kv-cache-memory`: 131072 bytes, but one sequence of 256 tokens needs {ENOUGH}; "
        f"give at least {ENOUGH}, or `--max-model-len` of at most 96",
    ),
    "memory for less than a token": (
        {"sliding_window": None},
        ["--max-model-len", "256", "--kv-cache-memory", "1KiB"],
        f"`--kv-cache-memory`: 1024 bytes, but one sequence of 256 tokens needs {ENOUGH}; give at least {ENOUGH}",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("mistral", tmp_path_factory.mktemp("mistral"))


@pytest.fixture(autouse=True)
def _keep_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_one_sentence_with_the_numbers_and_what_would_work(
    mistake: str, command: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, flags, sentence = MISTAKES[mistake]
    config = (model / "config.json").read_text()
    edit_json(model / "config.json", **changes)
    memory = BUDGET_FLAG.get(command, "--kv-cache-memory")
    own = [memory if flag == "--kv-cache-memory" else flag for flag in flags]
    try:
        assert main([*COMMANDS[command], "--model", str(model), "--dtype", "float32", *own]) == 2
    finally:
        (model / "config.json").write_text(config)
    captured = capsys.readouterr()
    said = [line.removeprefix("disagg: ") for line in captured.err.splitlines() if line.startswith("disagg: ")]
    assert len(said) == 1, captured.err
    assert said[0].startswith(sentence.replace("--kv-cache-memory", memory))
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert "exc=" not in captured.err
