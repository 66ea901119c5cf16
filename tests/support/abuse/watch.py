"""Eight honest streams and the processes' vitals while something bad goes on, and what must be true of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from support.abuse.honest import Ask, Honest, Seen
from support.abuse.loop_lag import HELD, LAG, LoopLags
from support.abuse.pair import Pair
from support.abuse.vitals import Vitals, leaks
from support.faults.wrong import Wrong

MAX_GAP_S = 1.0
MAX_HELD_P99_S = 0.05
TICK_TIMEOUT_S, TICK_LOOK_S = 60.0, 0.1
IDLE_TIMEOUT_S = 30.0  # whatever held a transfer, a request or a connection has timed out by then


@dataclass
class Report:
    """`wrong` is so on any machine; `late` may be the machine's, which can leave a process unrun until it is lost, and
    gets a second try."""

    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    figures: dict[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        return "\n".join(
            [shown, *(f"WRONG {fault}" for fault in self.wrong), *(f"LATE {fault}" for fault in self.late)]
        )

    def check(self) -> None:
        if self.wrong:
            raise Wrong(str(self))
        assert not self.late, str(self)


def judge_streams(seen: Seen, *, began_at: float, ended_at: float = float("inf")) -> Report:
    """What honest clients must not see between these moments."""
    report = Report()
    report.wrong += [f"an honest answer is wrong: {what}" for what in seen.wrong[:3]]
    report.late += [f"an honest stream broke ({len(seen.broken)} in all): {what}" for what in seen.broken[:5]]
    gap_s = seen.longest_gap_s(began_at, ended_at)
    if gap_s > MAX_GAP_S:
        report.late.append(f"{gap_s:.2f} s between two tokens of an honest stream, at most {MAX_GAP_S:g} s")
    if not seen.num_tokens:
        report.late.append("the honest streams got no token")
    return report


def judge_processes(
    before: Mapping[str, Vitals], after: Mapping[str, Vitals], warm: Mapping[str, Vitals] | None = None
) -> list[str]:
    """Another process under a name, or more held than before."""
    faults = []
    for name, was in before.items():
        now = after[name]
        if (was.pid, was.started_at) != (now.pid, now.started_at):
            faults.append(f"{name} is another process: pid {was.pid} before, {now.pid} after")
        else:
            faults += leaks(name, was, now, warm[name] if warm else None)
    return faults


def judge_lags(lags: LoopLags) -> tuple[list[str], list[str]]:
    """(wrong, late)"""
    if not lags.counts:
        return ["no process tells its loop's lag: /metrics has no `disagg_loop_held_seconds`"], []
    late = [
        f"the loop of {dict(loop) or 'the router'} was held for up to {p99_s:g} s in 99 % of its ticks"
        for loop, p99_s in lags.p99_s().items()
        if p99_s > MAX_HELD_P99_S
    ]
    return [], late


@dataclass
class Watch:
    """What an abuse may add to: what it found `wrong` or `late` itself."""

    pair: Pair
    began_at: float = 0.0
    wrong: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    figures: dict[str, float | str] = field(default_factory=dict)
    warm: Mapping[str, Vitals] | None = None

    def note_warm(self) -> None:
        """From here on the abuse repeats itself: what the processes hold now they may hold, and little more."""
        self.warm = self.pair.vitals()


@contextlib.contextmanager
def watching(pair: Pair, asks: Sequence[Ask], baseline_s: float) -> Iterator[Watch]:
    """Honest streams run before and during the block, undisturbed for `baseline_s` first. Judges at its end."""
    pair.wait_until_linked()
    pair.api.wait_until_idle()
    before, incarnations = pair.vitals(), _incarnations(pair)
    honest = Honest(pair.api.url, asks)
    try:
        quiet = _lags_now(pair)
        time.sleep(baseline_s)
        watch, at_start = Watch(pair, began_at=time.monotonic()), pair.vitals()
        lags = _lags_now(pair)
        try:
            yield watch
        except Exception as error:
            if not (ended := pair.ended()):
                raise
            raise Wrong(f"{watch.wrong} {watch.late} {ended}") from error
        ended_at = time.monotonic()
        if ended := pair.ended():
            raise Wrong("\n".join(ended))
        during, at_end = _lags_now(pair).since(lags), pair.vitals()
        seen = honest.stop()
        report = judge_streams(seen, began_at=watch.began_at)
        wrong, late = judge_lags(during.held)
        report.wrong += watch.wrong + wrong
        report.late += watch.late + late
        report.figures |= _figures(seen, watch, ended_at) | watch.figures
        report.figures |= _lag_figures(lags.since(quiet), during)
        for name, now in at_end.items():
            share = (now.unrun_s - at_start[name].unrun_s) / (ended_at - watch.began_at)
            report.figures[f"{name}'s loop had no core"] = f"{share:.0%} of the time"
        _judge_rest(watch, report, before)
        if _incarnations(pair) != incarnations:
            report.late.append(f"a worker lost its registration: {incarnations} before, {_incarnations(pair)} after")
        print(report)
        report.check()
    finally:
        honest.kill()


def _incarnations(pair: Pair) -> dict[str, str]:
    return {worker["id"]: worker["incarnation"] for worker in pair.api.workers()}


def _figures(seen: Seen, watch: Watch, ended_at: float) -> dict[str, float | str]:
    return {
        "seconds": round(ended_at - watch.began_at, 1),
        "honest answers": seen.num_answers,
        "honest tokens": seen.num_tokens,
        "longest gap before": round(seen.longest_gap_s(0, watch.began_at), 2),
        "during": round(seen.longest_gap_s(watch.began_at), 2),
        "longest wait for a first token before": round(seen.longest_first_s(0, watch.began_at), 2),
        "during ": round(seen.longest_first_s(watch.began_at), 2),
        "longest pause of the honest clients' own process": round(seen.longest_pause_s(0), 2),
    }


@dataclass(frozen=True)
class Lags:
    """All loops' at one moment: by their own doing, and in all."""

    held: LoopLags
    lag: LoopLags

    def since(self, earlier: Lags) -> Lags:
        return Lags(self.held.since(earlier.held), self.lag.since(earlier.lag))


def _lags_now(pair: Pair) -> Lags:
    """Of all loops, once each has ticked again: what a worker's loop did reaches the router with its next lease, and
    one that is held sends none. Raises TimeoutError."""
    deadline = time.monotonic() + TICK_TIMEOUT_S
    first = None
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # the router's own loop is held for longer than a client waits
            metrics = pair.api.get("/metrics")
            now = Lags(LoopLags.read(metrics, HELD), LoopLags.read(metrics, LAG))
            first = first or now
            if all(now.held.num_ticks(loop) > count for loop, count in first.held.all_ticks().items()):
                return now
        time.sleep(TICK_LOOK_S)
    raise TimeoutError(f"a loop did not tick for {TICK_TIMEOUT_S:g} s")


def _lag_figures(before: Lags, during: Lags) -> dict[str, float | str]:
    quiet, lag = before.held.p99_s(), during.lag.p99_s()
    return {
        f"p99 of {dict(loop).get('worker', 'router')}'s loop": (
            f"held {quiet.get(loop, 0):g} before, {p99_s:g} during; late {lag.get(loop, 0):g} during"
        )
        for loop, p99_s in during.held.p99_s().items()
    }


def _judge_rest(watch: Watch, report: Report, before: Mapping[str, Vitals]) -> None:
    """Once everybody left: nothing is open, nothing is used, nothing grew."""
    pair = watch.pair
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while (held := [*_held(pair), *judge_processes(before, pair.vitals(), watch.warm)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    report.wrong += held + pair.ended()
    after = pair.vitals()
    for name, now in after.items():
        was = before[name]
        report.figures[f"{name} grew by"] = (
            f"{now.num_fds - was.num_fds} descriptors, {now.num_threads - was.num_threads} threads, "
            f"{(now.nbytes - was.nbytes) >> 20} MiB; "
            f"{(now.shared_nbytes - was.shared_nbytes) >> 20} MiB of its pool were used for the first time"
            + (f"; {(now.nbytes - watch.warm[name].nbytes) >> 20} MiB since it was warm" if watch.warm else "")
        )


def _held(pair: Pair) -> list[str]:
    """Requests and blocks that are still there."""
    used = {key: value for key, value in pair.api.samples("disagg_kv_blocks_used").items() if value}
    running = pair.api.total("disagg_requests_running")
    found = [f"blocks are still used: {used}"] if used else []
    return [*found, f"{running:g} requests are still open"] if running else found
