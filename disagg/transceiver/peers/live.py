"""One side's transfers: events to the pure cores, actions to a shell, answers to latecomers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from disagg.transceiver.protocol.actions import Action, Forget
from disagg.transceiver.protocol.events import Event, MessageArrived, PeerGone, Tick
from disagg.transceiver.protocol.state import State
from disagg.transceiver.protocol.tombstones import Tombstones, answer_unknown
from disagg.transceiver.protocol.transfer import Transfer
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages.peer import Refused, TransferMessage
from disagg.transceiver.wire.messages.values import AttemptKey

log = logging.getLogger(__name__)

TICK_S = 0.05
"""How often deadlines are looked at: a quarter of the shortest repeat (0.2 s), so one is at most 25 % late."""


class Transfers:
    """All live cores of one side. `perform` gets each action once, in the order the core gave it."""

    def __init__(self, me: str, perform: Callable[[AttemptKey, Action], None]) -> None:
        self._me, self._perform = me, perform
        self._live: dict[AttemptKey, Transfer] = {}
        self._tombstones = Tombstones()

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._live

    def add(self, key: AttemptKey, transfer: Transfer) -> None:
        """Take over `transfer`, whose key is not known yet."""
        assert not self.knows(key), key
        self._live[key] = transfer

    def of_peer(self, incarnation: str) -> list[AttemptKey]:
        return [key for key, transfer in self._live.items() if transfer.peer == incarnation]

    def peers(self) -> set[str]:
        """Incarnations with a live transfer."""
        return {transfer.peer for transfer in self._live.values()}

    def peer_of(self, key: AttemptKey) -> str:
        """The peer's incarnation, or "" for a transfer that is over."""
        transfer = self._live.get(key)
        return transfer.peer if transfer is not None else ""

    def purpose_of(self, key: AttemptKey) -> str:
        """That of a live transfer."""
        return self._live[key].purpose

    def awaits_fetch(self, key: AttemptKey) -> bool:
        """Whether this attempt's sender lives and has admitted no FETCH yet."""
        transfer = self._live.get(key)
        return transfer is not None and transfer.state is State.WAITING

    def wanting_lease(self, incarnation: str) -> list[AttemptKey]:
        """Transfers that a heartbeat to `incarnation` must name."""
        return [key for key in self.of_peer(incarnation) if self._live[key].wants_lease]

    def feed(self, key: AttemptKey, event: Event) -> None:
        """Give `event` to the core and perform what it asks. Unknown keys are ignored: their transfer is over."""
        transfer = self._live.get(key)
        if transfer is None:
            return
        try:
            actions = transfer.handle(event, time.monotonic())
        except RemoteProtocolError as exc:  # the core is unchanged: a confused peer costs a log line, no more
            log.warning("transfer %s epoch %d: %s", key.transfer_id, key.epoch, exc)
            return
        for action in actions:
            if isinstance(action, Forget):
                self._bury(key, transfer, action.until)
            else:
                self._perform(key, action)

    def tell_gone(self, key: AttemptKey, reason: str) -> None:
        """Its peer is gone. A fault of ours in one transfer keeps the news from no other."""
        try:
            self.feed(key, PeerGone(reason))
        except Exception:
            log.exception("transfer %s epoch %d cannot be ended", key.transfer_id, key.epoch)

    def take(self, message: TransferMessage | Refused) -> TransferMessage | None:
        """Route a peer's message. Returns the answer when its transfer is over or was never known here."""
        named = message if isinstance(message, Refused) else message.header
        key = AttemptKey(named.transfer_id, named.epoch)
        if key in self._live:
            self.feed(key, MessageArrived(message))
            return None
        if isinstance(message, Refused):
            return None
        if self._tombstones.knows((key.transfer_id, key.epoch)):
            return self._tombstones.answer(message, 0)
        return answer_unknown(message, self._me, 0)

    def is_buried(self, key: AttemptKey) -> bool:
        return self._tombstones.knows((key.transfer_id, key.epoch))

    def knows(self, key: AttemptKey) -> bool:
        """Is this attempt live here, or over and not forgotten? Then nothing may start it (again)."""
        return key in self._live or self.is_buried(key)

    async def tick(self) -> None:
        """Run until cancelled: wake cores whose time has come."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for key, transfer in list(self._live.items()):
                wakeup = transfer.next_wakeup()
                if wakeup is not None and wakeup <= now:
                    self.feed(key, Tick())
            self._tombstones.expire(now)

    def _bury(self, key: AttemptKey, transfer: Transfer, until: float) -> None:
        self._live.pop(key, None)
        self._tombstones.add((key.transfer_id, key.epoch), transfer.peer, transfer.last_word, until)
