"""Every time constant of the protocol, in seconds, with its reason."""

from __future__ import annotations

from typing import Final

REPEAT_FIRST_S: Final = 0.2
"""Long against a round trip on any link we serve (under 0.1 s), short against a person's patience."""

REPEAT_MAX_S: Final = 2.0
"""Doubling stops here, below `LOST_S`: a peer hears an unanswered message again before it can count as lost."""

HEARTBEAT_S: Final = 0.5
"""Six chances before `LOST_S`; sent by the event loop, never by the model thread, whose steps may take seconds."""

SUSPECT_S: Final = 1.5
"""Three missed heartbeats: no new work goes there, nothing is given up yet."""

LOST_S: Final = 3.0
"""Six missed heartbeats: leaves two of the five seconds in which a client must see the next attempt."""

HUNG_S: Final = 10.0
"""A process whose event loop has not turned for so long sends no pulses any more: as long as sources outlive it.
Shorter stalls are slow and not dead; one that hangs for good is lost `LOST_S` later."""

LEASE_S: Final = 10.0
"""Three times `LOST_S`: sources outlive any stall that the peer itself survives, and a silent peer pins no longer."""

DISPATCH_GRACE_S: Final = 2.0
"""How long a FETCH may precede the router's DISPATCH: they travel on different links, and a router answers in less."""

FETCH_WAIT_S: Final = 30.0
"""Blocks that were not fetched by now are worth less than room for a request that a client waits for."""
