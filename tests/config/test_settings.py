"""Every field of every settings class takes effect from flag, environment and YAML, in this order of precedence."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
import yaml

from disagg.cli.options import command
from disagg.config.demo import demo_model_folder
from disagg.config.errors import ConfigError
from disagg.config.load import (
    COMMANDS,
    SWITCHES,
    check_switches,
    flag_of,
    load,
    off_flag_of,
    to_flags,
    unknown_variables,
    variable_of,
)
from disagg.config.settings import DemoSettings, HttpSettings, RouterSettings, Settings, UpSettings, WorkerSettings

# field -> (as written, as parsed, another way to write another value)
SAMPLES: dict[str, tuple[str, object, str]] = {
    "model": ("some/folder", "some/folder", "other/folder"),
    "insecure": ("true", True, "false"),
    "log_level": ("debug", "debug", "error"),
    "secret_file": ("/run/secret", Path("/run/secret"), "/run/other"),
    "host": ("127.0.0.2", "127.0.0.2", "127.0.0.3"),
    "port": ("8123", 8123, "8124"),
    "served_model_name": ("tiny", "tiny", "large"),
    "api_key": ("k1", "k1", "k2"),
    "api_key_file": ("/run/keys", Path("/run/keys"), "/run/others"),
    "api_processes": ("2", 2, "0"),
    "max_attempts": ("1", 1, "2"),
    "max_continuations": ("2", 2, "3"),
    "no_continue": ("true", True, "false"),
    "request_timeout_s": ("2.5", 2.5, "3"),
    "max_queued": ("7", 7, "8"),
    "policy": ("round-robin", "round-robin", "least-loaded"),
    "max_local_prefill": ("64", 64, "65"),
    "kv_events": ("127.0.0.1:5557", "tcp://127.0.0.1:5557", "tcp://localhost:0"),
    "kv_events_tokens": ("true", True, "false"),
    "kv_events_keys": ("/run/subscribers", Path("/run/subscribers"), "/run/others"),
    "connect": ("lazy", "lazy", "eager"),
    "admin_port": ("8125", 8125, "8126"),
    "control_host": ("127.0.0.4", "127.0.0.4", "127.0.0.5"),
    "control_port": ("8127", 8127, "8128"),
    "dtype": ("float32", "float32", "bfloat16"),
    "kv_cache_dtype": ("fp8", "fp8_e4m3", "float16"),
    "kv_scales": ("/run/scales.json", Path("/run/scales.json"), "/run/other.json"),
    "block_size": ("32", 32, "64"),
    "max_model_len": ("99", 99, "98"),
    "max_num_seqs": ("3", 3, "4"),
    "max_num_batched_tokens": ("128", 128, "129"),
    "kv_cache_memory": ("1.5GiB", 3 << 29, "1MiB"),
    "tensor_parallel_size": ("1", 1, "1"),
    "planes": ("zmq", ("zmq",), "zmq,shm"),
    "fetch_wait_s": ("0.5", 0.5, "1"),
    "prefix_recheck_s": ("1.5", 1.5, "9"),
    "drain_timeout_s": ("7.5", 7.5, "8"),
    "verify_weights": ("true", True, "false"),
    "check": ("true", True, "false"),
    "piecewise_graphs": ("true", True, "false"),
    "overlap_steps": ("true", True, "false"),
    "torch_compile": ("true", True, "false"),
    "enforce_eager": ("true", True, "false"),
    "enable_prefix_caching": ("false", False, "true"),
    "router": ("10.0.0.1:9", "tcp://10.0.0.1:9", "tcp://r:10"),
    "worker_id": ("p-1", "p-1", "p-2"),
    "advertise_host": ("node7", "node7", "node8"),
    "device": ("cuda:1", "cuda:1", "cuda"),
    "threads": ("3", 3, "4"),
    "prefill_threads": ("3", 3, "4"),
    "decode_threads": ("3", 3, "4"),
    "memory_share": ("0.25", 0.25, "0.5"),
    "prefill": ("2", 2, "3"),
    "decode": ("4", 4, "5"),
    "both": ("1", 1, "2"),
    "prefill_devices": ("cuda:0,cuda:1", ("cuda:0", "cuda:1"), "cpu"),
    "decode_devices": ("cuda", ("cuda",), "cpu,cpu"),
    "prompt_len": ("77", 77, "78"),
    "cached": ("full=3,window-8=2", ("full=3", "window-8=2"), "full=4"),
    "swa_scratch": ("reuse", "reuse", "on"),
    "budget": ("1KiB,2048", (1024, 2048), "3"),
    "rates": ("/run/rates.json", Path("/run/rates.json"), "/run/other.json"),
    "fleets": ("1p2d,4b", ("1p2d", "4b"), "2p2d"),
    "policies": ("round-robin", ("round-robin",), "least-loaded,prefix-aware"),
    "cores": ("2", 2, "3"),
    "speed": ("2.5", 2.5, "3"),
    "ttft": ("0.5", 0.5, "1"),
    "itl": ("0.05", 0.05, "0.2"),
    "plots": ("/run/plots", Path("/run/plots"), "/run/others"),
    "requests": ("10", 10, "11"),
    "rate": ("0.5", 0.5, "4"),
    "prompt": ("100", 100, "101"),
    "answer": ("20", 20, "21"),
    "seed": ("7", 7, "8"),
    "write_trace": ("/run/trace.jsonl", Path("/run/trace.jsonl"), "/run/other.jsonl"),
    "rounds": ("3", 3, "4"),
    "serving": ("false", False, "true"),
}
FIELDS = [(cls, field) for cls in COMMANDS for field in cls.model_fields]
EVERY_FIELD = pytest.mark.parametrize(("cls", "field"), FIELDS, ids=[f"{c.__name__}-{f}" for c, f in FIELDS])


def parse(cls: type[Settings], argv: list[str]) -> Settings:
    """What the command line `argv` gives, through the real options."""
    seen: list[Settings] = []
    app = typer.Typer()
    app.command()(command(cls, lambda settings: seen.append(settings) or 0))
    assert app(argv, standalone_mode=False) == 0
    return seen[0]


def as_flag(field: str, text: str) -> list[str]:
    if isinstance(SAMPLES[field][1], bool):
        return [flag_of(field) if text == "true" else off_flag_of(field)]
    return [flag_of(field), text]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in SAMPLES:
        monkeypatch.delenv(variable_of(field), raising=False)
    monkeypatch.delenv("DISAGG_CONFIG", raising=False)


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_samples_cover_every_field() -> None:
    assert set(SAMPLES) == {field for _, field in FIELDS}


@EVERY_FIELD
def test_a_flag_sets_its_field(cls: type[Settings], field: str) -> None:
    text, value, _ = SAMPLES[field]
    assert getattr(parse(cls, as_flag(field, text)), field) == value


@EVERY_FIELD
def test_a_variable_sets_its_field(cls: type[Settings], field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value, _ = SAMPLES[field]
    monkeypatch.setenv(variable_of(field), text)
    assert getattr(parse(cls, []), field) == value


@EVERY_FIELD
def test_a_yaml_key_sets_its_field(cls: type[Settings], field: str, tmp_path: Path) -> None:
    text, value, _ = SAMPLES[field]
    native = list(value) if isinstance(value, tuple) else yaml.safe_load(text)
    for number, content in enumerate((text, native)):
        path = write(tmp_path / f"{number}.yaml", **{field: content})
        assert getattr(parse(cls, ["--config", str(path)]), field) == value


@EVERY_FIELD
def test_a_flag_beats_a_variable_and_a_variable_beats_the_file(
    cls: type[Settings], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, value, other = SAMPLES[field]
    path = write(tmp_path / "config.yaml", **{field: other})
    monkeypatch.setenv(variable_of(field), text)
    assert getattr(parse(cls, ["--config", str(path)]), field) == value
    monkeypatch.setenv(variable_of(field), other)
    assert getattr(parse(cls, ["--config", str(path), *as_flag(field, text)]), field) == value


@EVERY_FIELD
def test_flags_made_from_settings_give_the_settings_again(cls: type[Settings], field: str) -> None:
    settings = load(cls, {field: SAMPLES[field][0]}, {})
    assert parse(cls, to_flags(settings)) == settings


@EVERY_FIELD
def test_a_field_is_explained_to_the_user(cls: type[Settings], field: str) -> None:
    assert cls.model_fields[field].description


def test_the_file_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_CONFIG", str(write(tmp_path / "config.yaml", block_size=64)))
    assert parse(WorkerSettings, []).block_size == 64


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load(WorkerSettings, {}, {"DISAGG_BLOCK_SIZE": ""}).block_size == 16


@pytest.mark.parametrize(
    ("cls", "flags", "sentence"),
    [
        (WorkerSettings, {"block_size": "12"}, "`--block-size` is `12`: expected a power of two, such as 16 or 32"),
        (WorkerSettings, {"block_size": "many"}, "`--block-size` is `many`: expected a whole number"),
        (WorkerSettings, {"block_size": "0"}, "`--block-size` is `0`: expected greater than or equal to 1"),
        (WorkerSettings, {"kv_cache_memory": "2GX"}, "`--kv-cache-memory` is `2GX`: expected bytes such as `512MiB`"),
        (
            WorkerSettings,
            {"planes": "zmq,rdma"},
            "`--planes` is `zmq,rdma`: expected one or more of shm, tcp, ucx, zmq",
        ),
        (WorkerSettings, {"planes": "zmq,zmq"}, "each once"),
        (WorkerSettings, {"tensor_parallel_size": "2"}, "workers of several ranks are not supported"),
        (WorkerSettings, {"device": "tpu"}, "`--device` is `tpu`: expected `cpu`, `cuda` or `cuda:N`"),
        (WorkerSettings, {"router": "somewhere"}, "`--router` is `somewhere`: expected the router's control endpoint"),
        (WorkerSettings, {"router": "host:70000"}, "`tcp://HOST:PORT`"),
        (WorkerSettings, {"worker_id": "a b"}, "`--worker-id` is `a b`: expected at most 128 letters"),
        (WorkerSettings, {"host": "0.0.0.0"}, "`--host`: `0.0.0.0` is no address a peer can connect to"),
        (WorkerSettings, {"insecure": True, "host": "10.0.0.1"}, "`--host`: `10.0.0.1` is not loopback"),
        (WorkerSettings, {"insecure": True, "router": "10.0.0.1:1"}, "`--router`: `10.0.0.1` is not loopback"),
        (RouterSettings, {"insecure": True, "control_host": "0.0.0.0"}, "`--control-host`: `0.0.0.0` is not loopback"),
        (RouterSettings, {"port": "70000"}, "`--port` is `70000`: expected less than or equal to 65535"),
        (RouterSettings, {"log_level": "loud"}, "`--log-level` is `loud`: expected 'debug', 'info'"),
        (RouterSettings, {"model": ""}, "`--model` is ``: expected a value"),
        (UpSettings, {"decode": "0"}, "no worker could answer"),
        (UpSettings, {"prefill_devices": "cpu,gpu"}, "`--prefill-devices` is `cpu,gpu`: expected `cpu`, `cuda`"),
        (UpSettings, {"prefill_devices": ""}, "`--prefill-devices` is ``: expected a value"),
    ],
)
def test_a_bad_value_is_one_sentence_with_origin_value_and_expectation(
    cls: type[Settings], flags: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(cls, flags, {})
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sentence_names_the_variable_or_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`DISAGG_PORT` is `x`: expected a whole number"):
        load(RouterSettings, {}, {"DISAGG_PORT": "x"})
    path = write(tmp_path / "r.yaml", port="x")
    with pytest.raises(ConfigError, match=rf"`port` in `{path}` is `x`"):
        load(RouterSettings, {}, {}, path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("blok_size: 16", "`blok_size` in `.*` is no setting of this command: did you mean `block_size`"),
        ("zzz: 16", "`zzz` in `.*` is no setting of this command: see its `--help`"),
        ("1: 16", "`1` in `.*` is no setting"),
        ("[1, 2]", "holds a list: expected lines of `key: value`"),
        ("a: [", "is not YAML: "),
        ("api_key: x", "no setting of this command"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load(WorkerSettings, {}, {}, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`--config` cannot be read: `.*none.yaml`: no such file"):
        load(WorkerSettings, {}, {}, tmp_path / "none.yaml")


def test_an_empty_file_and_empty_keys_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "keys.yaml").write_text("block_size:\n")
    for name in ("empty.yaml", "keys.yaml"):
        assert load(WorkerSettings, {}, {}, tmp_path / name) == load(WorkerSettings, {}, {})


def test_misspelt_variables_are_found() -> None:
    known = {variable_of(field): "" for field in SAMPLES} | {"DISAGG_SECRET": "", "DISAGG_CONFIG": "", "HOME": ""}
    assert unknown_variables(known | {"DISAGG_BLOK_SIZE": "1"}) == ["DISAGG_BLOK_SIZE"]


def test_the_bundled_model_is_served_as_demo() -> None:
    settings = load(UpSettings, {}, {})
    assert settings.model == str(demo_model_folder())
    assert settings.served_name == "demo"
    assert load(UpSettings, {"model": "org/name"}, {}).served_name == "org/name"
    assert load(UpSettings, {"served_model_name": "mine"}, {}).served_name == "mine"


def test_a_worker_without_a_name_is_named_after_role_host_and_pid() -> None:
    assert load(WorkerSettings, {"worker_id": "w"}, {}).name("decode") == "w"
    assert load(WorkerSettings, {}, {}).name("decode").startswith("decode-")


def test_peers_are_told_the_advertised_address() -> None:
    assert load(WorkerSettings, {"host": "0.0.0.0", "advertise_host": "node7"}, {}).peer_host == "node7"
    assert load(WorkerSettings, {"host": "10.0.0.9"}, {}).peer_host == "10.0.0.9"


def test_the_demo_takes_free_ports() -> None:
    settings = load(DemoSettings, {}, {})
    assert (settings.port, settings.admin_port, settings.control_port) == (0, 0, 0)


def test_the_api_key_is_not_printed() -> None:
    assert "hush" not in repr(load(RouterSettings, {"api_key": "hush"}, {}))


KEY_CLASSES = (RouterSettings, UpSettings, DemoSettings)


@pytest.mark.parametrize("cls", KEY_CLASSES)
@pytest.mark.parametrize("key", ["secret\n", "secret\r\n", " secret", "\tsecret \n\n"])
def test_white_space_around_a_key_is_no_part_of_it(cls: type[HttpSettings], key: str, tmp_path: Path) -> None:
    """A Kubernetes secret made with `echo` ends with a newline, which no client can send."""
    assert load(cls, {"api_key": key}, {}).api_key == "secret"
    assert load(cls, {}, {"DISAGG_API_KEY": key}).api_key == "secret"
    assert load(cls, {}, {}, write(tmp_path / "c.yaml", api_key=key)).api_key == "secret"


@pytest.mark.parametrize(
    "key", ["se\ncret", "se\x00cret", "se\x7fcret", "\x1b[1m", "🦙secret", "secret\udcff", "\n", "  "]
)
def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(key: str) -> None:
    for flags, environ in (({"api_key": key}, {}), ({}, {"DISAGG_API_KEY": key})):
        with pytest.raises(
            ConfigError, match=r"^`(--api-key|DISAGG_API_KEY)`: it (has characters|holds nothing)"
        ) as caught:
            load(RouterSettings, flags, environ)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "\n", "a\nb", "\udcff", "a\x00"])
def test_a_name_that_no_answer_can_hold_is_refused(name: str) -> None:
    """Bytes of a command line that are no UTF-8 become text that JSON cannot encode."""
    with pytest.raises(ConfigError, match=r"(?s)^`--served-model-name` is `.*`: expected") as caught:
        load(RouterSettings, {"served_model_name": name or " "}, {})
    assert "line of printable text" in str(caught.value)
    assert load(RouterSettings, {"served_model_name": "modèle-🦙\n"}, {}).served_model_name == "modèle-🦙"


def test_a_key_of_the_wrong_type_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`api_key` in `.*`: expected a valid string") as caught:
        load(RouterSettings, {}, {}, write(tmp_path / "c.yaml", api_key=[4711]))
    assert "4711" not in str(caught.value)


SERVICE = {
    "DISAGG_SERVICE_HOST": "10.0.0.1",
    "DISAGG_SERVICE_PORT": "8000",
    "DISAGG_SERVICE_PORT_HTTP": "8000",
    "DISAGG_PORT": "tcp://10.0.0.1:8000",
    "DISAGG_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "DISAGG_PORT_8000_TCP_PROTO": "tcp",
    "DISAGG_PORT_8000_TCP_PORT": "8000",
    "DISAGG_PORT_8000_TCP_ADDR": "10.0.0.1",
    "DISAGG_ADMIN_PORT": "tcp://10.0.0.2:8001",
    "DISAGG_CONTROL_PORT": "udp://[fd00::1]:8998",
    "DISAGG_ROUTER_SERVICE_HOST": "10.0.0.3",
    "DISAGG_ROUTER_PORT": "tcp://10.0.0.3:8998",
    "DISAGG_ROUTER_PORT_8998_TCP_ADDR": "10.0.0.3",
}


@pytest.mark.parametrize("cls", COMMANDS)
def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting(cls: type[Settings]) -> None:
    """Each container is told of each service, and one called `disagg` is told as `DISAGG_PORT=tcp://...`."""
    assert load(cls, {}, SERVICE) == load(cls, {}, {})
    assert unknown_variables(SERVICE) == []


def test_settings_that_look_like_a_service_stay_settings() -> None:
    environ = {"DISAGG_ROUTER": "tcp://10.0.0.1:8998", "DISAGG_HOST": "10.0.0.9"}
    settings = load(WorkerSettings, {}, environ)
    assert (settings.router, settings.host) == ("tcp://10.0.0.1:8998", "10.0.0.9")
    assert load(RouterSettings, {}, {"DISAGG_PORT": "8123"}).port == 8123
    assert unknown_variables({"DISAGG_PROT": "tcp://10.0.0.1:8000"}) == ["DISAGG_PROT"]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_with_a_value_that_it_does_not_have_is_refused(name: str) -> None:
    for value in (*SWITCHES[name], ""):
        check_switches({name: value})
    with pytest.raises(ConfigError, match=f"`{name}` is `maybe`: expected .* or .*, or leave it unset"):
        check_switches({name: "maybe"})
