"""Messages between the router and a worker; same codec as between workers (protocol.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from disagg.transceiver.wire.messages.blocks import AskBlocks, BlockEvents
from disagg.transceiver.wire.messages.legs import Grant as Grant
from disagg.transceiver.wire.messages.legs import PrefixLeg as PrefixLeg
from disagg.transceiver.wire.messages.legs import Resume as Resume
from disagg.transceiver.wire.messages.peer import check_purposes
from disagg.transceiver.wire.messages.prompt_logprobs import PromptLogprobs
from disagg.transceiver.wire.messages.ranges import (
    MAX_ADDRESS_CHARS,
    MAX_GROUPS,
    MAX_INT32,
    MAX_INT64,
    MAX_ITEMS,
    MAX_LEASED,
    MAX_LINKS,
    MAX_NAME_CHARS,
    MAX_NAMED_UNITS,
    MAX_PEERS,
    MAX_PLANES,
    MAX_PORT,
    MAX_PURPOSES,
    MAX_SAMPLES,
    MAX_SECRET_NBYTES,
    MAX_TEXT_CHARS,
    check_attempt,
    check_duration,
    check_finite,
    check_id,
    check_int,
    check_ints,
    check_names,
    check_one_of,
    check_size,
    check_transfers,
    fail,
)
from disagg.transceiver.wire.messages.rates import MeasuredRates
from disagg.transceiver.wire.messages.sampling_limits import MAX_CHOICES
from disagg.transceiver.wire.messages.targets import PeerTarget as PeerTarget
from disagg.transceiver.wire.messages.tokens import TOKENS_WINDOW, ChoiceOutput, StepTokens, TokenCredit, check_output
from disagg.transceiver.wire.messages.values import (
    Geometry,
    GroupBytes,
    Identity,
    MetricSample,
    Sampling,
    StageTimes,
    UnitName,
)
from disagg.transceiver.wire.purposes import HANDOFF, PURPOSES
from disagg.transceiver.wire.schema import PackedInts

MODES: Final = ("serve", "prefill", "decode", "move")


@dataclass(frozen=True, slots=True)
class Register:
    """A worker offers itself. `role` is `prefill`, `decode` or `both`; `peer_endpoint` is where peers say HELLO.

    `sends`, `receives`: the purposes of which it is a source and a sink; None = as protocol 2.0, which has handoffs
    alone (see `disagg.transceiver.wire.purposes`). `tells_blocks`: whether ASK_BLOCKS may be said to it.
    """

    incarnation: str
    worker_id: str
    role: str
    identity: Identity
    geometry: Geometry
    planes: Annotated[tuple[str, ...], MAX_PLANES]
    peer_endpoint: str
    pid: int
    host: str
    device: str
    num_slots: Annotated[tuple[int, ...], MAX_GROUPS]
    eos_token_ids: Annotated[tuple[int, ...], MAX_ITEMS] = ()
    sends: Annotated[tuple[str, ...], MAX_PURPOSES] | None = None
    receives: Annotated[tuple[str, ...], MAX_PURPOSES] | None = None
    tells_blocks: bool = False

    def __post_init__(self) -> None:
        check_purposes(self.sends or ())
        check_purposes(self.receives or ())
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("role", self.role, MAX_NAME_CHARS)
        check_size("planes", self.planes, MAX_PLANES)
        check_names("planes", self.planes)
        check_size("peer_endpoint", self.peer_endpoint, MAX_ADDRESS_CHARS)
        check_int("pid", self.pid, 0, MAX_INT32)
        check_size("host", self.host, MAX_NAME_CHARS)
        check_size("device", self.device, MAX_NAME_CHARS)
        check_size("num_slots", self.num_slots, MAX_GROUPS)
        check_ints("num_slots", self.num_slots, 0, MAX_INT32)
        check_size("eos_token_ids", self.eos_token_ids, MAX_ITEMS)
        check_ints("eos_token_ids", self.eos_token_ids, 0, MAX_INT32)


@dataclass(frozen=True, slots=True)
class Registered:
    """The router accepts; from here the lease runs. `pulse_port`: where it hears pulses, on its host; 0 = nowhere.

    `credit`: the first limit of STEP_TOKENS messages; each CREDIT raises it. `metrics_every_s`: leases carry metrics no
    more often.
    """

    router_incarnation: str
    incarnation: str
    pulse_port: int = 0
    credit: int = TOKENS_WINDOW
    metrics_every_s: float = 0.0

    def __post_init__(self) -> None:
        check_finite("metrics_every_s", self.metrics_every_s)
        check_id("router_incarnation", self.router_incarnation)
        check_id("incarnation", self.incarnation)
        check_int("pulse_port", self.pulse_port, 0, MAX_PORT)
        check_int("credit", self.credit, 0, MAX_INT64)


@dataclass(frozen=True, slots=True)
class Peers:
    """Router -> sink: connect to these sources now, before a request names them; `gone` are no peers any more."""

    peers: Annotated[tuple[PeerTarget, ...], MAX_PEERS]
    gone: Annotated[tuple[str, ...], MAX_PEERS] = ()

    def __post_init__(self) -> None:
        check_size("peers", self.peers, MAX_PEERS)
        check_size("gone", self.gone, MAX_PEERS)


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """What a worker says of one peer. `state`: `ready`, `suspect`, `lost`, `connecting` or `refused`; `detail` names
    the field that differs. Of the last transfers: `gb_per_s`, before the first that of a probe; `latency_s`, from their
    last byte to their end.
    """

    incarnation: str
    worker_id: str
    plane: str
    state: str
    gb_per_s: float
    detail: str = ""
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("plane", self.plane, MAX_ADDRESS_CHARS)
        check_size("state", self.state, MAX_NAME_CHARS)
        check_finite("gb_per_s", self.gb_per_s)
        check_finite("latency_s", self.latency_s)
        check_size("detail", self.detail, MAX_TEXT_CHARS)


READY = "ready"
DRAINING = "draining"
"""`state` of the leases of a worker that finishes what it has and wants nothing new."""
LEAVING = "leaving"
"""`state` of a worker's last lease: it ends its registration itself, so no timeout has to find out."""
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
    in_step: Annotated[tuple[tuple[str, int], ...], MAX_LEASED] | None = None

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        if self.in_step is not None:
            check_transfers("in_step", self.in_step, MAX_LEASED)


@dataclass(frozen=True, slots=True)
class Lease:
    """Both ways, every 0.5 s. A worker's carries its figures and live requests, the router's only its incarnation.

    `metrics`, `links` and `rates` None: as in the last lease that had them. They are most of it, and seldom change.
    `pressed`: answers that this worker will preempt next for want of blocks, each told once in a block of it.
    """

    incarnation: str
    router_incarnation: str
    state: str = READY
    metrics: Annotated[tuple[MetricSample, ...], MAX_SAMPLES] | None = None
    requests: Annotated[tuple[tuple[str, int], ...], MAX_LEASED] = ()
    num_running: int = 0
    num_queued: int = 0
    blocks_used: Annotated[tuple[int, ...], MAX_GROUPS] = ()
    blocks_free: Annotated[tuple[int, ...], MAX_GROUPS] = ()
    links: Annotated[tuple[LinkStatus, ...], MAX_LINKS] | None = None
    rates: MeasuredRates | None = None
    pressed: Annotated[tuple[tuple[str, int], ...], MAX_LEASED] = ()

    def __post_init__(self) -> None:
        check_transfers("pressed", self.pressed, MAX_LEASED)
        check_id("incarnation", self.incarnation)
        check_size("router_incarnation", self.router_incarnation, MAX_NAME_CHARS)
        check_size("state", self.state, MAX_NAME_CHARS)
        check_size("metrics", self.metrics or (), MAX_SAMPLES)
        check_transfers("requests", self.requests, MAX_LEASED)
        check_int("num_running", self.num_running, 0, MAX_INT32)
        check_int("num_queued", self.num_queued, 0, MAX_INT32)
        for name in ("blocks_used", "blocks_free"):
            check_size(name, getattr(self, name), MAX_GROUPS)
            check_ints(name, getattr(self, name), 0, MAX_INT32)
        check_size("links", self.links or (), MAX_LINKS)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One attempt of one request. `mode`:

    - `serve`: compute the prompt and emit every token here (role both, max_tokens = 1, or no peer);
    - `prefill`: compute the prompt and hand its KV to `peer`;
    - `decode`: receive the KV from `peer`, then emit tokens;
    - `move`: receive the answer that `peer` is decoding, by the transfer `leg`, then go on with it. `output` is what
      the router had of it. Sent only to workers that receive moves.

    `deadline_s` is a duration counted from receipt, so that no two clocks are compared. Requests of lower `priority`
    are admitted first and preempted last, of equals those that are older, by `age_s` since the router received them.
    `prefix`: where the first of the prompt's blocks may be had, for one that computes it.

    `output`: of an attempt that goes on after a loss, what the client has of each answer that is not over, in order of
    their numbers; answers that it does not name are. They are computed as the prompt is, and count as the answer. The
    KV of one answer is transferred with them; several go on in mode `serve`.
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
    priority: int = 0
    prefix: PrefixLeg | None = None
    output: Annotated[tuple[ChoiceOutput, ...], MAX_CHOICES] = ()
    leg: str = ""
    age_s: float = 0.0

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_size("leg", self.leg, MAX_NAME_CHARS)
        check_finite("age_s", self.age_s)
        check_int("priority", self.priority, -MAX_INT32 - 1, MAX_INT32)
        check_size("request_id", self.request_id, MAX_ADDRESS_CHARS)
        check_one_of("mode", self.mode, MODES)
        check_size("ticket", self.ticket, MAX_SECRET_NBYTES)
        check_duration("deadline_s", self.deadline_s)
        check_output(self.output, self.sampling, is_moved=self.mode != "serve")
        if self.mode == "move":
            check_id("leg", self.leg)
            if not self.first_output:
                fail("output", "nothing", "what there is of the answer to be moved")

    @property
    def first_output(self) -> tuple[int, ...]:
        """Of the answer that a transfer is for."""
        return self.output[0].token_ids if self.output else ()

    @property
    def num_known(self) -> int:
        """Tokens before the next one of that answer, the P of its transfer."""
        return len(self.prompt) + len(self.first_output)


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the prompt's tokens, from the worker that computes it, in order and before its last word.

    They are repeated from the first position on when the prompt is computed anew within an attempt.
    """

    transfer_id: str
    epoch: int
    scores: PromptLogprobs

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer ended with the token before `index`. `reason`: `stop` (`stop_token_id` if a token did), `length`."""

    transfer_id: str
    epoch: int
    index: int
    reason: str
    stop_token_id: int | None = None
    choice: int = 0

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_int("choice", self.choice, 0, MAX_CHOICES - 1)
        check_int("index", self.index, 0, MAX_INT32)
        check_size("reason", self.reason, MAX_NAME_CHARS)
        if self.stop_token_id is not None:
            check_int("stop_token_id", self.stop_token_id, 0, MAX_INT32)


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The worker cannot serve this attempt. `status` is the HTTP status it deserves: 400, 500, or 503 (retry)."""

    transfer_id: str
    epoch: int
    status: int
    message: str

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_int("status", self.status, 100, 599)


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """Decode -> router: this epoch's KV did not arrive whole. The router owns what happens next.

    Of a move both ends say so, each under the epoch of its own attempt.
    """

    transfer_id: str
    epoch: int
    reason: str
    units: Annotated[tuple[UnitName, ...], MAX_NAMED_UNITS] = ()

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_size("reason", self.reason, MAX_TEXT_CHARS)
        check_size("units", self.units, MAX_NAMED_UNITS)


@dataclass(frozen=True, slots=True)
class Retarget:
    """Router -> decode: fetch from another prefill worker under a new epoch."""

    transfer_id: str
    epoch: int
    peer: PeerTarget
    ticket: bytes

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_size("ticket", self.ticket, MAX_SECRET_NBYTES)


@dataclass(frozen=True, slots=True)
class PrefillLocally:
    """Router -> decode: give the transfer up and compute the prompt here under a new epoch."""

    transfer_id: str
    epoch: int

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Router -> worker: stop every epoch of this request up to `epoch` and free its blocks."""

    transfer_id: str
    epoch: int
    reason: str

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_size("reason", self.reason, MAX_TEXT_CHARS)


@dataclass(frozen=True, slots=True)
class CancelChoice:
    """Router -> worker: the client wants no more of one answer; the request's others go on."""

    transfer_id: str
    epoch: int
    choice: int

    def __post_init__(self) -> None:
        check_attempt(self.transfer_id, self.epoch)
        check_int("choice", self.choice, 0, MAX_CHOICES - 1)


@dataclass(frozen=True, slots=True)
class TransferReport:
    """A worker's own record of an attempt, for `/requests/{id}`: times, and what was moved per layer group."""

    transfer_id: str
    epoch: int
    worker_id: str
    plane: str
    groups: Annotated[tuple[GroupBytes, ...], MAX_GROUPS]
    times: StageTimes
    num_operations: int = 0
    purpose: str = HANDOFF

    def __post_init__(self) -> None:
        check_one_of("purpose", self.purpose, PURPOSES)
        check_attempt(self.transfer_id, self.epoch)
        check_size("worker_id", self.worker_id, MAX_NAME_CHARS)
        check_size("plane", self.plane, MAX_NAME_CHARS)
        check_size("groups", self.groups, MAX_GROUPS)
        check_int("num_operations", self.num_operations, 0, MAX_INT64)


RouterMessage = (
    Register
    | Registered
    | Pulse
    | Peers
    | Lease
    | Dispatch
    | StepTokens
    | TokenCredit
    | Finished
    | RequestFailed
    | TransferFailure
    | Retarget
    | PrefillLocally
    | CancelRequest
    | TransferReport
    | PromptScores
    | CancelChoice
    | BlockEvents
    | AskBlocks
    | Grant
    | Resume
)
