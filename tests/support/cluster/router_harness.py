"""Values for router tests: registrations, leases, and a placer that answers from a list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from disagg.router.attempt import RoutedRequest
from disagg.router.charges import WorkerNews
from disagg.router.choose import Placement, Unplaceable
from disagg.router.generation import GenerationRequest
from disagg.transceiver.wire.messages.router import Lease, LinkStatus, PeerTarget, Register
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity, Sampling

IDENTITY = Identity(
    protocol_major=1,
    model_fingerprint="f" * 32,
    attention="full",
    compute_dtype="float32",
    max_model_len=512,
    hash_key_id="k" * 16,
)

GEOMETRY = Geometry(
    block_size=16,
    kv_dtype="float32",
    groups=(GroupSemantics(None, 0, 2, 16, (0,)), GroupSemantics(64, 0, 2, 16, (1, 2, 3))),
    slot_nbytes=(4096, 12288),
)


def make_register(
    worker_id: str,
    role: str,
    *,
    incarnation: str | None = None,
    identity: Identity = IDENTITY,
    geometry: Geometry = GEOMETRY,
    planes: tuple[str, ...] = ("shm", "zmq"),
    sends: tuple[str, ...] | None = None,
    receives: tuple[str, ...] | None = None,
) -> Register:
    """A registration whose incarnation defaults to its name. It names no purposes unless told to."""
    return Register(
        incarnation=incarnation or worker_id,
        worker_id=worker_id,
        role=role,
        identity=identity,
        geometry=geometry,
        planes=planes,
        peer_endpoint=f"tcp://127.0.0.1:1/{worker_id}",
        pid=4711,
        host="testhost",
        device="cpu",
        num_slots=(64, 32),
        sends=sends,
        receives=receives,
    )


def make_link(incarnation: str, state: str = "ready") -> LinkStatus:
    return LinkStatus(incarnation, incarnation, "shm", state, 3.5)


def make_lease(incarnation: str, *, links: Collection[str] = (), state: str = "ready", num_running: int = 0) -> Lease:
    """A lease whose links to the named peers are ready."""
    return Lease(
        incarnation,
        "router",
        state=state,
        num_running=num_running,
        blocks_used=(3, 1),
        blocks_free=(59, 29),
        links=tuple(make_link(peer) for peer in links),
    )


def make_request(
    max_tokens: int = 4, request_id: str = "req-1", num_prompt_tokens: int = 5, **sampling: Any
) -> GenerationRequest:
    chosen = Sampling(max_tokens=max_tokens, seed=7, **sampling)
    return GenerationRequest(request_id, tuple(range(num_prompt_tokens)), chosen)


def target(name: str) -> PeerTarget:
    """The target of a worker whose incarnation is its name."""
    return PeerTarget(name, name, f"tcp://127.0.0.1:1/{name}")


class ListPlacer:
    """Places on the first worker named that is up and not excluded."""

    def __init__(
        self, prefills: Collection[str] = (), decodes: Collection[str] = (), boths: Collection[str] = ()
    ) -> None:
        self.prefills, self.decodes, self.boths = list(prefills), list(decodes), list(boths)
        self.old: set[str] = set()
        """Those that cannot go on with what was begun elsewhere."""

    def lose(self, name: str) -> None:
        for names in (self.prefills, self.decodes, self.boths):
            if name in names:
                names.remove(name)

    def place(self, max_tokens: int, exclude: frozenset[str] = frozenset()) -> Placement | Unplaceable:
        prefills, decodes, boths = (
            [name for name in names if name not in exclude] for names in (self.prefills, self.decodes, self.boths)
        )
        if max_tokens == 1 and prefills:
            return Placement(target(prefills[0]))
        if max_tokens > 1 and prefills and decodes:
            return Placement(target(decodes[0]), target(prefills[0]))
        return Placement(target(boths[0])) if boths else Unplaceable("nobody is up", 2.0)

    def alone(self, exclude: frozenset[str]) -> Placement | Unplaceable:
        names = [name for name in (*self.decodes, *self.boths) if name not in exclude]
        return Placement(target(names[0])) if names else Unplaceable("nobody is up", 2.0)

    def unfit(self, kv: object) -> frozenset[str]:
        return frozenset(self.old)

    def prefill_for(self, decode: str, exclude: frozenset[str]) -> PeerTarget | None:
        names = [name for name in self.prefills if name not in exclude]
        return target(names[0]) if decode in self.decodes and names else None


def spelt(output: Sequence[int]) -> str:
    return "".join(f",{token_id}" for token_id in output)


def make_attempts(
    placer: ListPlacer,
    *,
    max_tokens: int = 4,
    max_attempts: int = 3,
    timeout_s: float = 60.0,
    news: WorkerNews | None = None,
    max_continuations: int = 8,
    **sampling: Any,
) -> RoutedRequest:
    """A request received at time 0 whose tickets spell what they admit."""
    return RoutedRequest(
        make_request(max_tokens, **sampling),
        "t" * 32,
        lambda: placer,
        lambda epoch, prefill, decode, ttl_s, output: f"{epoch}:{prefill}>{decode}:{ttl_s:g}{spelt(output)}".encode(),
        max_attempts=max_attempts,
        max_continuations=max_continuations,
        timeout_s=timeout_s,
        now=0.0,
        news=news,
    )
