"""The book of connections: which one gives way, and how many there may be."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.api.http.connections import Activity, Connections, connections_within


class Client:
    def __init__(self) -> None:
        self.is_dropped = False

    def drop(self) -> None:
        self.is_dropped = True


@pytest.mark.parametrize(
    ("descriptors", "expected"), [(64, 16), (256, 128), (1024, 768), (4096, 3072), (20_000, 15_000), (1 << 20, 16_384)]
)
def test_clients_get_what_workers_and_the_process_do_not_need(descriptors: int, expected: int) -> None:
    assert connections_within(descriptors) == expected


def test_strangers_give_way_first_then_idle_ones_then_bodies_and_requests_never() -> None:
    book, clients = Connections(4), {stage: Client() for stage in Activity}
    for stage in reversed(Activity):
        book.place(clients[stage], stage)
    for stage in (Activity.SILENT, Activity.IDLE, Activity.RECEIVING):
        assert book.make_room()
        assert clients[stage].is_dropped
        book.place(Client(), Activity.ANSWERING)
    assert not book.make_room()
    assert not clients[Activity.ANSWERING].is_dropped


def test_a_body_that_stalls_gives_way_before_an_idle_client() -> None:
    now = [0.0]
    book, uploading, idle, other = Connections(3, clock=lambda: now[0]), Client(), Client(), Client()
    book.place(uploading, Activity.RECEIVING)
    book.place(idle, Activity.IDLE)
    book.place(other, Activity.ANSWERING)
    now[0] = 1.9
    book.place(uploading, Activity.RECEIVING)
    now[0] = 3
    assert book.drop_oldest()
    assert (uploading.is_dropped, idle.is_dropped) == (False, True)
    book.place(Client(), Activity.IDLE)
    now[0] = 3.9
    assert book.drop_oldest()
    assert uploading.is_dropped


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([*Activity, None]))), st.integers(1, 5))
def test_the_oldest_of_its_stage_goes_as_a_plain_list_has_it(
    steps: list[tuple[int, Activity | None]], bound: int
) -> None:
    book, clients, oracle = Connections(bound, lambda: 0), [Client() for _ in range(10)], list[tuple[int, Activity]]()
    for number, stage in steps:
        oracle = [entry for entry in oracle if entry[0] != number]
        if stage is None:
            book.remove(clients[number])
            continue
        book.remove(clients[number])
        if len(oracle) >= bound:
            order = [entry for kind in list(Activity)[:3] for entry in oracle if entry[1] is kind]
            assert book.make_room() is bool(order)
            if not order:
                continue
            oracle.remove(order[0])
        book.place(clients[number], stage)
        oracle.append((number, stage))
        book.check_invariants()
        assert {clients.index(c) for c in book._stages} == {number for number, _ in oracle}  # type: ignore[arg-type]


def test_a_flood_is_logged_once_and_a_later_one_again(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    book = Connections(1, clock=lambda: now[0])
    for at in (0, 1, 59, 61):
        now[0] = at
        book.place(Client(), Activity.SILENT)
        book.make_room()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "ulimit -n" in caplog.text
