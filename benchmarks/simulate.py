"""Predictions of `disagg simulate` beside runs of real systems on this machine, and how long the simulator takes.

    .venv/bin/python benchmarks/simulate.py [--requests 60] [--rate 3] [--rates FILE] [--rounds 3] [--fleets 1p1d ...]
    .venv/bin/python benchmarks/simulate.py --speed

Rates come first, measured with one request at a time and with four (`disagg bench rates --threads 1`), or from a file.
Then each fleet of the bundled model's workers, one CPU thread each, gets one trace of chats at its times from a client
in this process, in turns; the simulator gets the same trace, rates, policy and cores, and the mean number of threads of
other processes that wanted a core during the run, its neighbours. A row holds what was measured and predicted, each in
the median of the rounds, and the difference. Neighbours are modelled roughly: an idle machine has none.

`--speed` simulates 100,000 requests on 1,000 workers under each policy and prints the CPU time that takes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from disagg.bench.circumstances import circumstances
from disagg.bench.play import PlannedRequest, PlayedRequest, play
from disagg.bench.rates import measure_rates
from disagg.bench.running import RunningSystem, running_system
from disagg.cli.simulate import kind_of
from disagg.config.load import load
from disagg.config.resources import num_cores
from disagg.config.settings import RatesSettings, SimulateSettings
from disagg.simulate.figures import Objectives, figures, ttft_of
from disagg.simulate.fleet import FleetShape, parse_fleet
from disagg.simulate.generate import TraceShape, generate_trace
from disagg.simulate.rates import ClusterRates, Table, read_rates
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.routing import NAMES
from disagg.simulate.simulation import Outcome, Setting, Simulation
from disagg.simulate.trace import Trace

POLICY = "least-loaded"
WITHIN = 0.2
KV_MEMORY = "256MiB"
ROWS = ("TTFT mean", "TTFT p50", "TTFT p90", "ITL mean", "end mean", "end p90", "hits")


def trace_of(options: argparse.Namespace) -> Trace:
    """Chats whose answers are not known before: a turn finds the prompt of the turn before, and no more."""
    shape = TraceShape(options.requests, options.rate, prompt=192, answer=32, block_size=16, seed=options.seed)
    trace = generate_trace("chat", shape)
    first = trace.requests[0].arrival_s
    requests = (replace(r, arrival_s=r.arrival_s - first, answer_hashes=()) for r in trace.requests)
    return Trace(trace.block_size, tuple(requests))


def planned(trace: Trace, seed: int) -> list[PlannedRequest]:
    """The trace as token ids: equal blocks are equal ids, and another `seed` makes others of all."""
    rest = random.Random(seed)  # noqa: S311 (repeatable, not secret)
    found = []
    for request in trace.requests:
        prompt = [token for block in request.hashes for token in _words(f"{seed} {block}", trace.block_size)]
        prompt += [rest.randrange(300, 2000) for _ in range(request.prompt_len - len(prompt))]
        found.append(PlannedRequest(request.arrival_s, prompt, request.answer_len))
    return found


def _words(seed: str, count: int) -> list[int]:
    draw = random.Random(seed)  # noqa: S311 (repeatable, not secret)
    return [draw.randrange(300, 2000) for _ in range(count)]


def measured(played: Sequence[PlayedRequest], trace: Trace) -> dict[str, float]:
    ttft = [one.ttft_s for one in played]
    ends = [one.token_at[-1] for one in played]
    hits = sum(one.num_cached for one in played) / sum(request.prompt_len for request in trace.requests)
    return _row(ttft, [gap for one in played for gap in one.gaps], ends, hits)


def predicted(outcome: Outcome) -> dict[str, float]:
    hit_rate = figures(outcome, Objectives()).hit_rate
    ends = [_ended_s(request) for request in outcome.requests]
    gaps = sum(gap * count for gap, count in outcome.gaps) / sum(count for _, count in outcome.gaps)
    return _row([ttft_of(request) for request in outcome.requests], [gaps], ends, hit_rate)


def _ended_s(request: SimulatedRequest) -> float:
    assert request.ended_at is not None, request.refused
    return request.ended_at - request.traced.arrival_s


def _row(ttft: Sequence[float], gaps: Sequence[float], ends: Sequence[float], hits: float) -> dict[str, float]:
    values = (
        *(statistics.mean(ttft), _part(ttft, 0.5), _part(ttft, 0.9)),
        *(statistics.mean(gaps), statistics.mean(ends), _part(ends, 0.9), hits),
    )
    return dict(zip(ROWS, values, strict=True))


def _part(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


class Neighbours:
    """How many threads of other processes want a core, in the mean, while a system runs."""

    def __init__(self, system: RunningSystem) -> None:
        self._pids = [*system.processes.values(), os.getpid()]
        self._seen: list[int] = []

    async def watch(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            self._seen.append(max(0, _all_running() - sum(map(_num_running, self._pids))))
            await asyncio.sleep(0.25)

    @property
    def mean(self) -> float:
        return statistics.mean(self._seen)


def _all_running() -> int:
    return int(Path("/proc/stat").read_text().partition("procs_running ")[2].split()[0])


def _num_running(pid: int) -> int:
    """Threads of a process that want a core now."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return states.count("R")


async def run_real(
    fleet: FleetShape, trace: Trace, settings: RatesSettings, seed: int
) -> tuple[dict[str, float], float]:
    """What was measured, and its neighbours on the cores."""
    counts = {"prefill": fleet.prefill, "decode": fleet.decode, "both": fleet.both}
    flags = ("--policy", POLICY, "--kv-cache-memory", KV_MEMORY, "--threads", "1")
    async with running_system(settings, *flags, **counts) as system:
        warm = [PlannedRequest(0.0, _words(f"warm {seed} {number}", 64), 4) for number in range(8)]
        await play(system.url, warm, at_once=4)
        neighbours = Neighbours(system)
        watching = asyncio.create_task(neighbours.watch())
        played = await play(system.url, planned(trace, seed))
        watching.cancel()
        return measured(played, trace), neighbours.mean


def setting_of(fleet: FleetShape, rates: ClusterRates, cores: int, neighbours: float) -> Setting:
    workers = len(fleet.roles)
    kind = kind_of(load(SimulateSettings, {"kv_cache_memory": f"{256 // workers}MiB", "max_num_seqs": 16}, {}))
    return Setting(fleet, kind, rates, POLICY, cores, neighbours)


def compare(options: argparse.Namespace) -> None:
    settings = load(RatesSettings, {"threads": 1, "max_num_seqs": 16}, {})
    rates = read_rates(options.rates) if options.rates else measure_rates(settings)
    trace, fleets = trace_of(options), [parse_fleet(text) for text in options.fleets]
    rounds: dict[FleetShape, list[tuple[dict[str, float], float]]] = {fleet: [] for fleet in fleets}
    for number in range(options.rounds):
        for fleet in fleets:
            print(f"round {number + 1} of {options.rounds}: {fleet}", file=sys.stderr, flush=True)
            rounds[fleet].append(asyncio.run(run_real(fleet, trace, settings, number)))
    print(circumstances(f"{options.requests} requests at {options.rate:g} per second, {POLICY}"))
    print(f"\nrates: {rates.as_json()}\n")
    print("| fleet | figure | measured | rounds | predicted | off by | |\n|---|---|---|---|---|---|---|")
    for fleet in fleets:
        told, neighbours = zip(*rounds[fleet], strict=True)
        settings_of = [setting_of(fleet, rates, options.cores, others) for others in neighbours]
        guesses = [predicted(Simulation(trace, setting).run()) for setting in settings_of]
        _print_rows(f"{fleet}, {statistics.median(neighbours):.1f} neighbours", told, guesses)


def _print_rows(fleet: str, rounds: Sequence[dict[str, float]], guesses: Sequence[dict[str, float]]) -> None:
    for name in ROWS:
        guess = statistics.median(one[name] for one in guesses)
        all_rounds = [one[name] for one in rounds]
        true = statistics.median(all_rounds)
        scale, unit = (100.0, "%") if name == "hits" else (1e3, "ms")
        off = guess / true - 1 if true else 0.0
        spread = f"{min(all_rounds) * scale:.1f} to {max(all_rounds) * scale:.1f}"
        verdict = "" if abs(off) <= WITHIN else "miss"
        print(
            f"| {fleet} | {name} | {true * scale:.1f} {unit} | {spread} | {guess * scale:.1f} {unit} | "
            f"{off:+.0%} | {verdict} |"
        )


def speed(options: argparse.Namespace) -> None:
    """A large model's workers, chats in blocks of 512 tokens as Mooncake's traces have them."""
    rates = ClusterRates(Table({512: 0.03, 8192: 0.4}), Table({1: 0.01, 64: 0.02}), 25e9, 0.001, request_cpu_s=0.001)
    trace = generate_trace("chat", TraceShape(options.requests, 1000.0, prompt=4096, answer=200, block_size=512))
    kind = kind_of(load(SimulateSettings, {"kv_cache_memory": "8GiB"}, {}))
    kind = replace(kind, max_model_len=1 << 20, num_slots=(40000, 120000)[: kind.layout.num_pools])
    print(circumstances())
    print("| policy | requests | workers | CPU s | events | hits |\n|---|---|---|---|---|---|")
    for policy in NAMES:
        begun = time.process_time()
        fleet = parse_fleet("400p600d")
        found = figures(Simulation(trace, Setting(fleet, kind, rates, policy)).run(), Objectives())
        spent = time.process_time() - begun
        print(
            f"| {policy} | {found.num_requests} ({found.num_refused} refused) | {len(fleet.roles)} | {spent:.1f} | "
            f"{found.num_events} | {found.hit_rate:.0%} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fleets", nargs="*", default=["1p1d", "2p2d", "4b"])
    parser.add_argument("--cores", type=int, default=num_cores())
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    options.requests = options.requests or (100_000 if options.speed else 60)
    speed(options) if options.speed else compare(options)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
