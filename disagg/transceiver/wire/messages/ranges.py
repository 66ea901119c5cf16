"""What values of the wire may be: bounds with their reasons, and checks that name the field.

A bound is far above what any deployment has, and low enough that nothing which is computed from a legal value takes
long, overflows or divides by zero. Checks raise `ValueError` with the field, the value and what was expected; a decoder
turns that into `RemoteProtocolError` and puts the path before it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sized
from typing import Final

from disagg.transceiver.wire.errors import clipped

MAX_INT32: Final = 2**31 - 1
"""Token ids, lengths, epochs, slice numbers, windows: kernels and frames hold them in 32 bits."""

MAX_INT64: Final = 2**63 - 1
"""Bytes, generations, sequence numbers: numpy holds them in int64."""

MAX_UINT64: Final = 2**64 - 1
"""Digests."""

MAX_PORT: Final = 65535
"""Of TCP."""

MAX_NAME_CHARS: Final = 256
"""Ids have 32 characters, names that operators give a few dozen; a DNS name has at most 253."""

MAX_ADDRESS_CHARS: Final = 1024
"""tcp://HOST:PORT; a unix socket's path has 108."""

MAX_TEXT_CHARS: Final = 1 << 16
"""Reasons and descriptions: sentences, or what a model attends to, layer by layer. Clipped where they are told. Three
of them, of four bytes a character, fit into one message."""

MAX_SECRET_NBYTES: Final = 256
"""Tokens and nonces have 16 bytes, MACs 32, tickets 32 and a few numbers."""

MAX_GROUPS: Final = 256
"""Layer groups of one model: published ones have at most a handful of kinds of attention."""

MAX_LAYERS: Final = 4096
"""Of one model: the deepest published one has 126."""

MAX_HEADS: Final = 1 << 16
MAX_HEAD_DIM: Final = 1 << 16
"""Both 2**16: published models have at most 128 KV heads and 1,024 numbers per head."""

MAX_BLOCK_SIZE: Final = 1 << 16
"""Tokens per block: engines use 16 to 1,024."""

MAX_RANKS: Final = 4096
"""Per worker and direction; far above any that exists, and small enough that a claim costs nothing to look at."""

MAX_SLOT_NBYTES: Final = 1 << 40
"""1 TiB: one slot is never more than a machine's memory."""

MAX_ORDINAL: Final = 1 << 24
"""Blocks of one sequence: 16 million tokens at one token per block, above the longest context of any model."""

MAX_UNITS: Final = (1 << 16) + (1 << 13)
"""Units that one message, and so one transfer, names: 2**20 tokens, the longest context of a published model, at 16
tokens per block in one group of full attention, and 8,192 blocks for the windows of the other groups."""

MAX_RUNS: Final = 2048
"""Of one FETCH: blocks are fetched in one or two runs per group. Reading and judging so many takes 4 ms."""

MAX_SLICE_RUNS: Final = 512
MAX_SLICE_UNITS: Final = 4096
"""Of one SLICE: 32 MiB of units of 8 KiB; its sender cuts a slice of smaller or scattered ones earlier. Reading and
landing so many takes 4 ms of the loop."""

MAX_NAMED_UNITS: Final = 1024
"""In a report of a failure. Where more are wrong none is named, which says that each of them may be."""

MAX_NAMED_TRANSFERS: Final = 2048
"""In one heartbeat, 2 ms of reading; a peer that has more says several."""

MAX_ITEMS: Final = 1 << 14
"""Rows of one step, ids of a model's end tokens: several times those of the largest batch and vocabulary."""

MAX_LEASED: Final = 512
"""Attempts that one lease or pulse names, 0.5 ms of reading; a worker with more names them in turn."""

MAX_LINKS: Final = 384
"""In one lease, 1.5 ms of reading: a decode worker has 255 introduced ones at most, and 64 that requests made."""

MAX_SAMPLES: Final = 400
"""In one lease, 2.5 ms of reading: a worker with four layer groups has some 90 figures, and one of each link."""

MAX_PEERS: Final = 512
"""In one PEERS, 2 ms of reading; a router with more tells them in several."""

MAX_PLANES: Final = 16
"""There are four."""

MAX_PURPOSES: Final = 16
"""There are three."""


def fail(name: str, value: object, expected: str) -> None:
    raise ValueError(f"{name}: {clipped(repr(value))}, expected {expected}")


def check_int(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        fail(name, value, f"{low} to {high}")


def check_ints(name: str, values: Collection[int], low: int, high: int) -> None:
    """Each of them; in C, since a prompt has up to a million."""
    if values and not (low <= min(values) and max(values) <= high):
        fail(name, min(values) if min(values) < low else max(values), f"{low} to {high} each")


def check_size(name: str, value: Sized, high: int, low: int = 0) -> None:
    """Of a text its characters, of bytes their number, of a list its items."""
    if not low <= len(value) <= high:
        fail(name, f"{len(value)} long", f"a length of {low} to {high}")


def check_id(name: str, value: str) -> None:
    check_size(name, value, MAX_NAME_CHARS, 1)


def check_id_lengths(name: str, values: Collection[str]) -> None:
    """Each of them an id; in C, since a step has hundreds."""
    if values and not (min(map(len, values)) >= 1 and max(map(len, values)) <= MAX_NAME_CHARS):
        fail(name, sorted(values, key=len)[0 if "" in values else -1], f"ids of 1 to {MAX_NAME_CHARS} characters")


def check_names(name: str, values: Iterable[str], limit: int = MAX_NAME_CHARS) -> None:
    for value in values:
        check_size(name, value, limit)


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        fail(name, value, "a finite number")


def check_duration(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        fail(name, value, "a finite duration above 0")


def check_one_of(name: str, value: str, legal: Collection[str]) -> None:
    if value not in legal:
        fail(name, value, f"one of {', '.join(legal)}")


def check_transfers(name: str, values: Collection[tuple[str, int]], most: int) -> None:
    """(transfer id, epoch) of live attempts."""
    check_size(name, values, most)
    for transfer_id, epoch in values:
        check_id(name, transfer_id)
        check_int(name, epoch, 0, MAX_INT32)


def check_attempt(transfer_id: str, epoch: int) -> None:
    check_id("transfer_id", transfer_id)
    check_int("epoch", epoch, 0, MAX_INT32)
