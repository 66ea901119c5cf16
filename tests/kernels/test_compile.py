"""The kernels compile for NVIDIA hardware, which triton does without any: tensor cores, vectors, nothing spilled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support/model/compile_kernels.py"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def compiled(folder: Path, *arguments: str) -> dict[str, dict[str, int | bool]]:
    """By variant, what ptxas says. A fresh process: where the interpreter is on, nothing is compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": ":".join(path for path in sys.path if path)}
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(arguments[1:]) <= set(found)
    return found


def assert_fit_for_speed(found: dict[str, dict[str, int | bool]]) -> None:
    for name, variant in found.items():
        assert variant["spilled"] == 0, name
        assert variant["vectors"] or name == "merge_splits", name
        # Two programs of decode on one multiprocessor of 227 KiB, one of prefill.
        assert int(variant["shared"]) <= (227 << 10) // (2 if name.startswith("decode") else 1), name
        is_attention = name.startswith(("decode", "prefill"))
        assert variant["tensor_cores"] == (is_attention and "fp32" not in name), name


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    names = ["decode split", "prefill", "preprocess_qkv fp8", "copy_units", "gather_slots", "sampling"]
    assert_fit_for_speed(compiled(tmp_path, "90", *names))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_variant_compiles_for_hopper(tmp_path: Path) -> None:
    found = compiled(tmp_path, "90")
    assert len(found) > 20
    assert_fit_for_speed(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compile_for_ampere_and_blackwell(tmp_path: Path) -> None:
    names = ("decode split", "prefill", "preprocess_qkv", "copy_units")
    assert compiled(tmp_path, "80", *names, "decode int8", "preprocess_qkv int8")  # where fp8 is missing
    assert compiled(tmp_path, "100", *names)
