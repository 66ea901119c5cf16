"""Which sequences hold blocks, and what the next step computes. No clock, sockets or tensors: same calls, same plan.

**Admission.** A sequence starts only when every pool can promise what it will hold. A prompt or a reservation is
promised its peak, so it never waits midway; an answer only its next few blocks, since most end early.
Those that must be promised (requests served here, reservations, pinned prompts) stand in one line, by priority, then
by arrival, with one place in four for the oldest. While its head waits for room, those behind it may start in what is
left beside it (see `RoomBeside`). An urgent request, one whose transfer failed, stands before them all and holds
nothing meanwhile; nothing passes it.
Soft prompts run ahead of their FETCH only while that line is empty; their promise is revoked, newest first,
when the head of the line needs the room, and they are computed anew when their FETCH comes. Other soft
prompts pass one that finds no room, until its FETCH gives it a place in the line.

**Growth.** Before a step an answer's promise grows to what the step needs, oldest first. Where that fails, soft prompts
are dropped, then the least important running request of this worker's own, of equals the newest, gives way: its blocks
go, it stands at the head of the line, and is computed anew with the tokens it has generated. Blocks that a peer was
told of are never taken.

**Steps.** Every answer being decoded gets its one token. What is left of the token budget goes to prompts: half to the
oldest, the rest to those nearest to their end. So a short prompt does not wait behind a long one, and the long one
still advances in every step. A step may be scheduled while the one before it is under way (`num_ahead`): answers go on
from tokens that are not known yet, up to `max_tokens`; a prompt has one chunk under way at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from disagg.cache.admission import Promises
from disagg.cache.budget import MAX_PREFILLS_PER_STEP
from disagg.cache.cache import KVCache
from disagg.cache.scratch import scratch_until
from disagg.engine.announce import unannounced
from disagg.engine.batch import Work, scoring_of, share_tokens
from disagg.engine.beginning import Beginnings
from disagg.engine.beside import LOOK_BEHIND, RoomBeside
from disagg.engine.commands import (
    AttemptKey,
    EngineEvent,
    PinnedEvent,
    PrefixRoomEvent,
    ReservedEvent,
    SoftDroppedEvent,
)
from disagg.engine.invariants import check_sequences
from disagg.engine.promised import PeakSlots, Promised, is_soft, takes_seat
from disagg.engine.recheck import PrefixRecheck
from disagg.engine.reserving import reserve
from disagg.engine.sequence import Claim, DecodingSequence, LiveSequence, PromptSequence, Reservation, Stage
from disagg.transceiver.layout.units import SourceUnit
from disagg.waiting_line import WaitingLine

REGISTERED_AT_ONCE = 2048
"""Blocks that one step registers of a received prompt, at some 2 microseconds each: those of 128k tokens at once would
hold up all next tokens for longer than many a step takes."""


class Scheduler:
    """Owns the live sequences of one cache. `step_tokens` = max_num_batched_tokens, at least `max_num_seqs`."""

    def __init__(
        self,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        swa_scratch: str = "off",
        recheck: PrefixRecheck | None = None,
        longest_fetched: int = 0,
    ) -> None:
        """`longest_fetched`: tokens of the longest prompt that is computed for others while room is reserved for what
        others compute; 0 where a worker does one of both only. See `_set_floor`.
        """
        self._cache, self._swa_scratch, self._longest_fetched = cache, swa_scratch, longest_fetched
        self._layout = replace(cache.layout, uses_scratch=cache.layout.uses_scratch and swa_scratch != "off")
        self.beginnings = Beginnings(cache, recheck or PrefixRecheck(cache, None))
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._promises = Promises([pool.num_slots for pool in cache.pools])
        self._peaks = PeakSlots(self._layout, self._promises, max_num_batched_tokens)
        self._live: dict[AttemptKey, LiveSequence] = {}
        self._by_kind: tuple[list[DecodingSequence], list[Promised]] | None = None  # None: a sequence came or went
        self._urgent: deque[Promised] = deque()
        self._line: WaitingLine[Promised] = WaitingLine()
        self._soft_line: WaitingLine[PromptSequence] = WaitingLine()
        self._beside = RoomBeside(self._promises)
        self.registered: list[SourceUnit] = []
        """Blocks that were registered, those that peers are told of by themselves left out; the engine takes them."""
        pools = zip(self._layout.groups, self._layout.pool_of_group, strict=True)
        self._growing = frozenset(pool for group, pool in pools if group.window is None)
        """Pools of which an answer takes ever more: a window lets go of as much as it begins."""
        self.num_preemptions = 0

    # --- live sequences -------------------------------------------------------------------------------------

    @property
    def live(self) -> dict[AttemptKey, LiveSequence]:
        """Every attempt not yet released, by key, in order of arrival. Read only."""
        return self._live

    def get(self, key: AttemptKey) -> LiveSequence | None:
        return self._live.get(key)

    @property
    def answers(self) -> Sequence[DecodingSequence]:
        """In order of arrival, as `promised`. Both are made once for all steps until a sequence comes or goes."""
        return self._kinds()[0]

    @property
    def promised(self) -> Sequence[Promised]:
        """Prompts and reservations, waiting ones included."""
        return self._kinds()[1]

    @property
    def prompts(self) -> list[PromptSequence]:
        """Prompts being computed: promised ones first, each kind in order of arrival."""
        prompts = [s for s in self.promised if isinstance(s, PromptSequence) and s.is_computing]
        return sorted(prompts, key=lambda prompt: prompt.is_soft)

    @property
    def soft(self) -> list[PromptSequence]:
        """Soft prompts whose blocks may be taken, in order of arrival."""
        prompts = (s for s in self.promised if isinstance(s, PromptSequence) and s.is_soft and s.cached)
        return [prompt for prompt in prompts if prompt.stage is not Stage.LANDING]

    @property
    def num_waiting(self) -> int:
        return len(self._urgent) + len(self._line) + len(self._soft_line)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something. Waiting sequences start only when blocks are given back."""
        decodes = any(not answer.is_frozen for answer in self.answers)
        return decodes or any(isinstance(s, PromptSequence) and s.is_computing for s in self.promised)

    def _kinds(self) -> tuple[list[DecodingSequence], list[Promised]]:
        if self._by_kind is None:
            live = self._live.values()
            answers = [sequence for sequence in live if isinstance(sequence, DecodingSequence)]
            self._by_kind = answers, [sequence for sequence in live if not isinstance(sequence, DecodingSequence)]
        return self._by_kind

    def _put(self, sequence: LiveSequence) -> None:
        """Under its key, in the place of what stood there."""
        self._live[sequence.key] = sequence
        self._by_kind = None

    # --- commands -------------------------------------------------------------------------------------------

    def needs_more_than_exists(self, sequence: Promised) -> tuple[int, int] | None:
        """(slots needed, slots there are) of the pool that could not hold the sequence even if it were empty."""
        return self._peaks.beyond(sequence)

    def add(self, sequence: Promised, *, urgent: bool = False) -> None:
        """Queue a new sequence; `admit` starts it."""
        assert sequence.key not in self._live
        self._set_floor(sequence)
        self._put(sequence)
        if isinstance(sequence, PromptSequence) and sequence.is_soft:
            self._soft_line.add(sequence, sequence.request.priority)
        elif urgent:
            self._urgent.append(sequence)
        else:
            self._line.add(sequence, sequence.request.priority)

    def _set_floor(self, sequence: Promised) -> None:
        """From the first handoff on, keep room for one longest prompt that another worker fetches, if pools hold two.

        Two workers that both compute for each other would else wait for each other, each with its pools full of
        reservations. So the oldest fetched prompt waits for this worker's own sequences alone.
        """
        if not self._longest_fetched or (isinstance(sequence, PromptSequence) and sequence.serves):
            return
        self._promises.keep_floor(self._peaks.of_longest(self._longest_fetched))
        self._longest_fetched = 0

    @property
    def has_floor(self) -> bool:
        return self._promises.has_floor

    def pin(self, prompt: PromptSequence) -> None:
        """From here the prompt is not soft. One without blocks takes its place in the line, as the newest."""
        assert prompt.is_soft
        prompt.claim = Claim.PINNED
        if prompt.cached is None:
            self._leave_lines(prompt)
            self._line.add(prompt, prompt.request.priority)
            prompt.enter(Stage.WAITING)

    def park(self, prompt: PromptSequence) -> list[EngineEvent]:
        """Take a soft prompt's blocks away and compute it only once it is pinned."""
        assert prompt.is_soft
        if prompt.stage is Stage.LANDING:
            return []
        if prompt.cached is not None:
            return [self._drop(prompt)]
        self._leave_lines(prompt)
        prompt.enter(Stage.PARKED)
        return []

    def release(self, sequence: LiveSequence, *, wipe: bool = False) -> None:
        """Forget the sequence and free all it holds. `wipe`: its KV may not be finite."""
        del self._live[sequence.key]
        self._by_kind = None
        if not isinstance(sequence, DecodingSequence):
            self._leave_lines(sequence)
        elif not wipe:
            self._register(sequence, sequence.cached.history)
        if sequence.cached is not None:
            self._cache.close_sequence(sequence.cached, wipe=wipe)
        self._give_back(sequence.key)

    def try_extend(self, reservation: Reservation, count: int) -> bool:
        """Promise it room for `count` tokens that are received, and for the next one."""
        peaks = self._peaks.of(reservation.request, total_tokens=count + 1, history=count)
        return self._promises.try_grow(reservation.key, peaks)

    def replace(self, sequence: DecodingSequence) -> None:
        """The prompt or reservation of this key became an answer; its blocks and promise go on."""
        self._put(sequence)

    def fork(self, answer: DecodingSequence) -> None:
        """One more answer to a prompt whose KV its `cached` still shares with another: give it blocks of its own.

        Without room or a seat it waits, at the head of the line, and is computed anew as after a preemption.
        """
        request, count = answer.request, answer.request.num_known
        peaks = self._peaks.of(request, total_tokens=self._peaks.room_for(request, count), history=count)
        if self._has_seat() and self._promises.try_promise(answer.key, peaks):
            answer.cached = self._cache.fork(answer.cached, answer.key)
            self._put(answer)
            return
        prompt = PromptSequence(request, Claim.OWN, answer=answer)
        self._put(prompt)
        self._urgent.append(prompt)

    def keep_only(self, prompt: PromptSequence) -> None:
        """The prompt is computed: promise from now on what it will hold as an answer, or until its transfer ends."""
        request, count = prompt.request, len(prompt.token_ids)
        total = self._peaks.room_for(request, count) if prompt.serves else count
        history = self._kept_from(prompt, count)
        self._promises.shrink(prompt.key, self._peaks.of(request, total_tokens=total, history=history))

    # --- admission ------------------------------------------------------------------------------------------

    def admit(self) -> list[EngineEvent]:
        """Start all that may start, in order; to be called after whatever frees blocks or adds a sequence."""
        events: list[EngineEvent] = []
        self._start_in_floor(events)
        while self._urgent:
            if not self._has_seat() or not self._make_room(self._urgent[0], events):
                return events
            events += self._start(self._urgent.popleft())
        while head := self._line.head:
            if not self._has_seat():
                return events
            if not self._make_room(head, events):
                self._start_beside(head, events)
                return events
            events += self._start(self._line.take())
        self._start_soft(events)
        return events

    def _start_in_floor(self, events: list[EngineEvent]) -> None:
        """Start fetched prompts, the oldest first, before all else: what is kept for them is no other's to wait for."""
        if not self._promises.has_floor:
            return
        for prompt in [s for s in self._line if isinstance(s, PromptSequence) and s.claim is Claim.PINNED]:
            peaks = self._peaks.at_start(prompt)
            if not self._has_seat(is_fetched=True) or not self._promises.fits_floor(peaks):
                return
            if not self._make_room(prompt, events):
                return
            self._line.remove(prompt)
            events += self._start(prompt)

    def _start_beside(self, head: Promised, events: list[EngineEvent]) -> None:
        """Start what the head of the line does not have to wait for longer."""
        need = self._peaks.at_start(head)
        for sequence in self._line.behind_head(LOOK_BEHIND):
            if not self._has_seat():
                return
            if self._beside.fits(head.key, need, self._peaks.at_start(sequence)) and self._make_room(sequence, events):
                self._line.remove(sequence)
                self._beside.note(sequence.key)
                events += self._start(sequence)

    def _start_soft(self, events: list[EngineEvent]) -> None:
        for prompt in self._soft_line.first(LOOK_BEHIND):
            if not self._has_seat(with_soft=True):
                return
            if self._promises.try_promise(prompt.key, self._peaks.at_start(prompt), is_exempt=True):
                self._soft_line.remove(prompt)
                events += self._start(prompt)

    def _give_back(self, key: AttemptKey) -> None:
        self._promises.release(key)
        self._beside.forget(key)

    def _has_seat(self, *, with_soft: bool = False, is_fetched: bool = False) -> bool:
        """Whether one more may be computed at once. Held prompts take no seat; soft ones none from the promised.

        Where there is a floor, one seat is kept for what is fetched.
        """
        others = sum(takes_seat(s) and (with_soft or not is_soft(s)) for s in self.promised)
        kept = self._promises.has_floor and not is_fetched and self._max_num_seqs > 1
        return len(self.answers) + others < self._max_num_seqs - kept

    def _make_room(self, sequence: Promised, events: list[EngineEvent]) -> bool:
        """Promise the sequence its peak; drop soft prompts for it, newest first, but only if that suffices."""
        peaks, soft = self._peaks.at_start(sequence), self.soft
        is_exempt = isinstance(sequence, PromptSequence) and not sequence.serves
        if not self._promises.fits(peaks, without={prompt.key for prompt in soft}, is_exempt=is_exempt):
            return False
        while not self._promises.try_promise(sequence.key, peaks, is_exempt=is_exempt):
            events.append(self._drop(soft.pop()))
        return True

    def _drop(self, prompt: PromptSequence) -> SoftDroppedEvent:
        assert prompt.cached is not None
        prompt.enter(Stage.PARKED)
        self._cache.close_sequence(prompt.cached)
        self._give_back(prompt.key)
        dropped = SoftDroppedEvent(prompt.key, prompt.compute_id)
        prompt.cached, prompt.num_ahead = None, 0
        prompt.compute_id += 1
        return dropped

    def _start(self, sequence: Promised) -> list[EngineEvent]:
        if isinstance(sequence, Reservation):
            sequence.cached = self._cache.open(sequence.key, sequence.request.sampling.cache_salt, sequence.precision)
            return [reserve(self._cache, sequence)]
        events: list[EngineEvent] = []
        if sequence.claim is Claim.PINNED:
            events.append(PinnedEvent(sequence.key, sequence.compute_id))
        return events + self.beginnings.begin(sequence)

    def _leave_lines(self, sequence: Promised) -> None:
        if sequence in self._urgent:
            self._urgent.remove(sequence)
        self._line.remove(sequence)
        if isinstance(sequence, PromptSequence):
            self._soft_line.remove(sequence)

    # --- steps ----------------------------------------------------------------------------------------------

    def schedule(self, events: list[EngineEvent]) -> list[Work]:
        """The next step: one token of every answer, then chunks of prompts. Sizes the blocks of all of them.

        Appends to `events` what was dropped for their growth.
        """
        for answer in self.answers:
            if answer.num_stored >= answer.cached.room and answer.is_continued:  # else it has a block for its token
                self._begin_block(answer, events)
        continued = [answer for answer in self.answers if answer.is_continued]
        work = [Work(answer, (answer.next_input,), answer.num_stored) for answer in continued]
        prompts = [prompt for prompt in self.prompts if not prompt.num_ahead]
        budget = self._max_num_batched_tokens - len(work)
        max_chunks = min(MAX_PREFILLS_PER_STEP, self._max_num_seqs - len(work))
        shares = share_tokens([prompt.num_remaining for prompt in prompts], budget, max_chunks)
        work += [self._chunk(prompt, count) for prompt, count in zip(prompts, shares, strict=True) if count]
        for piece in work:
            piece.sequence.num_ahead += len(piece.token_ids)
        return work

    def is_awaited(self, event: ReservedEvent | PrefixRoomEvent) -> bool:
        """Whether the sequence still waits for the KV of these slots."""
        sequence = self._live.get(event.key)
        return isinstance(sequence, Reservation | PromptSequence) and sequence.awaited is event.slots

    def advance(self, work: Work) -> None:
        """The piece is computed: register the blocks it filled, and let go of what no later query reads.

        An answer does the latter when it takes its next block.
        """
        sequence, end = work.sequence, work.end
        sequence.num_ahead -= len(work.token_ids)
        if isinstance(sequence, PromptSequence):
            self._register(sequence, end)
            self._size(sequence, capacity=end, history=end)
        elif end - sequence.cached.committed >= self._layout.block_size:
            self.register_some(sequence, end)

    def register_some(self, answer: DecodingSequence, end: int) -> None:
        """`REGISTERED_AT_ONCE` more of the blocks before token `end`; steps and the answer's end register the rest.

        Where that takes several steps, a window may let go of a block before its turn comes.
        """
        at_once = REGISTERED_AT_ONCE * self._layout.block_size
        self._register(answer, min(end, answer.cached.committed + at_once))

    def _register(self, sequence: PromptSequence | DecodingSequence, end: int) -> None:
        """Later sequences may find the whole blocks before token `end`, whose KV is stored and right."""
        cached = sequence.cached
        assert cached is not None
        if end - cached.committed >= self._layout.block_size and cached.is_committing:
            first = cached.committed
            self._cache.commit(cached, sequence.tokens(first, end))
            self.registered += unannounced(self._cache, sequence, first, cached.committed)

    def _begin_block(self, answer: DecodingSequence, events: list[EngineEvent]) -> None:
        """Give the answer its next block. Those that went stale since its last go first, so it never holds more.

        Nothing if it was preempted for an older one, or must be now.
        """
        if self._live.get(answer.key) is answer and self._grow(answer, events):
            self._size(answer, capacity=answer.num_stored + 1, history=answer.num_stored)

    def _grow(self, answer: DecodingSequence, events: list[EngineEvent]) -> bool:
        """Promise the answer room for its next block. False when it was itself preempted for that."""
        stored, soft = answer.num_stored, None
        peaks = self._peaks.of(answer.request, total_tokens=stored + 1, history=stored)
        while not self._promises.try_grow(answer.key, peaks):
            soft = self.soft if soft is None else soft
            if soft:
                events.append(self._drop(soft.pop()))
                continue
            victim = self._next_victim()
            self._preempt(victim)
            if victim is answer:
                return False
        return True

    def _next_victim(self) -> LiveSequence:
        """The least important that may be preempted, of equals the newest. There is one while an answer goes on."""
        able = (s for s in reversed(self._live.values()) if self._is_preemptible(s))
        return max(able, key=lambda s: (s.request.priority, s.request.arrived_at))  # of equals the first

    def pressed_answer(self) -> DecodingSequence | None:
        """The answer that gives way first, where the others soon find no room for their next blocks."""
        free = self._promises.free
        if len(self.answers) < 2 or all(free[pool] >= len(self.answers) for pool in self._growing) or self.soft:
            return None
        if not any(self._is_preemptible(answer) for answer in self.answers):
            return None
        victim = self._next_victim()
        return victim if isinstance(victim, DecodingSequence) else None

    def _is_preemptible(self, sequence: LiveSequence) -> bool:
        """Running here for this worker's own answer, not about to leave nor landed in, and possible to compute anew."""
        is_own = isinstance(sequence, PromptSequence) and sequence.serves and sequence.stage is not Stage.LANDING
        is_own = is_own or (isinstance(sequence, DecodingSequence) and not sequence.is_frozen)
        return is_own and sequence.cached is not None and self._peaks.fit_anew(sequence.request)

    def _preempt(self, sequence: LiveSequence) -> None:
        """Take its blocks; it goes on from the head of the line, where the oldest of several ends up first."""
        assert isinstance(sequence, (PromptSequence, DecodingSequence))
        assert sequence.cached is not None
        self.num_preemptions += 1
        prompt = sequence
        if isinstance(sequence, DecodingSequence):
            self._register(sequence, sequence.cached.history)
            sequence.num_ahead = 0
            prompt = PromptSequence(sequence.request, Claim.OWN, answer=sequence)
            self._put(prompt)
        assert isinstance(prompt, PromptSequence)
        self._cache.close_sequence(sequence.cached)
        self._give_back(sequence.key)
        prompt.cached, prompt.num_ahead = None, 0
        prompt.enter(Stage.WAITING)
        self._urgent.appendleft(prompt)

    def _chunk(self, prompt: PromptSequence, count: int) -> Work:
        start = prompt.num_computed
        end = start + count
        until = scratch_until(self._swa_scratch, len(prompt.token_ids), end, self._cache.layout.block_size)
        self._size(prompt, capacity=end, history=start, scratch_until=until)
        return Work(prompt, prompt.token_ids[start:end], start, scoring_of(prompt, start, end))

    def _kept_from(self, prompt: PromptSequence, history: int) -> int:
        """A prompt keeps what a longer one goes on from: its last whole block, and all that is read from there on.

        Not where a step's outdated blocks are in scratch slots, nor where other answers will share its blocks.
        """
        is_shared = prompt.request.sampling.num_choices > 1
        if self._swa_scratch == "on" or is_shared or self._cache.prefixes is None:
            return history
        return min(history, self._layout.block_size * (len(prompt.token_ids) // self._layout.block_size))

    def _size(self, sequence: LiveSequence, *, capacity: int, history: int, scratch_until: int = 0) -> None:
        assert sequence.cached is not None
        kept_from = self._kept_from(sequence, history) if isinstance(sequence, PromptSequence) else None
        done = self._cache.resize(
            sequence.cached, capacity=capacity, history=history, scratch_until=scratch_until, kept_from=kept_from
        )
        assert done, f"{sequence.key}: a promised slot was not there"

    # --- invariants -----------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Promises fit the pools, no sequence holds more than its own, one that waits nothing. Also within a step."""
        self._promises.check_invariants()
        self._line.check_invariants()
        self._beside.check_invariants()
        if (kept := self._by_kind) is not None:
            self._by_kind = None
            assert self._kinds() == kept, "a sequence came or went unseen"
            self._by_kind = kept
        waiting = {sequence.key for line in (self._urgent, self._line, self._soft_line) for sequence in line}
        check_sequences(self._live, waiting, self._promises, self._cache)
