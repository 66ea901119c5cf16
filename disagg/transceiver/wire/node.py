"""What this process is to its peers, for one registration."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import Geometry, Identity
from disagg.transceiver.wire.purposes import HANDOFF


def draw_id() -> str:
    """128 random bits as 32 hex digits: an incarnation or a transfer id."""
    return secrets.token_hex(16)


@dataclass(frozen=True, slots=True)
class Node:
    """One incarnation: what HELLO and REGISTER say. A process draws a new one for every registration."""

    incarnation: str
    worker_id: str
    identity: Identity
    geometry: Geometry
    keys: ClusterKeys
    joins_ranks: bool = False
    """Is this one rank of several, with a leader that joins them? Then peers may be cut into ranks otherwise."""
    sends: tuple[str, ...] = (HANDOFF,)
    receives: tuple[str, ...] = (HANDOFF,)
    """The purposes of which it is a source, and those of which it is a sink."""
