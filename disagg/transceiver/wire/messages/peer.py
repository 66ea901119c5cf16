"""Messages between a prefill and a decode worker (protocol.md section 4)."""

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
    MAX_RANKS,
    MAX_RUNS,
    MAX_SECRET_NBYTES,
    MAX_SLICE_RUNS,
    MAX_SLICE_UNITS,
    MAX_TEXT_CHARS,
    MAX_UNITS,
    check_id,
    check_int,
    check_names,
    check_size,
    check_transfers,
    fail,
)
from disagg.transceiver.wire.messages.values import (
    FirstToken,
    Geometry,
    GroupRuns,
    Identity,
    PlaneOffer,
    UnitName,
    UnitRun,
)

MAX_REQUIRED: Final = MAX_ORDINAL
"""More than one transfer may name (`sizes.MAX_MANIFEST_ENTRIES`) is refused by its field; this bounds the look."""


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
    """First message of a connection, decode -> prefill. `planes` in the caller's order of preference."""

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    planes: Annotated[tuple[str, ...], MAX_PLANES]

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("planes", self.planes, MAX_PLANES)
        check_names("planes", self.planes)


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers HELLO: which incarnation answers, and how to open each plane both sides can use."""

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    planes: Annotated[tuple[PlaneOffer, ...], MAX_PLANES]

    def __post_init__(self) -> None:
        check_id("incarnation", self.incarnation)
        check_id("worker_id", self.worker_id)
        check_size("planes", self.planes, MAX_PLANES)


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
    """Decode asks for units by ordinal. Carries no slot and no address."""

    header: Header
    ticket: bytes
    prompt_len: int
    required: Annotated[tuple[GroupRuns, ...], MAX_GROUPS]
    plane: str

    def __post_init__(self) -> None:
        check_size("ticket", self.ticket, MAX_SECRET_NBYTES)
        check_int("prompt_len", self.prompt_len, 1, MAX_INT32)
        check_size("required", self.required, MAX_GROUPS)
        check_int("required: runs", num_runs(self.required), 0, MAX_RUNS)
        check_int("required", sum(count for entry in self.required for _, count in entry.runs), 0, MAX_REQUIRED)
        check_size("plane", self.plane, MAX_NAME_CHARS)


@dataclass(frozen=True, slots=True)
class Accepted:
    """Answers FETCH. `queue_position`: transfers accepted before this one that wait for their blocks to be pinned.

    0: it is next, or pinned already (a repeated FETCH).
    """

    header: Header
    queue_position: int

    def __post_init__(self) -> None:
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

    `manifest`: ascending groups, those of which something moved.
    """

    header: Header
    rank: int
    num_ranks: int
    num_slices: int
    manifest: Annotated[tuple[GroupDigests, ...], MAX_GROUPS]
    first_token: FirstToken | None
    mac: bytes

    def __post_init__(self) -> None:
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
