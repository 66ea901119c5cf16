"""The router below HTTP: workers register here, requests are placed, their tokens come back. Implements `Backend`.

A thin asyncio shell: the registry knows the workers, `choose` picks among them, `RoutedRequest` decides what a request
does next, `Cluster` holds the connections; this file hands events and actions between them. Everything but `generate`
is a plain function on the event loop, so no state is seen half changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from disagg.loop_lag import LoopLag
from disagg.router.attempt import RoutedRequest
from disagg.router.attempt_events import (
    Action,
    Answered,
    AnswerMessage,
    ChoiceUnwanted,
    ClientGone,
    Emit,
    Event,
    Fail,
    MoveEnded,
    RouterClosing,
    SendOrder,
    TimePassed,
    TurnedAway,
    WentOn,
    WorkerLost,
)
from disagg.router.charges import MAX_CHARGES
from disagg.router.choose import RETRY_BUSY_S, Placement
from disagg.router.cluster import Cluster
from disagg.router.costs.decide import POLICIES
from disagg.router.emptying import Emptying, Orders
from disagg.router.gate import Gate
from disagg.router.generation import GenerationEnd, GenerationError, GenerationRequest, TokenChunk
from disagg.router.index.remote import PrefixIndex
from disagg.router.metrics import RouterMetrics
from disagg.router.minting import Minting
from disagg.router.moving import MovableRequest
from disagg.router.options import RouterOptions as RouterOptions
from disagg.router.placing import Placing
from disagg.router.prefix_legs import PrefixLegs, PrefixSource
from disagg.router.prefix_lenders import PrefixLenders
from disagg.router.record import RecordStore, RequestRecord
from disagg.router.registry import Worker
from disagg.router.status import describe_workers
from disagg.router.tenants import QueuedRequest
from disagg.router.unread import Unread
from disagg.router.workload import Share
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.router import PeerTarget, TransferFailure, TransferReport
from disagg.transceiver.wire.messages.tokens import Tokens
from disagg.transceiver.wire.node import draw_id
from disagg.transceiver.wire.purposes import PREFIX
from disagg.transceiver.wire.ticket import LegClaims, mint_leg

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Stream:
    """One request in progress and what its client has not read yet."""

    attempts: MovableRequest
    turn: QueuedRequest
    load: tuple[Share, ...] = ()
    """What of it is counted in the router's load."""
    last_token_at: dict[int, float] = field(default_factory=dict)
    """By choice."""
    unread: Unread = field(default_factory=Unread)
    has_moved: bool = False
    """Another worker has taken the answer over, and its first token is to come."""


class Router:
    """Use `async with Router.open(...)`, or construct it with a bound server and keep `run` going."""

    def __init__(
        self,
        server: ControlServer,
        keys: ClusterKeys,
        options: RouterOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options or RouterOptions()
        self.cluster = Cluster(server, self.options.expected_fingerprint, self, clock, self.options.connect)
        self._keys = keys
        self._clock = clock
        self._gate = Gate(
            self.options.tenants,
            max_queued=self.options.max_queued,
            ahead_per_server=self.options.ahead_per_server,
            workers=lambda: self.cluster.registry,
            clock=clock,
        )
        self._metrics = RouterMetrics(lambda: list(self.cluster.registry), self._gate)
        self._records = RecordStore()
        self._streams: dict[str, _Stream] = {}
        self._by_request: dict[GenerationRequest, _Stream] = {}
        policy, bound = POLICIES[self.options.policy], self.options.max_local_prefill
        self._placing = Placing(self.cluster.registry, self.options.max_queued, policy, bound)
        remembers = not POLICIES[self.options.policy].weighs_all
        self._lenders = PrefixLenders(self.cluster.registry, keys.prefix_hash, clock, remembers=remembers)
        self._emptying = Emptying(self.cluster.registry, self._placing.work.answers, draw_id)
        self._is_draining = False
        """A move ended since draining workers were looked at."""
        self._index: PrefixIndex | None = None
        self._charged: dict[str, _Stream] = {}
        """Requests that a worker may have died of. One leaves when it has shown that another was the cause."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, endpoint: str, keys: ClusterKeys, options: RouterOptions | None = None
    ) -> AsyncIterator[Router]:
        """A router listening for workers at tcp://HOST:PORT while the block runs. Raises `EndpointRefused`."""
        server = ControlServer.bind(endpoint, keys)
        try:
            router = cls(server, keys, options)
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(router.run())
                watching = tasks.create_task(router.loop_lag.run())
                try:
                    yield router
                finally:
                    router.shut_down()
                    running.cancel()
                    watching.cancel()
        finally:
            await server.close()

    @property
    def endpoint(self) -> str:
        """Where workers register, with the port that was taken."""
        return self.cluster.endpoint

    @property
    def loop_lag(self) -> LoopLag:
        return self._metrics.loop_lag

    @property
    def figures(self) -> RouterMetrics:
        return self._metrics

    async def run(self) -> None:
        """Serve until cancelled."""
        await self.cluster.run()

    def ask_blocks(self, incarnation: str, message: AskBlocks) -> None:
        """Have a worker tell all blocks of its prefix cache."""
        self.cluster.order(incarnation, message)

    def use(self, index: PrefixIndex) -> None:
        """From here on ask which workers hold what of a prompt."""
        self._index = index
        self._metrics.add(index)
        for worker in self.cluster.registry:
            index.add(worker.register)

    def shut_down(self) -> None:
        """End every request with 503 and take no new one. Workers see the closed socket and drop what they hold."""
        self._gate.close()
        self._apply_to_all(RouterClosing())

    def check_invariants(self) -> None:
        """Every stream is a live request. Connections, records and each request hold their own invariants."""
        self.cluster.check_invariants()
        self._records.check_invariants()
        self._gate.check_invariants()
        self._placing.check_invariants()
        shares = [share for stream in self._streams.values() for share in stream.attempts.load]
        assert +self._placing.load == Counter(share.incarnation for share in shares)
        self._placing.work.check_invariants(shares)
        assert self._charged.keys() <= self._streams.keys()
        for transfer_id, stream in self._streams.items():
            assert stream.attempts.transfer_id == transfer_id
            assert not stream.attempts.is_over
            stream.attempts.check_invariants()

    # --- Backend: what HTTP asks ----------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk | GenerationEnd, None]:
        """See `Backend.generate`. The request starts with the first item asked for and is cancelled when closed."""
        stream = self._by_request[request] = await self._enter(request)
        try:
            while True:
                item = await stream.unread.take()  # the clock task owns the deadline: it ends every request
                if isinstance(item, GenerationError):
                    raise item
                yield item
                if stream.attempts.is_over and stream.unread.is_empty:
                    return
        finally:
            del self._by_request[request]
            self._apply(stream, ClientGone())
            self._gate.leave(stream.turn, stream.attempts.num_tokens)

    def end_choice(self, request: GenerationRequest, choice: int) -> None:
        """See `Backend.end_choice`."""
        if (stream := self._by_request.get(request)) is not None:
            self._apply(stream, ChoiceUnwanted(choice))

    def is_ready(self) -> bool:
        return isinstance(self._placing.at(self._clock()).place(max_tokens=2), Placement)

    def max_model_len(self) -> int | None:
        return self.cluster.registry.max_model_len()

    def workers(self) -> list[dict[str, Any]]:
        return describe_workers(list(self.cluster.registry), self._placing.load, self._clock())

    def drain(self, worker_id: str, draining: bool = True) -> bool:
        """Give a worker no new requests, or some again. False when it is not registered."""
        is_known = self.cluster.registry.drain(worker_id, draining)
        self._empty_draining()
        return is_known

    def record(self, request_id: str) -> Mapping[str, Any] | None:
        record = self._records.get(request_id)
        return None if record is None else record.describe()

    def metrics(self) -> bytes:
        self._metrics.running.set(len(self._streams))
        return self._metrics.text()

    # --- requests -------------------------------------------------------------------------------------------

    async def _enter(self, request: GenerationRequest) -> _Stream:
        """Wait for the request's turn and send it to its workers."""
        held: dict[str, int] = {}
        attempts = self._routed(request, held)
        self._records.add(attempts.record)
        try:
            turn = await self._gate.enter(request, attempts.record.received_at, attempts.deadline)
        except GenerationError as refusal:
            self._end_unstarted(attempts, TurnedAway(refusal.status, refusal.message))
            raise
        except BaseException:
            self._end_unstarted(attempts, ClientGone())
            raise
        try:
            await self._look_up(attempts, held)
            return self._start(attempts, turn)
        except BaseException:
            self._gate.leave(turn, 0)
            raise

    async def _look_up(self, attempts: RoutedRequest, held: dict[str, int]) -> None:
        """The workers that hold something of the prompt. Raises GenerationError when the router closes meanwhile."""
        try:
            held |= await self._who_holds(attempts.request)
        except BaseException:
            self._end_unstarted(attempts, ClientGone())
            raise
        if self._gate.is_closing:
            self._end_unstarted(attempts, RouterClosing())
            raise GenerationError(503, "the router is shutting down", retry_after_s=RETRY_BUSY_S)

    def _end_unstarted(self, attempts: RoutedRequest, event: Event) -> None:
        now = self._clock()
        attempts.handle(event, now)
        self._note_end(attempts.record, now)

    async def _who_holds(self, request: GenerationRequest) -> dict[str, int]:
        """As `PrefixIndex.who_holds`; empty for a request that uses no prefix."""
        uses_prefixes = self._placing.policy.weighs_all and request.sampling.num_prompt_logprobs is None
        if self._index is None or not uses_prefixes:
            return {}
        return await self._index.who_holds(request.prompt, request.sampling.cache_salt)

    def _routed(self, request: GenerationRequest, held: Mapping[str, int]) -> MovableRequest:
        transfer_id, now = draw_id(), self._clock()
        minting = Minting(self._keys.ticket, transfer_id, request)
        return MovableRequest(
            request,
            transfer_id,
            lambda: self._placing.at(self._clock(), request, held),
            minting.handoff,
            mint_leg=minting.move,
            max_attempts=self.options.max_attempts,
            max_continuations=self.options.max_continuations,
            timeout_s=min(request.timeout_s or math.inf, self.options.request_timeout_s),
            now=now,
            news=self,
            legs=self._legs_of(request, transfer_id),
        )

    def _legs_of(self, request: GenerationRequest, transfer_id: str) -> PrefixLegs:
        def choose(sink: PeerTarget, placement: Placement) -> PrefixSource | None:
            return self._lenders.choose(request, sink, placement)

        def mint_one(claims: LegClaims, ttl_s: float) -> bytes:
            self._lenders.note_leg(claims.transfer_id, claims.source, request, transfer_id)
            return mint_leg(self._keys.ticket, claims, ttl_s)

        return PrefixLegs(request, transfer_id, choose, mint_one)

    def _start(self, attempts: MovableRequest, turn: QueuedRequest) -> _Stream:
        stream, now = _Stream(attempts, turn), self._clock()
        actions = attempts.start(now)
        self._streams[attempts.transfer_id] = stream
        self._perform(stream, actions, now)
        return stream

    def _apply(self, stream: _Stream, event: Event) -> None:
        now = self._clock()
        self._perform(stream, stream.attempts.handle(event, now), now)

    def _go_on(self, stream: _Stream, source: str, tokens: Tokens) -> bool:
        """The short way for the next tokens of an answer, which change nothing else; False: it is not as plain."""
        now = self._clock()
        chunk = None if stream.attempts.is_charged else stream.attempts.next_chunk(source, tokens, now)
        if chunk is None:
            return False
        self._measure(stream, chunk, now)
        stream.unread.put(chunk)
        return True

    def _apply_to_all(self, event: Event) -> None:
        for stream in list(self._streams.values()):
            try:
                self._apply(stream, event)
            except Exception:  # one request that cannot go on costs that request, whatever happened to all of them
                log.exception("request %s cannot go on", stream.attempts.record.request_id)
                self._drop(stream)

    def _drop(self, stream: _Stream) -> None:
        self._placing.count(stream.load, ())
        self._streams.pop(stream.attempts.transfer_id, None)
        self._charged.pop(stream.attempts.transfer_id, None)
        stream.unread.put(GenerationError(500, "the router failed on this request; its log says how"))

    def _perform(self, stream: _Stream, actions: list[Action], now: float) -> None:
        for action in actions:
            match action:
                case SendOrder(to, message):
                    self.cluster.order(to, message)
                case MoveEnded(outcome):
                    self._metrics.moves.labels(outcome=outcome).inc()
                    stream.has_moved = outcome == "moved"
                    self._is_draining = True  # another may go in its place
                case WentOn(choice, is_exact):
                    self._metrics.went_on(now - stream.last_token_at.get(choice, now), is_exact=is_exact)
                case Emit(item):
                    self._measure(stream, item, now)
                    stream.unread.put(item)
                case Fail(status, message, retry_after_s):
                    stream.unread.put(GenerationError(status, message, retry_after_s=retry_after_s))
        self._count_load(stream)
        self._note_charges(stream)
        if stream.attempts.is_over and self._streams.pop(stream.attempts.transfer_id, None) is not None:
            self._note_end(stream.attempts.record, now)
            if stream.attempts.record.state == "finished":
                self._lenders.note_served(stream.attempts.request, stream.attempts.record)

    def _count_load(self, stream: _Stream) -> None:
        """Bring the count up to date with this one stream: no choice looks at all of them."""
        if stream.load != (load := stream.attempts.load):
            self._placing.count(stream.load, load)
            stream.load = load

    def _note_charges(self, stream: _Stream) -> None:
        if stream.attempts.is_charged:
            self._charged[stream.attempts.transfer_id] = stream
        else:
            self._charged.pop(stream.attempts.transfer_id, None)

    def _measure(self, stream: _Stream, item: TokenChunk | GenerationEnd, now: float) -> None:
        if isinstance(item, GenerationEnd):
            return
        last_token_at = stream.last_token_at.get(item.choice)
        if not stream.last_token_at:
            self._gate.began(stream.turn)
            self._metrics.ttft.observe(now - stream.attempts.record.received_at)
            if (error := stream.attempts.record.current.estimate_ratio(now)) is not None:
                self._metrics.estimate_ratio.observe(error)
        elif last_token_at is not None:
            self._note_pause(stream, now - last_token_at)
            count = len(item.token_ids)
            self._metrics.itl.note((now - last_token_at) / count, count)
        stream.last_token_at[item.choice] = now

    def _note_pause(self, stream: _Stream, pause_s: float) -> None:
        if stream.has_moved:
            stream.has_moved = False
            stream.attempts.record.current.pause_s = pause_s
            self._metrics.move_pause.observe(pause_s)

    # --- draining -------------------------------------------------------------------------------------------

    def _empty_draining(self) -> None:
        now, self._is_draining = self._clock(), False
        self._carry_out(self._emptying.empty(lambda: [s.attempts for s in self._streams.values()], now), now)

    def _carry_out(self, orders: Orders, now: float) -> None:
        for request, actions in orders:
            self._perform(self._streams[request.transfer_id], actions, now)

    def _note_end(self, record: RequestRecord, now: float) -> None:
        self._metrics.e2e.observe(now - record.received_at)
        self._metrics.requests.labels(outcome=record.state).inc()
        self._metrics.charged_deaths.inc(len(record.charged_deaths))
        if len(record.charged_deaths) >= MAX_CHARGES:
            self._metrics.refused_after_deaths.inc()
        if record.state == "finished":
            self._placing.work.note_answer(record.num_tokens)
        for attempt in record.attempts:
            self._metrics.attempts.labels(mode=attempt.mode).inc()
        level = logging.WARNING if record.state == "failed" else logging.INFO
        log.log(
            level,
            "request %s %s: %d tokens, %d attempts%s%s",
            record.request_id,
            record.state,
            record.num_tokens,
            len(record.attempts),
            record.decision_in_words(),
            f", {record.error}" if record.error else "",
        )

    # --- WorkerNews: what a request asks before it is tried again ---------------------------------------------------

    def is_in_step(self, incarnation: str, transfer_id: str) -> bool:
        return transfer_id in self.cluster.in_step(incarnation)

    def sign_at(self, incarnation: str) -> float | None:
        return self.cluster.sign_at(incarnation)

    def taken(self, transfer_id: str) -> frozenset[str]:
        others = (stream.attempts for charged, stream in self._charged.items() if charged != transfer_id)
        return frozenset(side for attempts in others if not attempts.is_waiting for side in attempts.sides)

    # --- ClusterListener: what happens below ------------------------------------------------------------------

    def answered(self, source: str, message: AnswerMessage) -> None:
        if isinstance(message, TransferReport) and message.purpose == PREFIX:
            self._lenders.note_fetched(message.transfer_id)
        if stream := self._streams.get(message.transfer_id):
            if not (isinstance(message, Tokens) and self._go_on(stream, source, message)):
                self._apply(stream, Answered(source, message))
                if self._is_draining:
                    self._empty_draining()
        elif isinstance(message, TransferReport) and (record := self._records.get(message.transfer_id)):
            record.note(source, message)
        elif isinstance(message, TransferFailure):
            self._lenders.note_failed(message.transfer_id)

    def registered(self, worker: Worker) -> None:
        self._placing.add(worker)
        self._lenders.add(worker)
        if self._index is not None:
            self._index.add(worker.register)

    def lost(self, incarnation: str, reason: str, in_step: Mapping[str, int]) -> None:
        self._placing.remove(incarnation)
        self._lenders.forget(incarnation)
        if self._index is not None:
            self._index.remove(incarnation)
        self._apply_to_all(WorkerLost(incarnation, reason, in_step))

    def told_blocks(self, events: BlockEvents) -> None:
        if self._index is not None:
            self._index.take(events)

    def pressed(self, incarnation: str, transfers: Sequence[tuple[str, int]]) -> None:
        now, streams = self._clock(), [self._streams.get(transfer_id) for transfer_id, _ in transfers]
        requests = [stream.attempts for stream in streams if stream is not None]
        self._carry_out(self._emptying.relieve(incarnation, requests, now), now)

    def faulted(self) -> None:
        self._metrics.peer_faults.inc()

    def is_serving(self, transfer_id: str, incarnation: str) -> bool:
        stream = self._streams.get(transfer_id)
        return stream is not None and incarnation in stream.attempts.sides

    def time_passed(self) -> None:
        self._gate.look()
        self._apply_to_all(TimePassed())
        self._empty_draining()
