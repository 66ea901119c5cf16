"""A worker that computes nothing: which request starts when there is room, what a step holds, how long it takes.

It follows `disagg.engine.scheduler`: what must be promised stands in one line and starts when seats and pools allow;
soft prompts start while that line is empty and give way, newest first; every answer gets a token per step, and prompts
share what is left of the budget by `disagg.engine.batch.share_tokens`. Steps that hold answers alone are all equal
until one of them ends or something comes, and are counted together.

Simpler than the scheduler: an answer is promised its whole length, so none is preempted; nothing starts beside the head
of the line while that waits for room.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Final

from disagg.cache.admission import Peaks
from disagg.cache.budget import MAX_PREFILLS_PER_STEP
from disagg.engine.batch import share_tokens
from disagg.simulate.agenda import Agenda
from disagg.simulate.blocks import BlockStore, Holding
from disagg.simulate.cores import Cores, Job
from disagg.simulate.fleet import WorkerKind
from disagg.simulate.rates import ClusterRates
from disagg.simulate.requests import (
    AnswerWork,
    PromptStage,
    PromptWork,
    ReservationWork,
    SimulatedRequest,
    StepsDone,
)

LOOK_BEHIND: Final = 16
"""Soft prompts that are tried when the first finds no room, as in the scheduler."""
MOST_STEPS: Final = 1 << 20
"""More than any answer has."""


_Chunk = tuple[PromptWork, int, Holding | None]
"""Tokens of a prompt in a step, and what it held then."""


class SimulatedWorker:
    """`on_steps` is told of steps when they are done."""

    def __init__(
        self,
        number: int,
        role: str,
        agenda: Agenda,
        cores: Cores,
        rates: ClusterRates,
        store: BlockStore,
        kind: WorkerKind,
        on_steps: Callable[[StepsDone], None],
        *,
        most_steps: int = MOST_STEPS,
    ) -> None:
        """`most_steps`: equal steps that are counted together."""
        self.number, self.role, self.store = number, role, store
        self._agenda, self._cores, self._rates, self._kind = agenda, cores, rates, kind
        self._on_steps, self._most_steps = on_steps, most_steps
        self._line: deque[PromptWork | ReservationWork] = deque()
        self._soft_line: deque[PromptWork] = deque()
        self._prompts: list[PromptWork] = []
        self._soft: list[PromptWork] = []
        """Soft prompts that hold blocks, in order of their start."""
        self._num_reserved = 0
        self._answers: list[tuple[int, int, AnswerWork]] = []
        self._joined: list[AnswerWork] = []
        """Those whose first step here has not begun."""
        self._num_joined = 0
        self._steps = 0
        self._job: Job | None = None
        self._run = StepsDone(number, 0.0, 0, 0)
        self._step_s = 0.0
        self._chunks: list[_Chunk] = []
        self.busy_s = 0.0
        self.num_answer_steps = self.num_answer_tokens = 0
        """Steps with answers in them, and the tokens of these."""
        self.num_computed = 0
        """Prompt tokens."""

    # --- what comes -----------------------------------------------------------------------------------------

    @property
    def num_running(self) -> int:
        return self.num_answers + len(self._prompts)

    @property
    def num_answers(self) -> int:
        return len(self._answers) + len(self._joined)

    @property
    def num_waiting(self) -> int:
        return len(self._line) + len(self._soft_line)

    @property
    def num_prompt_tokens(self) -> int:
        """Still to compute, of prompts that began."""
        return sum(prompt.remaining for prompt in self._prompts)

    def compute(self, prompt: PromptWork) -> None:
        """Put a prompt in line."""
        (self._soft_line if prompt.is_soft else self._line).append(prompt)
        self._admit()

    def pin(self, prompt: PromptWork) -> None:
        """Its decode worker asks for it: from here it is not soft. One without blocks takes its place in the line."""
        prompt.is_soft = False
        if prompt.stage in (PromptStage.WAITING, PromptStage.PARKED):
            if prompt.stage is PromptStage.WAITING:
                self._soft_line.remove(prompt)
            prompt.stage = PromptStage.WAITING
            self._line.append(prompt)
        else:
            self._soft.remove(prompt)
        self._admit()

    def reserve(self, reservation: ReservationWork) -> None:
        """Put a reservation in line."""
        self._line.append(reservation)
        self._admit()

    def receive(self, reservation: ReservationWork) -> AnswerWork:
        """The KV is there, and with it the first token: go on from that."""
        request, held = reservation.request, reservation.held
        assert held is not None
        self._num_reserved -= 1
        traced = request.traced
        self.store.register(held, 0, len(traced.hashes), traced.prompt_len, received=True)
        answer = self._begin_answer(request, held)
        self._wake()
        return answer

    def release(self, prompt: PromptWork) -> None:
        """Its KV was handed over."""
        assert prompt.held is not None
        self._give_back(prompt.request, prompt.held)
        prompt.held = None
        self._admit()

    # --- what starts ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        line = self._line
        while line:
            if not self._has_seat() or not self._make_room(line[0].request, line[0].peaks):
                break
            self._start(line.popleft())
        if not line:
            self._start_soft()
        self._wake()

    def _start_soft(self) -> None:
        for prompt in list(self._soft_line)[:LOOK_BEHIND] if self._soft_line else ():
            if not self._has_seat(with_soft=True):
                return
            if self.store.try_promise(prompt.request, prompt.peaks):
                self._soft_line.remove(prompt)
                self._soft.append(prompt)
                self._start(prompt)

    def _has_seat(self, *, with_soft: bool = False) -> bool:
        prompts = len(self._prompts) if with_soft else sum(not prompt.is_soft for prompt in self._prompts)
        return self.num_answers + self._num_reserved + prompts < self._kind.max_num_seqs

    def _make_room(self, request: SimulatedRequest, peaks: Peaks) -> bool:
        """Promise the request its slots; soft prompts give way, newest first, but only if that suffices."""
        if not self.store.promises.fits(peaks, without={prompt.request for prompt in self._soft}):
            return False
        while not self.store.try_promise(request, peaks):
            self._drop(self._soft.pop())
        return True

    def _drop(self, prompt: PromptWork) -> None:
        assert prompt.held is not None
        prompt.request.num_drops += 1
        prompt.stage = PromptStage.PARKED
        if prompt in self._prompts:
            self._prompts.remove(prompt)
        self._give_back(prompt.request, prompt.held)
        prompt.held = None

    def _start(self, work: PromptWork | ReservationWork) -> None:
        request, store = work.request, self.store
        traced = request.traced
        if isinstance(work, ReservationWork):
            self._num_reserved += 1
            work.resident = store.held(traced.hashes, traced.prompt_len)
            work.held = store.begin(traced.hashes + traced.answer_hashes, work.resident)
            work.on_reserved(work)
            return
        work.reused = store.usable(traced.hashes, traced.prompt_len)
        work.held = store.begin(traced.hashes + traced.answer_hashes, store.read_at(work.reused))
        work.remaining = traced.prompt_len - work.reused * store.unit
        work.chunk_begun, work.first_chunk_at = work.computed, 0.0
        work.stage = PromptStage.COMPUTING
        request.num_cached = work.reused * store.unit
        self._prompts.append(work)

    # --- steps ----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Begin to step, or end the equal steps under way after the one that runs, if something joins them."""
        if self._job is None:
            if self._answers or self._joined or self._prompts:
                self._begin_steps()
        elif self._run.count > 1 and (self._joined or self._prompts):
            count = min(self._run.count, int(self._cores.done_s(self._job) / self._step_s) + 1)
            if count < self._run.count:
                self._run.count = count
                self._job = self._cores.change(self._job, count * self._step_s)

    def _begin_steps(self) -> None:
        joined, self._joined = self._joined, []
        for answer in joined:
            self._num_joined += 1
            heapq.heappush(self._answers, (self._steps + answer.left, self._num_joined, answer))
        num_answers = len(self._answers)
        self._chunks = self._next_chunks(num_answers) if self._prompts else []
        self._step_s = self._rates.step_s(num_answers, sum(count for _, count, _ in self._chunks))
        count = 1 if self._chunks else min(self._answers[0][0] - self._steps, self._most_steps)
        self._run = StepsDone(self.number, self._agenda.now, count, num_answers, joined)
        self._job = self._cores.start(count * self._step_s, self._end_steps)

    def _next_chunks(self, num_answers: int) -> list[_Chunk]:
        """As `Scheduler.schedule`: promised prompts first."""
        prompts = sorted(self._prompts, key=_is_soft)
        budget = self._kind.max_num_batched_tokens - num_answers
        most = min(MAX_PREFILLS_PER_STEP, self._kind.max_num_seqs - num_answers)
        shares = share_tokens([prompt.remaining for prompt in prompts], budget, most)
        return [(prompt, count, prompt.held) for prompt, count in zip(prompts, shares, strict=True) if count]

    def _end_steps(self) -> None:
        run, self._job = self._run, None
        self._steps += run.count
        if run.num_answers:
            self.num_answer_steps += run.count
            self.num_answer_tokens += run.count * run.num_answers
        self.busy_s += run.count * self._step_s
        while self._answers and self._answers[0][0] <= self._steps:
            run.ended.append(heapq.heappop(self._answers)[2])
        computed = [chunk[0] for chunk in self._chunks if self._advance(*chunk)]
        for prompt in computed:
            self._prompts.remove(prompt)
            self._end_prompt(prompt, run)
        for answer in run.ended:
            self._end_answer(answer)
        self._on_steps(run)
        for prompt in computed:
            prompt.on_computed(prompt)
        self._admit()

    def _advance(self, prompt: PromptWork, count: int, held: Holding | None) -> bool:
        """Whether the prompt is computed. One that gave way within the step gets nothing of it."""
        if prompt.held is not held or held is None:
            return False
        self.num_computed += count
        prompt.first_chunk_at = prompt.first_chunk_at or self._agenda.now
        prompt.chunk_begun = prompt.computed
        prompt.remaining -= count
        return not prompt.remaining

    def _end_prompt(self, prompt: PromptWork, run: StepsDone) -> None:
        request, held = prompt.request, prompt.held
        assert held is not None
        prompt.stage = PromptStage.COMPUTED
        request.computed_at = self._agenda.now
        traced = request.traced
        self.store.register(held, prompt.reused, len(traced.hashes), traced.prompt_len)
        self.store.promises.shrink(request, prompt.kept)
        if prompt.serves:
            answer = self._begin_answer(request, held)
            run.first_tokens.append(answer)
            if not answer.left:
                run.ended.append(answer)

    def _begin_answer(self, request: SimulatedRequest, held: Holding) -> AnswerWork:
        """The first token is there already: the others take a step each."""
        answer = AnswerWork(request, held, request.traced.answer_len - 1)
        if answer.left:
            self._joined.append(answer)
        return answer

    def _end_answer(self, answer: AnswerWork) -> None:
        traced = answer.request.traced
        num_tokens = traced.prompt_len + traced.answer_len - 1  # the last token's KV is not stored
        last = min(len(traced.hashes) + len(traced.answer_hashes), num_tokens // self.store.unit)
        self.store.register(answer.held, len(traced.hashes), last, num_tokens)
        self._give_back(answer.request, answer.held)

    def _give_back(self, request: SimulatedRequest, held: Holding) -> None:
        self.store.promises.release(request)
        self.store.release(held)


def _is_soft(prompt: PromptWork) -> bool:
    return prompt.is_soft
