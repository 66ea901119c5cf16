"""Who serves a request: compatible, connected, live, least loaded, in turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from support.cluster.router_harness import GEOMETRY, make_lease, make_link, make_register

from disagg.router.choose import RETRY_BUSY_S, RETRY_WORKER_S, Fleet, Placement, Unplaceable
from disagg.router.registry import Registry, Worker
from disagg.transceiver.wire.messages.router import Lease, Register
from disagg.transceiver.wire.timing import SUSPECT_S


def worker(register: Register, lease: Lease | None = None) -> Worker:
    return Worker(register, lease or make_lease(register.incarnation), heard_at=0.0)


def prefill(name: str, **fields: object) -> Worker:
    return worker(make_register(name, "prefill", **fields))  # type: ignore[arg-type]


def decode(name: str, *peers: str, **fields: object) -> Worker:
    return worker(make_register(name, "decode", **fields), make_lease(name, links=peers))  # type: ignore[arg-type]


def names(placed: Placement | Unplaceable) -> tuple[str | None, str]:
    assert isinstance(placed, Placement), placed
    return placed.prefill.worker_id if placed.prefill else None, placed.server.worker_id


def reason(placed: Placement | Unplaceable) -> str:
    assert isinstance(placed, Unplaceable), placed
    return placed.reason


TWO_BY_TWO = [prefill("p0"), prefill("p1"), decode("d0", "p0", "p1"), decode("d1", "p0", "p1")]


def test_idle_pairs_serve_in_turn() -> None:
    used = Counter(names(Fleet(TWO_BY_TWO, 0.0, {}, turn).place(8)) for turn in range(8))
    assert used == {(p, d): 2 for p in ("p0", "p1") for d in ("d0", "d1")}


def test_the_least_loaded_of_each_role_is_chosen_whatever_the_turn() -> None:
    load = {"p0": 3, "p1": 1, "d0": 2, "d1": 5}
    assert {names(Fleet(TWO_BY_TWO, 0.0, load, turn).place(8)) for turn in range(8)} == {("p1", "d0")}


def test_excluded_workers_are_not_chosen() -> None:
    fleet = Fleet(TWO_BY_TWO, 0.0, {"p1": 9, "d1": 9})
    assert names(fleet.place(8, frozenset({"p0", "d0"}))) == ("p1", "d1")
    assert fleet.prefill_for("d0", frozenset({"p0"})) == TWO_BY_TWO[1].target
    assert fleet.prefill_for("d0", frozenset({"p0", "p1"})) is None
    assert fleet.prefill_for("gone", frozenset()) is None


def test_only_pairs_with_a_ready_link_serve() -> None:
    fleet = Fleet([prefill("p0"), prefill("p1"), decode("d0", "p1")], 0.0, {"p1": 50})
    assert names(fleet.place(8)) == ("p1", "d0")
    unlinked = Fleet([prefill("p0"), decode("d0")], 0.0, {})
    assert reason(unlinked.place(8)) == "prefill worker `p0` and decode worker `d0` are not connected: connecting"


def test_a_pair_of_other_geometry_never_serves_and_the_field_is_named() -> None:
    other = replace(GEOMETRY, block_size=24)
    fleet = Fleet([prefill("p0", geometry=other), decode("d0", "p0")], 0.0, {})
    assert "differ in block_size (24 and 16)" in reason(fleet.place(8))
    no_plane = Fleet([prefill("p0", planes=("shm",)), decode("d0", "p0", planes=("zmq",))], 0.0, {})
    assert "differ in planes (shm and zmq)" in reason(no_plane.place(8))


def test_a_both_worker_serves_alone_only_where_no_pair_exists() -> None:
    both = worker(make_register("b0", "both"))
    assert names(Fleet([both, *TWO_BY_TWO], 0.0, {"p0": 9, "p1": 9, "d0": 9, "d1": 9}).place(8))[0] is not None
    assert names(Fleet([both, prefill("p0")], 0.0, {}).place(8)) == (None, "b0")


def test_one_token_needs_no_pair() -> None:
    assert names(Fleet([prefill("p0")], 0.0, {}).place(1)) == (None, "p0")
    assert names(Fleet([worker(make_register("b0", "both"))], 0.0, {}).place(1)) == (None, "b0")
    assert "no prefill worker" in reason(Fleet([decode("d0")], 0.0, {}).place(1))


def test_a_suspect_worker_or_link_serves_only_where_nothing_better_does() -> None:
    late = SUSPECT_S
    healthy, silent = prefill("p0"), prefill("p1")
    healthy.heard_at = late
    receiver = decode("d0", "p0", "p1")
    receiver.heard_at = late
    assert names(Fleet([silent, healthy, receiver], late, {"p0": 100}).place(8)) == ("p0", "d0")
    assert names(Fleet([silent, receiver], late, {}).place(8)) == ("p1", "d0")
    lease = Lease("d0", "", links=(make_link("p0", "suspect"), make_link("p1", "ready")))
    doubtful = Worker(make_register("d0", "decode"), lease, 0.0)
    assert names(Fleet([prefill("p0"), prefill("p1"), doubtful], 0.0, {"p1": 100}).place(8)) == ("p1", "d0")


def test_draining_workers_get_nothing_new() -> None:
    registry = Registry()
    for register in (make_register("p0", "prefill"), make_register("p1", "prefill"), make_register("d0", "decode")):
        registry.register(register, 0.0)
    registry.renew(make_lease("d0", links=("p0", "p1")), 0.0)
    registry.renew(make_lease("p0", state="draining"), 0.0)
    assert names(Fleet(list(registry), 0.0, {"p1": 50}).place(8)) == ("p1", "d0")
    assert registry.drain("p1")
    assert isinstance(Fleet(list(registry), 0.0, {}).place(8), Unplaceable)
    assert registry.drain("p1", draining=False)
    assert names(Fleet(list(registry), 0.0, {}).place(8)) == ("p1", "d0")


@pytest.mark.parametrize(
    ("workers", "expected"),
    [([], "no prefill worker"), ([decode("d0")], "no prefill worker"), ([prefill("p0")], "no decode worker")],
    ids=["nobody", "only decode", "only prefill"],
)
def test_the_missing_role_is_named_with_the_command_that_starts_it(workers: list[Worker], expected: str) -> None:
    placed = Fleet(workers, 0.0, {}).place(8)
    assert expected in reason(placed)
    assert "running?" in reason(placed)
    assert isinstance(placed, Unplaceable)
    assert placed.retry_after_s == RETRY_WORKER_S


def test_a_worker_with_a_full_queue_takes_no_more_and_running_requests_do_not_wait() -> None:
    workers = [prefill("p0"), decode("d0", "p0")]
    full = Fleet(workers, 0.0, {"p0": 2, "d0": 2}, max_queued=2).place(8)
    assert full == Unplaceable("every worker has 2 requests waiting", RETRY_BUSY_S)
    for busy in workers:
        busy.lease = replace(busy.lease, num_running=1)
    assert names(Fleet(workers, 0.0, {"p0": 2, "d0": 2}, max_queued=2).place(8)) == ("p0", "d0")
