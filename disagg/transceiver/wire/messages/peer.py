"""Messages between the source and the sink of transfers (protocol.md section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Final

from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.ranges import (
    MAX_GROUPS,
    MAX_INT32,
    MAX_INT64,
    MAX_NAME_CHARS,
    MAX_NAMED_TRANSFERS,
    MAX_NAMED_UNITS,
    MAX_ORDINAL,
    MAX_PLANES,
    MAX_PURPOSES,
    MAX_RANKS,
    MAX_RUNS,
    MAX_SECRET_NBYTES,
    MAX_SLICE_RUNS,
    MAX_SLICE_UNITS,
    MAX_TEXT_CHARS,
    MAX_UNITS,
    check_id,
    check_int,
    check_ints,
    check_names,
    check_one_of,
    check_size,
    check_transfers,
    fail,
)
from disagg.transceiver.wire.messages.values import (
    IDENTITY_NBYTES,
    FirstToken,
    Geometry,
    GroupRuns,
    Identity,
    PlaneOffer,
    TokenLogprobs,
    UnitName,
    UnitRun,
)
from disagg.transceiver.wire.purposes import HANDOFF, PURPOSES
from disagg.transceiver.wire.schema import PackedInts

MAX_REQUIRED: Final = MAX_ORDINAL
"""More than one transfer may name (`sizes.MAX_MANIFEST_ENTRIES`) is refused by its field; this bounds the look."""


MAX_UNTOLD: Final = 256
"""Tokens of an answer that a router may not have yet when it is moved: more than its source makes in a second. An
answer whose router is further behind stays where it is."""


def check_purposes(purposes: tuple[str, ...]) -> None:
    """Names of later versions are legal: they are of no use to this process, and it asks for none of them."""
    check_size("purposes", purposes, MAX_PURPOSES)
    check_names("purposes", purposes)


def num_runs(required: Iterable[GroupRuns]) -> int:
    return sum(len(entry.runs) for entry in required)


@dataclass(frozen=True, slots=True)
class Header:
    """Carried by every message of a transfer. Incarnations name processes; a socket may reconnect to a successor."""

    source: str
    destination: str
    transfer_id: str
    epoch: int
    sequence: int

    def __post_init__(self) -> None:
        for name in ("source", "destination", "transfer_id"):
            check_id(name, getattr(self, name))
        check_int("epoch", self.epoch, 0, MAX_INT32)
        check_int("sequence", self.sequence, 0, MAX_INT64)


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a connection, sink -> source. `planes` in the caller's order of preference.

    `purposes`: what the caller would fetch over it.
    """

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    planes: Annotated[tuple[str, ...], MAX_PLANES]
    purposes: Annotated[tuple[str, ...], MAX_PURPOSES] = (HANDOFF,)

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("planes", self.planes, MAX_PLANES)
        check_names("planes", self.planes)
        check_purposes(self.purposes)


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers HELLO: which incarnation answers, how to open each plane both sides can use, and what it would send."""

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    planes: Annotated[tuple[PlaneOffer, ...], MAX_PLANES]
    purposes: Annotated[tuple[str, ...], MAX_PURPOSES] = (HANDOFF,)

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("planes", self.planes, MAX_PLANES)
        check_purposes(self.purposes)


@dataclass(frozen=True, slots=True)
class Refused:
    """HELLO, FETCH or REGISTER not served: which field differs and both values. `stale_peer` names a dead incarnation.

    A refused FETCH is named by `transfer_id` and `epoch`; the other refusals leave them empty.
    """

    field: str
    ours: str
    theirs: str
    destination: str = ""
    transfer_id: str = ""
    epoch: int = 0

    def __post_init__(self) -> None:
        for name in ("field", "ours", "theirs"):
            check_size(name, getattr(self, name), MAX_TEXT_CHARS)
        for name in ("destination", "transfer_id"):
            check_size(name, getattr(self, name), MAX_NAME_CHARS)
        check_int("epoch", self.epoch, 0, MAX_INT32)


@dataclass(frozen=True, slots=True)
class Fetch:
    """The sink asks for units by ordinal. Carries no slot and no address.

    For `prefix` the source says what is `required`: `prompt_len` is the boundary up to which it is asked, `tip` the
    identity of the source's block that ends there, and `held` the sink's ordinals below it, in blocks of the sink.
    """

    header: Header
    ticket: bytes
    prompt_len: int
    required: Annotated[tuple[GroupRuns, ...], MAX_GROUPS]
    plane: str
    purpose: str = HANDOFF
    tip: bytes = b""
    held: Annotated[tuple[GroupRuns, ...], MAX_GROUPS] = ()

    def __post_init__(self) -> None:
        check_one_of("purpose", self.purpose, PURPOSES)
        check_size("tip", self.tip, IDENTITY_NBYTES)
        check_size("held", self.held, MAX_GROUPS)
        check_int("held: runs", num_runs(self.held), 0, MAX_RUNS)
        check_int("held", sum(count for entry in self.held for _, count in entry.runs), 0, MAX_REQUIRED)
        check_size("ticket", self.ticket, MAX_SECRET_NBYTES)
        check_int("prompt_len", self.prompt_len, 1, MAX_INT32)
        check_size("required", self.required, MAX_GROUPS)
        check_int("required: runs", num_runs(self.required), 0, MAX_RUNS)
        check_int("required", sum(count for entry in self.required for _, count in entry.runs), 0, MAX_REQUIRED)
        check_size("plane", self.plane, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Answers FETCH. `queue_position`: transfers accepted before this one that wait for their blocks to be pinned.

    0: it is next, or pinned already (a repeated FETCH). `boundary`: of `prefix`, the tokens up to which source and sink
    together hold what is needed, 0 for none. `precision`: the formats that the KV has been through before it came to
    the source; "" = the source's own alone.

    Of `move` it says how far the answer has come, which stands still from here on: `output` and `logprobs` are of the
    tokens behind those that the router had, the newest of them without KV, so that `boundary` tokens have theirs.
    """

    header: Header
    queue_position: int
    boundary: int = 0
    precision: str = ""
    output: PackedInts = ()
    logprobs: Annotated[tuple[TokenLogprobs, ...], MAX_UNTOLD] = ()

    def __post_init__(self) -> None:
        check_size("output", self.output, MAX_UNTOLD)
        check_ints("output", self.output, 0, MAX_INT32)
        check_size("logprobs", self.logprobs, MAX_UNTOLD)
        check_int("boundary", self.boundary, 0, MAX_INT32)
        check_size("precision", self.precision, MAX_NAME_CHARS)
        check_int("queue_position", self.queue_position, 0, MAX_INT32)


@dataclass(frozen=True, slots=True)
class Slice:
    """Units that are now final. Numbered from 0 without gaps within an epoch."""

    header: Header
    number: int
    units: Annotated[tuple[UnitRun, ...], MAX_SLICE_RUNS]

    def __post_init__(self) -> None:
        check_int("number", self.number, 0, MAX_INT32)
        check_size("units", self.units, MAX_SLICE_RUNS, 1)
        check_int("units", sum(run.count for run in self.units), 1, MAX_SLICE_UNITS)


@dataclass(frozen=True, slots=True)
class Received:
    """Highest slice number with no gap below it that has landed; -1 before the first."""

    header: Header
    number: int

    def __post_init__(self) -> None:
        check_int("number", self.number, -1, MAX_INT32)


@dataclass(frozen=True, slots=True)
class Done:
    """One rank's terminal message: it announced `num_slices` slices; `mac` binds all of it to the transfer.

    `manifest`: ascending groups, those of which something moved. `boundary`, `precision`: as ACCEPTED said.
    """

    header: Header
    rank: int
    num_ranks: int
    num_slices: int
    manifest: Annotated[tuple[GroupDigests, ...], MAX_GROUPS]
    first_token: FirstToken | None
    mac: bytes
    purpose: str = HANDOFF
    boundary: int = 0
    precision: str = ""

    def __post_init__(self) -> None:
        check_one_of("purpose", self.purpose, PURPOSES)
        check_int("boundary", self.boundary, 0, MAX_INT32)
        check_size("precision", self.precision, MAX_NAME_CHARS)
        check_int("num_ranks", self.num_ranks, 1, MAX_RANKS**2)
        check_int("rank", self.rank, 0, MAX_RANKS**2 - 1)
        check_int("num_slices", self.num_slices, 0, MAX_INT32)
        check_size("manifest", self.manifest, MAX_GROUPS)
        groups = [entry.group for entry in self.manifest]
        if any(a >= b for a, b in pairwise(groups)):
            fail("manifest", groups, "ascending groups")
        check_int("manifest: units", sum(entry.num_units for entry in self.manifest), 0, MAX_UNITS)
        check_size("mac", self.mac, MAX_SECRET_NBYTES)


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: prefill could not deliver."""

    header: Header
    reason: str
    units: Annotated[tuple[UnitName, ...], MAX_NAMED_UNITS] = ()

    def __post_init__(self) -> None:
        check_size("reason", self.reason, MAX_TEXT_CHARS)
        check_size("units", self.units, MAX_NAMED_UNITS)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Terminal: prefill stopped because it was asked to, or because the request finished with its first token."""

    header: Header
    reason: str

    def __post_init__(self) -> None:
        check_size("reason", self.reason, MAX_TEXT_CHARS)


@dataclass(frozen=True, slots=True)
class Ack:
    """Decode verified everything: the sources may be freed."""

    header: Header


@dataclass(frozen=True, slots=True)
class Cancel:
    """Decode wants no more of this epoch. `reason` is one of `disagg.transceiver.wire.reasons`.

    `units`: those whose bytes are wrong; none where there are too many to name.
    """

    header: Header
    reason: str
    units: Annotated[tuple[UnitName, ...], MAX_NAMED_UNITS] = ()

    def __post_init__(self) -> None:
        check_size("reason", self.reason, MAX_TEXT_CHARS)
        check_size("units", self.units, MAX_NAMED_UNITS)


@dataclass(frozen=True, slots=True)
class Closed:
    """Answers ACK, and any FETCH, RECEIVED, ACK or CANCEL for a transfer that is over or no longer known."""

    header: Header


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One per peer pair, both ways. Names the transfers whose lease it renews; of very many, some of them."""

    source: str
    destination: str
    transfers: Annotated[tuple[tuple[str, int], ...], MAX_NAMED_TRANSFERS]

    def __post_init__(self) -> None:
        check_id("source", self.source)
        check_id("destination", self.destination)
        check_transfers("transfers", self.transfers, MAX_NAMED_TRANSFERS)


TransferMessage = Fetch | Accepted | Slice | Received | Done | Failed | Cancelled | Ack | Cancel | Closed
PeerMessage = Hello | Welcome | Refused | TransferMessage | Heartbeat
