"""Messages between a prefill and a decode worker (protocol.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from disagg.transceiver.wire.messages.values import (
    FirstToken,
    Geometry,
    GroupRuns,
    Identity,
    ManifestEntry,
    PlaneOffer,
    UnitName,
    UnitRun,
)


@dataclass(frozen=True, slots=True)
class Header:
    """Carried by every message of a transfer. Incarnations name processes; a socket may reconnect to a successor."""

    source: str
    destination: str
    transfer_id: str
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a connection, decode -> prefill. `planes` in the caller's order of preference."""

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    planes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answers HELLO: who answers, and how to open each plane both sides can use."""

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    planes: tuple[PlaneOffer, ...]


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


@dataclass(frozen=True, slots=True)
class Fetch:
    """Decode asks for units by ordinal. Carries no slot and no address."""

    header: Header
    ticket: bytes
    prompt_len: int
    required: tuple[GroupRuns, ...]
    plane: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """Answers FETCH. `queue_position`: transfers accepted before this one that wait for their blocks to be pinned.

    0: it is next, or pinned already (a repeated FETCH).
    """

    header: Header
    queue_position: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Units that are now final. Numbered from 0 without gaps within an epoch."""

    header: Header
    number: int
    units: tuple[UnitRun, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """Highest slice number with no gap below it that has landed; -1 before the first."""

    header: Header
    number: int


@dataclass(frozen=True, slots=True)
class Done:
    """One rank's terminal message: it announced `num_slices` slices; `mac` binds all of it to the transfer."""

    header: Header
    rank: int
    num_ranks: int
    num_slices: int
    manifest: tuple[ManifestEntry, ...]
    first_token: FirstToken | None
    mac: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """Terminal: prefill could not deliver."""

    header: Header
    reason: str
    units: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Terminal: prefill stopped because it was asked to, or because the request finished with its first token."""

    header: Header
    reason: str


@dataclass(frozen=True, slots=True)
class Ack:
    """Decode verified everything: the sources may be freed."""

    header: Header


@dataclass(frozen=True, slots=True)
class Cancel:
    """Decode wants no more of this epoch. `reason` is one of `disagg.transceiver.wire.reasons`."""

    header: Header
    reason: str
    units: tuple[UnitName, ...] = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """Answers ACK, and any FETCH, RECEIVED, ACK or CANCEL for a transfer that is over or no longer known."""

    header: Header


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """One per peer pair, both ways. Names the transfers whose lease it renews."""

    source: str
    destination: str
    transfers: tuple[tuple[str, int], ...]


TransferMessage = Fetch | Accepted | Slice | Received | Done | Failed | Cancelled | Ack | Cancel | Closed
PeerMessage = Hello | Welcome | Refused | TransferMessage | Heartbeat
