"""Why a transfer ended without delivering: the words that messages, actions and metrics share."""

from __future__ import annotations

from typing import Final

FINISHED: Final = "finished"  # the first token ended the answer: nothing had to move
CANCELLED: Final = "cancelled"  # an authorised party asked for it
EVICTED: Final = "evicted"  # the source needed the room of the cached blocks that it was sending
NO_ROOM: Final = "no_room"  # a fetched prompt has none, while this worker keeps room for what others compute
DEADLINE: Final = "deadline"  # the request's own time is over
LEASE: Final = "lease"  # the receiver stopped naming the transfer in its heartbeats
LOST: Final = "lost"  # the peer is gone, or did not answer in time
FAILED: Final = "failed"  # the sender cannot deliver; its message says why
UNKNOWN: Final = "unknown"  # the peer never heard of the transfer, or has forgotten it
REFUSED: Final = "refused"  # FETCH was not admitted
INCOMPLETE: Final = "incomplete"  # the prompt is computed, but a required unit was never reported final
PROTOCOL: Final = "protocol"  # the peer's messages contradict each other or the request
MAC: Final = "mac"  # DONE is not what the sender with the cluster's secret said of this epoch
PURPOSE: Final = "purpose"  # DONE is of a transfer of another purpose
DIGEST: Final = "digest"  # landed bytes are not the bytes the manifest names
NON_FINITE: Final = "non-finite"  # landed bytes hold NaN or infinity

WRONG: Final = frozenset({PROTOCOL, PURPOSE, MAC, DIGEST, NON_FINITE})
"""What no honest and healthy sender brings about: each is counted."""
