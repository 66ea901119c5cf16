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
from disagg.transceiver.wire.messages import blocks, peer, router, tokens
from disagg.transceiver.wire.messages.peer import PeerMessage
from disagg.transceiver.wire.messages.ranges import MAX_UNITS
from disagg.transceiver.wire.messages.router import RouterMessage
from disagg.transceiver.wire.schema import Record, ShapeError
from disagg.transceiver.wire.sizes import MAX_FIELDS, MAX_MESSAGE_NBYTES, Contents, limit_of

Message = PeerMessage | RouterMessage

PROTOCOL: Final = (2, 1)
"""(major, minor). Identity carries the major: workers of another one are refused by name. 2.1 has purposes; a worker of
2.0 names none, and is asked for handoffs alone."""

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
    37: tokens.StepTokens,
    38: router.Finished,
    39: router.RequestFailed,
    40: router.TransferFailure,
    41: router.Retarget,
    42: router.PrefillLocally,
    43: router.CancelRequest,
    44: router.TransferReport,
    45: router.Pulse,
    46: tokens.TokenCredit,
    47: router.PromptScores,
    48: router.CancelChoice,
    49: router.Grant,
    50: router.Resume,
    56: blocks.BlockEvents,
    57: blocks.AskBlocks,
}

HEAD_NBYTES: Final = 32
"""The head of an array and three integers have at most 5 + 3 * 9."""

_NO_MESSAGE: Final = "not a message: expected [major, minor, tag, fields]"
_UNREADABLE: Final = (
    ValueError,  # msgpack documents it for bad input; the others are what hostile nesting, keys and sizes yield
    TypeError,
    OverflowError,
    RecursionError,
    MemoryError,
    msgpack.UnpackException,
)

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
    most = min(limit_of(type(message)).nbytes, MAX_MESSAGE_NBYTES)
    if len(data) > most:
        raise LocalProtocolError(f"{type(message).__name__}: {len(data)} bytes, at most {most}")
    return bytes(data)


def decode(data: bytes | memoryview) -> Any:
    """The message in `data`, an instance of one of `TAGS`. Raises `RemoteProtocolError` and nothing else.

    The tag is read first: what is too large for its kind is refused before any of it is built.
    """
    if len(data) > MAX_MESSAGE_NBYTES:
        raise RemoteProtocolError(f"message of {len(data)} bytes, at most {MAX_MESSAGE_NBYTES}")
    tag = _tag(data[:HEAD_NBYTES])
    shape = _SHAPES.get(tag)
    if shape is None:
        raise RemoteProtocolError(f"message tag {tag} is unknown to protocol {PROTOCOL[0]}.{PROTOCOL[1]}")
    body = _unpack(data, shape.kind)[3]
    try:
        return shape.read(body, shape.kind.__name__)
    except ShapeError as exc:
        raise RemoteProtocolError(f"malformed message: {exc}") from exc


def _tag(head: bytes | memoryview) -> int:
    unpacker = msgpack.Unpacker(read_size=HEAD_NBYTES, max_buffer_size=HEAD_NBYTES)
    unpacker.feed(head)
    try:
        num_parts = unpacker.read_array_header()
        parts = [unpacker.unpack() for _ in range(3)]
    except _UNREADABLE as exc:
        raise RemoteProtocolError(f"{_NO_MESSAGE}: {type(exc).__name__}") from exc
    if num_parts != 4 or any(type(part) is not int for part in parts):
        raise RemoteProtocolError(_NO_MESSAGE)
    major, minor, tag = parts
    if major != PROTOCOL[0]:
        raise ProtocolDiffers(f"{PROTOCOL[0]}.{PROTOCOL[1]}", f"{major}.{minor}")
    return int(tag)


def _unpack(data: bytes | memoryview, kind: type) -> Any:
    limit = limit_of(kind)
    if len(data) > limit.nbytes:
        raise RemoteProtocolError(f"{kind.__name__}: {len(data)} bytes, at most {limit.nbytes}")
    count = Contents(limit).add
    try:
        return msgpack.unpackb(
            data, list_hook=count, object_hook=count, max_array_len=MAX_UNITS, max_map_len=MAX_FIELDS
        )
    except _UNREADABLE as exc:
        raise RemoteProtocolError(f"{kind.__name__}: not msgpack of its limits: {type(exc).__name__}: {exc}") from exc
