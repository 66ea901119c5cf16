"""Whole runs: known queues, nothing lost, bytes minimal, the router's own decisions, the same again by seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from disagg.cache.layout import CacheLayout, LayerSpec, derive_layout
from disagg.router.attempt import RoutedRequest
from disagg.router.attempt_events import Answered
from disagg.router.choose import Placement, Unplaceable
from disagg.router.costs.decide import POLICIES
from disagg.router.gate import AHEAD_PER_SERVER
from disagg.router.generation import GenerationRequest
from disagg.router.placing import Placing
from disagg.simulate.figures import Objectives, figures, ttft_of
from disagg.simulate.fleet import WorkerKind, parse_fleet
from disagg.simulate.generate import TraceShape, generate_trace
from disagg.simulate.index import IndexOfBlocks
from disagg.simulate.rates import ClusterRates, Table
from disagg.simulate.records import geometry_of, incarnation_of, records_of
from disagg.simulate.requests import SimulatedRequest
from disagg.simulate.routing import NAMES, Routing
from disagg.simulate.simulation import Outcome, Setting, Simulation
from disagg.simulate.trace import Trace, TracedRequest
from disagg.transceiver.layout.required import moved_nbytes, needed_units
from disagg.transceiver.wire.messages.router import Finished
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.messages.values import Sampling

GOLDEN = Path(__file__).parent / "golden_chat.json"
RATES = ClusterRates(
    Table({16: 0.008, 512: 0.06}), Table({1: 0.006, 8: 0.009}), 1e9, 0.001, request_cpu_s=0.002, token_cpu_s=0.0002
)


def layout_of(*windows: int | None) -> CacheLayout:
    layers = [LayerSpec(i, window, 0, 1, 16 + i, "float16", i) for i, window in enumerate(windows)]
    return derive_layout(layers, block_size=16, max_model_len=1 << 14)


def kind_of(*windows: int | None, num_slots: int = 2000, **fields: int) -> WorkerKind:
    layout = layout_of(*windows)
    return WorkerKind(layout, (num_slots,) * layout.num_pools, **fields)  # type: ignore[arg-type]


def run(
    trace: Trace,
    fleet: str,
    policy: str = "least-loaded",
    *,
    kind: WorkerKind | None = None,
    rates: ClusterRates = RATES,
    cores: int | None = None,
) -> Outcome:
    return Simulation(trace, Setting(parse_fleet(fleet), kind or kind_of(None, 64), rates, policy, cores)).run()


def chats(count: int = 120, rate: float = 6.0, seed: int = 0) -> Trace:
    return generate_trace("chat", TraceShape(count, rate, prompt=160, answer=30, seed=seed))


def apart(count: int, prompt_len: int, answer_len: int, every_s: float) -> Trace:
    return Trace(16, tuple(TracedRequest(i * every_s, prompt_len, answer_len, ()) for i in range(count)))


# --- what is known beforehand -----------------------------------------------------------------------------------


def test_a_worker_with_one_seat_waits_as_long_as_the_formula_for_m_d_1_says() -> None:
    draw, at, load, work_s = random.Random(3), 0.0, 0.6, RATES.prefill_step_s(100)
    requests = []
    for _ in range(20_000):
        at += draw.expovariate(load / work_s)
        requests.append(TracedRequest(at, 100, 1, ()))
    rates = replace(RATES, request_cpu_s=0.0)
    outcome = run(Trace(16, tuple(requests)), "1b", kind=kind_of(None, max_num_seqs=1), rates=rates)
    wait_s = sum(map(ttft_of, outcome.requests)) / len(requests) - work_s
    assert wait_s == pytest.approx(load * work_s / (2 * (1 - load)), rel=0.06)


def test_a_lone_request_takes_the_sum_of_its_parts() -> None:
    outcome = run(apart(1, 100, 5, 1.0), "1p1d", rates=replace(RATES, handoff_cpu_s=0.003))
    (request,) = outcome.requests
    nbytes = sum(request.handoff_nbytes)
    sent_s = nbytes / RATES.link_bytes_per_s + RATES.link_latency_s + 2 * 0.003
    expected = RATES.request_cpu_s + RATES.prefill_step_s(100) + sent_s
    assert ttft_of(request) == pytest.approx(expected)
    assert request.ended_at == pytest.approx(expected + 4 * RATES.decode_step_s(1))
    assert sum(count for _, count in outcome.gaps) == 4


def test_a_long_prompt_moves_while_it_is_computed_all_but_its_last_chunk() -> None:
    slow = replace(RATES, link_bytes_per_s=2e5, link_latency_s=0.0)
    kind = kind_of(None, max_num_batched_tokens=128)
    outcome = run(apart(1, 512, 2, 1.0), "1p1d", kind=kind, rates=slow)
    (request,) = outcome.requests
    assert request.computed_at is not None
    after_s = ttft_of(request) - request.computed_at
    all_s = sum(request.handoff_nbytes) / slow.link_bytes_per_s
    assert after_s == pytest.approx(max(all_s / 4, all_s - 3 * slow.prefill_step_s(128)), rel=1e-6)


def test_answers_that_come_and_go_get_one_token_per_step_of_their_worker() -> None:
    trace = Trace(16, (TracedRequest(0.0, 16, 100, ()), TracedRequest(0.2, 16, 10, ())))
    outcome = run(trace, "1b", rates=replace(RATES, request_cpu_s=0.0))
    first, second = outcome.requests
    mixed = RATES.step_s(1, 16)
    steps_before = int((0.2 - RATES.prefill_step_s(16)) / RATES.decode_step_s(1)) + 1
    assert second.first_at == pytest.approx(RATES.prefill_step_s(16) + steps_before * RATES.decode_step_s(1) + mixed)
    assert second.ended_at == pytest.approx(second.first_at + 9 * RATES.decode_step_s(2))
    left = 99 - steps_before - 1 - 9
    assert first.ended_at == pytest.approx(second.ended_at + left * RATES.decode_step_s(1))


def test_steps_counted_together_or_one_by_one_end_at_the_same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(chats(), "2p2d1b")
    monkeypatch.setattr("disagg.simulate.simulation.MOST_STEPS", 1)
    one_by_one = run(chats(), "2p2d1b")
    assert one_by_one.num_events > 2 * together.num_events
    ends = [[request.ended_at for request in outcome.requests] for outcome in (together, one_by_one)]
    assert ends[0] == pytest.approx(ends[1])
    gaps = [sum(gap * count for gap, count in outcome.gaps) for outcome in (together, one_by_one)]
    assert gaps[0] == pytest.approx(gaps[1])


# --- nothing is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("fleet", ["1p1d", "2p3d", "4b", "1p1d2b"])
@pytest.mark.parametrize("num_slots", [2000, 90])
def test_every_request_ends_once_and_leaves_nothing_behind(policy: str, fleet: str, num_slots: int) -> None:
    trace = chats(80, 12.0)
    outcome = run(trace, fleet, policy, kind=kind_of(None, 64, num_slots=num_slots))
    for request in outcome.requests:
        assert request.refused or _is_in_order(request), request
    tokens = sum(r.traced.answer_len - 1 for r in outcome.requests if not r.refused)
    assert sum(count for _, count in outcome.gaps) == tokens
    for worker in outcome.workers:
        worker.store.check_invariants()
        assert not any(worker.store.promises.promised)
        assert (worker.num_running, worker.num_waiting) == (0, 0)
    sent = sum(sum(r.handoff_nbytes) + sum(r.prefix_nbytes) for r in outcome.requests)
    for link_total in (sum(x.sent for x in outcome.network.links), sum(x.received for x in outcome.network.links)):
        assert link_total == sent
    if num_slots == 90:
        assert any(worker.store.num_evicted for worker in outcome.workers)


def test_prompts_that_gave_way_before_they_were_asked_for_are_computed_anew() -> None:
    """Two seats for answers, and pools of prompts that hold few: prompts run ahead and must make room for others."""
    draw = random.Random(5)
    lengths = [(draw.randint(50, 400), draw.randint(2, 60)) for _ in range(60)]
    trace = Trace(16, tuple(TracedRequest(0.01 * i, *lengths[i], ()) for i in range(60)))
    outcome = run(trace, "1p2d", kind=kind_of(None, num_slots=60, max_num_seqs=2))
    assert sum(request.num_drops for request in outcome.requests) > 5
    assert all(_is_in_order(request) for request in outcome.requests)
    assert all(not any(worker.store.promises.promised) for worker in outcome.workers)


def _is_in_order(request: SimulatedRequest) -> bool:
    moments = (request.traced.arrival_s, request.placed_at, request.computed_at, request.first_at, request.ended_at)
    return all(a is not None and b is not None and a <= b for a, b in pairwise(moments))


def test_prompt_tokens_are_computed_or_found_each_once() -> None:
    outcome = run(chats(), "2p2d", "prefix-aware")
    prompt_tokens = sum(request.traced.prompt_len for request in outcome.requests)
    assert not any(request.num_drops for request in outcome.requests)
    computed = sum(worker.num_computed for worker in outcome.workers)
    assert computed + sum(request.num_cached for request in outcome.requests) == prompt_tokens


def test_bytes_are_the_minimum_of_the_planner_where_nothing_is_held() -> None:
    trace = generate_trace("bursty", TraceShape(60, 5.0, prompt=200, answer=20))
    kind = kind_of(None, 64)
    outcome = run(trace, "2p2d", kind=kind)
    geometry = geometry_of(kind.layout)
    sizes = [kind.layout.slot_nbytes[pool] for pool in kind.layout.pool_of_group]
    for request in outcome.requests:
        if request.prefill is not None:
            need = needed_units(geometry.groups, request.traced.prompt_len, 16)
            assert sum(request.handoff_nbytes) == moved_nbytes(need, sizes)


def test_turn_two_computes_only_what_is_new_wherever_its_prefix_lies() -> None:
    found = {policy: figures(run(chats(), "3p3d", policy), Objectives()) for policy in NAMES}
    assert found["prefix-aware"].num_fetched_tokens > 0
    assert found["prefix-aware"].hit_rate > found["round-robin"].hit_rate + 0.2
    assert found["prefix-aware"].num_computed_tokens < found["least-loaded"].num_computed_tokens


def test_a_request_that_no_worker_could_hold_is_refused_with_the_reason() -> None:
    trace = Trace(16, (TracedRequest(0.0, 3000, 10, ()), TracedRequest(0.0, 30, 10, ())))
    outcome = run(trace, "1p1d", kind=kind_of(None, num_slots=100))
    assert outcome.requests[0].refused == "3010 tokens need more blocks than a worker has"
    assert outcome.requests[1].ended_at is not None
    assert figures(outcome, Objectives()).num_refused == 1


def test_a_flood_is_refused_by_the_routers_own_admission() -> None:
    trace = Trace(16, tuple(TracedRequest(0.0, 30, 10, ()) for _ in range(200)))
    setting = Setting(parse_fleet("1b"), kind_of(None), RATES, "least-loaded", max_queued=40)
    outcome = Simulation(trace, setting).run()
    at_the_gate = [request for request in outcome.requests if "as many as may (`--max-queued`)" in request.refused]
    assert len(at_the_gate) == 200 - AHEAD_PER_SERVER - 40


# --- the same again, and as the router would --------------------------------------------------------------------


@pytest.mark.parametrize("policy", NAMES)
def test_the_same_trace_gives_the_same_run(policy: str) -> None:
    again = [_journal(run(chats(), "2p2d1b", policy)) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] != _journal(run(chats(seed=1), "2p2d1b", policy))


def _journal(outcome: Outcome) -> list[tuple[object, ...]]:
    return [(r.server, r.prefill, r.source, r.first_at, r.ended_at, r.num_cached) for r in outcome.requests]


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("fleet", ["2p3d", "3b"])
def test_requests_are_placed_as_the_router_places_them(
    policy: str, fleet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments of a run are told to real requests of a real router's placing, which must choose the same."""
    held = remembered_answers(monkeypatch)
    trace = Trace(16, tuple(replace(r, answer_len=max(2, r.answer_len)) for r in chats().requests))
    simulation = Simulation(trace, Setting(parse_fleet(fleet), kind_of(None, 64), RATES, policy))
    outcome = simulation.run()
    replay = Replay(records_placing(simulation, policy), held)
    for moment, what, request in sorted(_moments(outcome.requests), key=lambda one: one[0]):
        getattr(replay, what)(request, moment)
    assert replay.chosen == {r.number: (r.server, r.prefill) for r in outcome.requests}
    assert len(set(replay.chosen.values())) > 2


def remembered_answers(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, int]]:
    """By request, what the index says of it when it is placed."""
    held: dict[int, dict[str, int]] = {}
    ask, choose, answers = IndexOfBlocks.who_holds, Routing._choose, []

    def who_holds(self: IndexOfBlocks, blocks: Sequence[int], prompt_len: int) -> dict[str, int]:
        answers.append(ask(self, blocks, prompt_len))
        return answers[-1]

    def chosen(self: Routing, request: SimulatedRequest) -> Placement | Unplaceable:
        answers.append({})
        placed = choose(self, request)
        held[request.number] = answers[-1]
        return placed

    monkeypatch.setattr(IndexOfBlocks, "who_holds", who_holds)
    monkeypatch.setattr(Routing, "_choose", chosen)
    return held


def records_placing(simulation: Simulation, policy: str) -> Placing:
    registry = records_of(simulation.workers, simulation.ground)
    placing = Placing(registry, 1024, POLICIES[policy])
    for worker in registry:
        placing.add(worker)
    return placing


def _moments(requests: Sequence[SimulatedRequest]) -> Iterator[tuple[float, str, SimulatedRequest]]:
    for request in requests:
        assert request.placed_at is not None
        assert request.first_at is not None
        assert request.ended_at is not None
        yield request.first_at, "first", request
        yield request.ended_at, "end", request
        yield request.placed_at, "place", request


class Replay:
    """A router's requests, told what happened in a simulation, in its order."""

    def __init__(self, placing: Placing, held: Mapping[int, Mapping[str, int]]) -> None:
        self._placing, self._held = placing, held
        self._live: dict[int, RoutedRequest] = {}
        self.chosen: dict[int, tuple[int, int | None]] = {}

    def place(self, request: SimulatedRequest, now: float) -> None:
        traced, number = request.traced, request.number
        asked = GenerationRequest(str(number), range(traced.prompt_len), Sampling(max_tokens=traced.answer_len))
        routed = RoutedRequest(
            asked,
            f"{number:032x}",
            lambda: self._placing.at(now, asked, self._held[number]),
            lambda *_: b"",
            max_attempts=1,
            max_continuations=0,
            timeout_s=1e9,
            now=now,
        )
        routed.start(now)
        placed = routed.placement
        assert placed is not None
        self._placing.count((), routed.load)
        self._live[number] = routed
        prefill = None if placed.prefill is None else int(placed.prefill.incarnation, 16)
        self.chosen[number] = int(placed.server.incarnation, 16), prefill

    def first(self, request: SimulatedRequest, now: float) -> None:
        self._tell(request, Tokens(f"{request.number:032x}", 1, 0, (7,)), now)

    def end(self, request: SimulatedRequest, now: float) -> None:
        routed, name, count = self._live[request.number], f"{request.number:032x}", request.traced.answer_len
        self._tell(request, Tokens(name, 1, 1, (7,) * (count - 1)), now)
        self._tell(request, Finished(name, 1, count, "length"), now)
        assert routed.is_over
        self._placing.work.note_answer(count)

    def _tell(self, request: SimulatedRequest, message: Tokens | Finished, now: float) -> None:
        routed = self._live[request.number]
        before, server = routed.load, self.chosen[request.number][0]
        routed.handle(Answered(incarnation_of(server), message), now)
        if before != routed.load:
            self._placing.count(before, routed.load)


def test_figures_of_a_small_trace_are_those_that_were_kept() -> None:
    """In `golden_chat.json`, of the policies that estimate nothing: another model of workers changes it on purpose."""
    plain = [name for name in NAMES if not POLICIES[name].weighs_all]
    found = [figures(run(chats(), fleet, policy), Objectives()) for fleet in ("1p1d", "2b") for policy in plain]
    told = [_rounded(one.as_json()) for one in found]
    assert told == json.loads(GOLDEN.read_text())


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {name: _rounded(one) for name, one in value.items()} if isinstance(value, dict) else value


# --- the checks can fail ----------------------------------------------------------------------------------------


def test_a_replay_under_another_policy_chooses_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    held = remembered_answers(monkeypatch)
    trace = Trace(16, tuple(replace(r, answer_len=max(2, r.answer_len)) for r in chats().requests))
    simulation = Simulation(trace, Setting(parse_fleet("2p3d"), kind_of(None, 64), RATES, "least-loaded"))
    outcome = simulation.run()
    replay = Replay(records_placing(simulation, "round-robin"), held)
    for moment, what, request in sorted(_moments(outcome.requests), key=lambda one: one[0]):
        getattr(replay, what)(request, moment)
    assert replay.chosen != {r.number: (r.server, r.prefill) for r in outcome.requests}


def test_bytes_of_blocks_that_are_held_are_missed_by_a_count_that_forgets_them() -> None:
    """Where blocks are held, a handoff moves less than the planner says of a worker that holds nothing."""
    kind = kind_of(None, 64)
    groups, sizes = geometry_of(kind.layout).groups, [kind.layout.slot_nbytes[p] for p in kind.layout.pool_of_group]
    outcome = run(chats(), "1p1d", kind=kind)
    minimum = [moved_nbytes(needed_units(groups, r.traced.prompt_len, 16), sizes) for r in outcome.requests]
    moved = [sum(request.handoff_nbytes) for request in outcome.requests]
    assert all(some <= most for some, most in zip(moved, minimum, strict=True))
    assert sum(moved) < 0.8 * sum(minimum)


def test_a_clock_without_contention_misses_what_shared_cores_cost() -> None:
    alone, shared = (run(chats(rate=12.0), "2p2d", cores=cores) for cores in (None, 1))
    means = [sum(map(ttft_of, outcome.requests)) / len(outcome.requests) for outcome in (alone, shared)]
    assert means[1] > 1.3 * means[0]
