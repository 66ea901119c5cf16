"""The benchmark of the kernels builds every case and counts who served it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support.model.interpreter import missing_interpreter
from support.tools import load_script

from disagg.kernels import native_attention
from disagg.kernels.dispatch import forced


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load_script("benchmarks/kernels.py")


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_every_case_runs_and_says_who_served_it(
    name: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    small = (torch.float8_e4m3fn, torch.int8)
    sizes = kernels.Sizes(4, 2, 16, torch.float32, 2, 40, (16,), 24, 24 << 10, (8 << 10, 12 << 10), small)
    monkeypatch.setattr(kernels, "CPU", sizes)
    with forced(name), native_attention.left_out():
        found = {case.name: kernels.served_by(case, "cpu") for case in kernels.Bench("cpu").cases()}
    assert len(found) == 4 + 4 + 2 + 2 * 3 - (name == "triton") + 2 * 2 + 4
    expected = {"torch": "torch", "triton": "Triton"}[name]
    assert {who for case, who in found.items() if "SDPA" not in case} == {expected}


def test_some_kernels_may_be_chosen_and_rows_are_a_table(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = kernels.Sizes(4, 2, 16, torch.float32, 2, 40, (16,), 24, 24 << 10, (8 << 10,), ())
    monkeypatch.setattr(kernels, "CPU", sizes)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda *_: 1e10)
    kernels.main(["--device", "cpu", "--repeats", "1", "--only", "gather"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| gather: 3 slots of 8 KiB", "| scatter: 3 slots of 8 KiB"]
    assert {row.count("|") for row in rows} == {6}


def test_a_case_that_runs_nothing_of_ours_is_an_error(kernels: ModuleType) -> None:
    with pytest.raises(SystemExit, match="nothing was counted"):
        kernels.served_by(kernels.Case("x", lambda: None, 1, "gather_slots"), "cpu")


def test_a_silent_fall_back_on_cuda_is_an_error(kernels: ModuleType) -> None:
    case = kernels.Case("x", lambda: None, 1, "decode_attention")
    with pytest.raises(SystemExit, match="kernel decode_attention did not run"):
        kernels.served_by(case, "cuda")
