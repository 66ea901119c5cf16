"""Whatever workers, clients and clocks do to a request, it has one honest end and nothing stays dispatched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster.router_harness import ListPlacer, make_attempts

from disagg.router.answers import AnswersSent
from disagg.router.attempt import RoutedRequest
from disagg.router.attempt_events import (
    Action,
    Answered,
    AnswerMessage,
    ClientGone,
    Emit,
    Event,
    Fail,
    RouterClosing,
    SendOrder,
    TimePassed,
    WorkerLost,
)
from disagg.router.charges import MAX_CHARGES
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.transceiver.wire.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    PrefillLocally,
    RequestFailed,
    Retarget,
    TransferFailure,
)
from disagg.transceiver.wire.messages.tokens import ChoiceOutput, Tokens

ID = "t" * 32
WORKERS = ("p0", "p1", "d0", "d1", "b0")
MAX_TOKENS = 4
MAX_EPOCH = 4


def token_id(source: str, epoch: int, index: int) -> int:
    """Says where a token came from, so that the client's stream shows who was believed."""
    return WORKERS.index(source) * 1000 + epoch * 100 + index


def spoken_tokens(source: str, epoch: int, index: int, count: int) -> Tokens:
    return Tokens(ID, epoch, index, tuple(token_id(source, epoch, i) for i in range(index, index + count)))


@dataclass(frozen=True)
class Said:
    """What a worker says, relative to what the request expects next: mostly right, sometimes stale, early or alien."""

    kind: str
    who: str
    epochs_old: int
    index_offset: int
    count: int
    status: int

    def events(self, attempts: RoutedRequest) -> list[Answered]:
        source, epoch = self._source(attempts), max(1, attempts.epoch - self.epochs_old)
        index = max(0, attempts.num_tokens + self.index_offset)
        match self.kind:
            case "tokens":
                messages: list[AnswerMessage] = [spoken_tokens(source, epoch, index, self.count)]
            case "finished":
                messages = [Finished(ID, epoch, index, "stop")]
            case "last token":
                messages = [spoken_tokens(source, epoch, index, 1), Finished(ID, epoch, index + 1, "stop")]
            case "failed":
                messages = [RequestFailed(ID, epoch, self.status, "x")]
            case _:
                messages = [TransferFailure(ID, epoch, "digest")]
        return [Answered(source, message) for message in messages]

    def _source(self, attempts: RoutedRequest) -> str:
        placement = attempts.placement
        if placement is None or self.who in WORKERS:
            return self.who if self.who in WORKERS else "d0"
        chosen = placement.prefill if self.who == "prefill" and placement.prefill else placement.server
        return chosen.incarnation


said = st.builds(
    Said,
    kind=st.sampled_from(["transfer failed", "last token", "tokens", "tokens", "finished", "failed"]),
    who=st.sampled_from(["server", "server", "server", "prefill", "prefill", *WORKERS]),
    epochs_old=st.sampled_from([0, 0, 1, 2]),
    index_offset=st.sampled_from([0, 0, 0, 0, -1, -2, 1]),
    count=st.integers(0, 2),
    status=st.sampled_from([503, 503, 500, 400]),
)
in_steps = st.sampled_from([{}, {ID: 1}])
losses = st.builds(WorkerLost, st.sampled_from(WORKERS), st.just("killed"), in_steps)
rare = st.sampled_from([ClientGone(), RouterClosing(), TimePassed()])
steps = st.lists(st.tuples(st.one_of(said, said, said, said, losses, rare), st.floats(0, 4)), max_size=25)


@dataclass
class Told:
    """What is known of the workers: fixed for a schedule, except that a lost one gives no sign."""

    computing: frozenset[str]
    silent: frozenset[str]
    others: frozenset[str]
    lost: set[str]
    now: float = 0.0

    def is_in_step(self, incarnation: str, transfer_id: str) -> bool:
        return incarnation in self.computing

    def sign_at(self, incarnation: str) -> float | None:
        return None if incarnation in self.lost else 0.0 if incarnation in self.silent else self.now

    def taken(self, transfer_id: str) -> frozenset[str]:
        return self.others


some = st.frozensets(st.sampled_from(WORKERS), max_size=3)


class Model:
    """An oracle that knows no rule of the machine: it reads the actions as the workers and the client would."""

    def __init__(self) -> None:
        self.open_epochs: dict[str, int] = {}
        self.server: tuple[str, int] | None = None
        self.prefill: tuple[str, int] | None = None
        self.received: list[int] = []
        self.num_ends = 0
        self.num_placed = 0
        self.lost: set[str] = set()

    def see(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.num_ends == 0 or isinstance(action, SendOrder), "something reached the client after its end"
            match action:
                case SendOrder(to, message):
                    self._see_send(to, message)
                case Emit(TokenChunk() as chunk):
                    self._see_tokens(chunk)
                case Emit(GenerationEnd()) | Fail():
                    self.num_ends += 1
        assert len(set(self.open_epochs.values())) <= 1, f"an old attempt still runs: {self.open_epochs}"

    def _see_send(self, to: str, message: object) -> None:
        assert to not in self.lost, "sent to a lost worker"
        match message:
            case CancelRequest(epoch=epoch):
                assert self.open_epochs.pop(to) == epoch
            case Dispatch(epoch=epoch) | Retarget(epoch=epoch) | PrefillLocally(epoch=epoch):
                assert self.num_ends == 0
                if isinstance(message, Dispatch):
                    given = [list(answer.token_ids) for answer in message.output]
                    assert given == ([self.received] if self.received else []), "it goes on with other tokens"
                    self.num_placed += message.mode != "prefill"
                assert epoch > self.open_epochs.get(to, 0), "an epoch was used twice at one worker"
                self.open_epochs[to] = epoch
                if isinstance(message, Dispatch) and message.mode == "prefill":
                    self.prefill = (to, epoch)
                else:
                    self.server = (to, epoch)

    def _see_tokens(self, chunk: TokenChunk) -> None:
        assert chunk.index == len(self.received), "a token was repeated or skipped"
        believed = [who for who in (self.server, self.prefill) if who is not None]
        ids = list(chunk.token_ids)
        spoken = [[token_id(source, epoch, chunk.index + i) for i in range(len(ids))] for source, epoch in believed]
        assert ids in spoken, "a token of another worker or an old epoch"
        self.received += ids

    def lose(self, incarnation: str) -> None:
        self.lost.add(incarnation)
        self.open_epochs.pop(incarnation, None)


def expect_closed(model: Model, event: Event, was_over: bool) -> None:
    """A server that finishes is done, and so is its prefill worker, whose KV it acknowledged; not the reverse."""
    if isinstance(event, Answered) and isinstance(event.message, Finished) and not was_over:
        if model.server is not None and event.source == model.server[0]:
            model.open_epochs.clear()
        model.open_epochs.pop(event.source, None)
    assert not model.open_epochs, f"still dispatched after the end: {model.open_epochs}"


@settings(max_examples=600, deadline=None)
@given(
    steps=steps,
    shape=st.sampled_from([(2, 2, 0), (1, 1, 0), (2, 1, 1), (0, 0, 1), (1, 2, 1)]),
    max_attempts=st.integers(1, MAX_EPOCH),
    max_continuations=st.integers(0, 2),
    max_tokens=st.sampled_from([1, MAX_TOKENS]),
    told=st.builds(Told, computing=some, silent=some, others=some, lost=st.builds(set)),
)
def test_every_schedule_has_one_end_and_leaves_nothing_dispatched(
    steps: list[tuple[Said | Event, float]],
    shape: tuple[int, int, int],
    max_attempts: int,
    max_continuations: int,
    max_tokens: int,
    told: Told,
) -> None:
    placer = ListPlacer(WORKERS[0 : shape[0]], WORKERS[2 : 2 + shape[1]], WORKERS[4 : 4 + shape[2]])
    limits = {"max_attempts": max_attempts, "max_continuations": max_continuations, "max_tokens": max_tokens}
    attempts = make_attempts(placer, timeout_s=30.0, news=told, **limits)
    model, now = Model(), 0.0
    model.see(attempts.start(now))
    for step, pause in [*steps, (TimePassed(), 60.0)]:
        now += pause
        told.now = now
        for event in step.events(attempts) if isinstance(step, Said) else [step]:
            if isinstance(event, WorkerLost):
                placer.lose(event.incarnation)
                model.lose(event.incarnation)
                told.lost.add(event.incarnation)
            was_over, epoch = attempts.is_over, attempts.epoch
            model.see(attempts.handle(event, now))
            attempts.check_invariants()
            assert len(attempts.record.charged_deaths) <= MAX_CHARGES
            if len(attempts.record.charged_deaths) == MAX_CHARGES:
                assert attempts.is_over
                assert attempts.epoch == epoch, "dispatched after two charges"
            if attempts.is_over:
                expect_closed(model, event, was_over)
    assert attempts.is_over, "the deadline passed"
    client_left = attempts.record.state == "cancelled"
    assert model.num_ends == (0 if client_left else 1)
    assert attempts.record.num_tokens == len(model.received)
    assert model.num_placed <= max_attempts + max_continuations


@pytest.mark.parametrize("broken", [lambda ids: ids[:-1], lambda ids: [*ids, ids[-1]], lambda ids: ids[1:]])
def test_a_router_that_drops_or_repeats_a_token_when_an_answer_goes_on_is_noticed(
    broken: Callable[[Sequence[int]], Sequence[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the oracle."""
    honest = AnswersSent.output

    def output(self: AnswersSent) -> tuple[ChoiceOutput, ...]:
        return tuple(ChoiceOutput(one.choice, tuple(broken(list(one.token_ids)))) for one in honest(self))

    monkeypatch.setattr(AnswersSent, "output", output)
    attempts, model = make_attempts(ListPlacer(["p0"], ["d0", "d1"]), max_tokens=30), Model()
    model.see(attempts.start(0.0))
    model.see(attempts.handle(Answered("d0", spoken_tokens("d0", 1, 0, 2)), 1.0))
    with pytest.raises(AssertionError, match="it goes on with other tokens"):
        model.see(attempts.handle(WorkerLost("d0", "killed"), 2.0))


@settings(max_examples=200, deadline=None)
@given(order=st.permutations(range(6)), counts=st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_repeats_in_any_order_behind_the_stream_never_reach_the_client(order: list[int], counts: list[int]) -> None:
    attempts = make_attempts(ListPlacer(["p0"], ["d0"]), max_tokens=30)
    attempts.start(0.0)
    received: list[int] = []
    spoken: list[Tokens] = []
    for repeat, count in zip(order, counts, strict=True):
        spoken.append(spoken_tokens("d0", 1, len(received), count))
        for message in (spoken[-1], spoken[repeat % len(spoken)]):
            for action in attempts.handle(Answered("d0", message), 1.0):
                assert isinstance(action, Emit)
                assert isinstance(action.item, TokenChunk)
                received += action.item.token_ids
    assert received == [token_id("d0", 1, i) for i in range(sum(counts))]
