"""Time to first token and throughput of the bundled model: prefill and decode apart, against workers that do both.

    .venv/bin/python benchmarks/serve.py [--requests 32] [--in-flight 8] [--rounds 2]
        [--overlap | --mix | --against TREE]

The two systems have the same number of processes, cores and bytes, get the same prompts, and take turns, so that a
neighbour on the machine disturbs both. Prints a Markdown table and what it takes to repeat it. *Exposed* is what a
request waits for its transfer after its prompt is computed, by the timeline of `/requests/{id}`. With `--overlap` the
systems are prefill and decode apart both times: prompts in many steps, so that blocks leave while later ones are
computed, and in one step, after which everything moves at once: the same transfer with nothing to hide behind.
With `--mix` short and long prompts are computed always apart, apart when that is estimated to pay, and never.
With `--against TREE`, another checkout with its compiled helper built, it is prefill and decode apart of that tree and
of this one, with short prompts alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from disagg.bench.circumstances import circumstances

SYSTEMS = {
    "1 prefill + 1 decode": ["--prefill", "1", "--decode", "1"],
    "2 both (colocated)": ["--prefill", "0", "--decode", "0", "--both", "2"],
}
OVERLAP = {
    "apart, steps of 64 tokens": [*SYSTEMS["1 prefill + 1 decode"], "--max-num-batched-tokens", "64"],
    "apart, a prompt in one step": [*SYSTEMS["1 prefill + 1 decode"], "--max-num-batched-tokens", "512"],
}
APART = SYSTEMS["1 prefill + 1 decode"]
AGAINST = ("TREE", "this tree")
MIX = {
    "always apart": [*APART, "--max-local-prefill", "0"],
    "apart when it pays": [*APART, "--max-local-prefill", "256"],
    "never apart": ["--prefill", "0", "--decode", "0", "--both", "2", "--policy", "least-loaded"],
}
EXPOSED_STAGES = ("transfer_wait", "wire", "verify")
PROMPT_LENGTHS = (48, 400)  # tokens: below the window of 64, and several windows
NUM_NEW_TOKENS = 48
NUM_PLAIN_IDS = (259, 2048)  # ids of ordinary words in the bundled vocabulary: no special tokens, no single bytes
START_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds from sending to the first token and to the end, and of them waiting for a transfer."""

    ttft_s: float
    total_s: float
    num_tokens: int
    exposed_s: float = 0.0
    second_s: float = 0.0
    """From the first token to the second."""
    prompt_len: int = 0
    is_local: bool = False
    """Whether one worker alone served it."""


@dataclass(frozen=True, slots=True)
class Urls:
    api: str
    admin: str


@dataclass(frozen=True, slots=True)
class Round:
    samples: Sequence[Sample]
    wall_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(sample.num_tokens for sample in self.samples) / self.wall_s


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest value that is not below `part` of all."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def row(name: str, rounds: Sequence[Round]) -> str:
    ttft = [sample.ttft_s * 1e3 for one in rounds for sample in one.samples]
    gaps = [
        (sample.total_s - sample.ttft_s) * 1e3 / (sample.num_tokens - 1)
        for one in rounds
        for sample in one.samples
        if sample.num_tokens > 1
    ]
    speed = statistics.median(one.tokens_per_s for one in rounds)
    middle, tail = statistics.median(ttft), quantile(ttft, 0.9)
    exposed, second = (
        statistics.median(getattr(sample, what) * 1e3 for one in rounds for sample in one.samples)
        for what in ("exposed_s", "second_s")
    )
    times = f"{middle:.1f} | {tail:.1f} | {exposed:.1f} | {second:.1f} | {statistics.median(gaps):.1f}"
    return f"| {name} | {times} | {speed:.0f} |"


def exposed_s(timeline: Mapping[str, float]) -> float:
    """Of a request's timeline: from the end of prefill to ready to decode."""
    return sum(timeline.get(stage, 0.0) for stage in EXPOSED_STAGES)


def prompts(num: int, seed: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    draw = random.Random(seed)  # noqa: S311 (repeatable, not secret)
    sizes = [lengths[i % len(lengths)] for i in range(num)]
    return [[2, *(draw.randrange(*NUM_PLAIN_IDS) for _ in range(size - 1))] for size in sizes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def system(flags: Sequence[str], tree: Path | None = None) -> AsyncIterator[Urls]:
    """A running `disagg up`, of another `tree` where one is given; its log goes to stderr."""
    port, admin_port = free_port(), free_port()
    command = [sys.executable, "-P", "-m", "disagg", "up", "--port", str(port)]
    command += ["--admin-port", str(admin_port), "--log-level", "error", *flags]
    env = dict(os.environ) if tree is None else {**os.environ, "PYTHONPATH": str(tree)}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL, env=env)
    url = f"http://127.0.0.1:{port}"
    try:
        async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
            while process.returncode is None and not await is_ready(session, url):  # noqa: ASYNC110 (not our process)
                await asyncio.sleep(0.2)
        if process.returncode is not None:
            raise SystemExit(f"error: `{shlex.join(command)}` ended with exit code {process.returncode}")
        yield Urls(url, f"http://127.0.0.1:{admin_port}")
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/ready") as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


async def request(session: aiohttp.ClientSession, urls: Urls, prompt: list[int]) -> Sample:
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": NUM_NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    request_id = uuid.uuid4().hex
    sent, at = time.perf_counter(), []
    async with session.post(f"{urls.api}/v1/completions", json=body, headers={"X-Request-Id": request_id}) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                ids = json.loads(line[6:])["choices"][0].get("token_ids") or ()
                at += [time.perf_counter()] * len(ids)
    if len(at) != NUM_NEW_TOKENS:
        raise SystemExit(f"error: a request returned {len(at)} tokens instead of {NUM_NEW_TOKENS}")
    total_s = time.perf_counter() - sent
    async with session.get(f"{urls.admin}/requests/{request_id}") as answer:
        record = await answer.json()
    is_local = record["attempts"][-1]["prefill"] is None
    exposed = exposed_s(record["timeline"])
    return Sample(at[0] - sent, total_s, len(at), exposed, at[1] - at[0], len(prompt), is_local)


async def measure(urls: Urls, work: Sequence[list[int]], in_flight: int) -> Round:
    gate = asyncio.Semaphore(in_flight)

    async def one(session: aiohttp.ClientSession, prompt: list[int]) -> Sample:
        async with gate:
            return await request(session, urls, prompt)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        await request(session, urls, work[0])  # the first request builds links and warms allocators
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(session, prompt)) for prompt in work]
        return Round([task.result() for task in tasks], time.perf_counter() - started)


async def run(options: argparse.Namespace) -> None:
    systems = systems_of(options)
    lengths = PROMPT_LENGTHS[:1] if options.against else PROMPT_LENGTHS
    found: dict[str, list[Round]] = {name: [] for name in systems}
    for number in range(options.rounds):
        work = prompts(options.requests, number, lengths)
        for name, flags in systems.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            async with system(flags, options.against if name == AGAINST[0] else None) as urls:
                found[name].append(await measure(urls, work, options.in_flight))
    print(circumstances())
    print(f"\n{options.requests} requests, {options.in_flight} in flight, prompts of {lengths} tokens in turn,")
    print(f"{NUM_NEW_TOKENS} new tokens each, {options.rounds} rounds\n")
    print("| system | TTFT median ms | TTFT p90 ms | exposed ms | to the second ms | per token ms | tokens/s |")
    print("|---|---|---|---|---|---|---|")
    for name, rounds in found.items():
        print(row(name, rounds))
        for length in lengths if options.mix else ():
            some = [Round([s for s in one.samples if s.prompt_len == length], one.wall_s) for one in rounds]
            share = statistics.mean(sample.is_local for one in some for sample in one.samples)
            print(row(f"{name}, {length} tokens, {share:.0%} by one worker", some))


def systems_of(options: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    if options.against:
        return dict.fromkeys(AGAINST, APART)
    return OVERLAP if options.overlap else MIX if options.mix else SYSTEMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--overlap", action="store_true")
    what.add_argument("--mix", action="store_true")
    what.add_argument("--against", type=lambda tree: Path(tree).resolve(), metavar="TREE")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
