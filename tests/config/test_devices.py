"""GPUs as the driver counts them, without torch."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg.cli.main import main
from disagg.cli.placement import DeviceAssignment
from disagg.config import devices
from disagg.config.errors import ConfigError
from disagg.config.load import load
from disagg.config.settings import UpSettings, WorkerSettings


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose driver counts so many GPUs, and a torch that was built for them."""
    machine = SimpleNamespace(count=2, build="cuda")
    monkeypatch.setattr(devices, "driver_count", lambda: machine.count)
    monkeypatch.setattr(devices, "torch_build", lambda: machine.build)
    return machine


def dealt(*roles: str, **told: object) -> list[str]:
    placement = DeviceAssignment(UpSettings.model_validate({"prefill": roles.count("prefill"), "both": 1, **told}))
    return [placement.next_device(role) for role in roles]  # type: ignore[arg-type]


def test_workers_take_the_gpus_in_turn_by_default_and_up_says_so(gpus: SimpleNamespace) -> None:
    assert dealt("prefill", "decode") == ["cuda:0", "cuda:1"]
    assert dealt("prefill", "prefill", "prefill", "decode", "both") == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    gpus.count = 1
    assert dealt("prefill", "decode") == ["cuda:0", "cuda:0"]
    assert DeviceAssignment(UpSettings()).sentence.startswith(
        "one GPU found, workers use cuda:0: `--prefill-devices cpu"
    )


def test_devices_that_were_told_come_before_gpus(gpus: SimpleNamespace) -> None:
    assert dealt("prefill", "decode", prefill_devices="cpu") == ["cpu", "cuda:1"]
    told = UpSettings.model_validate({"prefill_devices": "cpu", "decode_devices": "cpu"})
    assert DeviceAssignment(told).sentence == ""


@pytest.mark.parametrize(("count", "build"), [(0, "cuda"), (2, "cpu")])
def test_without_a_gpu_that_torch_can_use_workers_take_the_cpu(gpus: SimpleNamespace, count: int, build: str) -> None:
    gpus.count, gpus.build = count, build
    assert dealt("prefill", "decode") == ["cpu", "cpu"]
    assert DeviceAssignment(UpSettings()).sentence == ""


@pytest.mark.parametrize(
    ("count", "build", "told", "words"),
    [
        (0, "cuda", "cuda:0", "`--prefill-devices` is `cuda:0`: no GPU can be used here"),
        (2, "cpu", "cuda", "`--prefill-devices` is `cuda`: the installed PyTorch is a build for CPUs only"),
        (2, "cuda", "cuda:0,cuda:7", "is `cuda:0,cuda:7`: there is no `cuda:7`, GPUs here are cuda:0 to cuda:1; give"),
        (1, "cuda", "cuda:1", "there is no `cuda:1`, GPUs here are cuda:0 alone"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_a_process_starts(
    gpus: SimpleNamespace, count: int, build: str, told: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus.count, gpus.build = count, build
    assert main(["up", "--port", "0", "--prefill-devices", told]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_device_that_only_torch_can_count_is_left_to_the_worker(gpus: SimpleNamespace) -> None:
    gpus.build = "hip"
    devices.check_devices(("cuda:7",), "--prefill-devices")
    assert DeviceAssignment(UpSettings()).sentence == ""


@pytest.mark.parametrize("name", ["xpu", "mps", "cuda:", "cuda:-1", "cuda:01", "cuda:x", "CUDA", "cpu:0", "", "cuda:²"])
def test_other_devices_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        load(UpSettings, {"decode_devices": name}, {})
    with pytest.raises(ConfigError, match="expected `cpu`, `cuda` or `cuda:N`"):
        load(WorkerSettings, {"device": name or " "}, {})


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", "cuda"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n", "hip"),
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", "cpu"),
        ("cuda = '11.8'\n", "cuda"),
        ("", "cpu"),
    ],
)
def test_what_torch_was_built_for_is_read_from_its_version(
    text: str, build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(text)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert devices.torch_build() == build


def test_the_installed_torch_says_of_itself_what_is_read_from_its_file() -> None:
    import torch

    assert devices.torch_build() == ("cuda" if torch.version.cuda else "hip" if torch.version.hip else "cpu")


def test_no_driver_counts_nothing(tmp_path: Path) -> None:
    assert devices.driver_count("libno-such-driver.so.1") == 0
    assert devices.driver_count("libc.so.6") == 0  # a library that is none


def test_counting_gpus_does_not_import_torch() -> None:
    import subprocess

    code = "import sys; from disagg.config.devices import num_gpus; num_gpus(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
