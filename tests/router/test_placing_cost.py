"""Placing looks at each worker once: cheap in a large fleet, and its choice is that of a search over all pairs."""

from __future__ import annotations

import time
import tracemalloc
from dataclasses import replace
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster.router_harness import GEOMETRY, make_lease, make_link, make_register

from disagg.router.choose import MAX_PAIRS_TOLD, Fleet, Placement, Unplaceable, link_rank
from disagg.router.generation import GenerationRequest
from disagg.router.load_order import LoadOrder
from disagg.router.placing import Placing
from disagg.router.record import RecordStore, RequestRecord
from disagg.router.registry import Registry, Worker
from disagg.router.workload import shares_of
from disagg.transceiver.wire.messages.ranges import MAX_LINKS
from disagg.transceiver.wire.messages.router import Lease
from disagg.transceiver.wire.messages.values import Sampling
from disagg.transceiver.wire.timing import SUSPECT_S


def large_fleet(size: int, *, linked: bool = True) -> list[Worker]:
    prefills = [make_register(f"p{i}", "prefill") for i in range(size)]
    decodes = [make_register(f"d{i}", "decode", geometry=replace(GEOMETRY)) for i in range(size)]
    are_named = linked and size <= MAX_LINKS  # a larger fleet links on use
    peers = [register.incarnation for register in prefills] if are_named else []
    on_use = linked and not are_named
    workers = [Worker(register, make_lease(register.incarnation), 0.0) for register in prefills]
    return workers + [Worker(d, make_lease(d.incarnation, links=peers), 0.0, is_linked_on_use=on_use) for d in decodes]


def registry_of(workers: list[Worker]) -> Registry:
    registry = Registry()
    if workers and workers[-1].is_linked_on_use:
        registry.link_on_use()
    for worker in workers:
        registry.register(worker.register, worker.heard_at)
        registry.renew(worker.lease, worker.heard_at)
    return registry


def seconds_to_place(workers: list[Worker]) -> float:
    took = []
    for turn in range(5):
        began_at = time.thread_time()
        Fleet(workers, 0.0, {}, turn).place(16)
        took.append(time.thread_time() - began_at)
    return min(took)


def test_one_placement_among_64_and_64_linked_workers_takes_under_two_ms() -> None:
    assert seconds_to_place(large_fleet(64)) < 0.002


def test_one_among_512_and_512_takes_under_twenty_ms() -> None:
    assert seconds_to_place(large_fleet(512)) < 0.020
    assert seconds_to_place(large_fleet(512, linked=False)) < 0.020


def test_a_fleet_without_links_names_a_few_pairs_and_counts_the_rest() -> None:
    placed = Fleet(large_fleet(64, linked=False), 0.0, {}).place(16)
    assert isinstance(placed, Unplaceable)
    assert placed.reason.count("are not connected") == MAX_PAIRS_TOLD
    assert placed.reason.endswith(f"and {64 * 64 - MAX_PAIRS_TOLD} more pairs")


def test_a_choice_in_a_healthy_fleet_looks_at_few_workers_whatever_its_size() -> None:
    registry = registry_of(large_fleet(512))
    placing = Placing(registry, 1024)
    for worker in registry:
        placing.add(worker)
    began_at = time.thread_time()
    for _ in range(1000):
        placed = placing.at(0.0).place(16)
        assert isinstance(placed, Placement)
        assert placed.prefill is not None
        placing.count((), shares_of(placed, 100, 1, has_begun=False))
    assert time.thread_time() - began_at < 1.0, "a thousand choices and counts, each under a millisecond"
    placing.check_invariants()
    assert max(placing.load.values()) - min(placing.load.values()) <= 1, "spread evenly"


moves = st.lists(st.tuples(st.sampled_from("abcdef"), st.one_of(st.none(), st.integers(0, 4))), max_size=40)


@settings(max_examples=200, deadline=None)
@given(moves)
def test_the_order_is_that_of_sorting_by_load_and_then_of_arrival(script: list[tuple[str, int | None]]) -> None:
    order, told = LoadOrder(), dict[str, int]()
    workers = {name: Worker(make_register(name, "decode"), make_lease(name), 0.0) for name in "abcdef"}
    for name, load in script:
        told.pop(name, None)
        if load is None:
            order.remove(name)
        else:
            order.place(workers[name], load)
            told[name] = load  # a dict keeps the order of arrival
        order.check_invariants()
        assert [worker.worker_id for worker in order] == sorted(told, key=lambda name: told[name])


loads = st.integers(0, 3)
states = st.sampled_from(["ready", "ready", "suspect", "lost"])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), num_prefills=st.integers(1, 4), num_decodes=st.integers(1, 4), turn=st.integers(0, 20))
def test_the_choice_costs_what_the_best_of_all_pairs_costs(
    data: st.DataObject, num_prefills: int, num_decodes: int, turn: int
) -> None:
    def heard_at() -> float:
        return data.draw(st.sampled_from([0.0, SUSPECT_S]))

    prefills = [Worker(make_register(f"p{i}", "prefill"), make_lease(f"p{i}"), heard_at()) for i in range(num_prefills)]
    decodes = []
    for number in range(num_decodes):
        links = tuple(make_link(prefill.incarnation, data.draw(states)) for prefill in prefills)
        lease = Lease(f"d{number}", "router", links=links)
        decodes.append(Worker(make_register(f"d{number}", "decode"), lease, heard_at()))
    load = {worker.incarnation: data.draw(loads) for worker in (*prefills, *decodes)}

    def cost(pair: tuple[Worker, Worker]) -> tuple[int, int]:
        prefill, decode = pair
        late = sum(worker.heard_at < SUSPECT_S for worker in pair)
        return late + (link_rank(prefill, decode) or 0), load[prefill.incarnation] + load[decode.incarnation]

    linked = [pair for pair in product(prefills, decodes) if link_rank(*pair) is not None]
    by_name = {worker.worker_id: worker for worker in (*prefills, *decodes)}
    placed = Fleet([*prefills, *decodes], SUSPECT_S, load, turn).place(8)
    assert isinstance(placed, Placement) == bool(linked)
    if isinstance(placed, Placement):
        assert placed.prefill is not None
        chosen = by_name[placed.prefill.worker_id], by_name[placed.server.worker_id]
        assert cost(chosen) == min(map(cost, linked))
    kept = Placing(registry_of([*prefills, *decodes]), 1024)
    for worker in kept._registry:
        kept.load[worker.incarnation] = load[worker.incarnation]
        kept.add(worker)
    soon = kept.at(SUSPECT_S).place(8)
    assert isinstance(soon, Placement) == bool(linked)
    if isinstance(soon, Placement):
        assert soon.prefill is not None
        assert cost((by_name[soon.prefill.worker_id], by_name[soon.server.worker_id])) == min(map(cost, linked))


def test_a_remembered_request_keeps_what_it_shows_and_not_its_prompt() -> None:
    store = RecordStore()
    tracemalloc.start()
    try:
        for number in range(4):
            request = GenerationRequest(f"r{number}", tuple(range(10**6, 10**6 + 131072)), Sampling(max_tokens=1))
            record = RequestRecord(request, f"{number:032x}", 0.0)
            record.end("finished", 1.0, None)
            store.add(record)
            del request, record
        assert tracemalloc.get_traced_memory()[0] < 4 * 8192
    finally:
        tracemalloc.stop()
    kept = store.get("r3")
    assert kept is not None
    assert kept.describe()["prompt_tokens"] == 131072
