"""Where jobs are computed: each worker has a device of its own, or all share the few cores of one machine.

Shared cores are shared as a fair scheduler does it: as many jobs as cores run at full speed, and more jobs than cores
run equally fast, so that no core is idle while there is work. A job's progress is counted in its own seconds of work.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Protocol

from disagg.simulate.agenda import Agenda


class Job:
    """Work under way. `begun`, `ends`: on the scale of its `Cores`."""

    __slots__ = ("begun", "call", "ends", "is_over")

    def __init__(self, begun: float, ends: float, call: Callable[[], None]) -> None:
        self.begun, self.ends, self.call = begun, ends, call
        self.is_over = False


class Cores(Protocol):
    """Where jobs run."""

    def start(self, work_s: float, call: Callable[[], None]) -> Job:
        """`call` when so much work was done."""

    def done_s(self, job: Job) -> float:
        """How much of a job's work was done until now."""

    def change(self, job: Job, work_s: float) -> Job:
        """The same job with so much work in all, no less than was done."""


class OwnCores:
    """Every job has a core, or a device, of its own."""

    def __init__(self, agenda: Agenda) -> None:
        self._agenda = agenda

    def start(self, work_s: float, call: Callable[[], None]) -> Job:
        return self._note(Job(self._agenda.now, self._agenda.now + work_s, call))

    def done_s(self, job: Job) -> float:
        return self._agenda.now - job.begun

    def change(self, job: Job, work_s: float) -> Job:
        job.is_over = True
        return self._note(Job(job.begun, job.begun + work_s, job.call))

    def _note(self, job: Job) -> Job:
        def end() -> None:
            if not job.is_over:
                job.is_over = True
                job.call()

        self._agenda.at(job.ends, end)
        return job


class SharedCores:
    """`num_cores` for all jobs. `num_neighbours`: other processes' jobs that run on them all the time, in the mean.

    `_pace` is the work done so far by a job that was there from the beginning.
    """

    def __init__(self, agenda: Agenda, num_cores: int, num_neighbours: float = 0.0) -> None:
        self._agenda, self._num_cores, self._num_neighbours = agenda, num_cores, num_neighbours
        self._jobs: list[tuple[float, int, Job]] = []
        self._num_running = self._num_started = 0
        self._pace = self._seen_at = 0.0
        self._wake = 0
        self.busy_s = 0.0
        """Seconds of cores that were used."""

    def start(self, work_s: float, call: Callable[[], None]) -> Job:
        self._catch_up()
        return self._add(Job(self._pace, self._pace + work_s, call))

    def done_s(self, job: Job) -> float:
        self._catch_up()
        return self._pace - job.begun

    def change(self, job: Job, work_s: float) -> Job:
        self._catch_up()
        job.is_over = True
        self._num_running -= 1
        return self._add(Job(job.begun, job.begun + work_s, job.call))

    def _add(self, job: Job) -> Job:
        self._num_started += 1
        self._num_running += 1
        heapq.heappush(self._jobs, (job.ends, self._num_started, job))
        self._look_later()
        return job

    @property
    def _speed(self) -> float:
        return min(1.0, self._num_cores / (self._num_running + self._num_neighbours)) if self._num_running else 0.0

    def _catch_up(self) -> None:
        passed = self._agenda.now - self._seen_at
        self._pace += passed * self._speed
        self.busy_s += passed * self._speed * self._num_running
        self._seen_at = self._agenda.now

    def _look_later(self) -> None:
        """Every change of what runs changes when the next job ends; an older look does nothing."""
        while self._jobs and self._jobs[0][2].is_over:
            heapq.heappop(self._jobs)
        self._wake += 1
        if self._jobs:
            wake, left = self._wake, max(0.0, self._jobs[0][0] - self._pace)
            self._agenda.after(left / self._speed, lambda: self._end(wake))

    def _end(self, wake: int) -> None:
        """The first job ends; the look was for that moment, so rounding does not delay it."""
        if wake != self._wake:
            return
        self._catch_up()
        _, _, job = heapq.heappop(self._jobs)
        self._pace = max(self._pace, job.ends)
        job.is_over = True
        self._num_running -= 1
        self._look_later()
        job.call()
