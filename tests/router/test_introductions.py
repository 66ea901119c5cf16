"""Small fleets are linked ahead of requests, large ones by requests: what is said stays linear in the workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
from support.cluster.router_harness import GEOMETRY, make_lease, make_link, make_register, make_request
from support.cluster.router_stage import collect, run, stage

from disagg.router.choose import Fleet, Placement, Unplaceable
from disagg.router.introductions import EAGER_WORKERS, MAX_EAGER_WORKERS, PEERS_PER_MESSAGE, Connect, Introductions
from disagg.router.placing import Placing
from disagg.router.registry import Registry, Worker
from disagg.transceiver.wire.codec import encode
from disagg.transceiver.wire.messages.router import Dispatch, Lease, Peers, Retarget, TransferFailure


class Hall:
    """A registry, with what each worker was told as it filled."""

    def __init__(self, connect: Connect) -> None:
        self.registry = Registry()
        self.introductions = Introductions(self.registry, connect)
        self.said: list[tuple[str, Peers]] = []

    def add(self, name: str, role: str, **fields: object) -> Worker:
        self.registry.register(make_register(name, role, **fields), 0.0)  # type: ignore[arg-type]
        worker = self.registry.named(name)
        assert worker is not None
        self.said += [(other.worker_id, peers) for other, peers in self.introductions.of_new(worker)]
        return worker

    def lose(self, name: str) -> None:
        worker = self.registry.remove(name)
        assert worker is not None
        self.said += [(other.worker_id, peers) for other, peers in self.introductions.of_lost(worker)]

    @property
    def links(self) -> Counter[tuple[str, str]]:
        """(decode, prefill) pairs as they were told."""
        return Counter((name, target.incarnation) for name, peers in self.said for target in peers.peers)


def test_in_a_small_fleet_every_pair_is_told_once_whatever_the_order() -> None:
    hall = Hall("auto")
    for name, role in (("d0", "decode"), ("p0", "prefill"), ("b0", "both"), ("p1", "prefill"), ("d1", "decode")):
        hall.add(name, role)
    assert hall.links == Counter([("d0", "p0"), ("d0", "p1"), ("d1", "p0"), ("d1", "p1")])
    hall.said.clear()
    hall.lose("p0")
    assert hall.said == [("d0", Peers((), ("p0",))), ("d1", Peers((), ("p0",)))]


@pytest.mark.parametrize(("connect", "most"), [("auto", EAGER_WORKERS), ("lazy", 0), ("eager", MAX_EAGER_WORKERS)])
def test_past_its_size_a_fleet_is_told_nothing_and_stays_so(connect: Connect, most: int) -> None:
    hall = Hall(connect)
    for number in range(most // 2):
        hall.add(f"p{number}", "prefill", planes=("shm",) if number else ("zmq",))
        hall.add(f"d{number}", "decode", planes=("zmq",) if number else ("shm",))  # else a million pairs are told
    assert hall.registry.is_linked_on_use == (most == 0 and len(hall.registry) > 0)
    hall.said.clear()
    hall.add("p-late", "prefill")
    hall.add("d-late", "decode")
    assert not hall.said
    assert hall.registry.is_linked_on_use
    hall.lose("p-late")
    hall.add("p-later", "prefill")
    assert not hall.said, "its pairs are not all linked any more, so it does not go back"
    assert all(worker.is_linked_on_use for worker in hall.registry)


def test_what_a_thousand_workers_are_told_as_they_register_is_linear() -> None:
    hall = Hall("auto")
    for number in range(512):
        hall.add(f"p{number}", "prefill")
        hall.add(f"d{number}", "decode")
    assert sum(len(encode(peers)) for _, peers in hall.said) < 512 * 1024


def test_a_long_list_of_peers_is_told_in_pieces_without_the_geometry_that_the_reader_has() -> None:
    hall = Hall("eager")
    for number in range(PEERS_PER_MESSAGE + 3):
        hall.add(f"p{number}", "prefill", geometry=replace(GEOMETRY))
    for number in range(2):
        hall.add(f"other{number}", "prefill", geometry=replace(GEOMETRY, block_size=32, slot_nbytes=(8192, 24576)))
    hall.said.clear()
    hall.add("d0", "decode")
    assert [len(peers.peers) for _, peers in hall.said] == [PEERS_PER_MESSAGE, 3, 1, 1]
    geometries = [target.geometry for _, peers in hall.said for target in peers.peers]
    assert geometries[:-2] == [None] * (PEERS_PER_MESSAGE + 3)
    assert all(geometry is not None and geometry.block_size == 32 for geometry in geometries[-2:])
    assert len(hall.links) == PEERS_PER_MESSAGE + 5


def test_the_loss_of_a_peer_is_told_to_those_that_have_a_link_and_to_later_ones_by_their_leases() -> None:
    hall = Hall("lazy")
    hall.add("p0", "prefill")
    for name in ("d0", "d1"):
        hall.add(name, "decode")
    hall.registry.renew(make_lease("d0", links=["p0"]), 0.0)
    hall.lose("p0")
    assert hall.said == [("d0", Peers((), ("p0",)))]
    late = make_lease("d1", links=["p0"])  # whose link was not told of before
    assert hall.introductions.of_links(late) == Peers((), ("p0",))
    assert hall.introductions.of_links(make_lease("d1")) is None
    assert hall.introductions.of_links(Lease("d1", "router")) is None, "it says nothing new of its links"


@pytest.mark.parametrize(("state", "is_chosen"), [("connecting", True), ("ready", True), ("lost", False)])
def test_where_links_are_made_on_use_a_pair_without_one_serves_and_one_that_failed_does_not(
    state: str, is_chosen: bool
) -> None:
    hall = Hall("lazy")
    prefill, decode = hall.add("p0", "prefill"), hall.add("d0", "decode")
    placing = Placing(hall.registry, 1024)
    for worker in (prefill, decode):
        placing.add(worker)
    assert isinstance(placing.at(0.0).place(2), Placement)
    assert isinstance(Fleet(hall.registry, 0.0, {}).place(2), Placement)
    hall.registry.renew(Lease("d0", "router", links=(make_link("p0", state),)), 0.0)
    assert isinstance(placing.at(0.0).place(2), Placement) == is_chosen
    assert isinstance(Fleet(hall.registry, 0.0, {}).place(2), Placement) == is_chosen


def test_an_eager_pair_without_a_link_does_not_serve() -> None:
    hall = Hall("eager")
    hall.add("p0", "prefill")
    hall.add("d0", "decode")
    assert isinstance(Fleet(hall.registry, 0.0, {}).place(2), Unplaceable)


def test_a_lazy_router_introduces_nothing_and_retries_past_a_link_that_cannot_be_made() -> None:
    async def scenario() -> None:
        async with stage(connect="lazy") as s:
            prefills = {name: await s.add(name, "prefill") for name in ("p0", "p1")}
            decode = await s.add("d0", "decode")
            assert s.router.is_ready()
            answer = asyncio.create_task(collect(s.router, make_request(max_tokens=2)))
            dispatch = await decode.expect(Dispatch)
            assert decode.links == ()
            assert dispatch.peer is not None
            decode.links = (dispatch.peer.incarnation,)
            await decode.renew()
            await decode.say(TransferFailure(dispatch.transfer_id, 1, "no connection"))
            retarget = await decode.expect(Retarget)
            assert {retarget.peer.incarnation, dispatch.peer.incarnation} == set(prefills)
            await decode.answer(replace(dispatch, epoch=2), 3, 4)
            assert (await answer)[0] == [3, 4]

    run(scenario)
