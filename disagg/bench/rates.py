"""`disagg bench rates`: how fast this machine's workers, links and front end are, for `disagg simulate`.

A worker's engine computes prompts and steps of answers in this process; two processes move KV; a running system says
what requests and tokens cost beside that. On one CPU thread CPU time is counted, which neighbours change little.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from json import dumps
from typing import Any, Final

import numpy as np

from disagg.bench.cases import CASES
from disagg.bench.circumstances import about
from disagg.bench.pair import BenchError, Pair
from disagg.bench.serving import ServingCosts, measure_serving
from disagg.config.resources import num_cores
from disagg.config.settings import RatesSettings, WorkerSettings
from disagg.engine.commands import AttemptKey, FailedEvent, FinishedEvent, Release, Serve, TokensEvent
from disagg.engine.engine import Engine
from disagg.simulate.rates import ClusterRates, Table
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import Sampling
from disagg.worker.build import make_engine

WORDS: Final = range(300, 2000)
"""Token ids that every model of ours has and that end no answer, since stop tokens are ignored."""
SMALLEST: Final = 16
"""Tokens of the shortest prompt that is measured: below, what a step costs without any token decides."""


def bench_rates(settings: RatesSettings) -> int:
    """Print the rates as JSON, progress on stderr; the exit code."""
    load = os.getloadavg()
    rates = measure_rates(settings)
    sys.stdout.write(dumps(rates.as_json() | {"about": dict(rates.about) | about(load)}, indent=1) + "\n")
    return 0


def measure_rates(settings: RatesSettings) -> ClusterRates:
    """All that `disagg simulate` wants to know. Raises what `make_engine` does, and BenchError."""
    worker = worker_settings(settings)
    parts = make_engine(worker, "both", ClusterKeys.published(), _say)
    with closing(parts.cache):
        clock = EngineClock(parts.engine, settings, parts.identity.max_model_len)
        _say("steps with prompts")
        prefill = clock.prefill()
        _say("steps of answers")
        decode = clock.decode()
    _say("transfers")
    link_bytes_per_s, link_latency_s = measure_link(settings.planes[0], settings.rounds)
    serving = ServingCosts()
    if settings.serving:
        _say("a running system")
        serving = measure_serving(settings, prefill, decode)
    told = {"clock": clock.name, "threads": worker.threads or num_cores(), "plane": settings.planes[0]}
    return ClusterRates(
        prefill,
        decode,
        link_bytes_per_s,
        link_latency_s,
        **asdict(serving),
        about=told | {"context": clock.context, "model": settings.model},
    )


def worker_settings(settings: RatesSettings) -> WorkerSettings:
    """Of a worker that keeps no prefixes: prompts are computed whole."""
    shared = {
        name: getattr(settings, name) for name in RatesSettings.model_fields if name in WorkerSettings.model_fields
    }
    return WorkerSettings(**shared | {"enable_prefix_caching": False, "insecure": True})


def measure_link(plane: str, rounds: int) -> tuple[float, float]:
    """Bytes per second of a large transfer with digests, and what a small one takes longer than its bytes would."""
    large_s, small_s = (_transfer_s(plane, case, rounds) for case in ("a", "c"))
    bytes_per_s = (CASES["a"].nbytes - CASES["c"].nbytes) / max(large_s - small_s, 1e-9)
    return bytes_per_s, max(0.0, small_s - CASES["c"].nbytes / bytes_per_s)


def _transfer_s(plane: str, case: str, rounds: int) -> float:
    rng = np.random.default_rng(0)
    with closing(Pair(plane, True, CASES[case])) as pair:
        pair.repeat(0, rng)  # the first touches pages
        return statistics.median(pair.repeat(number + 1, rng).seconds for number in range(rounds))


def _say(what: str) -> None:
    print(f"measuring: {what}", file=sys.stderr)  # noqa: T201


class EngineClock:
    """One engine and the seconds of its steps."""

    def __init__(self, engine: Engine, settings: RatesSettings, max_model_len: int) -> None:
        self._engine, self._settings, self._max_model_len = engine, settings, max_model_len
        is_single = settings.device == "cpu" and (settings.threads or num_cores()) == 1
        self.name = "CPU" if is_single else "wall"
        self._clock: Callable[[], float] = time.thread_time if is_single else time.perf_counter
        self._random = random.Random(0)  # noqa: S311 (repeatable, not secret)
        self._number = 0

    def prefill(self) -> Table:
        """Seconds of a step by the prompt tokens in it, up to a worker's whole step."""
        most = min(self._settings.max_num_batched_tokens, self._max_model_len - 1)
        sizes = sorted({most, *_doubling(min(SMALLEST, most), most, factor=4)})
        return Table({size: self._prompts(size) for size in sizes})

    def decode(self) -> Table:
        """Seconds of a step by the answers in it, each behind a prompt of `context` tokens."""
        most = self._settings.max_num_seqs
        return Table({count: self._answers(count) for count in sorted({most, *_doubling(1, most, factor=2)})})

    @property
    def context(self) -> int:
        """A quarter of what a sequence may have, but no more than some pages."""
        return max(1, min(self._max_model_len // 4, 512))

    def _prompts(self, size: int) -> float:
        """The median of some prompts of so many tokens."""
        self._prompt(size)  # the first of a size allocates what the next ones reuse
        return statistics.median(self._prompt(size) for _ in range(self._settings.rounds))

    def _prompt(self, size: int) -> float:
        self._serve(size, 1)
        return sum(self._until(FinishedEvent, 1))

    def _answers(self, count: int) -> float:
        """The median step of so many answers under way."""
        steps = self._settings.rounds + 2
        keys = [self._serve(self.context, self._max_model_len - self.context) for _ in range(count)]
        sum(self._until(TokensEvent, count))
        times = [self._timed()[0] for _ in range(steps)]
        for key in keys:
            self._engine.handle(Release(key))
        return statistics.median(times[2:])

    def _serve(self, size: int, num_tokens: int) -> AttemptKey:
        self._number += 1
        key = AttemptKey(f"{self._number:032x}", 1)
        prompt = tuple(self._random.choice(WORDS) for _ in range(size))
        self._engine.handle(Serve(key, prompt, Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)))
        return key

    def _until(self, kind: type[FinishedEvent | TokensEvent], count: int) -> Iterator[float]:
        """Steps until so many different attempts have said such an event; their seconds."""
        heard: set[AttemptKey] = set()
        while len(heard) < count:
            seconds, events = self._timed()
            heard |= {event.key for event in events if isinstance(event, kind)}
            yield seconds

    def _timed(self) -> tuple[float, list[Any]]:
        begun = self._clock()
        events = self._engine.step()
        seconds = self._clock() - begun
        if failed := next((event for event in events if isinstance(event, FailedEvent)), None):
            raise BenchError(failed.message)
        return seconds, events


def _doubling(first: int, most: int, *, factor: int) -> Iterator[int]:
    while first <= most:
        yield first
        first *= factor
