"""What a router costs: CPU per request, per token and of an idle fleet, beside direct streaming and a plain proxy.

    .venv/bin/python benchmarks/router.py [--case core|tokens|api|prompts|fleet|overhead ...] [--streams 64] ...

A real router, workers without a model over real sockets (`disagg.bench.fleet`) and clients (`disagg.bench.streams`),
each a process. CPU seconds are those of the router's process with its helpers, from /proc, so that neighbours on the
machine change them little; times are what they are. `nginx`, where it is installed, passes on the same streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg.bench.circumstances import circumstances
from disagg.bench.fleet import registration
from disagg.router.choose import Placement
from disagg.router.generation import GenerationRequest, TokenChunk
from disagg.router.placing import Placing
from disagg.router.registry import Registry
from disagg.router.router import Router
from disagg.router.workload import Share
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import Sampling
from disagg.transceiver.wire.node import draw_id

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 240  # a thousand workers on a busy machine
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; client_max_body_size 16m;
  upstream worker {{ server 127.0.0.1:{upstream}; keepalive 64; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://worker; proxy_http_version 1.1; proxy_set_header Connection "";
                 proxy_buffering off; proxy_request_buffering off; }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Child:
    """A running process with what it announced."""

    process: asyncio.subprocess.Process
    said: dict[str, Any]

    def cpu_s(self) -> float:
        """Of the process and its children, at any depth: user and system, in ticks of 10 ms."""
        return sum(_cpu_ticks(pid) for pid in family(self.process.pid)) * TICK_S

    def cpu_s_by_process(self) -> dict[str, float]:
        """The same for each: `core`, the API processes in the order of their start, and what their helpers took."""
        found, count = {"core": _cpu_ticks(self.process.pid) * TICK_S}, 0
        for pid in family(self.process.pid)[1:]:
            if b"disagg.cli.api_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                count, name = count + 1, f"api {count + 1}"
            else:
                name = "helpers"
            found[name] = found.get(name, 0.0) + _cpu_ticks(pid) * TICK_S
        return found

    def memory_mib(self) -> float:
        """Resident, of the process alone."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def family(pid: int) -> list[int]:
    """A process and its children, with theirs, whichever thread started them."""
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [pid, *(each for some in children for child in some for each in family(int(child)))]


def _cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@asynccontextmanager
async def started(*command: str) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", *command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                line = await process.stdout.readline()
                if not line:
                    raise RuntimeError(f"{command[0]} ended before it was ready")
                said = json.loads(line)
                if said.get("event") == "ready":
                    break
        yield Child(process, said)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@asynccontextmanager
async def router(*more: str) -> AsyncIterator[Child]:
    ports = ["--port", "0", "--admin-port", "0", "--control-port", "0", "--announce-fd", "1"]
    async with started("disagg", "router", "--insecure", "--log-level", "error", *ports, *more) as child:
        yield child


@asynccontextmanager
async def fleet(control: str, pairs: int, step_s: float, *more: str) -> AsyncIterator[Child]:
    arguments = ["--router", control, "--pairs", str(pairs), "--step-s", str(step_s), *more]
    async with started("disagg.bench.fleet", *arguments) as child:
        await asyncio.sleep(1.2)  # until leases told every link
        yield child


async def clients(url: str, streams: int, requests: int, max_tokens: int, prompt_length: int) -> dict[str, Any]:
    arguments = {
        "--url": url,
        "--streams": streams,
        "--requests": requests,
        "--max-tokens": max_tokens,
        "--prompt-length": prompt_length,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "disagg.bench.streams", *flat), stdout=subprocess.PIPE
    )
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    if found["faults"]:
        print(f"  faults: {found['faults']}")
    return found


def loop_lag_ms(url: str) -> tuple[float, int]:
    """The bucket's edge below which 99 % of the wakes lie, in ms, and the number of wakes."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()  # noqa: S310  # our own router
    pairs = re.findall(r'disagg_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)', text)
    total = float(pairs[-1][1])
    return next(1e3 * float(edge) for edge, count in pairs if float(count) >= 0.99 * total), int(total)


def workers_of(url: str) -> list[Any]:
    found: list[Any] = json.loads(urllib.request.urlopen(f"{url}/workers").read())["workers"]  # noqa: S310  # as above
    return found


async def tokens(options: argparse.Namespace) -> None:
    """Streams at full speed: CPU per token, and what a worker that can do more is slowed to."""
    async with router() as hub, fleet(hub.said["control"], options.pairs, options.step_s) as workers:
        before_mib, before = hub.memory_mib(), hub.cpu_s()
        fleet_before = workers.cpu_s()
        began_at = time.perf_counter()
        found = await clients(hub.said["url"], options.streams, options.requests, options.max_tokens, 16)
        wall_s, cpu_s = time.perf_counter() - began_at, hub.cpu_s() - before
        count = found["num_tokens"]
        print(
            f"tokens: {options.streams} streams, {count} tokens in {found['num_events']} events, "
            f"{count / found['wall_s']:.0f} tokens/s; router {1e6 * cpu_s / count:.1f} us of CPU per token, "
            f"{cpu_s / wall_s:.0%} of a core, {count / cpu_s:.0f} tokens/s per core; "
            f"TTFT {found['ttft_ms_median']:.1f} ms; workers {1e6 * (workers.cpu_s() - fleet_before) / count:.1f}, "
            f"clients {1e6 * found['cpu_s'] / count:.1f} us per token; loop lag p99 "
            f"{loop_lag_ms(hub.said['url'])[0]:.1f} ms; +{hub.memory_mib() - before_mib:.0f} MiB"
        )


async def core(options: argparse.Namespace) -> None:
    """The router without HTTP, in this process: workers asked for more than it carries, then prompts of many ids."""
    async with AsyncExitStack() as stack:
        router = await stack.enter_async_context(Router.open("tcp://127.0.0.1:0", ClusterKeys.published()))
        await stack.enter_async_context(fleet(router.endpoint, options.pairs, options.core_step_s))
        before, began_at = time.process_time(), time.perf_counter()
        length = options.core_tokens
        work = [_answer(router, array("i", [1]), length) for _ in range(options.core_streams)]
        found = await asyncio.gather(*work)
        cpu_s, wall_s = time.process_time() - before, time.perf_counter() - began_at
        count, asked = sum(found), options.core_streams / options.core_step_s
        lost = options.core_streams * length - count
        print(
            f"core: {options.core_streams} streams, {asked:.0f} tokens/s asked, {count / wall_s:.0f} came, "
            f"{lost} lost, {len(router.workers())} of {2 * options.pairs} workers registered; "
            f"{1e6 * cpu_s / count:.1f} us of CPU per token, {count / cpu_s:.0f} tokens/s per core"
        )
        for length in options.prompt_lengths:
            prompt, before = array("i", range(length)), time.process_time()
            for _ in range(options.prompt_requests):
                await _answer(router, prompt, 2)
            cpu_ms = 1e3 * (time.process_time() - before) / options.prompt_requests
            print(f"core: a prompt of {length} ids: {cpu_ms:.1f} ms of CPU, I/O threads included")


async def _answer(router: Router, prompt: array[int], max_tokens: int) -> int:
    """Read one answer: its number of tokens."""
    request = GenerationRequest(draw_id(), prompt, Sampling(max_tokens=max_tokens))
    return sum([len(item.token_ids) async for item in router.generate(request) if isinstance(item, TokenChunk)])


async def prompts(options: argparse.Namespace) -> None:
    """Long prompts with one token of answer more than none: CPU of the core and of its helpers per request."""
    async with router() as hub, fleet(hub.said["control"], options.pairs, 0.01):
        for length in options.prompt_lengths:
            await clients(hub.said["url"], 1, 1, 2, length)
            own = _cpu_ticks(hub.process.pid)
            all_before = hub.cpu_s()
            found = await clients(hub.said["url"], 1, options.prompt_requests, 2, length)
            count = found["num_answers"]
            own_ms = (_cpu_ticks(hub.process.pid) - own) * TICK_S * 1e3 / count
            print(
                f"prompts: {length} ids: {own_ms:.1f} ms of the router's CPU each, "
                f"{1e3 * (hub.cpu_s() - all_before) / count - own_ms:.1f} ms of its helpers', "
                f"TTFT {found['ttft_ms_median']:.1f} ms"
            )


async def api_processes(options: argparse.Namespace) -> None:
    """The same load with HTTP in the router's process and in processes of its own: long answers, then short ones."""
    for count in options.api_processes:
        async with (
            router("--api-processes", str(count)) as hub,
            fleet(hub.said["control"], options.pairs, options.step_s),
        ):
            await clients(hub.said["url"], options.streams, options.streams, 2, 16)  # connections, code, helpers: warm
            for what, max_tokens in (("tokens", options.max_tokens), ("requests", 2)):
                before = hub.cpu_s_by_process()
                found = await clients(hub.said["url"], options.streams, options.requests, max_tokens, 16)
                spent = {name: cpu_s - before.get(name, 0.0) for name, cpu_s in hub.cpu_s_by_process().items()}
                number, unit = (found["num_tokens"], "us") if what == "tokens" else (found["num_answers"], "ms")
                scale = {"us": 1e6, "ms": 1e3}[unit]
                each = ", ".join(f"{name} {scale * cpu_s / number:.1f}" for name, cpu_s in spent.items())
                print(
                    f"api: {count} processes, {options.streams} streams: {number / found['wall_s']:.0f} {what}/s, "
                    f"TTFT {found['ttft_ms_median']:.1f} ms; {unit} of CPU per {what[:-1]}: {each}; "
                    f"together {scale * sum(spent.values()) / number:.1f}"
                )


async def idle_fleet(options: argparse.Namespace) -> None:
    """Registered and idle: CPU, registration, memory and descriptors; then requests placed one after another."""
    pairs = options.fleet_pairs
    async with router() as hub:
        before_mib = hub.memory_mib()
        async with fleet(hub.said["control"], pairs - 1, 0.05, "--late") as workers:
            await asyncio.sleep(1)
            before, began_at = hub.cpu_s(), time.perf_counter()
            await asyncio.sleep(options.idle_s)
            share = (hub.cpu_s() - before) / (time.perf_counter() - began_at)
            there = len(workers_of(hub.said["url"]))
            print(
                f"fleet: {there} of {pairs}+{pairs} workers are registered, all within "
                f"{workers.said['seconds']:.2f} s, the last pair in "
                f"{1e3 * workers.said['last_seconds']:.0f} ms, idle {share:.0%} of a core, "
                f"{(hub.memory_mib() - before_mib) * 1024 / (2 * pairs):.0f} KiB and "
                f"{hub.num_descriptors() / (2 * pairs):.1f} descriptors per worker"
            )
            before, began_at = hub.cpu_s(), time.perf_counter()
            found = await clients(hub.said["url"], 16, options.fleet_requests, 2, 16)
            cpu_s = hub.cpu_s() - before - share * (time.perf_counter() - began_at)
            print(
                f"fleet: {found['num_answers'] / found['wall_s']:.0f} requests/s, "
                f"{1e3 * cpu_s / found['num_answers']:.2f} ms of CPU per request, "
                f"TTFT {found['ttft_ms_median']:.1f} ms; a placement takes {placing_us(pairs):.0f} us"
            )


def placing_us(pairs: int) -> float:
    """CPU of one choice with its count in a fleet of this size whose links are made on use, in this process."""
    registry = Registry()
    registry.link_on_use()
    placing = Placing(registry, 1024)
    for number in range(2 * pairs):
        register = registration(draw_id(), f"w{number}", ("prefill", "decode")[number % 2])
        registry.register(register, 0.0)
    for worker in registry:
        placing.add(worker)
    before = time.process_time()
    for _ in range(1000):
        placed = placing.at(0.0).place(16)
        assert isinstance(placed, Placement)
        placing.count((), (Share(placed.server.incarnation),))
    return 1e3 * (time.process_time() - before)


@asynccontextmanager
async def nginx(upstream: int) -> AsyncIterator[str | None]:
    """nginx before the direct stream; None where it is not installed."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        port = 20_000 + os.getpid() % 20_000
        config = Path(folder) / "nginx.conf"
        config.write_text(NGINX.format(folder=folder, upstream=upstream, port=port))
        process = await asyncio.create_subprocess_exec(
            binary, "-p", folder, "-c", str(config), stderr=subprocess.DEVNULL
        )
        await asyncio.sleep(0.5)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            await process.wait()


async def overhead(options: argparse.Namespace) -> None:
    """Turns of direct streaming, nginx and the router at the same steps: TTFT, tokens/s."""
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(router())
        workers = await stack.enter_async_context(fleet(hub.said["control"], 1, options.step_s))
        port = workers.said["direct_port"]
        plain = await stack.enter_async_context(nginx(port))
        urls = {"direct": f"http://127.0.0.1:{port}", "nginx": plain, "router": hub.said["url"]}
        for streams in (1, 32):
            for turn in range(options.rounds):
                for name, url in urls.items():
                    if url is None:
                        print("overhead: nginx is not installed, so its turn is left out") if not turn else None
                        continue
                    found = await clients(url, streams, streams * 4, options.max_tokens, 16)
                    print(
                        f"overhead: {streams} streams, {name}: TTFT {found['ttft_ms_median']:.2f} ms, "
                        f"{found['num_tokens'] / found['wall_s']:.0f} tokens/s"
                    )


CASES = {
    "core": core,
    "tokens": tokens,
    "api": api_processes,
    "prompts": prompts,
    "fleet": idle_fleet,
    "overhead": overhead,
}


async def main(options: argparse.Namespace) -> None:
    print(circumstances())
    for name in options.case or CASES:
        await CASES[name](options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=CASES, default=[])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--step-s", type=float, default=0.01)
    parser.add_argument("--core-streams", type=int, default=256)
    parser.add_argument("--core-tokens", type=int, default=512)
    parser.add_argument("--core-step-s", type=float, default=0.005)
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[8192, 131072])
    parser.add_argument("--prompt-requests", type=int, default=20)
    parser.add_argument("--fleet-pairs", type=int, default=64)
    parser.add_argument("--idle-s", type=float, default=5)
    parser.add_argument("--fleet-requests", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--api-processes", type=int, nargs="*", default=[0, 1, 2])
    asyncio.run(main(parser.parse_args()))
