"""`disagg up`: router and workers on this machine under one supervisor."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from disagg.cli.child import ChildSpec
from disagg.cli.display import display
from disagg.cli.placement import DeviceAssignment, check_told_devices
from disagg.cli.ports import LOOPBACK, Address, hold_port, require_free_ports
from disagg.cli.supervisor import ClusterError, Ready, Supervisor
from disagg.config.api_keys import api_keys
from disagg.config.errors import ConfigError
from disagg.config.load import PREFIX, SWITCHES, to_flags, variable_of
from disagg.config.quantities import format_nbytes
from disagg.config.resources import default_kv_cache_nbytes, num_cores, threads_by_role
from disagg.config.secret import INSECURE_SECRET, draw_secret
from disagg.config.settings import (
    EngineSettings,
    HttpSettings,
    Role,
    RouterSettings,
    Settings,
    UpSettings,
    WorkerSettings,
)

LINKS_TIMEOUT_S: Final = 30.0  # all workers are ready by then: what remains are handshakes of milliseconds
POLL_S: Final = 0.1  # below what a person notices, and two leases long enough not to be a load


@dataclass(frozen=True, slots=True)
class WorkerPair:
    """What one decode worker says of its link to one prefill worker."""

    prefill: str
    decode: str
    plane: str
    state: str
    detail: str


Work = Callable[[Ready, Sequence[Ready], Sequence[WorkerPair]], Awaitable[int]]


class LocalCluster:
    """The processes of one `up`, and what each is told. All know the control port beforehand, so none waits."""

    def __init__(self, settings: UpSettings, model: str, control_port: int) -> None:
        self._settings = settings
        self._shared = {field: getattr(settings, field) for field in Settings.model_fields} | {"model": model}
        self._threads = _threads(settings)
        self.placement = DeviceAssignment(settings)
        # Measured once: workers that measured for themselves, or after a restart, would find different amounts free,
        # derive different lengths from them and be refused as different workers.
        self._cpu_kv_nbytes = default_kv_cache_nbytes()
        self._control_port = control_port

    def router(self, ready: Ready | None) -> ChildSpec:
        """A router that starts again takes the ports it announced: clients know them."""
        told = {field: getattr(self._settings, field) for field in HttpSettings.model_fields}
        told |= self._shared | {"served_model_name": self._settings.served_name, "control_host": LOOPBACK}
        told |= {"admin_port": self._settings.admin_port, "control_port": self._control_port}
        if ready is not None:
            told |= {"port": _port(ready["url"]), "admin_port": _port(ready["admin"])}
        env = child_environment(os.environ)
        if self._settings.api_key is not None:
            env[variable_of("api_key")] = self._settings.api_key  # not argv, which every user can read
        return _spec("router", "router", to_flags(RouterSettings(**told), hide=("api_key",)), env)

    def workers(self) -> list[ChildSpec]:
        counts: dict[Role, int] = {
            "prefill": self._settings.prefill,
            "decode": self._settings.decode,
            "both": self._settings.both,
        }
        devices = self.placement.next_device
        placed = [(role, f"{role}-{n}", devices(role)) for role, count in counts.items() for n in range(count)]
        used = [device for _, _, device in placed]
        return [self._worker(*place, used.count(place[2])) for place in placed]

    def _worker(self, role: Role, name: str, device: str, num_sharing: int) -> ChildSpec:
        """`num_sharing` workers use this device's memory, this one included."""
        told = {field: getattr(self._settings, field) for field in EngineSettings.model_fields} | self._shared
        if role != "prefill":
            told["swa_scratch"] = "off"
        threads = self._threads[role]
        told |= {"router": f"tcp://{LOOPBACK}:{self._control_port}", "worker_id": name}
        told |= {"device": device, "threads": threads}
        told |= {"memory_share": round(1 / num_sharing, 4)}
        if self._settings.kv_cache_memory is not None:
            told |= {"kv_cache_memory": self._settings.kv_cache_memory // self._settings.num_workers}
        elif device == "cpu":
            told |= {"kv_cache_memory": max(1, self._cpu_kv_nbytes // num_sharing)}
        env = child_environment(os.environ) | {"OMP_NUM_THREADS": str(threads)}
        return _spec(name, role, to_flags(WorkerSettings(**told)), env)


def _threads(settings: UpSettings) -> dict[Role, int]:
    """CPU threads of a worker of each role: as told, else a share of the cores."""
    counts: dict[Role, int] = {"prefill": settings.prefill, "decode": settings.decode, "both": settings.both}
    shares = threads_by_role(counts, num_cores())
    told = {"prefill": settings.prefill_threads, "decode": settings.decode_threads}
    return {role: told.get(role) or settings.threads or shares[role] for role in counts}


def up(settings: UpSettings) -> int:
    """Serve until a signal; the exit code."""
    return serve(settings, _serve_forever(settings))


def serve(settings: UpSettings, work: Work) -> int:
    """Start the cluster and await `work(router, workers, pairs)`, whose result is the exit code; 1 when that fails.

    Raises ConfigError for what the user gave.
    """
    require_free_ports(
        Address("--port", settings.host, settings.port),
        Address("--admin-port", LOOPBACK, settings.admin_port),
        Address("--control-port", LOOPBACK, settings.control_port),
    )
    check_told_devices(settings)
    authorization(settings)  # a key file that no router would start with is refused here
    model = _resolved(settings.model)
    secret = INSECURE_SECRET if settings.insecure else draw_secret()
    with hold_port(LOOPBACK, settings.control_port) as held, display() as shown:
        cluster = LocalCluster(settings, model, held.getsockname()[1])
        if sentence := cluster.placement.sentence:
            shown.say(sentence)

        async def connected(router: Ready, workers: Sequence[Ready]) -> int:
            pairs = await wait_for_pairs(settings, router["url"])
            shown.settle()
            return await work(router, workers, pairs)

        try:
            return asyncio.run(Supervisor(cluster, secret, shown).run(connected))
        except (ClusterError, aiohttp.ClientError, TimeoutError) as exc:
            shown.say(str(exc) or "the router did not answer in time")
        except OSError as exc:
            shown.say(f"a process cannot be started: {(exc.strerror or str(exc)).lower()}")
        return 1


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Our environment without settings: they were read here, and a child gets its own as flags.

    Switches are no settings: each process reads them where it imports what they switch. What a child writes is read
    here as UTF-8, whatever the terminal's encoding.
    """
    passed = {name: value for name, value in environ.items() if not name.startswith(PREFIX) or name in SWITCHES}
    return passed | {"PYTHONIOENCODING": "utf-8:backslashreplace"}


def authorization(settings: HttpSettings) -> dict[str, str]:
    """The header with which this process asks its own router. Raises ConfigError for a key file without a key."""
    keys = api_keys(settings.api_key, settings.api_key_file)
    return {"Authorization": f"Bearer {keys[0].key}"} if keys else {}


async def wait_for_pairs(settings: UpSettings, url: str) -> list[WorkerPair]:
    """Until the router can place a request and every prefill worker is linked with every decode worker.

    Raises ClusterError with the reason of one missing pair after LINKS_TIMEOUT_S.
    """
    headers = authorization(settings)
    deadline = time.monotonic() + LINKS_TIMEOUT_S
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=LINKS_TIMEOUT_S)) as session:
        while True:
            ready, pairs = await _placeable(session, url)
            linked = [pair for pair in pairs if pair.state == "ready"]
            if ready and len(linked) >= settings.prefill * settings.decode:
                return linked
            if time.monotonic() > deadline:
                raise ClusterError(_missing(pairs))
            await asyncio.sleep(POLL_S)


async def _placeable(session: aiohttp.ClientSession, url: str) -> tuple[bool, list[WorkerPair]]:
    """`GET /ready` and `GET /workers`."""
    try:
        async with session.get(f"{url}/ready") as response:
            ready = response.status == 200
        async with session.get(f"{url}/workers") as response:
            response.raise_for_status()
            return ready, pairs_of(await response.json())
    except aiohttp.ClientConnectionError:  # the router is being restarted
        return False, []


def _missing(pairs: Sequence[WorkerPair]) -> str:
    start = f"workers started but cannot serve after {LINKS_TIMEOUT_S:.0f} s"
    for pair in pairs:
        if pair.state != "ready":
            return f"{start}: {pair.prefill} -> {pair.decode} is {pair.state}: {pair.detail or 'no reason given'}"
    return f"{start}: none of them registered"


def _serve_forever(settings: UpSettings) -> Work:
    async def work(router: Ready, workers: Sequence[Ready], pairs: Sequence[WorkerPair]) -> int:
        for line in summary(settings, router, workers, pairs):
            print(line, flush=True)  # noqa: T201 (this is the command's result)
        await asyncio.Event().wait()
        raise AssertionError("only a signal or a lost child ends this")

    return work


def pairs_of(body: Mapping[str, Any]) -> list[WorkerPair]:
    """The links in the answer of `GET /workers`."""
    return [
        WorkerPair(link["worker"], worker["id"], link["plane"], link["state"], link["detail"])
        for worker in body["workers"]
        for link in worker["links"]
    ]


def summary(settings: UpSettings, router: Ready, workers: Sequence[Ready], pairs: Sequence[WorkerPair]) -> list[str]:
    """What is running, and how to ask it something."""
    return [
        f"serving `{settings.served_name}` at {router['url']} (admin: {router['admin']})",
        *(line for worker in workers for line in _worker_lines(worker)),
        *(f"  {pair.prefill} -> {pair.decode}: {pair.plane}" for pair in pairs),
        curl(settings, router["url"]),
    ]


def _worker_lines(worker: Ready) -> Iterator[str]:
    """What it runs on, what it takes, and what its KV cache leaves for prefixes where it keeps any."""
    steps = f", {format_nbytes(worker['step_memory'])} for steps" if worker.get("step_memory") else ""
    yield (
        f"  {worker['worker_id']}: {worker['device']} in {worker['dtype']}, "
        f"{worker['threads']} of {num_cores()} cores, "
        f"{format_nbytes(worker['memory'])} of KV cache{steps}, max-model-len {worker['max_model_len']}"
    )
    if "eager" in worker:
        yield f"    note: steps run without CUDA graphs: {worker['eager']}"
    if "reuse" in worker:
        yield f"    for prefixes beside one running sequence: {worker['reuse']}"
    if "reuse_advice" in worker:
        yield f"    note: {worker['reuse_advice']}"


def curl(settings: UpSettings, url: str) -> str:
    """A command to paste; the key is left for the user to fill in."""
    body = {"model": settings.served_name, "prompt": "If the file does not exist,", "max_tokens": 48}
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_key or settings.api_key_file else ""
    return f"curl {url}/v1/completions -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"


def _resolved(model: str) -> str:
    """The model's folder, fetched once here rather than by every child. Raises ConfigError."""
    from disagg.engine.model.checkpoint import ModelRefused, resolve_model

    try:
        return str(resolve_model(model))
    except ModelRefused as exc:
        raise ConfigError(str(exc)) from exc


def _spec(name: str, command: str, flags: Sequence[str], env: Mapping[str, str]) -> ChildSpec:
    """`-P`: the top-level links `cache`, `kernels` and `transceiver` must not shadow other packages."""
    return ChildSpec(name, (sys.executable, "-P", "-m", "disagg", command, *flags), env)


def _port(url: str) -> int:
    return int(url.rpartition(":")[2].rstrip("/"))
