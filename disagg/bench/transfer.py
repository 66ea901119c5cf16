"""`disagg bench transfer`: every contender on every case, in turns, in one run."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from disagg.bench.cases import CASES, Case
from disagg.bench.circumstances import about
from disagg.bench.contenders import OURS, missing_package
from disagg.bench.pair import BenchError, Pair, Sample

SEED: Final = 20_240_229
WARMUP: Final = 2
"""Repetitions that are not counted: the first pays for faulted pages, grown windows and a cold interpreter."""

COLUMNS: Final = (
    "case, plane, digests, p50 ms, best ms, spread, GB/s, x memcpy, x nixl, CPU s/GB, operations, sender digest ms"
)


@dataclass(frozen=True, slots=True)
class Result:
    """One contender on one case. `digests` is null where a contender has none. `spread`: (slowest-fastest)/median.

    `sender_digest_ms`: what hashing the same blocks takes the sender, on its landing thread, as they become final; in
    none of the other times.
    """

    plane: str
    case: str
    digests: bool | None
    gbps: float
    p50_ms: float
    best_ms: float
    spread: float
    cpu_s_per_gb: float
    operations: int
    sender_digest_ms: float
    rounds: int


def summarise(plane: str, case: Case, digests: bool | None, samples: Sequence[Sample]) -> Result:
    seconds = [sample.seconds for sample in samples]
    median = statistics.median(seconds)
    return Result(
        plane=plane,
        case=case.name,
        digests=digests,
        gbps=round(case.nbytes / median / 1e9, 3),
        p50_ms=round(median * 1e3, 3),
        best_ms=round(min(seconds) * 1e3, 3),
        spread=round((max(seconds) - min(seconds)) / median, 3),
        cpu_s_per_gb=round(statistics.median(sample.cpu_s for sample in samples) / (case.nbytes / 1e9), 4),
        operations=samples[-1].operations,
        sender_digest_ms=round(statistics.median(sample.digest_s for sample in samples) * 1e3, 3),
        rounds=len(samples),
    )


def run_case(case: Case, contenders: Sequence[tuple[str, bool | None]], rounds: int) -> list[Result]:
    """All contenders in turns, so that what else the machine does falls on all of them alike."""
    pairs: list[tuple[Pair, bool | None, list[Sample]]] = []
    try:
        for plane, digests in contenders:
            _say(f"case {case.name}: starting {plane}")
            try:
                pairs.append((Pair(plane, bool(digests), case), digests, []))
            except BenchError as exc:
                if plane in OURS:
                    raise
                _say(f"{plane} left out: {str(exc).strip().splitlines()[-1]}")
        for number in range(WARMUP + rounds):
            rng = np.random.default_rng([SEED, number])  # the same blocks for everybody
            state = rng.bit_generator.state
            for pair, _, samples in pairs:
                rng.bit_generator.state = state
                sample = pair.repeat(number, rng)
                if number >= WARMUP:
                    samples.append(sample)
        return [summarise(pair.plane, case, digests, samples) for pair, digests, samples in pairs]
    finally:
        for pair, _, _ in pairs:
            pair.close()


def contenders_of(planes: Sequence[str], digests: str) -> list[tuple[str, bool | None]]:
    """(plane, digests) to run; says which are left out because their package is not installed."""
    chosen: list[tuple[str, bool | None]] = []
    for plane in planes:
        if package := missing_package(plane):
            _say(f"{plane} left out: the package {package} is not installed")
        elif plane in OURS:
            chosen += [(plane, on) for on in (False, True) if digests in ("both", "on" if on else "off")]
        else:
            chosen.append((plane, None))
    return chosen


def bench_transfer(planes: Sequence[str], cases: Sequence[str], rounds: int, digests: str, as_json: bool) -> int:
    """Run and print. Exit code 1 when a contender failed or moved wrong bytes."""
    results: list[Result] = []
    load_before = os.getloadavg()
    for name in cases:
        try:
            results += run_case(CASES[name], contenders_of(planes, digests), rounds)
        except BenchError as exc:
            print(f"disagg: case {name} failed: {exc}", file=sys.stderr)  # noqa: T201
            return 1
    run = about(load_before)
    print(json.dumps({**run, "results": [asdict(r) for r in results]}) if as_json else _table(run, results))  # noqa: T201
    return 0


def _table(run: dict[str, Any], results: Sequence[Result]) -> str:
    head = f"`{run['command']}`, commit {run['commit']}\n"
    head += f"{run['machine']}; load {run['load_before']} before, {run['load_after']} after"
    columns = COLUMNS.split(", ")
    lines = [head, "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    speed = {(r.case, r.plane): r.gbps for r in results}
    for r in results:
        digests = {None: "", True: "on", False: "off"}[r.digests]
        sender_ms = f"{r.sender_digest_ms:.2f}" if r.digests else ""
        ratios = " | ".join(_ratio(r.gbps, speed.get((r.case, other))) for other in ("memcpy", "nixl"))
        lines.append(
            f"| {r.case} | {r.plane} | {digests} | {r.p50_ms:.2f} | {r.best_ms:.2f} | {r.spread:.0%} | {r.gbps:.2f} "
            f"| {ratios} | {r.cpu_s_per_gb:.3f} | {r.operations} | {sender_ms} |"
        )
    return "\n".join(lines)


def _ratio(gbps: float, other: float | None) -> str:
    return f"{gbps / other:.2f}" if other else ""


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
