"""A worker looks at its device before it loads a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from disagg.cli.main import main
from disagg.config.errors import ConfigError
from disagg.config.settings import WorkerSettings
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.worker import build
from disagg.worker.device import check_device


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for torch.cuda: how many devices there are and what using one raises."""
    machine = SimpleNamespace(count=2, error=None)

    def zeros(*_: object, device: str) -> None:
        if machine.error is not None:
            raise machine.error

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.count)
    monkeypatch.setattr(torch, "zeros", zeros)
    return machine


def test_devices_that_are_there_are_taken(cuda: SimpleNamespace) -> None:
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_device(name)


def test_devices_that_are_not_are_a_sentence(cuda: SimpleNamespace) -> None:
    with pytest.raises(
        ConfigError, match="`--device` is `cuda:7`: there is no `cuda:7`, GPUs here are cuda:0 to cuda:1"
    ):
        check_device("cuda:7")
    cuda.count = 0
    with pytest.raises(ConfigError, match="no GPU can be used here"):
        check_device("cuda")


def test_a_device_that_cannot_be_used_is_the_drivers_first_line(cuda: SimpleNamespace) -> None:
    cuda.error = RuntimeError("CUDA error: no kernel image is available\nCompile with TORCH_USE_CUDA_DSA")
    with pytest.raises(
        ConfigError, match="cannot be used: CUDA error: no kernel image is available; give another device"
    ):
        check_device("cuda:0")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is no CPU build")
@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_a_worker_without_its_device_ends_with_a_sentence(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([role, "--insecure", "--device", "cuda:0"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("ts=")]
    assert said == [
        "disagg: `--device` is `cuda:0`: the installed PyTorch is a build for CPUs only; give another device, or `cpu`"
    ]


def test_a_worker_makes_its_engine_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the calling thread's device, wherever the tensors lie."""
    order: list[str] = []

    def resolve(_: str) -> None:
        order.append("model")
        raise ConfigError("far enough")

    monkeypatch.setattr(build, "check_device", lambda name: order.append(f"check {name}"))
    monkeypatch.setattr(build, "resolve_model", resolve)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: order.append(f"use {index}"))
    with pytest.raises(ConfigError, match="far enough"):
        build.make_engine(WorkerSettings(device="cuda:1"), "decode", ClusterKeys.published(), order.append)
    assert order == ["check cuda:1", "use 1", "model"]
