"""`disagg simulate`: a trace, some fleets and policies, and what would come of each of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import Final

from rich.console import Console

from disagg.cache.errors import BudgetTooSmall
from disagg.cli.plan import model_layout
from disagg.config.errors import ConfigError
from disagg.config.settings import PlanSettings, SimulateSettings
from disagg.engine.model.checkpoint import ModelRefused
from disagg.engine.reuse_words import CacheSize
from disagg.simulate.figures import Figures, Objectives, figures
from disagg.simulate.fleet import FleetShape, WorkerKind, parse_fleet
from disagg.simulate.generate import KINDS, TraceShape, generate_trace
from disagg.simulate.plots import write_plots
from disagg.simulate.rates import ClusterRates, RatesRefused, read_rates
from disagg.simulate.report import json_of, table_of
from disagg.simulate.routing import NAMES
from disagg.simulate.simulation import Setting, Simulation
from disagg.simulate.trace import Trace, TraceRefused, read_trace, trace_lines

MADE_UP: Final = 1000
"""Requests of a trace that is made up: the slowest hundredth is ten of them."""
TABLE_WIDTH: Final = 168
"""Columns of the table in full: a pipe is no reason to cut figures off."""


def simulate(settings: SimulateSettings, trace: str, *, json: bool | None) -> int:
    """Run each fleet under each policy and print the figures; the exit code. Raises ConfigError."""
    try:
        given = settings_of(settings)
        played = trace_of(settings, trace)
        fleets = [parse_fleet(text) for text in settings.fleets]
        if settings.write_trace is not None:
            write_trace(played, settings.write_trace)
        found = run_all(settings, played.faster(settings.speed), fleets, *given)
    except BudgetTooSmall as refusal:
        raise ConfigError(str(refusal)) from refusal
    except (TraceRefused, RatesRefused, ModelRefused, ValueError) as refusal:
        raise ConfigError(str(refusal)) from refusal
    if settings.plots is not None:
        _plot(found, settings.plots)
    objectives = asdict(given[2])
    if json:
        about = {
            "trace": trace,
            "num_requests": len(played.requests),
            "speed": settings.speed,
            "objectives": objectives,
        }
        sys.stdout.write(dumps(json_of(found, about)) + "\n")
    else:
        _print_table(found, given[2])
    return 0


def settings_of(settings: SimulateSettings) -> tuple[WorkerKind, ClusterRates, Objectives]:
    """What the workers are, how fast they are, and what is good. Raises ConfigError, RatesRefused, ModelRefused."""
    if unknown := [name for name in settings.policies if name not in NAMES]:
        raise ConfigError(f"`--policies` is `{unknown[0]}`: expected some of {', '.join(NAMES)}")
    if settings.rates is None:
        raise ConfigError("`--rates` is missing: measure with `disagg bench rates > rates.json` and give that file")
    rates = read_rates(settings.rates)
    return kind_of(settings), rates, Objectives(settings.ttft, settings.itl)


def kind_of(settings: SimulateSettings) -> WorkerKind:
    """A worker as `disagg prefill` with these settings would be."""
    names = ("model", "dtype", "kv_cache_dtype", "block_size", "max_model_len")
    plan = PlanSettings(**{name: getattr(settings, name) for name in names})
    _, layout, max_model_len = model_layout(plan)
    step = settings.max_num_batched_tokens
    size = CacheSize(
        max_model_len=max_model_len, max_num_seqs=settings.max_num_seqs, max_num_batched_tokens=step, step_tokens=step
    )
    return WorkerKind(
        layout,
        size.slots(layout, settings.kv_cache_memory),
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=step,
        reuses_prefixes=settings.enable_prefix_caching,
    )


def trace_of(settings: SimulateSettings, trace: str) -> Trace:
    """Of a file, or made up. Raises TraceRefused, ValueError."""
    if trace not in KINDS:
        return read_trace(Path(trace), most=settings.requests)
    shape = TraceShape(
        num_requests=settings.requests or MADE_UP,
        rate=settings.rate,
        prompt=settings.prompt,
        answer=settings.answer,
        block_size=settings.block_size,
        seed=settings.seed,
    )
    return generate_trace(trace, shape)


def write_trace(trace: Trace, path: Path) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(trace_lines(trace))
    except OSError as fault:
        raise ConfigError(f"`--write-trace`: {fault}") from fault


def run_all(
    settings: SimulateSettings,
    trace: Trace,
    fleets: Sequence[FleetShape],
    kind: WorkerKind,
    rates: ClusterRates,
    objectives: Objectives,
) -> list[Figures]:
    """One run for each fleet and policy; progress goes to stderr."""
    found = []
    for fleet in fleets:
        for policy in settings.policies:
            begun = time.process_time()
            setting = Setting(
                fleet,
                kind,
                rates,
                policy,
                num_cores=settings.cores,
                max_queued=settings.max_queued,
                max_local_prefill=settings.max_local_prefill,
            )
            found.append(figures(Simulation(trace, setting).run(), objectives))
            spent = time.process_time() - begun
            print(f"{fleet} {policy}: {len(trace.requests)} requests in {spent:.1f} s of CPU", file=sys.stderr)  # noqa: T201
    return found


def _plot(found: Sequence[Figures], folder: Path) -> None:
    try:
        write_plots(found, folder)
    except OSError as fault:
        raise ConfigError(f"`--plots`: {fault}") from fault


def _print_table(found: Sequence[Figures], objectives: Objectives) -> None:
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table_of(found))
    console.print(
        f"{found[0].num_requests} requests; good: first token within {objectives.ttft_s:g} s and "
        f"{objectives.itl_s * 1e3:g} ms from token to token; hits: prompt tokens that were not computed; busy: "
        "time in steps of prefill (P), decode (D) and `both` (B) workers, and of the front end (F)",
        soft_wrap=True,
    )
