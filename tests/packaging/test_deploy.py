"""The files of deploy/ hold together: no container engine is needed to see that."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml
from support.tools import load_script

from disagg.config.load import load
from disagg.config.settings import RouterSettings, Settings, WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SETTINGS: dict[str, type[Settings]] = {
    "router": RouterSettings,
    "prefill": WorkerSettings,
    "decode": WorkerSettings,
}

DURATION = {"type": "string", "pattern": r"^(\d+(ms|s|m|h))+$"}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["image", "command", "environment", "healthcheck", "secrets"],
    "properties": {
        "image": {"type": "string"},
        "build": {
            "type": "object",
            "additionalProperties": False,
            "required": ["context"],
            "properties": {
                "context": {"type": "string"},
                "dockerfile": {"type": "string"},
                "args": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}},
            },
        },
        "command": TEXTS,
        "environment": {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}},
        "ports": {**TEXTS, "items": {"type": "string", "pattern": r"^(([\d.]+:)?\d+:)?\d+$"}},
        "user": {"type": "string"},
        "init": {"type": "boolean"},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
        "stop_grace_period": DURATION,
        "secrets": TEXTS,
        "cap_drop": TEXTS,
        "security_opt": TEXTS,
        "depends_on": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["condition"],
                "properties": {
                    "condition": {"enum": ["service_started", "service_healthy", "service_completed_successfully"]}
                },
            },
        },
        "healthcheck": {
            "type": "object",
            "additionalProperties": False,
            "required": ["test"],
            "properties": {
                "test": {**TEXTS, "prefixItems": [{"enum": ["CMD", "CMD-SHELL", "NONE"]}]},
                "interval": DURATION,
                "timeout": DURATION,
                "start_period": DURATION,
                "retries": {"type": "integer", "minimum": 1},
            },
        },
    },
}
COMPOSE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["services"],
    "patternProperties": {"^x-": {}},
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "additionalProperties": SERVICE},
        "secrets": {
            "type": "object",
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["file"],
                "properties": {"file": {"type": "string"}},
            },
        },
    },
}
"""What compose.yaml uses of the compose specification, in the specification's own terms."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_compose_file_follows_the_specification(compose: dict[str, Any]) -> None:
    jsonschema.validate(compose, COMPOSE, cls=jsonschema.Draft202012Validator)


def test_the_schema_refuses_a_misspelt_key(compose: dict[str, Any]) -> None:
    router = {**compose["services"]["router"], "helthcheck": {}}
    wrong = {**compose, "services": {**compose["services"], "router": router}}
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate(wrong, COMPOSE, cls=jsonschema.Draft202012Validator)


def test_the_compose_file_refers_only_to_what_it_defines(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert set(service["secrets"]) <= compose["secrets"].keys()
        assert service.get("depends_on", {}).keys() <= compose["services"].keys()
        build = DEPLOY / service["build"]["context"]
        assert (build / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", ["router", "prefill", "decode"])
def test_each_service_is_a_command_with_settings_that_load(compose: dict[str, Any], name: str, tmp_path: Path) -> None:
    service = compose["services"][name]
    assert service["command"] == [name]
    environ = {key: str(value) for key, value in service["environment"].items()}
    assert {key.removeprefix("DISAGG_").lower() for key in environ} <= SETTINGS[name].model_fields.keys()
    settings = load(SETTINGS[name], {}, environ)
    assert settings.model_dump()["secret_file"] == Path("/run/secrets/cluster")


def test_no_secret_is_written_into_a_file_of_deploy() -> None:
    for path in DEPLOY.rglob("*"):
        if path.is_file():
            assert not re.search(r"^\s*(DISAGG_)?(SECRET|API_KEY)\s*[:=]\s*\S", path.read_text(), re.M | re.I), path


def test_secret_files_are_ignored_by_git() -> None:
    assert "*.secret" in (ROOT / ".gitignore").read_text().splitlines()


def test_workers_are_known_and_reached_by_their_own_names(compose: dict[str, Any]) -> None:
    workers = {name: service["environment"] for name, service in compose["services"].items() if name != "router"}
    assert len({environment["DISAGG_WORKER_ID"] for environment in workers.values()}) == len(workers)
    assert all(environment["DISAGG_ADVERTISE_HOST"] == name for name, environment in workers.items())


@pytest.mark.parametrize("name", ["router", "prefill", "decode"])
def test_a_two_machine_config_loads(name: str) -> None:
    path = DEPLOY / "two-machines" / f"{name}.yaml"
    settings = load(SETTINGS[name], {}, {}, path)
    given = yaml.safe_load(path.read_text())
    assert given.keys() <= settings.model_fields_set
    assert not settings.insecure


@pytest.mark.parametrize("name", ["router", "prefill", "decode"])
def test_settings_that_are_commented_out_exist_too(name: str) -> None:
    text = (DEPLOY / "two-machines" / f"{name}.yaml").read_text()
    assert set(re.findall(r"^# (\w+): \S", text, re.MULTILINE)) <= SETTINGS[name].model_fields.keys()


def test_the_two_machines_agree_on_what_must_be_equal() -> None:
    folder = DEPLOY / "two-machines"
    router, prefill, decode = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in SETTINGS)
    for key in ("model", "dtype", "block_size", "max_model_len", "router", "secret_file"):
        assert prefill[key] == decode[key]
    assert router["model"] == prefill["model"]
    assert prefill["router"] == f"tcp://{router['control_host']}:{router['control_port']}"
    assert prefill["host"] != decode["host"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_copies_only_what_exists() -> None:
    sources = [
        source
        for instruction, arguments in instructions()
        if instruction == "COPY" and "--from=" not in arguments
        for source in arguments.split()[:-1]
    ]
    assert "disagg" in sources
    missing = [source for source in sources if source != "README.md" and not (ROOT / source).exists()]
    assert missing == []


def test_what_the_dockerfile_copies_is_let_into_the_build_context() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    for instruction, arguments in instructions():
        if instruction == "COPY" and "--from=" not in arguments:
            assert {f"!{source}" for source in arguments.split()[:-1]} <= set(lines)


def test_the_image_runs_disagg_as_an_ordinary_user_in_exec_form() -> None:
    by_name = dict(instructions())
    assert by_name["USER"] not in {"root", "0"}
    assert json.loads(by_name["ENTRYPOINT"]) == ["disagg"]
    assert json.loads(by_name["CMD"])[0] == "up"
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert set(names) <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


def test_arguments_are_declared_in_the_stage_that_uses_them() -> None:
    declared: set[str] = set()
    known_to_docker = {"PATH"}
    for instruction, arguments in instructions():
        used = set(re.findall(r"\$\{(\w+)", arguments))
        assert used <= declared | known_to_docker, (instruction, used - declared)
        if instruction == "FROM":
            declared = {"PYTHON_VERSION"}
        if instruction == "ARG":
            declared.add(arguments.split("=")[0])


def test_the_torch_of_the_image_is_the_tested_one() -> None:
    (line,) = (arguments for name, arguments in instructions() if name == "RUN" and "download.pytorch.org" in arguments)
    assert "$(grep '^torch==' constraints.txt)" in line
    assert dict(instructions())["EXPOSE"].split() == ["8000", "8998"]


@pytest.fixture(scope="module")
def health() -> ModuleType:
    return load_script("deploy/worker_health.py")


@contextmanager
def router_that_answers(body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/workers" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("state", "worker_id", "status"), [("ready", "d0", 0), ("suspect", "d0", 1), ("ready", "another", 1)]
)
def test_a_worker_is_healthy_when_the_router_calls_it_ready(
    health: ModuleType, state: str, worker_id: str, status: int
) -> None:
    body = json.dumps({"workers": [{"id": "d0", "state": state}]}).encode()
    with router_that_answers(body) as url:
        assert health.main(url, worker_id) == status


def test_no_router_and_no_json_are_unhealthy_and_said(health: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with router_that_answers(b"<html>") as url:
        assert health.main(url, "d0") == 1
    assert health.main(url, "d0") == 1
    assert capsys.readouterr().out.count("no answer from") == 2
