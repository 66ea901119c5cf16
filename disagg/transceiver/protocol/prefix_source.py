"""The source's end of a `prefix`: cached blocks of tokens that the router granted, to a worker about to compute them.

The states are a sender's. What differs: the blocks are final already, so the engine is asked how far they reach, both
ends compute from that what must move, and SLICE and DONE follow at once. There is no first token, and the blocks are
pinned by nothing: a source that needs their room ends the transfer with CANCELLED(evicted).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from disagg.transceiver.layout.boundary import missing_at
from disagg.transceiver.layout.compatibility import Difference
from disagg.transceiver.layout.required import check_required
from disagg.transceiver.protocol.actions import AskPrefix
from disagg.transceiver.protocol.events import Pinned, UnitsFinal
from disagg.transceiver.protocol.sender import Offer, Sender, too_many
from disagg.transceiver.protocol.state import Decision
from disagg.transceiver.protocol.transfer import Ends
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.peer import Accepted, Done, Fetch
from disagg.transceiver.wire.messages.values import GroupRuns
from disagg.transceiver.wire.purposes import PREFIX
from disagg.transceiver.wire.ticket import LegClaims, is_leg_ticket


@dataclass(frozen=True, slots=True)
class Lendable:
    """What a source knows of a granted prefix. `tips[i]`: the identity of its block i of the granted tokens, as it has
    named them itself; `block_size` its own, `sink_block_size` the sink's. `request`: whose prompt it is.
    """

    request: str
    tips: tuple[bytes, ...]
    block_size: int
    sink_block_size: int

    def tip(self, boundary: int) -> bytes:
        """The identity of the block that ends at `boundary`, a multiple of the block size; none before the first."""
        return self.tips[boundary // self.block_size - 1] if boundary else b""


class PrefixSender(Sender):
    purpose: ClassVar[str] = PREFIX

    def __init__(self, ends: Ends, offer: Offer, lendable: Lendable, now: float) -> None:
        super().__init__(ends, offer, now)
        self._lendable = lendable
        self._boundary: int | None = None

    def _is_ticket_right(self, fetch: Fetch) -> bool:
        ends, offer, boundary = self.ends, self._offer, len(self._offer.prompt)
        claims = LegClaims(
            purpose=self.purpose,
            transfer_id=ends.transfer_id,
            epoch=ends.epoch,
            request=self._lendable.request,
            source=ends.me,
            sink=ends.peer,
            boundary=boundary,
            tip=self._lendable.tip(boundary),
        )
        return is_leg_ticket(offer.keys.ticket, fetch.ticket, claims, offer.ttl_s)

    def _wrong_units(self, fetch: Fetch) -> Difference | None:
        if fetch.tip != self._lendable.tip(fetch.prompt_len):
            return "tip", "the block that ends the granted tokens", "another"
        if fetch.required:
            return "required", "nothing: the source says what moves", f"{len(fetch.required)} groups"
        num_blocks = fetch.prompt_len // self._lendable.sink_block_size
        every = GroupRuns(0, ((0, num_blocks),)) if num_blocks else GroupRuns(0, ())
        try:
            check_required(fetch.held, (every,) * len(self._offer.geometry.groups))
        except RemoteProtocolError as exc:
            return "held", "whole blocks below the boundary", str(exc)
        return None

    def _admit(self, fetch: Fetch) -> None:
        self._do(AskPrefix(fetch.held))

    def _accept(self) -> None:
        if self._boundary is not None:  # else ACCEPTED would say nothing yet
            self._send(Accepted(self._header(), 0, self._boundary))

    def _begin(self, event: Pinned) -> None:
        self._pinned, self._boundary = event.compute_id, event.boundary
        required = self._required(event.boundary)
        if too_many(required) is not None:
            self._decide(Decision.INCOMPLETE)
            return
        self._expect(required)
        self._accept()
        self._try_done()

    def _required(self, boundary: int) -> tuple[GroupRuns, ...]:
        assert self._fetch is not None, "a FETCH was admitted"
        geometry = self._offer.geometry
        held: list[tuple[int, ...]] = [()] * len(geometry.groups)
        for entry in self._fetch.held:
            held[entry.group] = entry.ordinals
        return missing_at(geometry.groups, boundary, geometry.block_size, held, self._lendable.sink_block_size)

    def _announce_units(self, event: UnitsFinal) -> None:
        super()._announce_units(event)
        self._try_done()

    def _try_done(self) -> None:
        """Nothing more is computed: DONE follows what the window of unanswered slices lets out last."""
        if self._outbox.is_all_announced:
            self._decide(Decision.ALL_ANNOUNCED)

    def _say_done(self, decision: Decision) -> None:
        assert self._boundary is not None, "announcing begins at the boundary"
        self._insist(self._sealed(self._boundary))

    def _sealed(self, boundary: int) -> Done:
        return self._sealed_done(boundary=boundary, tip=self._lendable.tip(boundary))
