"""Placing by estimates: what leases and the router's own count say of workers becomes the choice of a way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster.router_harness import GEOMETRY, make_lease, make_link, make_register, make_request

from disagg.router.choose import Placement, Unplaceable
from disagg.router.costs.decide import POLICIES, decide
from disagg.router.costs.ways import Ask
from disagg.router.known_rates import FIRST_GUESS, KnownRates, kv_shape_of
from disagg.router.placing import Placing
from disagg.router.registry import Registry
from disagg.router.workload import FIRST_GUESS as FIRST_ANSWER
from disagg.router.workload import Share, Workload, shares_of
from disagg.transceiver.layout.ranks import pool_of_group
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.router import Lease, LinkStatus

FAST = MeasuredRates(1000.0, 0.0, ((1, 0.01), (8, 0.01)))
SLOW = MeasuredRates(100.0, 0.0, ((1, 0.1), (8, 0.8)))


def placing_of(
    *workers: tuple[str, str, MeasuredRates | None], policy: str = "prefix-aware", max_local_prefill: int = 0
) -> Placing:
    """Workers by (name, role, rates); decode workers have a ready link to each prefill worker."""
    registry = Registry()
    placing = Placing(registry, 1024, POLICIES[policy], max_local_prefill)
    prefills = [name for name, role, _ in workers if role == "prefill"]
    for name, role, rates in workers:
        registry.register(make_register(name, role), 0.0)
        lease = make_lease(name, links=prefills if role == "decode" else ())
        registry.renew(replace(lease, rates=rates), 0.0)
        worker = registry.get(name)
        assert worker is not None
        placing.add(worker)
    return placing


def place(placing: Placing, num_tokens: int = 400, max_tokens: int = 8, exclude: Iterable[str] = ()) -> Placement:
    request = make_request(max_tokens, num_prompt_tokens=num_tokens)
    placed = placing.at(0.0, request).place(max_tokens, frozenset(exclude))
    assert isinstance(placed, Placement), placed
    return placed


def names(placed: Placement) -> tuple[str | None, str]:
    return placed.prefill.worker_id if placed.prefill else None, placed.server.worker_id


def test_the_faster_prefill_worker_is_chosen_until_its_queue_is_longer() -> None:
    placing = placing_of(("slow", "prefill", SLOW), ("fast", "prefill", FAST), ("d", "decode", FAST))
    assert names(place(placing)) == ("fast", "d")
    placing.count((), [Share("fast", num_prompt_tokens=3000)])
    assert names(place(placing)) == ("fast", "d"), "3 s of queue and 0.4 are less than 4 s"
    placing.count((), [Share("fast", num_prompt_tokens=1000)])
    assert names(place(placing)) == ("slow", "d")


def test_answers_go_where_a_step_costs_less() -> None:
    placing = placing_of(("p", "prefill", FAST), ("busy", "decode", SLOW), ("idle", "decode", SLOW))
    placing.count((), [Share("busy", num_answers=4)])
    assert {names(place(placing)) for _ in range(4)} == {("p", "idle")}


def test_a_short_prompt_is_computed_where_it_is_decoded_within_the_bound() -> None:
    placing = placing_of(("p", "prefill", FAST), ("d", "decode", FAST), max_local_prefill=64)
    assert names(place(placing, 64)) == (None, "d")
    assert names(place(placing, 65)) == ("p", "d")
    assert names(place(placing_of(("p", "prefill", FAST), ("d", "decode", FAST)), 5)) == ("p", "d"), "off by default"


def test_workers_that_have_measured_nothing_are_as_fast_as_those_that_have() -> None:
    known, work = KnownRates(), Workload()
    registry = Registry()
    for name, rates in (("new", None), ("old", SLOW)):
        registry.register(make_register(name, "decode"), 0.0)
        registry.renew(replace(make_lease(name), rates=rates), 0.0)
    new, old = registry.get("new"), registry.get("old")
    assert new is not None
    assert old is not None
    guessed = known.candidate(new, work, 0).rates
    assert guessed.prefill_tokens_per_s == FIRST_GUESS.prefill_tokens_per_s
    assert known.candidate(old, work, 0).rates.prefill_tokens_per_s == 100.0
    assert known.candidate(new, work, 0).rates == known.candidate(old, work, 0).rates
    registry.renew(replace(make_lease("new"), rates=FAST), 0.0)
    assert known.candidate(new, work, 0).rates.prefill_tokens_per_s == 1000.0


@pytest.mark.parametrize(
    "rates", [MeasuredRates(1e-300, 1e300, ((1, 1e300),)), MeasuredRates(1e300, 0.0, ((1, 1e-9),))]
)
def test_absurd_figures_of_a_worker_end_no_request(rates: MeasuredRates) -> None:
    placing = placing_of(("p", "prefill", rates), ("d", "decode", rates), max_local_prefill=10**6)
    lease = Lease("d", "router", links=(LinkStatus("p", "p", "shm", "ready", -5.0, "", -1.0),), rates=rates)
    placing._registry.renew(lease, 0.0)
    placing.count((), [Share("p", num_prompt_tokens=10**6), Share("d", num_answers=1000)])
    place(placing, 500)


def test_the_shape_of_the_kv_is_that_of_the_pools() -> None:
    shape = kv_shape_of(GEOMETRY)
    assert [group.block_nbytes for group in shape.groups] == [GEOMETRY.slot_nbytes[p] for p in pool_of_group(GEOMETRY)]
    assert [group.window for group in shape.groups] == [None, 64]


def test_a_worker_whose_reservations_wait_makes_an_answer_wait_its_turn() -> None:
    placing = placing_of(("p", "prefill", FAST), ("full", "decode", FAST), ("free", "decode", FAST))
    placing.count((), [Share("full", num_answers=2), Share("free", num_answers=2)])
    full = placing._registry.get("full")
    assert full is not None
    placing._registry.renew(replace(full.lease, num_queued=3), 0.0)
    assert placing.rates.candidate(full, placing.work, 2).room_s == pytest.approx(3 * FIRST_ANSWER * 0.01 / 2)
    assert {names(place(placing)) for _ in range(4)} == {("p", "free")}


def test_excluded_suspect_and_unlinked_workers_are_no_candidates() -> None:
    placing = placing_of(("p0", "prefill", FAST), ("p1", "prefill", SLOW), ("d", "decode", FAST))
    assert names(place(placing, exclude=["p0"])) == ("p1", "d")
    placing._registry.renew(Lease("d", "router", links=(make_link("p0", "suspect"), make_link("p1"))), 0.0)
    assert names(place(placing)) == ("p1", "d")
    placing._registry.renew(Lease("d", "router", links=(make_link("p0", "suspect"),)), 0.0)
    assert names(place(placing)) == ("p0", "d"), "as the whole fleet is looked at, a suspect link serves"


def test_requests_without_a_place_are_told_why_under_each_policy() -> None:
    for policy in POLICIES:
        placing = placing_of(("d", "decode", FAST), policy=policy)
        placed = placing.at(0.0, make_request(8)).place(8)
        assert isinstance(placed, Unplaceable)
        assert "no prefill worker" in placed.reason


def test_round_robin_takes_workers_in_turn_whatever_their_load() -> None:
    placing = placing_of(
        ("p0", "prefill", FAST),
        ("p1", "prefill", SLOW),
        ("d0", "decode", None),
        ("d1", "decode", None),
        policy="round-robin",
    )
    placing.count((), [Share("p0", 10**6), Share("p0", 10**6), Share("d1", 0, 9)])
    used = []
    for _ in range(8):
        placed = place(placing)
        placing.count((), shares_of(placed, 400, 1, has_begun=False))
        used.append(names(placed))
    assert [p for p, _ in used].count("p0") == [d for _, d in used].count("d1") == 4


@settings(max_examples=100, deadline=None)
@given(loads=st.lists(st.integers(0, 3), min_size=4, max_size=4), turn=st.integers(0, 5))
def test_under_least_loaded_a_placement_weighs_what_the_preset_of_the_cost_function_weighs(
    loads: list[int], turn: int
) -> None:
    fleet = (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode"))
    placing = placing_of(*((name, role, FAST) for name, role in fleet), policy="least-loaded")
    load = {name: count for (name, _), count in zip(fleet, loads, strict=True)}
    for name, count in load.items():
        placing.count((), [Share(name)] * count)
    for _ in range(turn):
        placing.at(0.0)
    workers = [placing._registry.get(name) for name, _ in fleet]
    candidates = [placing.rates.candidate(w, placing.work, load[w.incarnation]) for w in workers if w is not None]
    way = decide(Ask(400, 8), candidates, placing.links, placing.policy)
    assert way is not None
    prefill, server = names(place(placing))
    assert prefill is not None
    assert load[prefill] + load[server] == way.num_requests


shares = st.builds(Share, st.sampled_from("abc"), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(shares, max_size=2), max_size=12), st.data())
def test_the_workload_is_the_sum_of_live_shares(script: list[list[Share]], data: st.DataObject) -> None:
    work, live = Workload(), list[list[Share]]()
    for after in script:
        before = live.pop(data.draw(st.integers(0, len(live) - 1))) if live and data.draw(st.booleans()) else []
        work.move(before, after)
        live.append(after)
        work.check_invariants([share for some in live for share in some])


def test_the_mean_answer_follows_the_answers() -> None:
    work = Workload()
    for _ in range(300):
        work.note_answer(10)
    assert work.mean_answer == pytest.approx(10)
    for _ in range(300):
        work.note_answer(50)
    assert work.mean_answer == pytest.approx(50, rel=0.01)


def test_a_worker_that_holds_the_prompt_is_weighed_however_loaded_it_is() -> None:
    fleet = [(f"p{n}", "prefill", FAST) for n in range(8)]
    placing = placing_of(*fleet, ("d", "decode", FAST))
    placing.count((), [Share("p7", num_prompt_tokens=100)])
    request = make_request(8, num_prompt_tokens=400)

    def chosen(held: dict[str, int]) -> tuple[str | None, str]:
        placed = placing.at(0.0, request, held).place(8)
        assert isinstance(placed, Placement)
        return names(placed)

    assert chosen({"p7": 384, "gone": 384}) == ("p7", "d"), "0.1 s of queue against 0.38 s of computing"
    placing.count((), [Share("p7", num_prompt_tokens=900)])
    assert chosen({"p7": 384})[0] != "p7"
    assert chosen({"d": 384}) != (None, "d"), "within the bound of 0 tokens nothing is computed beside answers"


def test_links_that_a_request_makes_cost_their_making_and_lossy_ones_fetch_nothing() -> None:
    placing = placing_of(("p", "prefill", FAST), ("d", "decode", FAST))
    met = placing.links("p", "d")
    assert met is not None
    assert (met.hands_over, met.fetches) == (True, False), "by its registration it speaks protocol 2.0"
    assert placing.links("d", "p") is None
    assert placing.links("p", "gone") is None
