"""One worker's engine: commands decide which sequences hold blocks, a step computes the next tokens of those.

Single threaded, no clock, no sockets. Every event that reports an end (`FinishedEvent`, `FailedEvent`) is returned
after the blocks were freed, so a listener may count them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from disagg.cache.cache import KVCache
from disagg.engine.announce import publish_final_units, units_at
from disagg.engine.batch import Work
from disagg.engine.commands import (
    AttemptKey,
    Command,
    Decode,
    DropChoice,
    DropSoft,
    EngineEvent,
    Extend,
    FailedEvent,
    FinishedEvent,
    Freeze,
    LendPrefix,
    MakePrefixRoom,
    Pin,
    PinnedEvent,
    Prefill,
    PrefixChecked,
    PrefixGivenUp,
    PrefixLanded,
    PrefixRoomEvent,
    PromptComputedEvent,
    PromptScoredEvent,
    RegisteredEvent,
    Release,
    Reserve,
    ReservedEvent,
    Serve,
    SuspectEvent,
    Thaw,
    TokensEvent,
    UnitsFinalEvent,
    Unregister,
)
from disagg.engine.config import EngineConfig as EngineConfig
from disagg.engine.flight import Flight, chunk_of, sample_input
from disagg.engine.lending import Lending
from disagg.engine.moving import Moves
from disagg.engine.other_choices import draw_others
from disagg.engine.promised import Promised
from disagg.engine.recheck import PrefixRecheck
from disagg.engine.refusals import request_refusal, role_refusal
from disagg.engine.run.graphs.use import GraphUse
from disagg.engine.run.runner import StepRunner
from disagg.engine.sampler import Drawn, Sampled, SampleInput, draw
from disagg.engine.scheduler import Scheduler
from disagg.engine.sequence import (
    Claim,
    Computed,
    DecodingSequence,
    PromptSequence,
    Request,
    Reservation,
    Stage,
    first_token_of,
    state_of,
)
from disagg.engine.stats import EngineCounters, EngineStats
from disagg.transceiver.wire.messages.router import YOUNG_TOKENS
from disagg.transceiver.wire.messages.values import OtherFirst, TokenLogprobs


class Engine:
    """Continuous batching over one cache. `handle` takes a command, `step` computes; both answer with events."""

    def __init__(
        self,
        runner: StepRunner,
        cache: KVCache,
        config: EngineConfig,
        graphs: GraphUse | None = None,
        draw: Callable[[torch.Tensor, Sequence[SampleInput]], Drawn] = draw,
    ) -> None:
        """`graphs`: what the runner tells of the graphs it replays. `draw`: how tokens are chosen."""
        self._runner, self._cache, self._config = runner, cache, config
        self._recheck = PrefixRecheck(cache, config.prefix_recheck_s)
        self._scheduler = Scheduler(
            cache,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            swa_scratch=config.swa_scratch,
            recheck=self._recheck,
            longest_fetched=config.max_model_len if config.role == "both" else 0,
        )
        self._lending = Lending(cache)
        self._moves = Moves(cache, self._scheduler)
        self._counters = EngineCounters(scratch=cache.num_scratch)
        self._graphs = graphs or GraphUse()
        self._draw = draw
        self._flight: Flight | None = None
        self._untold: list[ReservedEvent | PrefixRoomEvent] = []
        """Reservations made while a step is under way, told when it is read: it may still use what their slots held."""
        self.on_step: Callable[[Sequence[AttemptKey]], None] = lambda keys: None
        """Called before each step with its young attempts: if the step ends the process, one of them is the cause."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would compute something; without it only a command can change anything."""
        return self._flight is not None or self._scheduler.has_work

    def step(self) -> list[EngineEvent]:
        """Compute the next tokens of every sequence that holds blocks. Without work nothing happens.

        With `steps_ahead` the forward pass is launched before the tokens of the step before it are read. All that
        depends on these comes after: endings, penalties, and which rows are sampled at all.
        """
        events = self._finish() if self._flight is not None and self._flight.holds_up else []
        work = self._schedule(events)
        logits = self._launch(work) if work else None
        events += self._finish()
        if logits is not None:
            self._flight = self._sample(work, logits)
        if not self._config.steps_ahead:
            events += self._finish()
        events += self._told_in_time(self._scheduler.admit()) + self._news()
        self._check()
        return events

    def handle(self, command: Command) -> list[EngineEvent]:
        """Apply one command and start what may start now. Commands for unknown or repeated keys change nothing."""
        events = self._told_in_time(self._apply(command) + self._scheduler.admit()) + self._news()
        self._check()
        return events

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        prompts = [s for s in scheduler.promised if isinstance(s, PromptSequence)]
        return EngineStats(
            pools=self._cache.usage(),
            num_running=len(scheduler.answers) + sum(prompt.is_computing for prompt in prompts),
            num_waiting=scheduler.num_waiting,
            num_soft=len(scheduler.soft),
            num_held=sum(prompt.stage is Stage.HELD for prompt in prompts),
            num_reserved=sum(isinstance(s, Reservation) and s.cached is not None for s in scheduler.promised),
            prompt_tokens_computed=self._counters.prompt_tokens_computed,
            tokens_generated=self._counters.tokens_generated,
            steps=self._counters.steps,
            num_preemptions=scheduler.num_preemptions,
            scratch=self._counters.scratch,
            live_keys=tuple(scheduler.live),
            released=tuple(sorted(self._counters.released.items())),
            reuse=self._cache.reuse_counts(),
            num_outdated=self._cache.num_outdated,
            graphs=replace(self._graphs),
            num_dropped=self._counters.dropped,
            answer_tokens=self._counters.answer_tokens,
            has_floor=scheduler.has_floor,
        )

    def _news(self) -> list[EngineEvent]:
        """Of blocks that others may read: which are new, and which of those that are being read are gone."""
        registered, self._scheduler.registered = tuple(self._scheduler.registered), []
        events: list[EngineEvent] = [RegisteredEvent(registered)] if registered else []
        return events + self._lending.broken()

    # --- a step's parts -------------------------------------------------------------------------------------

    def _schedule(self, events: list[EngineEvent]) -> list[Work]:
        work = self._scheduler.schedule(events)
        events += self._moves.pressed()
        self._counters.scratch = tuple(map(max, self._counters.scratch, self._cache.num_scratch))
        if self._config.check_invariants:
            self._scheduler.check_invariants()  # now every sequence holds most: new blocks, old ones, and scratch
        return work

    def _launch(self, work: Sequence[Work]) -> torch.Tensor:
        """The forward pass, behind all that was launched before it."""
        before = self._flight
        self.on_step([piece.sequence.key for piece in (*(before.work if before else ()), *work) if _is_young(piece)])
        chunks = [chunk_of(piece, before) for piece in work]
        if before is None:
            return self._runner.execute(chunks)
        return self._runner.execute(chunks, before.drawn.token_ids)

    def _sample(self, work: Sequence[Work], logits: torch.Tensor) -> Flight:
        """Choose a token behind each piece that ends in one, save those of sequences that ended meanwhile."""
        wanting = [piece for piece in work if piece.wants_logits]
        kept = [row for row, piece in enumerate(wanting) if piece.is_current]
        if len(kept) < len(wanting):
            logits = logits[kept]
        pieces = [wanting[row] for row in kept]
        drawn = self._draw(logits, [sample_input(piece) for piece in pieces])
        rows = {piece.sequence: row for row, piece in enumerate(pieces)}
        return Flight(work, drawn, rows, draw_others(self._draw, logits, pieces))

    def _finish(self) -> list[EngineEvent]:
        """Read the tokens of the step under way, and do what they decide. Nothing if there is none."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        sampled = flight.drawn.read()
        untold, self._untold = self._untold, []
        events: list[EngineEvent] = [event for event in untold if self._scheduler.is_awaited(event)]
        return events + self._commit(flight, sampled)

    def _told_in_time(self, events: list[EngineEvent]) -> list[EngineEvent]:
        if self._flight is None:
            return events
        self._untold += [event for event in events if isinstance(event, ReservedEvent | PrefixRoomEvent)]
        return [event for event in events if not isinstance(event, ReservedEvent | PrefixRoomEvent)]

    # --- commands -------------------------------------------------------------------------------------------

    def _apply(self, command: Command) -> list[EngineEvent]:
        match command:
            case Serve():
                prompt = PromptSequence(_request(command), Claim.OWN, prefix_boundary=command.prefix_boundary)
                return self._add(prompt, urgent=_is_urgent(command))
            case Prefill():
                boundary = command.prefix_boundary
                return self._add(PromptSequence(_request(command), Claim.SOFT, prefix_boundary=boundary))
            case Reserve():
                return self._add(Reservation(_request(command), command.precision), urgent=_is_urgent(command))
            case Pin():
                return self._pin(command)
            case Extend():
                return self._moves.extend(command)
            case Decode():
                return self._decode(command)
            case Freeze():
                return self._moves.freeze(command)
            case Thaw():
                return self._moves.thaw(command)
            case DropSoft():
                return self._drop_soft(command)
            case DropChoice():
                return self._drop_choice(command)
            case Release():
                return self._release(command)
            case Unregister():
                return self._unregister(command)
            case PrefixChecked():
                return self._prefix_checked(command)
            case LendPrefix():
                return self._lending.lend(command)
            case MakePrefixRoom() | PrefixLanded() | PrefixGivenUp():
                return self._fetched(command)

    def _add(self, sequence: Promised, *, urgent: bool = False) -> list[EngineEvent]:
        if self._scheduler.get(sequence.key) is not None:
            return []  # delivered twice
        if refusal := self._refusal(sequence):
            return [FailedEvent(sequence.key, 400, refusal)]
        self._scheduler.add(sequence, urgent=urgent)
        return []

    def _refusal(self, sequence: Promised) -> str | None:
        """Why this request can never be served here, or None."""
        request = sequence.request
        if refusal := role_refusal(sequence, self._config.role):
            return refusal
        if refusal := request_refusal(request, self._config.max_model_len, self._config.vocab_size):
            return refusal
        if short := self._scheduler.needs_more_than_exists(sequence):
            return (
                f"{request.prompt_len} prompt tokens and max_tokens {request.sampling.max_tokens} need {short[0]} "
                f"blocks of a KV pool of {short[1]}; shorten the prompt, lower max_tokens or raise `--kv-cache-memory`"
            )
        return None

    def _pin(self, command: Pin) -> list[EngineEvent]:
        prompt = self._scheduler.get(command.key)
        if not isinstance(prompt, PromptSequence) or prompt.serves:
            return []
        if prompt.is_soft:
            self._scheduler.pin(prompt)
        return [PinnedEvent(prompt.key, prompt.compute_id)] if prompt.cached else []

    def _decode(self, command: Decode) -> list[EngineEvent]:
        reservation = self._scheduler.get(command.key)
        if not isinstance(reservation, Reservation) or reservation.cached is None:
            return []  # released meanwhile
        answer = DecodingSequence(reservation.request, reservation.cached, command.verified)
        self._cache.mark_partial(reservation.cached, [(unit.group, unit.ordinal) for unit in command.partial_blocks])
        self._scheduler.register_some(answer, answer.num_stored)  # verified, and not a moment before
        return self._begin(answer)

    def _drop_choice(self, command: DropChoice) -> list[EngineEvent]:
        if (sequence := self._scheduler.get(command.key)) is not None:
            self._scheduler.release(sequence)
        return []

    def _drop_soft(self, command: DropSoft) -> list[EngineEvent]:
        prompt = self._scheduler.get(command.key)
        if isinstance(prompt, PromptSequence) and prompt.is_soft:
            return self._scheduler.park(prompt)
        return []

    def _release(self, command: Release) -> list[EngineEvent]:
        self._lending.end(command.key)
        for sequence in [s for s in self._scheduler.live.values() if s.key.attempt == command.key]:
            self._counters.released[state_of(sequence)] += 1
            self._scheduler.release(sequence)
        return []

    def _unregister(self, command: Unregister) -> list[EngineEvent]:
        if command.key in self._lending:
            return self._lending.unregister(command.key, command.units)
        sequence = self._scheduler.get(command.key)
        if sequence is None or sequence.cached is None:
            return [SuspectEvent(command.key, ())]
        if command.units:
            # They are blocks of one chain: the first takes all that extend it along.
            self._cache.unregister(sequence.cached, min(unit.ordinal for unit in command.units))
        return [SuspectEvent(command.key, units_at(self._cache, sequence.cached, command.units))]

    def _prefix_checked(self, command: PrefixChecked) -> list[EngineEvent]:
        self._recheck.note(command.right)
        for unit in command.wrong:
            self._cache.unregister_slot(unit.group, unit.slot, unit.generation)
        prompt = self._scheduler.get(command.key)
        if (
            not isinstance(prompt, PromptSequence)
            or prompt.stage is not Stage.CHECKING
            or prompt.check_id != command.check_id
        ):
            return []  # released or dropped meanwhile
        return self._scheduler.beginnings.end_check(prompt, is_right=not command.wrong)

    def _fetched(self, command: MakePrefixRoom | PrefixLanded | PrefixGivenUp) -> list[EngineEvent]:
        """What became of the blocks that a prompt waits for."""
        prompt, beginnings = self._scheduler.get(command.key), self._scheduler.beginnings
        if not isinstance(prompt, PromptSequence):
            return [PrefixRoomEvent(command.key, 0, None)] if isinstance(command, MakePrefixRoom) else []
        match command:
            case MakePrefixRoom():
                return [beginnings.make_room(prompt, command.boundary)]
            case PrefixLanded():
                return beginnings.take_landed(prompt, command.partial_blocks)
            case PrefixGivenUp():
                return beginnings.give_up(prompt)

    # --- commit ---------------------------------------------------------------------------------------------

    def _commit(self, flight: Flight, sampled: Sequence[Sampled]) -> list[EngineEvent]:
        """Append tokens, report units that became final, end what ended. What was for an ended sequence is dropped."""
        self._counters.steps += 1
        events: list[EngineEvent] = []
        for piece in flight.work:
            if piece.is_current:
                row = flight.rows[piece.sequence] if piece.wants_logits else None
                others = [one.read()[0] for one in flight.others.get(piece.sequence, ())]
                events += self._commit_piece(piece, None if row is None else sampled[row], others)
            else:
                self._counters.dropped += 1
        return events

    def _commit_piece(self, piece: Work, result: Sampled | None, others: Sequence[Sampled]) -> list[EngineEvent]:
        sequence = piece.sequence
        if result is not None and not result.finite:
            return self._not_finite(piece)
        if error := next((one.error for one in (result, *others) if one is not None and one.error is not None), None):
            self._scheduler.release(sequence)
            return [FailedEvent(sequence.key, 500, f"sampling after position {piece.end - 1} failed: {error}")]
        if result is not None:
            self._counters.tokens_generated += 1 + len(others)
        if isinstance(sequence, PromptSequence):
            return self._commit_chunk(sequence, piece, result, others)
        assert result is not None
        self._counters.answer_tokens += 1
        self._scheduler.advance(piece)
        sequence.output.append(result.token_id)
        return self._emit(sequence, result.logprobs) + self._moves.settled(sequence)

    def _not_finite(self, piece: Work) -> list[EngineEvent]:
        key = piece.sequence.key
        self._scheduler.release(piece.sequence, wipe=True)  # what it left behind must never be loaded
        return [FailedEvent(key, 500, f"non-finite logits after position {piece.end - 1}")]

    def _commit_chunk(
        self, prompt: PromptSequence, piece: Work, result: Sampled | None, others: Sequence[Sampled]
    ) -> list[EngineEvent]:
        self._scheduler.advance(piece)
        self._counters.prompt_tokens_computed += len(piece.token_ids)
        scores = piece.scoring.scores() if piece.scoring is not None else []
        if scores is None:
            return self._not_finite(piece)
        events: list[EngineEvent] = [PromptScoredEvent(prompt.key, some) for some in scores]
        if not prompt.serves and (units := publish_final_units(self._cache, prompt)):
            self._recheck.note(units)
            events.append(UnitsFinalEvent(prompt.key, prompt.compute_id, units))
        return events + (self._end_prompt(prompt, result, others) if result else [])

    def _end_prompt(self, prompt: PromptSequence, result: Sampled, others: Sequence[Sampled]) -> list[EngineEvent]:
        """The prompt is whole: answer it here, go on with its answer, or hold its blocks for the decode worker."""
        if prompt.answer is not None:
            return self._resume(prompt, prompt.answer, result)
        more = tuple(OtherFirst(one.token_id, one.logprobs) for one in others)
        computed = Computed(prompt, first_token_of(prompt, result.token_id, result.logprobs, more))
        self._scheduler.keep_only(prompt)
        if prompt.serves:
            assert prompt.cached is not None
            return self._begin(DecodingSequence(prompt.request, prompt.cached, computed))
        prompt.enter(Stage.HELD)
        return [_prompt_computed(prompt, computed)]

    def _resume(self, prompt: PromptSequence, answer: DecodingSequence, result: Sampled) -> list[EngineEvent]:
        """What was preempted is computed again, and its next token sampled; those before it were emitted."""
        self._scheduler.keep_only(prompt)
        answer.resume(prompt)
        answer.output.append(result.token_id)
        self._scheduler.replace(answer)
        return self._emit(answer, result.logprobs)

    def _begin(self, answer: DecodingSequence) -> list[EngineEvent]:
        """The answer, and where several are given to its prompt all others: they share its blocks before it goes on."""
        self._scheduler.replace(answer)
        events: list[EngineEvent] = []
        for number in range(1, answer.request.sampling.num_choices):
            other = DecodingSequence(answer.request.of_choice(number), answer.cached, answer.licence)
            events += self._told(other, other.first.logprobs)
            if other.ending() is None:
                self._scheduler.fork(other)
        return self._emit(answer, answer.first.logprobs) + events

    def _emit(self, answer: DecodingSequence, logprobs: TokenLogprobs | None) -> list[EngineEvent]:
        """Report the newest token; free the answer if that token ends it."""
        if answer.ending() is not None:
            self._scheduler.release(answer)
        return self._told(answer, logprobs)

    def _told(self, answer: DecodingSequence, logprobs: TokenLogprobs | None) -> list[EngineEvent]:
        """The newest token, and that it ends the answer."""
        count = len(answer.output)
        answer.logprobs += [logprobs] if logprobs else ()
        num_cached_tokens = answer.licence.first_token.num_cached_tokens if count == 1 else 0
        token = TokensEvent(
            answer.key, count - 1, (answer.output[-1],), (logprobs,) if logprobs else (), num_cached_tokens
        )
        ending = answer.ending()
        if ending is None:
            return [token]
        return [token, FinishedEvent(answer.key, count, ending.reason, ending.stop_token_id)]

    def _check(self) -> None:
        if self._config.check_invariants:
            self._cache.check_invariants()
            self._scheduler.check_invariants()


def _request(command: Serve | Prefill | Reserve) -> Request:
    named = command.key, command.prompt, command.sampling, command.priority
    return Request(*named, command.output, command.arrived_at)


def _is_urgent(command: Serve | Reserve) -> bool:
    is_behind = isinstance(command, Reserve) and command.is_moved  # its worker goes on with the answer meanwhile
    return (bool(command.output) and not is_behind) or (isinstance(command, Serve) and command.urgent)


def _prompt_computed(prompt: PromptSequence, computed: Computed) -> PromptComputedEvent:
    """A first token that stops the answer leaves nothing to decode; one that only uses up max_tokens is still sent."""
    token_id = computed.first_token.token_id
    ending = prompt.request.ending_after(token_id, len(prompt.request.emitted) + 1)
    stop_token_id = ending.stop_token_id if ending else None
    others = computed.first_token.others
    is_finished = stop_token_id is not None and all(_stops(prompt.request, other.token_id) for other in others)
    return PromptComputedEvent(prompt.key, prompt.compute_id, computed.first_token, is_finished, stop_token_id)


def _stops(request: Request, token_id: int) -> bool:
    ending = request.ending_after(token_id, 1)
    return ending is not None and ending.reason == "stop"


def _is_young(piece: Work) -> bool:
    sequence = piece.sequence
    answer = sequence.answer if isinstance(sequence, PromptSequence) else sequence
    return answer is None or answer.num_sampled < YOUNG_TOKENS
