"""Whatever workers, clients and clocks do to a request, it has one honest end and nothing stays dispatched."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.router_harness import ListPlacer, make_attempts

from disagg.router.attempt_events import (
    Action,
    Answered,
    ClientGone,
    Emit,
    Event,
    Fail,
    RouterClosing,
    Send,
    Tick,
    WorkerLost,
)
from disagg.router.generation import GenerationEnd, TokenChunk
from disagg.transceiver.messages.router import (
    CancelRequest,
    Dispatch,
    Finished,
    PrefillLocally,
    RequestFailed,
    Retarget,
    Tokens,
    TransferFailed,
)

ID = "t" * 32
WORKERS = ("p0", "p1", "d0", "d1", "b0")
MAX_TOKENS = 4
MAX_EPOCH = 4


def token_id(source: str, epoch: int, index: int) -> int:
    """Says where a token came from, so that the client's stream shows who was believed."""
    return WORKERS.index(source) * 1000 + epoch * 100 + index


def spoken_tokens(source: str, epoch: int, index: int, count: int) -> Tokens:
    return Tokens(ID, epoch, index, tuple(token_id(source, epoch, i) for i in range(index, index + count)))


epochs = st.integers(1, MAX_EPOCH)
sources = st.sampled_from(WORKERS)
answers = st.one_of(
    st.builds(
        lambda s, e, i, n: Answered(s, spoken_tokens(s, e, i, n)),
        sources,
        epochs,
        st.integers(0, MAX_TOKENS),
        st.integers(0, 2),
    ),
    st.builds(lambda s, e, i: Answered(s, Finished(ID, e, i, "stop")), sources, epochs, st.integers(0, MAX_TOKENS)),
    st.builds(
        lambda s, e, c: Answered(s, RequestFailed(ID, e, c, "x")), sources, epochs, st.sampled_from([400, 500, 503])
    ),
    st.builds(lambda s, e: Answered(s, TransferFailed(ID, e, "digest")), sources, epochs),
)
losses = st.builds(WorkerLost, sources, st.just("killed"))
rare = st.sampled_from([ClientGone(), RouterClosing(), Tick()])
steps = st.lists(st.tuples(st.one_of(answers, answers, losses, rare), st.floats(0, 2)), max_size=40)


class Model:
    """An oracle that knows no rule of the machine: it reads the actions as the workers and the client would."""

    def __init__(self) -> None:
        self.open_epochs: dict[str, int] = {}
        self.server: tuple[str, int] | None = None
        self.prefill: tuple[str, int] | None = None
        self.received: list[int] = []
        self.num_ends = 0
        self.lost: set[str] = set()

    def see(self, actions: list[Action]) -> None:
        for action in actions:
            assert self.num_ends == 0 or isinstance(action, Send), "something reached the client after its end"
            match action:
                case Send(to, message):
                    self._see_send(to, message)
                case Emit(TokenChunk() as chunk):
                    self._see_tokens(chunk)
                case Emit(GenerationEnd()) | Fail():
                    self.num_ends += 1

    def _see_send(self, to: str, message: object) -> None:
        assert to not in self.lost, "sent to a lost worker"
        match message:
            case CancelRequest(epoch=epoch):
                assert self.open_epochs.pop(to) == epoch
            case Dispatch(epoch=epoch) | Retarget(epoch=epoch) | PrefillLocally(epoch=epoch):
                assert self.num_ends == 0
                assert not self.received, "a retry after the first token"
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
    """A server that finishes is done, and so is its prefill worker, whose KV it acknowledged before; not the reverse."""
    if isinstance(event, Answered) and isinstance(event.message, Finished) and not was_over:
        if model.server is not None and event.source == model.server[0]:
            model.open_epochs.clear()
        model.open_epochs.pop(event.source, None)
    assert not model.open_epochs, f"still dispatched after the end: {model.open_epochs}"


@settings(max_examples=400, deadline=None)
@given(
    steps=steps,
    shape=st.sampled_from([(2, 2, 0), (1, 1, 0), (2, 1, 1), (0, 0, 1), (1, 2, 1)]),
    max_attempts=st.integers(1, MAX_EPOCH),
    max_tokens=st.sampled_from([1, MAX_TOKENS]),
)
def test_every_schedule_has_one_end_and_leaves_nothing_dispatched(
    steps: list[tuple[Event, float]], shape: tuple[int, int, int], max_attempts: int, max_tokens: int
) -> None:
    placer = ListPlacer(WORKERS[0 : shape[0]], WORKERS[2 : 2 + shape[1]], WORKERS[4 : 4 + shape[2]])
    attempts = make_attempts(placer, max_attempts=max_attempts, max_tokens=max_tokens, timeout_s=30.0)
    model, now = Model(), 0.0
    model.see(attempts.start(now))
    for event, pause in [*steps, (Tick(), 60.0)]:
        now += pause
        if isinstance(event, WorkerLost):
            placer.lose(event.incarnation)
            model.lose(event.incarnation)
        was_over = attempts.is_over
        model.see(attempts.handle(event, now))
        attempts.check_invariants()
        if attempts.is_over:
            expect_closed(model, event, was_over)
    assert attempts.is_over, "the deadline passed"
    client_left = attempts.record.state == "cancelled"
    assert model.num_ends == (0 if client_left else 1)
    assert attempts.record.num_tokens == len(model.received)


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
