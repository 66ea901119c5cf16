"""Simulated time: queues with a known answer, and cores that are shared as fairly as they are said to be."""

from __future__ import annotations

import random

import pytest

from disagg.simulate.agenda import Agenda
from disagg.simulate.cores import OwnCores, SharedCores
from disagg.simulate.front import FrontEnd


def test_calls_of_one_moment_are_made_in_the_order_in_which_they_were_noted() -> None:
    agenda, made = Agenda(), []
    for name, moment in (("b", 2.0), ("a", 1.0), ("c", 2.0)):
        agenda.at(moment, lambda name=name: made.append((name, agenda.now)))
    agenda.at(1.0, lambda: agenda.at(0.0, lambda: made.append(("late", agenda.now))))
    agenda.run()
    assert made == [("a", 1.0), ("late", 1.0), ("b", 2.0), ("c", 2.0)]


def test_one_server_with_equal_jobs_waits_as_long_as_the_formula_for_m_d_1_says() -> None:
    agenda, work_s, load = Agenda(), 1.0, 0.7
    server, draw, waits = FrontEnd(OwnCores(agenda)), random.Random(1), []

    def arrive(left: int) -> None:
        begun = agenda.now
        server.do(work_s, lambda: waits.append(agenda.now - begun - work_s))
        if left:
            agenda.after(draw.expovariate(load / work_s), lambda: arrive(left - 1))

    arrive(60_000)
    agenda.run()
    expected = load * work_s / (2 * (1 - load))
    assert sum(waits) / len(waits) == pytest.approx(expected, rel=0.05)


def test_jobs_up_to_the_number_of_cores_run_as_if_they_were_alone() -> None:
    agenda, ended = Agenda(), []
    cores = SharedCores(agenda, 2)
    for name, work_s in (("a", 3.0), ("b", 1.0)):
        cores.start(work_s, lambda name=name: ended.append((name, agenda.now)))
    agenda.run()
    assert ended == [("b", 1.0), ("a", 3.0)]


def test_more_jobs_than_cores_share_them_equally_and_leave_none_idle() -> None:
    agenda, ended = Agenda(), {}
    cores = SharedCores(agenda, 2)
    for name, work_s in (("a", 2.0), ("b", 2.0), ("c", 2.0), ("d", 4.0)):
        cores.start(work_s, lambda name=name: ended.update({name: agenda.now}))
    agenda.run()
    # four on two cores until a, b and c have 2 s each at 4 s; then d is alone
    assert ended == pytest.approx({"a": 4.0, "b": 4.0, "c": 4.0, "d": 6.0})
    assert cores.busy_s == pytest.approx(10.0)


def test_random_jobs_use_exactly_the_work_that_they_were_given() -> None:
    agenda, draw, given, ended = Agenda(), random.Random(2), [], []
    cores = SharedCores(agenda, 3)

    def start() -> None:
        work_s = draw.random()
        given.append(work_s)
        cores.start(work_s, lambda: ended.append(work_s))

    for _ in range(300):
        agenda.at(draw.random() * 40, start)
    agenda.run()
    assert sorted(ended) == sorted(given)
    assert cores.busy_s == pytest.approx(sum(given))


@pytest.mark.parametrize("shared", [False, True])
def test_a_job_that_is_cut_short_ends_when_its_new_work_is_done(shared: bool) -> None:
    agenda, ended = Agenda(), []
    cores = SharedCores(agenda, 1) if shared else OwnCores(agenda)
    job = cores.start(10.0, lambda: ended.append(agenda.now))

    def cut() -> None:
        assert cores.done_s(job) == pytest.approx(2.0)
        cores.change(job, 3.0)

    agenda.at(2.0, cut)
    agenda.run()
    assert ended == [pytest.approx(3.0)]
