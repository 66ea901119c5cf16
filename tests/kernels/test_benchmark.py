"""The benchmark of the kernels builds every case and counts who served it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from support.interpreter import missing_interpreter
from support.tools import load_script

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
    monkeypatch.setattr(kernels, "CPU", kernels.Sizes(4, 2, 16, torch.float32, 2, 40, (16,), 24, 3))
    with forced(name):
        found = {case.name: kernels.served_by(case, "cpu") for case in kernels.Bench("cpu").cases()}
    assert len(found) == 10
    expected = {"torch": "torch", "triton": "Triton"}[name]
    assert {who for case, who in found.items() if "SDPA" not in case} == {expected}


def test_a_silent_fall_back_on_cuda_is_an_error(kernels: ModuleType) -> None:
    case = kernels.Case("x", lambda: None, 1, "decode_attention")
    with pytest.raises(SystemExit, match="kernel decode_attention did not run"):
        kernels.served_by(case, "cuda")
