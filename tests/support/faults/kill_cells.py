"""How a transfer between real workers is brought to a standstill in each state of the table, and what a kill then does.

The faults are those of `faulty_worker.py`. In every row the decode worker's tokens are held too: no request ends before
its kill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from support.cluster.calls import until
from support.faults.switches import Faults
from support.faults.table import VERIFIED, Row

from disagg.transceiver.protocol.state import Role, State

S, R = Role.SENDER, Role.RECEIVER
Settings = Mapping[str, dict[str, Any]]

TOKENS: Final = ("TokensEvent", "FinishedEvent")
FIRST_SLICE_ONLY: Final = {"kinds": ("PromptComputedEvent",), "after_first": ("UnitsFinalEvent",)}


def mute(*kinds: str) -> dict[str, Any]:
    return {"kinds": kinds}


@dataclass(frozen=True)
class Halt:
    """`faults` bring the transfer where it stays; `fails`: once slice 0 is in the landing thread, the prompt fails.

    `fired`: the fault that shows that it stands there, where the state itself does not.
    """

    faults: Settings
    fails: bool = False
    fired: str = ""


LANDING_STOPS, LANDING_PASSES = {"times": 1}, {"times": 1, "seconds": 0.0}
HALTS: Final[dict[Row, Halt]] = {
    (S, State.WAITING): Halt({"mute": mute("Fetch")}, fired="mute"),
    (S, State.PINNING): Halt({"hold_prefill": {"kinds": ("PinnedEvent",)}}),
    (S, State.SENDING): Halt({"mute": mute("Slice"), "hold_prefill": FIRST_SLICE_ONLY}),
    (S, State.DECIDED): Halt({"mute": mute("Slice", "Done")}),
    (S, State.STOPPED): Halt(
        {"mute": mute("Cancel"), "hold_prefill": FIRST_SLICE_ONLY, "pause_landing": LANDING_PASSES}, fails=True
    ),
    (S, State.CLOSED): Halt({"mute": mute("Closed")}),
    (R, State.WAITING): Halt({"hold_decode": {"kinds": (*TOKENS, "ReservedEvent")}}, fired="hold_decode"),
    (R, State.FETCHING): Halt({"mute": mute("Accepted", "Slice", "Done")}),
    (R, State.LANDING): Halt({"mute": mute("Done"), "pause_landing": LANDING_STOPS}, fired="pause_landing"),
    (R, State.VERIFIED): Halt({"mute": mute("Ack")}),
    (R, State.STOPPING): Halt(
        {"mute": mute("Cancel"), "hold_prefill": FIRST_SLICE_ONLY, "pause_landing": LANDING_STOPS}, fails=True
    ),
    (R, State.JOINING): Halt({"hold_prefill": FIRST_SLICE_ONLY, "pause_landing": LANDING_STOPS}, fails=True),
    (R, State.CANCELLING): Halt(
        {"mute": mute("Cancel"), "hold_prefill": FIRST_SLICE_ONLY, "pause_landing": LANDING_PASSES}, fails=True
    ),
    (R, State.CLOSED): Halt({}),
}

PREFILL, DECODE, ROUTER = PROCESSES = ("prefill-0", "decode-0", "router")
WORKERS: Final = (PREFILL, DECODE)


def modes_after(row: Row) -> list[str]:
    """The attempts of a request whose prefill worker dies in this state; with its licence to decode, one was enough."""
    return ["transfer"] if row in VERIFIED else ["transfer", "local"]


def begin(faults: Faults, row: Row) -> None:
    """From now on a request's transfer goes as far as this state."""
    faults.forget("state-")
    faults.set(**_settings(row))


async def stand(faults: Faults, row: Row) -> None:
    """Until it stands there."""
    halt, (role, state) = HALTS[row], row
    if halt.fails:
        await until(lambda: faults.num_fired("pause_landing"), "slice 0 is in the landing thread")
        faults.add(fail_compute={"times": 1})
    if halt.fired:
        await until(lambda: faults.num_fired(halt.fired), f"`{halt.fired}` has fired")
    if state is not State.WAITING:  # a transfer begins there, and tells what it comes to
        await until(
            lambda: faults.told(f"state-{role.value}") == [f"1 {state.value}"],
            f"{role.value} {state.value}: {faults.told('state-')}",
        )


def _settings(row: Row) -> dict[str, dict[str, Any]]:
    return {"hold_decode": {"kinds": TOKENS}, **HALTS[row].faults}
