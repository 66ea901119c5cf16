"""Which attempts of one registration are live, and which requests they are of."""

from __future__ import annotations

from disagg.engine.commands import AttemptKey
from disagg.transceiver.peers.decode_side import ReceivingSide
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.wire.messages.router import Dispatch
from disagg.worker.request_state import RequestState


class LiveAttempts:
    """What is asked of them; `Attempts` says what becomes of each."""

    def __init__(self) -> None:
        self._live: dict[AttemptKey, RequestState] = {}
        self._requests: dict[str, Dispatch] = {}
        self._suspects: dict[AttemptKey, bool] = {}
        """Attempts whose sources are hashed again first: True once the transfer needs them no more."""
        self.sending: SendingSide | None = None
        self.receiving: ReceivingSide | None = None

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._live

    def num_known(self, key: AttemptKey) -> int | None:
        """Tokens that a live attempt's transfer covers; None for another transfer."""
        state = self._live.get(key)
        return state.dispatch.num_known if state is not None else None

    def take_pressed(self) -> tuple[tuple[str, int], ...]:
        """Answers that are preempted next unless another worker takes them over, each told once."""
        return tuple(state.told_pressed() for state in self._live.values() if state.is_pressed)

    @property
    def keys(self) -> tuple[AttemptKey, ...]:
        return tuple(self._live)

    @property
    def held(self) -> tuple[AttemptKey, ...]:
        """Attempts of which the engine may hold blocks, with those that are over but have blocks to be hashed again."""
        return tuple({*self._live, *self._suspects})

    @property
    def num_open(self) -> int:
        """Requests that this worker has a part in still, those included whose next attempt the router decides on."""
        held = self.receiving.held if self.receiving is not None else ()
        return len({*self._requests, *(key.transfer_id for key in held)})

    def _was_here(self, key: AttemptKey) -> bool:
        """Its transfer may still be stopping, long after the attempt was cancelled."""
        sides = (self.sending, self.receiving)
        return any(side is not None and side.knows(key) for side in sides)

    def _newest(self, transfer_id: str) -> RequestState | None:
        """The last attempt of a request that is live here."""
        keys = [key for key in self._live if key.transfer_id == transfer_id]
        return self._live[max(keys)] if keys else None

    def _drop_request(self, transfer_id: str) -> None:
        if not any(key.transfer_id == transfer_id for key in self._live):
            self._requests.pop(transfer_id, None)
