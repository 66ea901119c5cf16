"""Who serves a device, and that it is counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.model.interpreter import missing_interpreter

from disagg.kernels import dispatch, ops, reference
from disagg.kernels.dispatch import CALLS, backend, forced

CPU = torch.device("cpu")


def test_torch_serves_a_cpu() -> None:
    assert backend(CPU) is reference


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
def test_triton_serves_cuda_where_it_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend(torch.device("cuda", 0)).NAME == "triton"
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert backend(torch.device("cuda", 0)) is reference


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="expected cpu or cuda"):
        backend(torch.device("meta"))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="DISAGG_KERNELS='cuda': expected torch or triton"), forced("cuda"):
        pass


def test_what_is_forced_ends_with_the_block() -> None:
    with forced("torch"):
        assert backend(torch.device("cuda", 0)) is reference
    assert dispatch._forced is None


def test_every_call_is_counted_under_who_served_it() -> None:
    CALLS.clear()
    memory = torch.zeros(2, 3, dtype=torch.uint8)
    ops.scatter_slots(memory, torch.tensor([1]), torch.ones(1, 3, dtype=torch.uint8))
    assert CALLS == {"torch:scatter_slots": 1}


@pytest.mark.skipif(bool(missing_interpreter()), reason=str(missing_interpreter()))
def test_triton_on_a_cpu_without_its_interpreter_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg.kernels.triton.backend.INTERPRETED", False)
    memory = torch.zeros(2, 8, dtype=torch.uint8)
    with forced("triton"), pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before it is imported"):
        ops.gather_slots(memory, torch.tensor([1]), memory[:1].clone())


def test_without_triton_everything_imports_and_torch_serves() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from disagg.kernels.dispatch import backend, has_triton\n"
        "print(has_triton(), backend(torch.device('cuda')).NAME)"
    )
    paths = ":".join(path for path in sys.path if path)
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": paths})
    assert done.stdout.split() == ["False", "torch"], done.stderr
    assert "triton cannot be imported" in done.stderr
