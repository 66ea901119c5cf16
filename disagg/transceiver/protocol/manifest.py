"""What DONE proves: the digests of exactly these units belong to exactly this transfer (protocol.md section 6).

mac = blake2b-256, keyed with the cluster's manifest key, over transfer, epoch, both incarnations, rank, num_ranks,
num_slices, every group's rectangle, ordinals and digests, and the first token with its logprobs and sampling state. A
digest alone proves that bytes are what was hashed; the MAC proves that they are this request's, of this attempt.

Each purpose has a label of its own (blake2b's `person`), so that no DONE of one is ever one of another. Those of legs
bind purpose, boundary, tip and precision too; those of handoffs the precision where the source's own format is not all.
"""

from __future__ import annotations

import hmac
from dataclasses import replace
from hashlib import blake2b
from typing import Any, Final

import msgpack

from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.peer import Done, Header
from disagg.transceiver.wire.messages.values import FirstToken, OtherFirst, TokenLogprobs
from disagg.transceiver.wire.purposes import HANDOFF, MOVE, PREFIX

LABELS: Final = {HANDOFF: b"disagg-manifest", PREFIX: b"disagg-prefix", MOVE: b"disagg-move"}


def seal(
    key: bytes,
    header: Header,
    *,
    rank: int,
    num_ranks: int,
    num_slices: int,
    manifest: tuple[GroupDigests, ...],
    first_token: FirstToken | None,
    purpose: str = HANDOFF,
    boundary: int = 0,
    tip: bytes = b"",
    precision: str = "",
) -> Done:
    """DONE with its MAC. `header.source` is the sender's incarnation, `header.destination` the receiver's.

    `tip`: the identity of the block that ends at the boundary. It is not sent: both ends know it.
    """
    done = Done(header, rank, num_ranks, num_slices, manifest, first_token, b"", purpose, boundary, precision)
    return replace(done, mac=_mac(key, done, tip))


def is_sealed(key: bytes, done: Done, tip: bytes = b"") -> bool:
    """Does the MAC hold? Takes the same time either way."""
    return hmac.compare_digest(_mac(key, done, tip), done.mac)


def _mac(key: bytes, done: Done, tip: bytes) -> bytes:
    bound = _canonical(done)
    if done.purpose != HANDOFF:
        bound += [done.purpose, done.boundary, tip, done.precision]
    elif done.precision:
        bound.append(done.precision)
    return blake2b(msgpack.packb(bound), key=key, digest_size=32, person=LABELS[done.purpose]).digest()


def _canonical(done: Done) -> list[Any]:
    """Everything the MAC binds, as arrays by position: msgpack writes each scalar in one way, with its length.

    Not the sequence number of the header: a repeat of DONE is the same DONE.
    """
    ids = done.header
    return [
        [ids.transfer_id, ids.epoch, ids.source, ids.destination],
        [done.rank, done.num_ranks, done.num_slices],
        [[entry.group, entry.rectangle, entry.ordinals, entry.digests] for entry in done.manifest],
        _canonical_token(done.first_token),
    ]


def _canonical_token(token: FirstToken | None) -> list[Any] | None:
    if token is None:
        return None
    logprobs = _canonical_logprobs(token.logprobs)
    state = [token.state.version, token.state.seed, token.state.output_counts]
    others = [_canonical_other(other) for other in token.others]
    return [token.token_id, logprobs, state, token.num_cached_tokens, *([others] if others else [])]


def _canonical_other(other: OtherFirst) -> list[Any]:
    return [other.token_id, _canonical_logprobs(other.logprobs)]


def _canonical_logprobs(logprobs: TokenLogprobs | None) -> list[Any] | None:
    # float(): the codec turns integers in float fields into floats on the way, and 0 packs differently from 0.0.
    return None if logprobs is None else [float(logprobs.logprob), [(i, float(x)) for i, x in logprobs.top]]
