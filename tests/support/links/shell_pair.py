"""A router, a prefill and a decode worker in one process: the real shells over real sockets, with proxies between.

Engines are real too, with a runner whose logits are a hash of the KV it reads: a wrong block shows as other tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from support.event_loop import PATIENCE_S, until
from support.faults.gates import EventGate, LandingGate
from support.faults.wrong import Wrong, never_late
from support.links.message_proxy import MessageProxy
from support.model.engine_pair import LAYOUT, ROOM, TestedEngine, greedy, prompt_of
from support.model.fake_runner import reference_tokens

from disagg.cache.identity import BlockHasher
from disagg.cache.layout import CacheLayout
from disagg.config.settings import WorkerSettings
from disagg.engine.commands import AttemptKey, ReservedEvent, UnitsFinalEvent
from disagg.router.generation import GenerationEnd, GenerationError, GenerationRequest
from disagg.router.router import Router, RouterOptions
from disagg.transceiver.peers.landing_threads import LandingThreads
from disagg.transceiver.planes import probe
from disagg.transceiver.planes.base import SourcePlane
from disagg.transceiver.planes.inproc import InprocHub, InprocLandingPlane, InprocSourcePlane
from disagg.transceiver.protocol.events import CancelAsked
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.messages.values import Identity
from disagg.worker import main, registration
from disagg.worker.attempts import Attempts
from disagg.worker.model_thread import ModelThread
from disagg.worker.parts import EngineParts, WorkerParts
from disagg.worker.registration import Registration

KEYS = ClusterKeys.published()
IDENTITY = Identity(1, "f" * 32, "pretended", "float32", 200, KEYS.hash_key_id)
PROMPT_LEN = 22
STEP_TOKENS = 8
"""Three chunks, so units become final three times."""
MAX_TOKENS = 3
REPLY_S = 5.0
"""Within this a client has an answer or an error."""
LEAKED_S = 30.0
"""Three times a lease, which is the last thing that could still end what is held: it is held for good."""


def patched_timing(patch: pytest.MonkeyPatch, scale: float) -> None:
    """Every constant of time in the protocol's modules times `scale`."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(("disagg.transceiver", "disagg.router", "disagg.worker")):
            continue
        for key, value in list(vars(module).items()):
            if key.isupper() and key.endswith("_S") and isinstance(value, int | float):
                patch.setattr(module, key, value * scale)
            elif key.isupper() and key.endswith("_MS") and isinstance(value, int):
                patch.setattr(module, key, max(1, int(value * scale)))


def patched_shells(patch: pytest.MonkeyPatch, plane: str) -> None:
    """Registrations of this process report to their `ShellWorker`; `inproc` becomes a plane that workers can serve."""
    patch.setattr(main, "Registration", ShellRegistration)
    patch.setattr(registration, "Attempts", JournalledAttempts)
    if plane == "inproc":
        hub = InprocHub()
        patch.setattr(registration, "source_planes", lambda *a, **k: {"inproc": InprocSourcePlane(hub)})
        patch.setattr(registration, "landing_planes", lambda *a, **k: {"inproc": lambda: InprocLandingPlane(hub)})


class JournalledAttempts(Attempts):
    """Counts verdicts and releases per attempt, and compares landed bytes with the sender's when one is verified."""

    shell: ShellWorker

    def release_source(self, key: AttemptKey, reason: str) -> None:
        self.shell.count_once("release", self.shell.releases, key)
        super().release_source(key, reason)

    def decode(self, key: AttemptKey, verified: Any, record: Any) -> None:
        self.shell.count_once("verdict", self.shell.verdicts, key)
        self.shell.compare(key)
        super().decode(key, verified, record)

    def transfer_failed(self, key: AttemptKey, failure: Any, record: Any) -> None:
        self.shell.count_once("verdict", self.shell.verdicts, key)
        self.shell.failures.append(failure.reason)
        super().transfer_failed(key, failure, record)

    def free_reservation(self, key: AttemptKey, reason: str, record: Any) -> None:
        self.shell.count_once("verdict", self.shell.verdicts, key)
        super().free_reservation(key, reason, record)


class ShellRegistration(Registration):
    """A registration whose peers meet it through proxies."""

    def __init__(self, parts: WorkerParts, node: Any) -> None:
        super().__init__(parts, node)
        self.shell: ShellWorker = parts.shell  # type: ignore[attr-defined]
        self.shell.registration = self

    @property
    def node(self) -> Any:
        return self._node

    async def _listen(self, stack: contextlib.AsyncExitStack) -> tuple[ControlServer | None, dict[str, SourcePlane]]:
        server, planes = await super()._listen(stack)
        self.source_planes = planes
        if not self.shell.is_proxied:
            return server, planes
        if server is not None:
            self.shell.control.target = server.endpoint
        for name in {"zmq", "tcp", "ucx"} & planes.keys():
            plane: Any = planes[name]
            self.shell.data.target, plane._address = plane._address, self.shell.data.endpoint
        return server, planes

    def _make_register(self, server: ControlServer | None) -> Register:
        register = super()._make_register(server)
        is_proxied = server is not None and self.shell.is_proxied
        return replace(register, peer_endpoint=self.shell.control.endpoint) if is_proxied else register

    def _attach_sides(self, server: ControlServer | None, planes: dict[str, SourcePlane]) -> None:
        self._attempts.shell = self.shell
        super()._attach_sides(server, planes)
        if (sending := self._attempts.sending) is not None:
            feed = sending.feed
            sending.feed = lambda key, event: feed(key, self.shell.note(event))  # type: ignore[method-assign]

    @property
    def attempts(self) -> Attempts:
        return self._attempts


async def let_go(leftovers: Callable[[], dict[str, Any]], within_s: float = REPLY_S) -> None:
    """Until nothing is held. Fails after `within_s`: with `Wrong` for what is held for good, else as late."""
    began_at = time.monotonic()
    while left := leftovers():
        if time.monotonic() - began_at > LEAKED_S:
            raise Wrong(f"left behind: {left}")
        await asyncio.sleep(0.002)
    passed_s = time.monotonic() - began_at
    assert passed_s < within_s, f"let go after {passed_s:.1f} s only"


@dataclass
class Links:
    """The proxies of a trio: they outlive the processes behind them, as addresses do."""

    control: MessageProxy
    data: MessageProxy
    router: dict[str, MessageProxy]

    @property
    def all(self) -> list[MessageProxy]:
        return [self.control, self.data, *self.router.values()]


class ShellWorker:
    """One worker "process": an engine, its threads, and registrations at the router for as long as it lives."""

    def __init__(
        self,
        role: str,
        links: Links,
        plane: str,
        name: str = "",
        layout: CacheLayout = LAYOUT,
        hasher: BlockHasher | None = None,
        num_slots: Sequence[int] = ROOM,
    ) -> None:
        self.role, self._links, self.name = role, links, name or role
        self.sources: tuple[ShellWorker, ...] = ()
        """Of a decode worker: those whose KV it may receive."""
        self.control, self.data = links.control, links.data
        self.is_proxied = role == "prefill"  # the proxies are those of the worker that is fetched from
        self.releases, self.verdicts = Counter[AttemptKey](), Counter[AttemptKey]()
        self.failures, self.cancels = list[str](), list[str]()
        self.wrong: list[str] = []  # the trio's
        self.deaths: list[BaseException] = []
        self.registration: ShellRegistration
        self.events, self.landing = EventGate(), LandingGate()
        self.engine = TestedEngine(
            layout=layout, role=role, max_num_batched_tokens=STEP_TOKENS, hasher=hasher, num_slots=num_slots
        )
        settings = WorkerSettings(
            worker_id=self.name,
            router=links.router[role].endpoint,
            insecure=True,
            planes=("shm",) if plane == "inproc" else (plane,),
        )
        made = EngineParts(role, settings, IDENTITY, layout, self.engine.cache, self.engine, {})
        self.parts = WorkerParts(made, KEYS, lambda ready: None)
        self.parts.shell = self  # type: ignore[attr-defined]
        self.parts.landing = LandingThreads(
            self.parts.regions, [group.dtype for group in layout.groups], after_copy=self.landing
        )
        self.events.put = self.parts.take_events

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.parts.model = ModelThread(self.engine, loop, self.events.take, self.deaths.append)
        self.parts.model.start()
        self._stopped: asyncio.Future[int] = loop.create_future()
        serving = main._register_until_drained(self.parts, self._stopped)
        self._serving = asyncio.create_task(serving, name=f"worker {self.role}")

    async def close(self) -> None:
        self.landing.open()
        if not self._stopped.done():
            self._stopped.set_result(0)
        self._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving
        await self.parts.close()

    async def kill(self) -> None:
        """To the others it is dead at once: nothing of what it does on its way out reaches anyone."""
        self._links.router[self.role].cut(down=True)
        if self.role == "prefill":
            self._links.data.cut(down=True)
        self._links.control.cut(down=True)
        await self.close()

    def revive_links(self) -> None:
        self._links.router[self.role].is_down = False
        self._links.control.is_down = self._links.data.is_down = False

    @property
    def is_running(self) -> bool:
        return not self._serving.done()

    @property
    def attempts(self) -> Attempts:
        return self.registration.attempts

    @property
    def sending(self) -> Any:
        return self.attempts.sending

    @property
    def receiving(self) -> Any:
        return self.attempts.receiving

    def core(self, key: AttemptKey) -> Any:
        """The live core of an attempt, or None."""
        side = self.sending if self.role == "prefill" else self.receiving
        return side._transfers._live.get(key)

    def is_buried(self, key: AttemptKey) -> bool:
        side = self.sending if self.role == "prefill" else self.receiving
        return bool(side._transfers.is_buried(key))

    @property
    def plane(self) -> Any:
        """The data plane to the only source, without what reshapes between unequal blocks."""
        (link,) = self.receiving.links
        return getattr(link.plane, "_inner", link.plane)

    def note(self, event: Any) -> Any:
        """Remember why a sender was told to end a transfer."""
        if isinstance(event, CancelAsked):
            self.cancels.append(event.reason)
        return event

    def count_once(self, name: str, counts: Counter[AttemptKey], key: AttemptKey) -> None:
        counts[key] += 1
        if counts[key] > 1:
            self.wrong.append(f"{key}: {name} number {counts[key]} at {self.name}")

    def compare(self, key: AttemptKey) -> None:
        """Bytes in the reserved slots against those of the sender's blocks when they became final, token by token."""
        source = next(source for source in self.sources if source.engine.of(key, UnitsFinalEvent))
        (reserved,) = self.engine.of(key, ReservedEvent)
        sent = {
            (unit.group, unit.ordinal): source.tokens(unit.group, source.engine.bytes_when_final[unit])
            for event in source.engine.of(key, UnitsFinalEvent)
            for unit in event.units
        }
        size, source_size = (worker.parts.layout.block_size for worker in (self, source))
        for group, pairs in enumerate(reserved.slots):
            for ordinal, slot in pairs:
                here = self.tokens(group, self.engine.cache.group_view(group)[slot].numpy().tobytes())
                for token in range(ordinal * size, (ordinal + 1) * size):
                    block, place = divmod(token, source_size)
                    if (group, block) in sent and not np.array_equal(here[token % size], sent[group, block][place]):
                        self.wrong.append(f"{key}: group {group}, token {token} was verified and is not what was sent")

    def tokens(self, group: int, slot: bytes) -> np.ndarray:
        """`[token, ...]`: a slot's bytes by the tokens they belong to."""
        cut = self.parts.layout.groups[group]
        shape = (len(cut.layers), 2, cut.num_kv_heads, self.parts.layout.block_size, -1)
        return np.moveaxis(np.frombuffer(slot, dtype=np.uint8).reshape(shape), 3, 0)

    def leftovers(self) -> dict[str, Any]:
        """Everything that must be empty when no request is live."""
        left: dict[str, Any] = {
            "slots": self.engine.num_used,
            "live in engine": self.engine.stats().live_keys,
            "landing jobs": tuple(self.parts.landing._jobs),
        }
        attempts = getattr(self.registration, "_attempts", None)
        if attempts is None:  # it is registering anew, and holds no request
            return {name: value for name, value in left.items() if value}
        left |= {"attempts": attempts.keys, "requests": tuple(attempts._requests)}
        if attempts.receiving is not None:
            left["reservations"] = attempts.receiving.held
            for link in attempts.receiving.links:
                plane = getattr(link.plane, "_inner", link.plane)
                left["payloads"] = getattr(plane, "_num_held", 0) or len(getattr(plane, "_landable", ()))
                if (staging := getattr(link.plane, "_staging", None)) is not None:
                    left["rows"] = sum(map(len, (r.slots for r in staging.regions))) - sum(map(len, staging._free))
        if attempts.sending is not None:
            left["early"] = tuple(attempts.sending._early)
            left["planes of attempts"] = tuple(attempts.sending._plane_of)
        return {name: value for name, value in left.items() if value}


@dataclass
class Reply:
    """What the client got: `kind` is `answer`, `error` or `cancelled`."""

    kind: str
    status: int = 200
    num_attempts: int = 0
    message: str = ""
    at: float = 0.0


class ShellTrio:
    """The three participants. Use `start`, then `ask` or `begin`; `close` in the end."""

    def __init__(self, plane: str, scale: float) -> None:
        self.plane, self.scale = plane, scale
        self._serial = 0
        self.wrong: list[str] = []
        """Answers and bytes that are not what they must be, and what was done twice, whoever has died since."""

    async def start(self) -> None:
        delay_s = 0.5 * self.scale  # past the first repeat of whatever is delayed
        self.links = Links(
            MessageProxy(delay_s=delay_s),
            MessageProxy(delay_s=delay_s, is_zmtp=self.plane not in ("tcp", "ucx")),
            {"prefill": MessageProxy(), "decode": MessageProxy()},
        )
        for proxy in self.links.all:
            await proxy.start()
        await self.start_router()
        self.start_worker("prefill")
        self.start_worker("decode")
        await self.ready()

    async def close(self) -> None:
        for proxy in self.links.all:
            proxy.flow()
        await self.decode.close()
        await self.prefill.close()
        await self._router_stack.aclose()
        for proxy in self.links.all:
            await proxy.close()

    # --- participants -----------------------------------------------------------------------------------------

    async def start_router(self) -> None:
        self._router_stack = contextlib.AsyncExitStack()
        opened = Router.open("tcp://127.0.0.1:0", KEYS, self.options)
        self.router = await self._router_stack.enter_async_context(opened)
        for proxy in self.links.router.values():
            proxy.target, proxy.is_down = self.router.endpoint, False

    async def kill_router(self) -> None:
        for proxy in self.links.router.values():
            proxy.cut(down=True)
        await self._router_stack.aclose()

    options = RouterOptions()
    layouts: Mapping[str, CacheLayout] = {}
    """By role, where it is not `LAYOUT`."""

    def start_worker(self, role: str) -> None:
        worker = ShellWorker(role, self.links, self.plane, layout=self.layouts.get(role, LAYOUT))
        worker.wrong = self.wrong
        setattr(self, role, worker)
        if hasattr(self, "decode"):
            self.decode.sources = tuple(w for w in self.workers if w.role == "prefill")
        worker.revive_links()
        worker.start()

    prefill: ShellWorker
    decode: ShellWorker

    @property
    def workers(self) -> tuple[ShellWorker, ...]:
        return self.prefill, self.decode

    def worker(self, role: str) -> ShellWorker:
        return self.prefill if role == "prefill" else self.decode

    async def ready(self) -> None:
        """Until the router has these workers, no others, and knows of their links."""
        await until(self._is_whole, "the router has a linked pair")

    def _is_whole(self) -> bool:
        if not all(hasattr(worker, "registration") for worker in self.workers):
            return False
        incarnations = {worker.registration.node.incarnation for worker in self.workers}
        if {worker.incarnation for worker in self.router.cluster.registry} != incarnations:
            return False
        if not self.router.is_ready() or not hasattr(self.decode.registration, "_attempts"):
            return False
        # The router's view is a lease old: the link itself must be up too.
        sources = [worker.registration.node.incarnation for worker in self.workers if worker.role == "prefill"]
        return all(self.decode.receiving.is_ready(incarnation) for incarnation in sources)

    # --- requests ---------------------------------------------------------------------------------------------

    def request(self, max_tokens: int = MAX_TOKENS) -> GenerationRequest:
        self._serial += 1
        prompt = prompt_of(PROMPT_LEN, self._serial)
        return GenerationRequest(f"request-{self._serial}", prompt, greedy(max_tokens, ignore_eos=True))

    def begin(self, request: GenerationRequest | None = None, *, timeout_s: float = 60.0) -> asyncio.Task[Reply]:
        """A client that reads its answer, or goes away when the task is cancelled."""
        self.router.options = replace(self.router.options, request_timeout_s=timeout_s)
        return asyncio.create_task(self._ask(self.router, request or self.request()), name="client")

    async def ask(self, request: GenerationRequest | None = None) -> Reply:
        async with asyncio.timeout(PATIENCE_S):
            return await self.begin(request)

    async def _ask(self, router: Router, request: GenerationRequest) -> Reply:
        tokens: list[int] = []
        generation = router.generate(request)
        try:
            async for item in generation:
                if not isinstance(item, GenerationEnd):
                    tokens += item.token_ids
        except GenerationError as error:
            return self._reply(router, request, "error", error.status, error.message)
        finally:
            await generation.aclose()
        expected = reference_tokens(LAYOUT, request.prompt, request.sampling)
        if tokens != expected:
            self.wrong.append(f"{request.request_id}: a wrong answer: {tokens}, expected {expected}")
            raise Wrong(self.wrong[-1])
        return self._reply(router, request, "answer")

    def _reply(self, router: Router, request: GenerationRequest, kind: str, status: int = 200, why: str = "") -> Reply:
        record = router.record(request.request_id)
        num_attempts = len(record["attempts"]) if record else 0
        return Reply(kind, status, num_attempts, why, time.monotonic())

    def now(self) -> float:
        """The clock of `Reply.at`."""
        return time.monotonic()

    def newest_key(self, epoch: int = 1) -> AttemptKey:
        """The first attempt of the youngest live request."""
        return AttemptKey(list(self.router._streams)[-1], epoch)

    # --- afterwards -------------------------------------------------------------------------------------------

    def leftovers(self) -> dict[str, Any]:
        return {w.name: left for w in self.workers if (left := w.leftovers())}

    async def settle(self) -> None:
        await let_go(self.leftovers)

    def check(self) -> None:
        """What is true at any time: nobody died, at most one release and one verdict per attempt, no wrong bytes."""
        for worker in self.workers:
            assert worker.is_running
            with never_late():
                assert not worker.deaths, worker.deaths
        with never_late():
            assert not self.wrong, self.wrong
            self.router.check_invariants()


@contextlib.contextmanager
def trio_context(plane: str, scale: float) -> Iterator[None]:
    """The patches a trio needs while it lives."""
    with pytest.MonkeyPatch.context() as patch:
        patched_timing(patch, scale)
        patched_shells(patch, plane)
        patch.setattr(probe, "SLICE_NBYTES", 1 << 12)  # slots are tiny here: 2 MiB would be thousands of units
        yield
