"""Messages between the router and a worker; same codec as between workers (protocol.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from disagg.transceiver.wire.messages.values import (
    Geometry,
    GroupBytes,
    Identity,
    MetricSample,
    Sampling,
    StageTimes,
    TokenLogprobs,
    UnitName,
)
from disagg.transceiver.wire.schema import PackedInts


@dataclass(frozen=True, slots=True)
class Register:
    """A worker offers itself. `role` is `prefill`, `decode` or `both`; `peer_endpoint` is where peers say HELLO."""

    incarnation: str
    worker_id: str
    role: str
    identity: Identity
    geometry: Geometry
    planes: tuple[str, ...]
    peer_endpoint: str
    pid: int
    host: str
    device: str
    num_slots: tuple[int, ...]
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Registered:
    """The router accepts; from here the lease runs. `pulse_port`: where it hears pulses, on its host; 0 = nowhere."""

    router_incarnation: str
    incarnation: str
    pulse_port: int = 0


@dataclass(frozen=True, slots=True)
class PeerTarget:
    """The other end of a transfer, or a prefill worker that a decode worker should connect to ahead of any request.

    `geometry`: the peer's; None = as the reader's. Both ends plan in the units that it makes.
    """

    incarnation: str
    worker_id: str
    endpoint: str
    geometry: Geometry | None = None


@dataclass(frozen=True, slots=True)
class Peers:
    """Router -> decode worker: connect to these too, now (first contact happens before the first request).

    `gone`: incarnations of earlier ones that are no peers any more. A registration's first message names all there are.
    """

    peers: tuple[PeerTarget, ...]
    gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerLink:
    """What a worker says of one peer.

    `state` is `ready`, `suspect`, `lost`, `connecting` or `refused`; `detail` names the field that differs.
    """

    incarnation: str
    worker_id: str
    plane: str
    state: str
    gb_per_s: float
    detail: str = ""


READY = "ready"
DRAINING = "draining"
"""`state` of the leases of a worker that finishes what it has and wants nothing new."""
LEAVING = "leaving"
"""`state` of a worker's last lease: it ends its registration itself, so nobody has to find out."""
YOUNG_TOKENS: Final = 8
"""A request that emitted so many was in as many steps of this worker and ended none: what ends one now is another."""
BROKEN = "broken"
"""As LEAVING, of a worker whose model thread died: `requests` are the new ones of the step that it died in."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """Both ways, every 0.5 s, from a thread of its own: this process lives, however busy its event loop is.

    With `in_step` from the model thread, before each step whose new requests differ from the last one's: attempts in
    the step that have emitted fewer than 8 tokens here. Should the process die now, it was in that step.
    """

    incarnation: str
    in_step: tuple[tuple[str, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """Both ways, every 0.5 s. A worker's carries its figures and live requests, the router's only its incarnation."""

    incarnation: str
    router_incarnation: str
    state: str = READY
    metrics: tuple[MetricSample, ...] = ()
    requests: tuple[tuple[str, int], ...] = ()
    num_running: int = 0
    num_queued: int = 0
    blocks_used: tuple[int, ...] = ()
    blocks_free: tuple[int, ...] = ()
    links: tuple[PeerLink, ...] = ()


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One attempt of one request. `mode`:

    - `serve`: compute the prompt and emit every token here (role both, max_tokens = 1, or no peer);
    - `prefill`: compute the prompt and hand its KV to `peer`;
    - `decode`: receive the KV from `peer`, then emit tokens.

    `deadline_s` is a duration counted from receipt, so that no two clocks are compared.
    """

    transfer_id: str
    epoch: int
    request_id: str
    mode: str
    prompt: PackedInts
    sampling: Sampling
    deadline_s: float
    peer: PeerTarget | None = None
    ticket: bytes = b""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s < float("inf"):
            raise ValueError(f"deadline_s: {self.deadline_s}, expected a finite duration above 0")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Generated tokens, the first at `index` (0 = the first token of the answer).

    With the first token comes `num_cached_tokens`: tokens of the prompt that were found in a cache and not computed.
    """

    transfer_id: str
    epoch: int
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer ended with the token before `index`. `reason`: `stop` (`stop_token_id` if a token did), `length`."""

    transfer_id: str
    epoch: int
    index: int
    reason: str
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The worker cannot serve this attempt. `status` is the HTTP status it deserves: 400, 500, or 503 (retry)."""

    transfer_id: str
    epoch: int
    status: int
    message: str


@dataclass(frozen=True, slots=True)
class TransferFailed:
    """Decode -> router: this epoch's KV did not arrive whole. The router owns what happens next."""

    transfer_id: str
    epoch: int
    reason: str
    units: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class Retarget:
    """Router -> decode: fetch from another prefill worker under a new epoch."""

    transfer_id: str
    epoch: int
    peer: PeerTarget
    ticket: bytes


@dataclass(frozen=True, slots=True)
class PrefillLocally:
    """Router -> decode: give the transfer up and compute the prompt here under a new epoch."""

    transfer_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Router -> worker: stop every epoch of this request up to `epoch` and free its blocks."""

    transfer_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class TransferReport:
    """A worker's own record of an attempt, for `/requests/{id}`: times, and what was moved per layer group."""

    transfer_id: str
    epoch: int
    worker_id: str
    plane: str
    groups: tuple[GroupBytes, ...]
    times: StageTimes
    num_operations: int = 0


RouterMessage = (
    Register
    | Registered
    | Pulse
    | Peers
    | Lease
    | Dispatch
    | Tokens
    | Finished
    | RequestFailed
    | TransferFailed
    | Retarget
    | PrefillLocally
    | CancelRequest
    | TransferReport
)
