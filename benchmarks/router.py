"""What a router costs: CPU per request, per token and of an idle fleet, beside direct streaming and a plain proxy.

    .venv/bin/python benchmarks/router.py [--case tokens|prompts|fleet|overhead ...] [--pairs 1] [--streams 64] ...

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
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg.bench.circumstances import circumstances

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 60
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
        """Of the process and its children: user and system, in ticks of 10 ms."""
        return sum(_cpu_ticks(pid) for pid in family(self.process.pid)) * TICK_S

    def memory_mib(self) -> float:
        """Resident, of the process alone."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def num_descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


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
async def router() -> AsyncIterator[Child]:
    ports = ["--port", "0", "--admin-port", "0", "--control-port", "0", "--announce-fd", "1"]
    async with started("disagg", "router", "--insecure", "--log-level", "error", *ports) as child:
        yield child


@asynccontextmanager
async def fleet(router: Child, pairs: int, step_s: float, *more: str) -> AsyncIterator[Child]:
    control = router.said["control"]
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


async def tokens(options: argparse.Namespace) -> None:
    """Streams at full speed: CPU per token, and what a worker that can do more is slowed to."""
    async with router() as hub, fleet(hub, options.pairs, options.step_s) as workers:
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


async def prompts(options: argparse.Namespace) -> None:
    """Long prompts with one token of answer more than none: CPU of the core and of its helpers per request."""
    async with router() as hub, fleet(hub, options.pairs, 0.01):
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


async def idle_fleet(options: argparse.Namespace) -> None:
    """Registered and idle: CPU, registration, memory and descriptors; then requests placed one after another."""
    async with router() as hub:
        before_mib = hub.memory_mib()
        pulses = [] if options.fleet_pairs > 128 else ["--pulses"]
        more = pulses or ["--no-pulses"]
        async with fleet(hub, options.fleet_pairs, 0.05, *more) as workers:
            registered_s = workers.said["seconds"]
            await asyncio.sleep(1)
            before, began_at = hub.cpu_s(), time.perf_counter()
            await asyncio.sleep(5)
            share = (hub.cpu_s() - before) / (time.perf_counter() - began_at)
            count = 2 * options.fleet_pairs
            print(
                f"fleet: {options.fleet_pairs}+{options.fleet_pairs} workers registered in {registered_s:.2f} s, "
                f"idle {share:.0%} of a core, {(hub.memory_mib() - before_mib) * 1024 / count:.0f} KiB and "
                f"{hub.num_descriptors() / count:.1f} descriptors per worker"
            )
            before, began_at = hub.cpu_s(), time.perf_counter()
            found = await clients(hub.said["url"], 16, options.fleet_requests, 2, 16)
            cpu_s = hub.cpu_s() - before - share * (time.perf_counter() - began_at)
            print(
                f"fleet: {found['num_answers'] / found['wall_s']:.0f} requests/s, "
                f"{1e3 * cpu_s / found['num_answers']:.2f} ms of CPU per request, "
                f"TTFT {found['ttft_ms_median']:.1f} ms"
            )


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
        workers = await stack.enter_async_context(fleet(hub, 1, options.step_s))
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


CASES = {"tokens": tokens, "prompts": prompts, "fleet": idle_fleet, "overhead": overhead}


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
    parser.add_argument("--prompt-lengths", type=int, nargs="*", default=[8192, 131072])
    parser.add_argument("--prompt-requests", type=int, default=20)
    parser.add_argument("--fleet-pairs", type=int, default=64)
    parser.add_argument("--fleet-requests", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=2)
    asyncio.run(main(parser.parse_args()))
