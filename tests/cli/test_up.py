"""What `disagg up` tells its processes and its user."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import aiohttp
import pytest

from disagg.cli import up as up_module
from disagg.cli.child import ChildSpec
from disagg.cli.supervisor import ClusterError
from disagg.cli.up import LocalCluster, WorkerPair, child_environment, curl, pairs_of, summary
from disagg.config.load import SWITCHES, unknown_variables
from disagg.config.resources import num_cores, threads_by_role
from disagg.config.settings import UpSettings

ROUTER = {"url": "http://127.0.0.1:8000", "admin": "http://127.0.0.1:41000", "control": "tcp://127.0.0.1:42000"}
CONTROL_PORT = 42000


def cluster(**settings: object) -> LocalCluster:
    return LocalCluster(UpSettings.model_validate(settings), "/models/m", CONTROL_PORT)


def flag(spec: ChildSpec, name: str) -> str | None:
    return spec.argv[spec.argv.index(name) + 1] if name in spec.argv else None


def test_processes_are_started_with_a_safe_path() -> None:
    assert cluster().router(None).argv[1:5] == ("-P", "-m", "disagg", "router")


def test_there_are_as_many_workers_of_each_role_as_asked_for() -> None:
    names = [spec.name for spec in cluster(prefill=2, decode=1, both=1).workers()]
    assert names == ["prefill-0", "prefill-1", "decode-0", "both-0"]


def test_router_and_workers_are_told_one_control_port() -> None:
    assert {flag(spec, "--router") for spec in cluster().workers()} == {f"tcp://127.0.0.1:{CONTROL_PORT}"}
    assert flag(cluster().router(None), "--control-port") == str(CONTROL_PORT)


def test_a_router_that_starts_again_takes_the_ports_it_had() -> None:
    again = cluster(port=0).router(ROUTER)
    assert (flag(again, "--port"), flag(again, "--admin-port"), flag(again, "--control-port")) == (
        None,
        "41000",
        "42000",
    )
    assert flag(cluster(port=0).router(None), "--port") == "0"


def test_the_api_key_travels_in_the_environment_of_the_router_alone() -> None:
    started = cluster(api_key="hush")
    router, workers = started.router(None), started.workers()
    assert router.env["DISAGG_API_KEY"] == "hush"
    assert not any("hush" in " ".join(spec.argv) for spec in (router, *workers))
    assert not any("DISAGG_API_KEY" in spec.env for spec in workers)
    assert "hush" not in repr(router)


def test_children_do_not_read_the_settings_of_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"DISAGG_PORT": "1", "DISAGG_CONFIG": "x", "DISAGG_SECRET": "s", "HF_HOME": "/hf"}
    assert child_environment(environ) == {"HF_HOME": "/hf", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    monkeypatch.setenv("DISAGG_BLOCK_SIZE", "64")
    assert all("DISAGG_BLOCK_SIZE" not in spec.env for spec in cluster().workers())


def test_workers_share_memory_and_cores() -> None:
    workers = cluster(kv_cache_memory="90MiB", prefill=2, decode=1).workers()
    assert {flag(spec, "--kv-cache-memory") for spec in workers} == {str(30 << 20)}
    assert {flag(spec, "--memory-share") for spec in workers} == {"0.3333"}
    shares = threads_by_role({"prefill": 2, "decode": 1, "both": 0}, num_cores())
    expected = [str(shares[role]) for role in ("prefill", "prefill", "decode")]
    assert [flag(spec, "--threads") for spec in workers] == expected
    assert [spec.env["OMP_NUM_THREADS"] for spec in workers] == expected


def test_threads_may_be_told_by_role() -> None:
    def threads(**told: int) -> list[str]:
        return [flag(spec, "--threads") for spec in cluster(prefill=1, decode=1, both=1, **told).workers()]

    assert threads(threads=5) == ["5", "5", "5"]
    assert threads(threads=5, prefill_threads=7) == ["7", "5", "5"]
    assert threads(threads=5, decode_threads=2) == ["5", "2", "5"]


def test_workers_are_told_one_share_of_memory_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measuring for itself found another amount free, hence another length, and only the first could register."""
    measured = iter([900, 700, 500])
    monkeypatch.setattr(up_module, "default_kv_cache_nbytes", lambda: next(measured))
    started = cluster(prefill=2, decode=1)
    for _ in ("at first", "after a restart"):
        assert {flag(spec, "--kv-cache-memory") for spec in started.workers()} == {"300"}


def test_devices_are_dealt_in_turn_and_share_their_own_memory() -> None:
    workers = cluster(prefill=2, decode=2, prefill_devices="cuda:0,cuda:1", decode_devices="cuda:1").workers()
    assert [flag(spec, "--device") for spec in workers] == ["cuda:0", "cuda:1", "cuda:1", "cuda:1"]
    assert [flag(spec, "--memory-share") for spec in workers] == [None, "0.3333", "0.3333", "0.3333"]


@pytest.mark.parametrize(
    ("setting", "value", "flags"),
    [
        ("block_size", 32, ["--block-size", "32"]),
        ("check", True, ["--check"]),
        ("insecure", True, ["--insecure"]),
        ("planes", "zmq", ["--planes", "zmq"]),
        ("max_model_len", 128, ["--max-model-len", "128"]),
        ("log_level", "debug", ["--log-level", "debug"]),
    ],
)
def test_every_worker_is_told_what_up_was_told(setting: str, value: object, flags: list[str]) -> None:
    for spec in cluster(**{setting: value}).workers():
        assert " ".join(flags) in " ".join(spec.argv)


@pytest.mark.parametrize(
    ("setting", "value", "flags"),
    [
        ("max_attempts", 1, ["--max-attempts", "1"]),
        ("max_continuations", 2, ["--max-continuations", "2"]),
        ("no_continue", True, ["--no-continue"]),
        ("served_model_name", "tiny", ["--served-model-name", "tiny"]),
        ("host", "127.0.0.9", ["--host", "127.0.0.9"]),
        ("insecure", True, ["--insecure"]),
    ],
)
def test_the_router_is_told_what_up_was_told(setting: str, value: object, flags: list[str]) -> None:
    assert " ".join(flags) in " ".join(cluster(**{setting: value}).router(None).argv)


def test_the_environment_passes_proxies_on_for_model_downloads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert child_environment(os.environ)["HTTPS_PROXY"] == "http://proxy:1"


def test_links_are_read_from_the_list_of_workers() -> None:
    link = {"worker": "prefill-0", "plane": "shm", "state": "ready", "detail": "", "gb_per_s": 1.0}
    body = {"workers": [{"id": "prefill-0", "links": []}, {"id": "decode-0", "links": [link]}]}
    assert pairs_of(body) == [WorkerPair("prefill-0", "decode-0", "shm", "ready", "")]


def test_the_summary_says_where_what_and_how() -> None:
    worker = {"worker_id": "decode-0", "device": "cpu", "dtype": "float32"}
    worker |= {"threads": 1, "memory": 5 << 20, "max_model_len": 2048}
    lines = summary(UpSettings(), ROUTER, [worker], [WorkerPair("prefill-0", "decode-0", "shm", "ready", "")])
    assert lines[0] == "serving `demo` at http://127.0.0.1:8000 (admin: http://127.0.0.1:41000)"
    assert lines[1] == f"  decode-0: cpu in float32, 1 of {num_cores()} cores, 5 MiB of KV cache, max-model-len 2048"
    assert lines[2] == "  prefill-0 -> decode-0: shm"
    assert lines[3].startswith("curl http://127.0.0.1:8000/v1/completions")


def test_the_summary_says_what_is_left_for_prefixes_and_what_to_change_when_it_is_nothing() -> None:
    worker = {"worker_id": "decode-0", "device": "cpu", "dtype": "float32"}
    worker |= {"threads": 1, "memory": 5 << 20, "max_model_len": 2048}
    said = {"reuse": "0 of 256 blocks of full", "reuse_advice": "no prefix is kept"}
    lines = summary(UpSettings(), ROUTER, [worker | said], [])
    assert lines[2:4] == [
        "    for prefixes beside one running sequence: 0 of 256 blocks of full",
        "    note: no prefix is kept",
    ]


def test_the_summary_says_what_steps_take_of_a_gpu_and_why_there_are_no_graphs() -> None:
    worker = {
        "worker_id": "decode-0",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "threads": 1,
        "memory": 5 << 20,
        "max_model_len": 2048,
    }
    said = {"step_memory": 3 << 20, "eager": "capture failed: item waits for the device"}
    lines = summary(UpSettings(), ROUTER, [worker | said], [])
    assert "5 MiB of KV cache, 3 MiB for steps, max-model-len 2048" in lines[1]
    assert lines[2] == "    note: steps run without CUDA graphs: capture failed: item waits for the device"


class FailingSupervisor:
    def __init__(self, exc: Exception) -> None:
        self.exc = exc

    def __call__(self, *args: object) -> FailingSupervisor:
        return self

    async def run(self, work: object) -> int:
        raise self.exc


@pytest.mark.parametrize(
    ("exc", "words"),
    [
        (ClusterError("`router` exited with code 1"), "disagg: `router` exited with code 1"),
        (aiohttp.ClientError("status 503: no worker"), "disagg: status 503: no worker"),
        (TimeoutError(), "disagg: the router did not answer in time"),
    ],
)
def test_a_cluster_that_fails_ends_with_a_sentence_and_exit_code_1(
    exc: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(up_module, "Supervisor", FailingSupervisor(exc))
    assert up_module.up(UpSettings(port=0)) == 1
    assert capsys.readouterr().err == words + "\n"


def test_the_curl_line_does_not_show_the_key() -> None:
    line = curl(UpSettings(api_key="hush"), "http://127.0.0.1:1")
    assert "hush" not in line
    assert "Bearer YOUR_KEY" in line


@pytest.mark.parametrize(
    ("name", "module", "variable"),
    [
        ("DISAGG_KERNELS", "dispatch", "VARIABLE"),
        ("DISAGG_FUSED_QKV", "dispatch", "FUSED_VARIABLE"),
        ("DISAGG_NATIVE", "native", "VARIABLE"),
    ],
)
def test_switches_reach_the_workers_under_the_name_that_they_read(
    name: str, module: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(importlib.import_module(f"disagg.kernels.{module}"), variable) == name
    monkeypatch.setenv(name, "off")
    assert {spec.env[name] for spec in cluster().workers()} == {"off"}


def test_every_variable_that_the_documentation_names_is_one_that_up_knows() -> None:
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").glob("*.md"), *(root / "disagg").rglob("*.py")]
    named = {name for page in pages for name in re.findall(r"\bDISAGG_[A-Z_]*[A-Z]\b", page.read_text())}
    assert unknown_variables(dict.fromkeys(named, "")) == []
    assert named >= set(SWITCHES)
