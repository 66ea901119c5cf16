"""What a running system takes of the CPU beside the model: per request, per token, per step and per transfer.

A prefill and a decode worker answer requests of two lengths, one after another and some at once. CPU seconds of each
process come from the kernel, so that neighbours change them little; how they differ between the loads says what each
thing costs.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disagg.bench.play import PlannedRequest, play
from disagg.bench.running import RunningSystem, running_system
from disagg.config.settings import RatesSettings
from disagg.simulate.rates import Table

PROMPT: Final = 64
"""Tokens: what a prompt costs to compute is known and taken off."""
SHORT, LONG = 2, 66
"""Tokens of an answer; the difference is what tokens cost."""
REQUESTS: Final = 16
AT_ONCE: Final = 4
"""Answers in a step share what a step costs the front end."""
IDLE_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """CPU seconds; see `ClusterRates`."""

    step_cpu_s: float = 0.0
    handoff_cpu_s: float = 0.0
    request_cpu_s: float = 0.0
    message_cpu_s: float = 0.0
    token_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadCosts:
    """CPU seconds of one request under one load, by process: `front` is all that is no worker, this client too."""

    prefill: float
    decode: float
    front: float


def measure_serving(settings: RatesSettings, prefill: Table, decode: Table) -> ServingCosts:
    """Start a system with these settings, load it, and end it."""
    return asyncio.run(_measure(settings, prefill, decode))


async def _measure(settings: RatesSettings, prefill: Table, decode: Table) -> ServingCosts:
    async with running_system(settings, prefill=1, decode=1) as system:
        loads = ((SHORT, 1), (LONG, 1), (SHORT, AT_ONCE), (LONG, AT_ONCE))
        await _load(system, SHORT, AT_ONCE)  # links, allocators
        idle = await _idle(system)
        short, long, short_many, long_many = [await _cost(system, *load, idle) for load in loads]
    return costs_of(short, long, short_many, long_many, prefill(PROMPT), decode(1))


def costs_of(
    short: LoadCosts, long: LoadCosts, short_many: LoadCosts, long_many: LoadCosts, prefill_s: float, decode_s: float
) -> ServingCosts:
    """`prefill_s`, `decode_s`: what the model takes of a prompt, and of one answer's step."""
    more = LONG - SHORT
    step_cpu_s = max(0.0, (long.decode - short.decode) / more - decode_s)
    received = short.decode - (SHORT - 1) * (decode_s + step_cpu_s)
    sent = short.prefill - prefill_s - step_cpu_s
    alone, together = (long.front - short.front) / more, (long_many.front - short_many.front) / more
    message_cpu_s = max(0.0, (alone - together) * AT_ONCE / (AT_ONCE - 1))
    token_cpu_s = max(0.0, alone - message_cpu_s)
    request_cpu_s = short.front - SHORT * (message_cpu_s + token_cpu_s)
    return ServingCosts(
        step_cpu_s, max(0.0, (sent + received) / 2), max(0.0, request_cpu_s), message_cpu_s, token_cpu_s
    )


async def _idle(system: RunningSystem) -> Mapping[str, float]:
    """CPU seconds per second of each process, and of this one, while nothing is asked."""
    before = _used(system)
    await asyncio.sleep(IDLE_S)
    return {name: (seconds - before[name]) / IDLE_S for name, seconds in _used(system).items()}


async def _cost(system: RunningSystem, num_tokens: int, at_once: int, idle: Mapping[str, float]) -> LoadCosts:
    before, begun = _used(system), time.monotonic()
    await _load(system, num_tokens, at_once)
    passed = time.monotonic() - begun
    used = {name: (s - before[name] - idle[name] * passed) / REQUESTS for name, s in _used(system).items()}
    front = sum(seconds for name, seconds in used.items() if not name.startswith(("prefill", "decode")))
    prefill, decode = (sum(s for name, s in used.items() if name.startswith(role)) for role in ("prefill", "decode"))
    return LoadCosts(prefill, decode, front)


async def _load(system: RunningSystem, num_tokens: int, at_once: int) -> None:
    draw = random.Random()  # noqa: S311 (no prompt twice, so that none is found in a cache)
    prompts = [[draw.randrange(300, 2000) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    await play(system.url, [PlannedRequest(0.0, prompt, num_tokens) for prompt in prompts], at_once=at_once)


def _used(system: RunningSystem) -> dict[str, float]:
    return {name: cpu_s(pid) for name, pid in system.processes.items()} | {"client": cpu_s(os.getpid())}


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads that a process has now."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9
