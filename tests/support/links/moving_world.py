"""A router's request, two workers with engines, and all that they say to each other, under one clock that a test turns.

Only sockets, threads and tensors of a model are missing: attempts, departures, arrivals, both cores, engines and the
request at the router are the product's own. Each worker draws with seeds of its own, so that every token shows who
chose it: a token that follows another text than the client has is a second text.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from support.cluster.router_harness import ListPlacer, make_request, target
from support.links.lossy_link import LossyLink
from support.model.engine_pair import HASHER, LAYOUT, TestedEngine
from support.model.fake_runner import reference_logits
from support.oracles.cache_oracle import needed_blocks

from disagg.engine.commands import AttemptKey, Command, FrozenEvent
from disagg.engine.sampler import SampleInput, draw, sample
from disagg.engine.sequence import DecodingSequence
from disagg.router.attempt_events import Action, Answered, Emit, Event, Fail, SendOrder, TimePassed, WorkerLost
from disagg.router.generation import GenerationEnd
from disagg.router.moving import MovableRequest
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol import actions as a
from disagg.transceiver.protocol import events as e
from disagg.transceiver.protocol.tombstones import Tombstones, answer_unknown
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.peer import Fetch, Refused, Slice
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity, Sampling
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.ticket import mint_leg, move_claims
from disagg.transceiver.wire.timing import HEARTBEAT_S, LOST_S
from disagg.worker.attempts import Attempts
from disagg.worker.pairing import Pairing

KEYS = ClusterKeys.published()
IDENTITY = Identity(2, "f" * 16, "full", "float32", 200, "k" * 16)
GEOMETRY = Geometry(
    block_size=LAYOUT.block_size,
    kv_dtype="float32",
    groups=tuple(
        GroupSemantics(g.window, g.num_sink_tokens, g.num_kv_heads, g.head_dim, g.layers) for g in LAYOUT.groups
    ),
    slot_nbytes=LAYOUT.slot_nbytes,
)
SOURCE, SINK = "a" * 32, "b" * 32
REQUEST, LEG = "c" * 32, "1"
NAMES = {SOURCE: "source", SINK: "sink"}


def seed_of(worker: str, seed: int) -> int:
    """Of the same request at each worker: no two texts agree for long."""
    return seed + 1000 * (worker == SINK)


class Side:
    """Either side of a worker: its cores, performed at once but for landing, which a test does."""

    def __init__(self, worker: SimWorker, *, sends: bool) -> None:
        self.worker, self.sends = worker, sends
        self.cores: dict[AttemptKey, Transfer] = {}
        self.peer_of: dict[AttemptKey, str] = {}
        self.destinations: dict[AttemptKey, dict[tuple[int, int], int]] = {}
        self.jobs: dict[tuple[AttemptKey, int], Slice] = {}
        self.early: dict[AttemptKey, Fetch] = {}
        self.landed: defaultdict[AttemptKey, list[tuple[int, int]]] = defaultdict(list)
        self.graves = Tombstones()

    # what the worker asks of it

    def start(self, key: AttemptKey, transfer: Transfer, *rest: Any) -> None:
        self.cores[key] = transfer
        if self.sends:
            if (early := self.early.pop(key, None)) is not None:
                self.feed(key, e.MessageArrived(early))
            return
        _peer, slots, event = rest
        self.set_destinations(key, slots)
        self.feed(key, event)

    def set_destinations(self, key: AttemptKey, slots: Any) -> None:
        self.destinations[key] = {(group, o): slot for group, pairs in enumerate(slots) for o, slot in pairs}

    def reach(self, peer: Any, then: Any = None) -> None:
        if then is not None:
            then()

    def plane_of(self, peer: str) -> str:
        return "shm"

    def knows(self, key: AttemptKey) -> bool:
        return key in self.cores or self.graves.knows((key.transfer_id, key.epoch))

    def __contains__(self, key: AttemptKey) -> bool:
        return key in (self.cores if self.sends else self.destinations)

    @property
    def held(self) -> tuple[AttemptKey, ...]:
        return tuple(self.destinations)

    def feed(self, key: AttemptKey, event: e.Event) -> None:
        if (core := self.cores.get(key)) is None:
            return
        try:
            done = core.handle(event, self.worker.world.now)
        except RemoteProtocolError as fault:
            self.worker.world.faults.append(str(fault))
            return
        for action in done:
            self._perform(key, core, action)

    # what it does

    def _perform(self, key: AttemptKey, core: Transfer, action: a.Action) -> None:
        attempts, world = self.worker.attempts, self.worker.world
        match action:
            case a.Send(message):
                world.post(self.worker, self.sends, encode(message))
            case a.AskPin():
                attempts.pin(key)
            case a.ReleaseSource(reason):
                attempts.release_source(key, reason)
            case a.UnregisterUnits(units):
                attempts.unregister(key, units)
            case a.AskExtension():
                attempts.make_room(key, action)
            case a.Land(message):
                self.jobs[key, message.number] = message
            case a.StopLanding():
                for job in [job for job in self.jobs if job[0] == key]:
                    del self.jobs[job]
                self.feed(key, e.LandingStopped())
            case a.Verified():
                self._assert_minimal(key, core)
                attempts.decode(key, action, self._ended(key))
            case a.ReportFailed():
                attempts.transfer_failed(key, action, self._ended(key))
            case a.FreeReservation(reason):
                attempts.free_reservation(key, reason, self._ended(key))
            case a.Forget(until):
                del self.cores[key]
                self.graves.add((key.transfer_id, key.epoch), core.peer, core.last_word, until)
            case _:
                raise AssertionError(action)

    def _assert_minimal(self, key: AttemptKey, core: Any) -> None:
        """What landed is what is read next and was not held, block by block."""
        world = self.worker.world
        boundary = world.prompt_len + len(core._output) - 1
        for number, group in enumerate(LAYOUT.groups):
            needed = needed_blocks(boundary, group.window, group.num_sink_tokens, LAYOUT.block_size)
            wanted = {(number, ordinal) for ordinal in needed if ordinal not in core._held[number]}
            landed = [unit for unit in self.landed[key] if unit[0] == number]
            assert sorted(landed) == sorted(wanted), f"group {number} at {boundary}: {landed}"
        world.num_held += sum(map(len, core._held))

    def _ended(self, key: AttemptKey) -> TransferRecord:
        del self.destinations[key]
        return TransferRecord(plane="shm")

    def hear(self, data: bytes) -> None:
        message: Any = decode(data)
        named = message if isinstance(message, Refused) else message.header
        key = AttemptKey(named.transfer_id, named.epoch)
        if key in self.cores:
            self.feed(key, e.MessageArrived(message))
        elif isinstance(message, Refused):
            return
        elif self.graves.knows((key.transfer_id, key.epoch)):
            self._answer(self.graves.answer(message, 0))
        elif self.sends and isinstance(message, Fetch):
            self.early.setdefault(key, message)
        else:
            self._answer(answer_unknown(message, self.worker.incarnation, 0))

    def _answer(self, message: Any) -> None:
        if message is not None:
            self.worker.world.post(self.worker, self.sends, encode(message))

    def land_one(self) -> bool:
        """Copy the oldest slice that was announced, from where the peer's blocks lie now."""
        if not self.jobs:
            return False
        (key, number), message = next(iter(self.jobs.items()))
        del self.jobs[key, number]
        peer, units = self.worker.world.peer(self.worker), []
        for run in message.units:
            for index in range(run.count):
                unit, slot = (run.group, run.first + index), run.slots[index]
                pool = peer.engine.cache.pools[LAYOUT.pool_of_group[run.group]]
                if not peer.is_alive or int(pool.generations[slot]) != run.generations[index]:
                    self.feed(key, e.LandingFailed(number, "source changed"))
                    return True
                here = self.destinations[key][unit]
                self.worker.engine.cache.group_view(run.group)[here] = peer.engine.cache.group_view(run.group)[slot]
                units.append(e.LandedUnit(*unit, self.worker.digest(run.group, here)))
                self.landed[key].append(unit)
        self.feed(key, e.SliceLanded(number, tuple(units)))
        return True

    def tick(self) -> None:
        for key, core in list(self.cores.items()):
            wakeup = core.next_wakeup()
            if wakeup is not None and wakeup <= self.worker.world.now:
                self.feed(key, e.Tick())


class SimWorker:
    """One worker's attempts over an engine that a test steps."""

    def __init__(self, world: MovingWorld, incarnation: str, num_slots: tuple[int, int]) -> None:
        self.world, self.incarnation, self.is_alive = world, incarnation, True
        hasher = HASHER if world.reuses else None
        self.engine = TestedEngine(role="both", num_slots=num_slots, max_num_seqs=4, hasher=hasher)
        self.engine._draw = self._draw
        self.events: deque[Any] = deque()
        self.orders: deque[Any] = deque()
        self.words: deque[Any] = deque()
        metrics: Any = type("Metrics", (), {"__getattr__": lambda self, name: lambda *given: None})()
        node = Node(incarnation, NAMES[incarnation], IDENTITY, GEOMETRY, KEYS)
        self.attempts = Attempts(
            self.submit,
            self.words.append,
            lambda dispatch: Pairing(node, LAYOUT, {"shm": False}, dispatch),
            metrics,
            fetch_wait_s=30.0,
        )
        self.sending, self.receiving = Side(self, sends=True), Side(self, sends=False)
        self.attempts.sending, self.attempts.receiving = self.sending, self.receiving  # type: ignore[assignment]

    def _draw(self, logits: Any, inputs: Any) -> Any:
        own = [
            replace(i, sampling=replace(i.sampling, seed=seed_of(self.incarnation, i.sampling.seed))) for i in inputs
        ]
        return draw(logits, own)

    def submit(self, command: Command) -> None:
        self.events.extend(self.engine.handle(command))

    def digest(self, group: int, slot: int) -> int:
        data = self.engine.cache.group_view(group)[slot].contiguous().numpy().tobytes()
        return int.from_bytes(blake2b(data, digest_size=8).digest())

    def step(self) -> None:
        if self.engine.has_work:
            self.events.extend(self.engine.step())

    def take_event(self) -> bool:
        if not self.events:
            return False
        event = self.events.popleft()
        if not isinstance(event, FrozenEvent):
            self.attempts.take_event(event)
        elif (leg := self.attempts.froze(event)) is not None:
            units = (self._hashed(unit) for unit in event.units)
            self.sending.feed(leg, e.UnitsFinal(0, tuple(units)))
        return True

    def _hashed(self, unit: Any) -> HashedUnit:
        named = unit.group, unit.ordinal, unit.pool, unit.slot, unit.generation
        return HashedUnit(*named, self.digest(unit.group, unit.slot))

    def take_order(self) -> bool:
        if not self.orders:
            return False
        self.attempts.take_message(self.orders.popleft())
        return True

    @property
    def decodes(self) -> bool:
        """Whether it goes on with an answer now."""
        return any(isinstance(s, DecodingSequence) and not s.is_frozen for s in self.engine._scheduler.live.values())

    def assert_empty(self) -> None:
        assert not self.engine.stats().live_keys, self.engine.stats()
        assert self.engine.num_used == 0
        assert not self.attempts.held
        assert not self.receiving.held
        assert not self.attempts._departures._by_leg
        assert not self.attempts._arrivals._by_leg


@dataclass
class MovingWorld:
    """Router, source and sink. Controls say which thing happens next; `run_out` lets all of them go on to the end."""

    sampling: Sampling
    prompt_len: int = 9
    link: LossyLink = field(default_factory=LossyLink)
    sink_slots: tuple[int, int] = (60, 120)
    max_continuations: int = 8
    reuses: bool = False

    def __post_init__(self) -> None:
        self.now = time.monotonic()
        self.began_at = self.now
        self.faults: list[str] = []
        self.flying: list[tuple[float, int, str, bool, bytes]] = []
        self.count = self.num_legs = self.num_held = 0
        self.token_ids: list[int] = []
        self.ends: list[Any] = []
        self.gone: dict[str, float] = {}
        self.is_cut = False
        self.next_beat = self.now
        self.workers = {SOURCE: SimWorker(self, SOURCE, (60, 120)), SINK: SimWorker(self, SINK, self.sink_slots)}
        self.placer = ListPlacer(boths=[SOURCE, SINK])
        plain = make_request(max_tokens=self.sampling.max_tokens, num_prompt_tokens=self.prompt_len)
        self.request = MovableRequest(
            replace(plain, sampling=self.sampling),
            REQUEST,
            lambda: self.placer,
            lambda *given: b"",
            mint_leg=self._mint_leg,
            max_attempts=3,
            timeout_s=600.0,
            now=self.now,
            max_continuations=self.max_continuations,
        )
        self.perform(self.request.start(self.now))

    def _mint_leg(self, leg: str, epoch: int, source: str, sink: str, num_tokens: int, ttl_s: float) -> bytes:
        prompt = self.request.request.prompt
        return mint_leg(KEYS.ticket, move_claims(leg, epoch, REQUEST, source, sink, prompt, num_tokens), ttl_s)

    def peer(self, worker: SimWorker) -> SimWorker:
        return self.workers[SINK if worker.incarnation == SOURCE else SOURCE]

    # --- the router -------------------------------------------------------------------------------------------

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case SendOrder(to, message):
                    if self.workers[to].is_alive:
                        self.workers[to].orders.append(decode(encode(message)))
                case Emit(GenerationEnd() as end):
                    self.ends.append(end)
                case Emit(chunk):
                    assert chunk.index == len(self.token_ids)
                    self.token_ids += chunk.token_ids
                case Fail():
                    self.ends.append(action)
                case _:
                    pass

    def hear(self, worker: SimWorker) -> bool:
        """The worker's next word reaches the router, if it was sent before the worker died."""
        if not worker.words:
            return False
        self.handle(Answered(worker.incarnation, worker.words.popleft()))
        return True

    def handle(self, event: Event) -> None:
        self.perform(self.request.handle(event, self.now))
        self.request.check_invariants()

    def move(self) -> bool:
        """To the worker that has not the answer, if it may be moved."""
        sink = SINK if self.request.server == SOURCE else SOURCE
        if not self.workers[sink].is_alive or not self.request.may_move(self.now, is_pressing=True):
            return False
        self.num_legs += 1
        self.perform(self.request.move(target(sink), f"{self.num_legs:032x}", self.now))
        self.request.check_invariants()
        return True

    # --- the link between the workers ---------------------------------------------------------------------------

    def post(self, worker: SimWorker, sends: bool, data: bytes) -> None:
        """To the other worker's other side."""
        if self.is_cut:
            return
        for at, copy in self.link.carry(data, self.now):
            self.count += 1
            self.flying.append((at, self.count, self.peer(worker).incarnation, not sends, copy))

    def deliver(self) -> bool:
        due = [item for item in self.flying if item[0] <= self.now]
        if not due:
            return False
        item = min(due, key=lambda entry: entry[:2])
        self.flying.remove(item)
        worker = self.workers[item[2]]
        if worker.is_alive:
            try:
                (worker.sending if item[3] else worker.receiving).hear(item[4])
            except RemoteProtocolError as fault:
                self.faults.append(str(fault))
        return True

    def lose_link(self, worker: SimWorker) -> None:
        """The worker gives its peer up: every transfer with it hears so."""
        for side in (worker.sending, worker.receiving):
            for key in list(side.cores):
                side.feed(key, e.PeerGone("reset"))

    def cut(self) -> None:
        """Nothing passes between the workers any more; each finds out by itself."""
        self.is_cut, self.flying = True, []

    def kill(self, incarnation: str) -> None:
        worker = self.workers[incarnation]
        if worker.is_alive:
            worker.is_alive = False
            worker.orders.clear()
            self.placer.lose(incarnation)
            self.gone[incarnation] = self.now
            self.flying = [item for item in self.flying if item[2] != incarnation]

    def find_out(self, incarnation: str) -> None:
        """The router and the other worker notice that one is dead; its last words came before."""
        if self.gone.pop(incarnation, None) is not None:
            while self.hear(self.workers[incarnation]):
                pass
            self.handle(WorkerLost(incarnation, "killed"))
            self.lose_link(self.peer(self.workers[incarnation]))

    # --- time -----------------------------------------------------------------------------------------------------

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        alive = [worker for worker in self.workers.values() if worker.is_alive]
        for worker in alive:
            for side in (worker.sending, worker.receiving):
                side.tick()
        if self.now >= self.next_beat:
            self.next_beat = self.now + HEARTBEAT_S
            for worker in alive:
                worker.attempts.look_at_deadlines()
                self._beat(worker)
        self.handle(TimePassed())

    def _beat(self, worker: SimWorker) -> None:
        """The sink's heartbeats name its transfers; a link without any is lost."""
        peer = self.peer(worker)
        if self.is_cut:
            self.lose_link(worker)
        elif peer.is_alive:
            for key, core in list(worker.receiving.cores.items()):
                if core.wants_lease:
                    peer.sending.feed(key, e.LeaseRenewed())

    def run_out(self) -> None:
        """Everything goes on, in turn, until the request is over and nothing is said any more."""
        for _ in range(4000):
            busy = self.progress()
            if not busy:
                self.pass_time(0.05)
            for incarnation, at in list(self.gone.items()):
                if self.now - at > LOST_S:
                    self.find_out(incarnation)
            quiet = not busy and not any(s.cores for w in self.alive for s in (w.sending, w.receiving))
            if quiet and self.request.is_over and not self.gone:
                return
        raise AssertionError(f"it does not end: {self.request.record}")

    def progress(self) -> bool:
        """One of each thing that can go on without time."""
        done = [self.deliver()]
        for worker in self.alive:
            done += [worker.take_order(), worker.take_event(), worker.receiving.land_one(), self.hear(worker)]
            if worker.engine.has_work:
                worker.step()
                done.append(True)
        return any(done)

    @property
    def alive(self) -> list[SimWorker]:
        return [worker for worker in self.workers.values() if worker.is_alive]

    # --- what must hold -------------------------------------------------------------------------------------------

    def assert_one_text(self) -> None:
        """Every token is what one of the workers draws behind the tokens that the client has."""
        prompt = self.request.request.prompt
        for index, token_id in enumerate(self.token_ids):
            legal = {self._next(worker, prompt, self.token_ids[:index]) for worker in self.workers}
            assert token_id in legal, f"token {index} follows another text: {self.token_ids}"

    def _next(self, worker: str, prompt: Any, output: list[int]) -> int:
        tokens = [*prompt, *output]
        sampling = replace(self.sampling, seed=seed_of(worker, self.sampling.seed))
        given = SampleInput(sampling, len(tokens), prompt, output)
        return sample(reference_logits(LAYOUT, tokens)[None], [given])[0].token_id

    def assert_whole(self) -> None:
        """It ended as it should, with every token once, and no worker that lives holds anything."""
        self.assert_one_text()
        for worker in self.alive:
            worker.assert_empty()
        assert len(self.ends) == 1, self.ends
