"""Tickets: the router's permission for exactly one transfer (protocol.md section 8).

ticket = HMAC-SHA256(key, transfer, epoch, prefill and decode incarnation, prompt hash, ttl_s), and where an answer goes
on, the hash of its tokens so far. The router mints it, the decode worker carries it in FETCH, the prefill worker
recomputes it from what the router itself delivered. It names no time: each worker counts `ttl_s` from its own receipt
of DISPATCH, so no two clocks are compared.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import blake2b, sha256

import msgpack
import numpy as np

from disagg.transceiver.wire.errors import TicketRefused


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


def prompt_hash(prompt: Sequence[int]) -> bytes:
    """blake2b-128 over the token ids as little-endian int32, so that two prompts never share a ticket.

    An id that no message can carry is hashed as int64 with its prompt: what refuses it is the message.
    """
    try:
        ids = np.asarray(prompt, dtype="<i4")
    except OverflowError:
        ids = np.asarray(prompt, dtype="<i8")
    return blake2b(ids.tobytes(), digest_size=16).digest()
