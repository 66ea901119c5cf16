"""Messages to bytes and back: msgpack `[major, minor, tag, {field: value}]`.

Within one major version fields and messages may be added: a reader ignores fields it does not know and takes the
default of those it misses. Another major is refused, naming both. Tags are written down here, one per message, and
never reused; field types come from the dataclasses themselves, so there is no second description to keep in step.
Whatever the bytes are, `decode` returns a valid message or raises `RemoteProtocolError`; that of another major is a
`ProtocolDiffers`, which says more than that nothing can be read.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack

from disagg.transceiver.wire.errors import LocalProtocolError, ProtocolDiffers, RemoteProtocolError
from disagg.transceiver.wire.messages import peer, router
from disagg.transceiver.wire.messages.peer import PeerMessage
from disagg.transceiver.wire.messages.router import RouterMessage
from disagg.transceiver.wire.schema import Record, ShapeError

Message = PeerMessage | RouterMessage

PROTOCOL: Final = (2, 0)
"""(major, minor). Identity carries the major: workers of another one are refused by name."""

MAX_MESSAGE_NBYTES: Final = 16 << 20
"""The largest legal message is DONE of 2**20 tokens, the longest context of a published model: at 16 tokens per block
and two layer groups 131072 manifest entries of at most 75 bytes, 9.4 MiB. DISPATCH of the same prompt has 2**20 token
ids of 4 bytes, 4 MiB. 16 MiB holds both with room for later fields."""

MAX_MANIFEST_ENTRIES: Final = (MAX_MESSAGE_NBYTES - (64 << 10)) // 75
"""More units than one DONE can name are not fetched in one transfer: 222 822. An entry has at most 75 bytes; 64 KiB are
for the rest, a first token with its logprobs."""

TAGS: Final[dict[int, type]] = {
    1: peer.Hello,
    2: peer.Welcome,
    3: peer.Refused,
    4: peer.Fetch,
    5: peer.Accepted,
    6: peer.Slice,
    7: peer.Received,
    8: peer.Done,
    9: peer.Failed,
    10: peer.Cancelled,
    11: peer.Ack,
    12: peer.Cancel,
    13: peer.Closed,
    14: peer.Heartbeat,
    32: router.Register,
    33: router.Registered,
    34: router.Peers,
    35: router.Lease,
    36: router.Dispatch,
    37: router.Tokens,
    38: router.Finished,
    39: router.RequestFailed,
    40: router.TransferFailure,
    41: router.Retarget,
    42: router.PrefillLocally,
    43: router.CancelRequest,
    44: router.TransferReport,
    45: router.Pulse,
}

_SHAPES: Final = {tag: Record(kind) for tag, kind in TAGS.items()}
_TAG_OF: Final = {kind: tag for tag, kind in TAGS.items()}


def encode(message: Message) -> bytes:
    """The bytes of `message`. Raises `LocalProtocolError` when a field has another type or the message is too large."""
    tag = _TAG_OF.get(type(message))
    if tag is None:
        raise LocalProtocolError(f"{type(message).__name__} is no message of the protocol")
    try:
        data = msgpack.packb([*PROTOCOL, tag, _SHAPES[tag].write(message, type(message).__name__)])
    except (ShapeError, OverflowError, UnicodeEncodeError) as exc:
        raise LocalProtocolError(f"cannot encode {type(message).__name__}: {exc}") from exc
    if len(data) > MAX_MESSAGE_NBYTES:
        raise LocalProtocolError(f"{type(message).__name__}: {len(data)} bytes, at most {MAX_MESSAGE_NBYTES}")
    return bytes(data)


def decode(data: bytes | memoryview) -> Any:
    """The message in `data`, an instance of one of `TAGS`. Raises `RemoteProtocolError` and nothing else."""
    tag, body = _envelope(_unpack(data))
    shape = _SHAPES.get(tag)
    if shape is None:
        raise RemoteProtocolError(f"message tag {tag} is unknown to protocol {PROTOCOL[0]}.{PROTOCOL[1]}")
    try:
        return shape.read(body, shape.kind.__name__)
    except ShapeError as exc:
        raise RemoteProtocolError(f"malformed message: {exc}") from exc


def _unpack(data: bytes | memoryview) -> Any:
    if len(data) > MAX_MESSAGE_NBYTES:
        raise RemoteProtocolError(f"message of {len(data)} bytes, at most {MAX_MESSAGE_NBYTES}")
    try:
        return msgpack.unpackb(data)
    # msgpack documents ValueError for bad input; the others are what hostile nesting, keys, sizes and timestamps yield.
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as exc:
        raise RemoteProtocolError(f"not msgpack: {type(exc).__name__}") from exc


def _envelope(value: Any) -> tuple[int, Any]:
    if type(value) is not list or len(value) != 4 or any(type(part) is not int for part in value[:3]):
        raise RemoteProtocolError("not a message: expected [major, minor, tag, fields]")
    major, minor, tag, body = value
    if major != PROTOCOL[0]:
        raise ProtocolDiffers(f"{PROTOCOL[0]}.{PROTOCOL[1]}", f"{major}.{minor}")
    return tag, body
