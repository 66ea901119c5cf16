"""Cached blocks as vLLM 0.32.0 publishes them: the same messages, so that its subscribers read ours.

    frames   topic | sequence, 8 bytes, big-endian | msgpack [time, [event, ...], None]
    event    {"type": "BlockStored" | "BlockRemoved" | "AllBlocksCleared", ...}, of one layer group

A block's hash is a keyed hash of its identity, under a key of its own: it is no name that the data plane takes, and
says nothing of the tokens to a subscriber without the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import msgpack
import numpy as np

from disagg.router.index.block_index import GroupSpan
from disagg.transceiver.wire.messages.blocks import (
    BLOCK_NAME_NBYTES,
    DROPPED,
    NUM_KINDS,
    STORED_BEHIND,
    STORED_FIRST,
    STORED_NEXT,
    TOKEN_NBYTES,
    BlockEvents,
)

CLEARED: dict[str, Any] = {"type": "AllBlocksCleared"}


def event_hasher(key: bytes) -> Callable[[bytes], bytes]:
    """identity -> the hash that is published of it, 16 bytes."""
    keyed = blake2b(key=key, digest_size=BLOCK_NAME_NBYTES, person=b"disagg-kvevent")

    def hashed(identity: bytes) -> bytes:
        state = keyed.copy()
        state.update(identity)
        return state.digest()

    return hashed


def payload_of(now: float, events: Sequence[dict[str, Any]]) -> bytes:
    """`now`: seconds since the epoch."""
    data: bytes = msgpack.packb([now, events, None])
    return data


def published(
    events: BlockEvents, groups: Sequence[GroupSpan], medium: str, hashed: Callable[[bytes], bytes]
) -> list[dict[str, Any]]:
    """What a worker told, in the published form: a chain of blocks is one event for each of its groups."""
    told = [CLEARED] if events.is_reset else []
    for run in _runs(events):
        told += [_event(run, group, groups[group], events.block_size, medium, hashed) for group in run.groups]
    return told


@dataclass(slots=True)
class _Run:
    """Consecutive events that make one: drops, or stores of which each follows the one before. `parent` b"": none."""

    is_stored: bool
    groups: tuple[int, ...]
    parent: bytes = b""
    identities: list[bytes] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)


def _runs(events: BlockEvents) -> Iterator[_Run]:
    names, before, run = events.identities, b"", _Run(is_stored=False, groups=())
    parents = _pieces(events.parents, BLOCK_NAME_NBYTES)
    tokens = _pieces(events.tokens, TOKEN_NBYTES * events.block_size)
    for identity, op in zip(_pieces(names, BLOCK_NAME_NBYTES), events.ops, strict=True):
        groups, kind = events.group_sets[op // NUM_KINDS], op % NUM_KINDS
        parent = {STORED_NEXT: before, STORED_BEHIND: b"", STORED_FIRST: b"", DROPPED: b""}[kind]
        if kind == STORED_BEHIND:
            parent = next(parents)
        goes_on = kind == STORED_NEXT if run.is_stored else kind == DROPPED
        if run.groups != groups or not goes_on:
            if run.identities:
                yield run
            run = _Run(is_stored=kind != DROPPED, groups=groups, parent=parent)
        run.identities.append(identity)
        if kind != DROPPED and events.tokens:
            run.tokens.append(next(tokens))
        before = identity
    if run.identities:
        yield run


def _event(
    run: _Run, number: int, group: GroupSpan, block_size: int, medium: str, hashed: Callable[[bytes], bytes]
) -> dict[str, Any]:
    hashes = [hashed(identity) for identity in run.identities]
    if not run.is_stored:
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium, "group_idx": number}
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": hashed(run.parent) if run.parent else None,
        "token_ids": np.frombuffer(b"".join(run.tokens), dtype="<i4").tolist(),
        "block_size": block_size,
        "lora_id": None,
        "medium": medium,
        "lora_name": None,
        "group_idx": number,
        "kv_cache_spec_kind": "full_attention" if group.window is None else "sliding_window",
        "kv_cache_spec_sliding_window": group.window,
    }


def _pieces(data: bytes, nbytes: int) -> Iterator[bytes]:
    return (data[at : at + nbytes] for at in range(0, len(data), nbytes))
