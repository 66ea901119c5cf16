"""Prefixes that this worker lends: granted by the router, named by this worker, fetched by another that computes.

GRANT -> blocks named, off the loop -> a sender waits for its FETCH -> the engine finds what is cached -> hashed where
that was not done yet -> SLICE, DONE. What is lent is held by nothing: the engine says when it is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from disagg.cache.identity import BlockHasher
from disagg.engine.commands import AttemptKey, Command, LendPrefix, Release, Unregister
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.protocol.actions import AskPrefix
from disagg.transceiver.protocol.events import CancelAsked
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages.router import Dispatch, Grant
from disagg.transceiver.wire.messages.values import Geometry, Sampling, UnitName
from disagg.transceiver.wire.purposes import PREFIX
from disagg.worker.pairing import Pairing

log = logging.getLogger(__name__)

MAX_GRANTS: Final = 4096
"""As many requests as a large fleet's router has under way for one source; a grant of 8,192 tokens takes 300 KB. One
beyond is not served: its sink computes."""


class PrefixSources:
    """The grants of one registration; host of its senders of prefixes. Event loop only."""

    def __init__(
        self,
        pair: Callable[[Dispatch], Pairing],
        hasher: BlockHasher,
        block_size: int,
        submit: Callable[[Command], None],
        count_digest_failure: Callable[[int], None],
    ) -> None:
        self._pair, self._hasher, self._block_size = pair, hasher, block_size
        self._submit, self._count_digest_failure = submit, count_digest_failure
        self._granted: dict[AttemptKey, tuple[Grant, Pairing]] = {}
        self.sending: SendingSide

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._granted

    def __iter__(self) -> Iterator[AttemptKey]:
        return iter(self._granted)

    def peer_geometry(self, key: AttemptKey) -> Geometry:
        """How the sink of a live grant lays out its cache."""
        return self._granted[key][1].peer_geometry

    def grant(self, grant: Grant) -> None:
        """Name the blocks of the granted tokens, then wait for their FETCH."""
        key, pairing = AttemptKey(grant.transfer_id, grant.epoch), self._pair(_dispatch_of(grant))
        if key in self._granted or self.sending.knows(key) or len(self._granted) >= MAX_GRANTS:
            return
        if grant.purpose != PREFIX or not grant.tokens or not pairing.is_exact:
            log.warning("ignored a grant of %d tokens for %s", len(grant.tokens), grant.purpose)
            return
        self._granted[key] = grant, pairing
        named = asyncio.get_running_loop().run_in_executor(
            None, self._hasher.chain, grant.tokens, self._block_size, grant.salt
        )
        named.add_done_callback(partial(self._start, key))

    def _start(self, key: AttemptKey, named: asyncio.Future[tuple[bytes, ...]]) -> None:
        if key not in self._granted or named.cancelled():  # withdrawn meanwhile
            return
        self.sending.start(key, self._granted[key][1].prefix_sender(named.result()), self)

    def withdraw(self, transfer_id: str, reason: str) -> None:
        """The router needs this transfer no more. One that is under way ends."""
        for key in [key for key in self._granted if key.transfer_id == transfer_id]:
            if key in self.sending:
                self.sending.feed(key, CancelAsked(reason))
            else:
                self._granted.pop(key)

    def evicted(self, key: AttemptKey) -> None:
        """What is being sent is gone."""
        self.sending.feed(key, CancelAsked(reasons.EVICTED))

    # --- from the senders -------------------------------------------------------------------------------------

    def lend(self, key: AttemptKey, asked: AskPrefix) -> None:
        grant, pairing = self._granted[key]
        size = pairing.peer_geometry.block_size
        self._submit(LendPrefix(key, grant.tokens, grant.salt, asked.held, size))

    def release_source(self, key: AttemptKey, reason: str) -> None:
        log.debug("prefix released: %s", reason)
        self._granted.pop(key, None)
        self._submit(Release(key))

    def unregister(self, key: AttemptKey, units: Sequence[UnitName]) -> None:
        log.error("the sink's digests disagree for %d blocks of the prefix %s", len(units), key.transfer_id)
        self._count_digest_failure(len(units))
        self._submit(Unregister(key, tuple(units)))


def _dispatch_of(grant: Grant) -> Dispatch:
    """As if these tokens were a prompt to be handed over: what a pairing is made of."""
    facts = (grant.transfer_id, grant.epoch, grant.request, "prefill", grant.tokens, Sampling(1), grant.ttl_s)
    return Dispatch(*facts, peer=grant.sink)
