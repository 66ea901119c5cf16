"""The table of states and faults: what may follow from each fault in each state, in data.

A row is one (role, state) of `disagg.transceiver.protocol.state`, a column one fault, a cell what the client may get:

    a1      the answer, by the first attempt          503, 504   an error with that status
    a2, a3  the answer, by a later attempt            gone       nothing: the client itself went away

"The peer" of a sender is the decode worker, of a receiver the prefill worker. Whatever the cell says, the same holds
after it: no slot is used on either side, and the next request is answered with the survivors as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from disagg.transceiver.protocol.state import Role, State

Row = tuple[Role, State]


@dataclass(frozen=True)
class Fault:
    """`name` is the column; `means` what happens, for people."""

    name: str
    means: str


KILLED = Fault("peer killed", "every connection of the peer is reset and nothing listens there any more")
REPLACED = Fault("peer replaced", "the peer is killed, and a new process takes its name and address at once")
CONTROL_CUT = Fault("control link cut", "the peers' control connection is reset; both live on")
CONTROL_SILENT = Fault(
    "control link silent", "the control connection stays open and passes nothing, not even heartbeats"
)
DATA_CUT = Fault("data link cut", "the data plane's connection ends; both live on")
DROPPED = Fault("dropped", "the next message of the transfer never arrives")
DUPLICATED = Fault("duplicated", "it arrives twice")
REORDERED = Fault("reordered", "it arrives after a later one")
DELAYED = Fault("delayed", "it arrives after its first repeat")
TRUNCATED = Fault("truncated", "it arrives cut short")
RANDOM = Fault("random bytes", "random bytes of its length arrive instead")
GENERATION = Fault("generation changed", "a source slot is given away without being freed")
SOURCE_FLIP = Fault("source byte flipped", "a byte of a source slot changes after it was hashed")
LANDED_FLIP = Fault("landed byte flipped", "a byte changes where it landed, after the copy and before the hash")
CANCEL = Fault("router cancel", "the client goes away, and the router cancels on both sides")
DEADLINE = Fault("deadline", "the request's time ends while the transfer stands still")
ROUTER_LOST = Fault("router lost", "the router dies; another one is started at its address")

MESSAGE_FAULTS: Final = (DROPPED, DUPLICATED, REORDERED, DELAYED, TRUNCATED, RANDOM)
FAULTS: Final = (
    KILLED,
    REPLACED,
    CONTROL_CUT,
    CONTROL_SILENT,
    DATA_CUT,
    *MESSAGE_FAULTS,
    GENERATION,
    SOURCE_FLIP,
    LANDED_FLIP,
    CANCEL,
    DEADLINE,
    ROUTER_LOST,
)

S, R = Role.SENDER, Role.RECEIVER
ROWS: Final[tuple[Row, ...]] = (
    (S, State.WAITING),
    (S, State.PINNING),
    (S, State.SENDING),
    (S, State.DECIDED),
    (S, State.STOPPED),
    (S, State.CLOSED),
    (R, State.WAITING),
    (R, State.FETCHING),
    (R, State.LANDING),
    (R, State.VERIFIED),
    (R, State.STOPPING),
    (R, State.JOINING),
    (R, State.CANCELLING),
    (R, State.CLOSED),
)

HALTED_BY: Final[dict[Row, str]] = {
    (S, State.WAITING): "FETCH is held on its way; the prompt is computed and hashed",
    (S, State.PINNING): "the engine's word that the blocks are pinned is held",
    (S, State.SENDING): "SLICE is held on its way, and the later chunks before they are hashed",
    (S, State.DECIDED): "SLICE and DONE are held on their way",
    (S, State.STOPPED): "the computation failed after one slice had landed; CANCEL is held on its way",
    (S, State.CLOSED): "CLOSED is held on its way",
    (R, State.WAITING): "the engine's word that the room is reserved is held",
    (R, State.FETCHING): "all answers of the sender are held on their way",
    (R, State.LANDING): "the landing thread stands between copy and hash of slice 0; later slices and DONE are held",
    (R, State.VERIFIED): "ACK is held on its way",
    (R, State.STOPPING): "the landing thread stands in slice 0, FAILED has come, CANCEL is held on its way",
    (R, State.JOINING): "the landing thread stands in slice 0; FAILED has come and CANCEL was answered",
    (R, State.CANCELLING): "FAILED has come, no job runs; CANCEL is held on its way",
    (R, State.CLOSED): "CLOSED has come; the first token is held in the decode worker",
}

FAILING: Final = frozenset({(S, State.STOPPED), (R, State.STOPPING), (R, State.JOINING), (R, State.CANCELLING)})
"""Rows that are entered by a failure of the first attempt: the answer comes from the second, whatever follows."""
VERIFIED: Final = frozenset({(S, State.CLOSED), (R, State.VERIFIED), (R, State.CLOSED)})
"""Rows in which the licence to decode was given: the transfer has nothing more to lose."""
ALL_SENT: Final = frozenset({(S, State.SENDING), (S, State.DECIDED), (R, State.FETCHING), (R, State.LANDING)})
"""Rows in which, on a plane that sends bytes, every hashed byte has left the source."""

_NO_JOB = "every landing job of the attempt has ended"
_NO_MESSAGE = "CLOSED has come: no message is on its way and none will follow"
IMPOSSIBLE: Final[dict[tuple[Row, Fault], str]] = {
    ((S, State.STOPPED), LANDED_FLIP): _NO_JOB,
    ((S, State.CLOSED), LANDED_FLIP): _NO_JOB,
    ((R, State.VERIFIED), LANDED_FLIP): _NO_JOB,
    ((R, State.CANCELLING), LANDED_FLIP): _NO_JOB,
    ((R, State.CLOSED), LANDED_FLIP): _NO_JOB,
    ((R, State.JOINING), DROPPED): _NO_MESSAGE,
    ((R, State.JOINING), DELAYED): _NO_MESSAGE,
}

LATE_COPY: Final = frozenset({(R, State.JOINING), (R, State.CLOSED)})
"""Rows in which no message is on its way: the fault meets a late copy of one, or the answer to it."""

QUICK_FAULTS: Final = frozenset({*MESSAGE_FAULTS, GENERATION, SOURCE_FLIP, LANDED_FLIP, CANCEL})
"""Faults after which nothing has to be waited for: all their cells run in CI."""


def cells() -> Iterator[tuple[Row, Fault]]:
    """Every cell that can be filled, row by row."""
    return ((row, fault) for row in ROWS for fault in FAULTS if (row, fault) not in IMPOSSIBLE)


def allowed(row: Row, fault: Fault, *, sends_bytes: bool) -> frozenset[str]:
    """What the client may get in a cell, on a plane whose sender pushes the bytes or whose receiver reads them."""
    if fault in (CANCEL, DEADLINE, ROUTER_LOST):
        return frozenset({CANCEL: {"gone"}, DEADLINE: {"504"}, ROUTER_LOST: {"503"}}[fault])
    if fault in (KILLED, REPLACED) and row[0] is S:
        # The worker that emits the tokens died: where nobody else can take over at once, that is an error.
        # Its first token leaves when the transfer is verified, before the sender hears of that: then it is a 502.
        begun = {"502"} if row[1] in (State.DECIDED, State.CLOSED) else set()
        return frozenset({"503", *begun} if fault is KILLED else {"503", "a2", "a3", *begun})
    if row in FAILING:
        return frozenset({"a2"})
    if row in VERIFIED or fault in MESSAGE_FAULTS:
        return frozenset({"a1"})
    if fault in (GENERATION, SOURCE_FLIP) and sends_bytes and row in ALL_SENT:
        # Too late to matter, except for the blocks of later chunks, which are given away here before they are hashed.
        return frozenset({"a2" if fault is GENERATION and row[1] is State.SENDING else "a1"})
    if row == (R, State.WAITING) and fault in (CONTROL_CUT, CONTROL_SILENT, DATA_CUT):
        return frozenset({"a1", "a2"})  # nobody was asked yet: the link may be up again before the room is there
    return frozenset({"a2", "a3"} if fault is REPLACED else {"a2"})


def render(results: Mapping[tuple[Row, Fault], str], *, empty: str = "EMPTY") -> str:
    """The table as markdown, one line per state; impossible cells hold a dash."""
    lines = ["| role, state | " + " | ".join(fault.name for fault in FAULTS) + " |"]
    lines.append("|---" * (len(FAULTS) + 1) + "|")
    for row in ROWS:
        texts = ["-" if (row, fault) in IMPOSSIBLE else results.get((row, fault), empty) for fault in FAULTS]
        lines.append(f"| {row[0].value}, {row[1].value} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
