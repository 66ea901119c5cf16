"""Tickets: the router's permission for exactly one transfer (protocol.md section 8).

ticket = HMAC-SHA256(key, transfer, epoch, prefill and decode incarnation, prompt hash, ttl_s), and where an answer goes
on, the hash of its tokens so far. The router mints it, the decode worker carries it in FETCH, the prefill worker
recomputes it from what the router itself delivered. It names no time: each worker counts `ttl_s` from its own receipt
of DISPATCH, so no two clocks are compared.

A leg (a transfer of another purpose than a handoff) has claims of its own, under a label of its purpose: no ticket of
one purpose is ever one of another.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256

import msgpack
import numpy as np

from disagg.transceiver.wire.errors import TicketRefused
from disagg.transceiver.wire.purposes import MOVE


def mint(
    key: bytes,
    *,
    transfer_id: str,
    epoch: int,
    prefill: str,
    decode: str,
    prompt: Sequence[int],
    ttl_s: float,
    output: Sequence[int] = (),
) -> bytes:
    """The 32-byte ticket. `prefill` and `decode` are incarnations, `prompt` and `output` ids, `ttl_s` its lifetime."""
    # A msgpack array of scalars is its own canonical form: fields carry their length, so none can run into the next.
    claims = ["ticket", transfer_id, epoch, prefill, decode, prompt_hash(prompt), float(ttl_s)]
    if len(output):
        claims.append(prompt_hash(output))
    return hmac.digest(key, msgpack.packb(claims), sha256)


def check(
    key: bytes,
    ticket: bytes,
    *,
    transfer_id: str,
    epoch: int,
    prefill: str,
    decode: str,
    prompt: Sequence[int],
    ttl_s: float,
    output: Sequence[int] = (),
) -> None:
    """Raises `TicketRefused` unless the router minted `ticket` for exactly this. Takes the same time either way."""
    expected = mint(
        key,
        transfer_id=transfer_id,
        epoch=epoch,
        prefill=prefill,
        decode=decode,
        prompt=prompt,
        ttl_s=ttl_s,
        output=output,
    )
    if not hmac.compare_digest(expected, ticket):
        raise TicketRefused(f"ticket of transfer {transfer_id} epoch {epoch} was not minted for it")


@dataclass(frozen=True, slots=True)
class LegClaims:
    """What the ticket of a leg permits: `transfer_id` is the leg's own, `request` that of the request it serves.

    `source` and `sink` are incarnations. For `move` see `move_claims`. For `prefix`, `boundary` is the number of tokens
    whose blocks may be asked for and `tip` the identity of the source's block that ends there, which stands for all
    tokens before it.
    """

    purpose: str
    transfer_id: str
    epoch: int
    request: str
    source: str
    sink: str
    boundary: int
    tip: bytes


def move_claims(
    leg: str, epoch: int, request: str, source: str, sink: str, prompt: Sequence[int], num_tokens: int
) -> LegClaims:
    """Of the move of an answer to `prompt` of which the router has `num_tokens`."""
    return LegClaims(MOVE, leg, epoch, request, source, sink, num_tokens, prompt_hash(prompt))


def mint_leg(key: bytes, claims: LegClaims, ttl_s: float) -> bytes:
    """The 32-byte ticket of a leg."""
    named = [claims.transfer_id, claims.epoch, claims.request, claims.source, claims.sink]
    bound = [claims.boundary, claims.tip, float(ttl_s)]
    return hmac.digest(key, msgpack.packb([f"ticket {claims.purpose}", *named, *bound]), sha256)


def is_leg_ticket(key: bytes, ticket: bytes, claims: LegClaims, ttl_s: float) -> bool:
    """Did the router mint `ticket` for exactly this? Takes the same time either way."""
    return hmac.compare_digest(mint_leg(key, claims, ttl_s), ticket)


def prompt_hash(prompt: Sequence[int]) -> bytes:
    """blake2b-128 over the token ids as little-endian int32, so that two prompts never share a ticket.

    An id that no message can carry is hashed as int64 with its prompt: what refuses it is the message.
    """
    try:
        ids = np.asarray(prompt, dtype="<i4")
    except OverflowError:
        ids = np.asarray(prompt, dtype="<i8")
    return blake2b(ids.tobytes(), digest_size=16).digest()
