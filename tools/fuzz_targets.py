"""What is fuzzed: one function of bytes per reader. Each raises nothing but what its reader documents, whatever comes.

Bytes for a core are a script: messages are encoded, then decoded, as on the wire; their fields, the times between them
and the events of this process are drawn from the script. A receiver that is fuzzed knows no key of the fuzzer's, so it
must never be licensed to decode; that is asserted. What two workers say of themselves is drawn field by field.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar, cast

import numpy as np

from disagg.transceiver.layout.ranks import Part, natural_slot_nbytes
from disagg.transceiver.layout.units import HashedUnit
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.peers.link import PeerLink, PeerRefused
from disagg.transceiver.peers.prefill_side import PromptHost, SendingSide
from disagg.transceiver.planes import greeting
from disagg.transceiver.planes import slice_stream as tcp_wire
from disagg.transceiver.planes.inproc import InprocHub, InprocLandingPlane
from disagg.transceiver.planes.zmq import frames
from disagg.transceiver.protocol import events as e
from disagg.transceiver.protocol.actions import Land, StopLanding, Verified
from disagg.transceiver.protocol.receiver import Order, Receiver
from disagg.transceiver.protocol.sender import Offer, Sender
from disagg.transceiver.protocol.state import State
from disagg.transceiver.protocol.transfer import Ends, Transfer
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.links import ControlServer
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.router import PeerTarget
from disagg.transceiver.wire.messages.values import (
    FirstToken,
    Geometry,
    GroupRuns,
    GroupSemantics,
    Identity,
    SamplingState,
    UnitName,
    UnitRun,
)
from disagg.transceiver.wire.node import Node
from disagg.transceiver.wire.sockets import Sockets

T = TypeVar("T")

KEYS: Final = ClusterKeys.from_secret(b"the secret of a fuzzed transfer!")
GEOMETRY: Final = Geometry(
    4, "float32", (GroupSemantics(None, 0, 2, 8, (0, 3)), GroupSemantics(8, 0, 2, 8, (1, 2))), (4096,)
)
IDENTITY: Final = Identity(1, "f" * 32, "attention", "float32", 200, KEYS.hash_key_id)
PAIRED: Final = replace(GEOMETRY, slot_nbytes=natural_slot_nbytes(GEOMETRY))
"""As `GEOMETRY`, with slots as large as its groups make them: what converts to another geometry must say so truly."""
REGIONS: Final = tuple(
    PoolRegion(np.zeros((4, nbytes), np.uint8), np.zeros(4, np.uint64), -1, 0) for nbytes in PAIRED.slot_nbytes
)
PROMPT: Final = tuple(range(26))
TRANSFER_ID, PREFILL, DECODE = "0123456789abcdef0123456789abcdef", "p" * 32, "d" * 32
PLANES: Final = {"shm": False, "zmq": True}
DEADLINE_S: Final = 60.0
FIRST: Final = FirstToken(7, None, SamplingState(11, ((7, 1),)), 0)
REQUIRED: Final = (GroupRuns(0, ((0, 7),)), GroupRuns(1, ((4, 3),)))
TICKET: Final = ticket.mint(
    KEYS.ticket, transfer_id=TRANSFER_ID, epoch=0, prefill=PREFILL, decode=DECODE, prompt=PROMPT, ttl_s=DEADLINE_S
)
ENDS: Final[tuple[e.Event, ...]] = (e.CancelAsked("cancelled"), e.PeerGone("gone"), e.ComputeFailed("failed"))
MAX_STEPS: Final = 64
"""Events of one script: a transfer of ten units that goes wrong in every way has fewer."""


# --- bytes --------------------------------------------------------------------------------------------------


def fuzz_codec(data: bytes) -> None:
    """What decodes must encode, and decode to itself: nothing else could be compared or repeated."""
    try:
        message = decode(data)
    except RemoteProtocolError:
        return
    try:
        again = encode(message)
    except LocalProtocolError:
        return  # larger by its defaults than a message may be
    assert encode(decode(again)) == again


def fuzz_tcp(data: bytes) -> None:
    """The greeting that a source reads, and the headers that a receiver reads."""
    with contextlib.suppress(ValueError):
        greeting.parse_greeting(data)
    size = tcp_wire.HEADER.size
    for start in range(0, len(data) - size + 1, size):
        try:
            header = tcp_wire.SliceHeader.parse(data[start : start + size])
            tcp_wire.check_size(header, 8 << 20)
        except RemoteProtocolError:
            continue
        assert header.pack() == data[start : start + size]


def fuzz_zmq(data: bytes) -> None:
    """The heads that either end of the zmq plane reads."""
    for message in (data, frames.seal(data)):  # no mutation finds a checksum
        try:
            head = frames.parse(message)
        except RemoteProtocolError:
            continue
        assert frames.pack(head) == message


# --- cores --------------------------------------------------------------------------------------------------


class Script:
    """Numbers drawn from bytes; zeros when they end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def is_over(self) -> bool:
        return self._at >= len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def small(self) -> int:
        """Mostly what a plan contains, sometimes anything."""
        value = self.byte()
        return value if value < 200 else self.wide()

    def wide(self) -> int:
        data = bytes(self.byte() for _ in range(8))
        return int(struct.unpack("<q", data)[0])

    def pick(self, options: Sequence[T]) -> T:
        return options[self.byte() % len(options)]


def fuzz_sender(data: bytes) -> None:
    script = Script(data)
    core = Sender(
        Ends(TRANSFER_ID, 0, PREFILL, DECODE),
        Offer(
            prompt=PROMPT,
            geometry=GEOMETRY,
            unit_nbytes=(4 << 20, 4 << 20),
            planes=PLANES,
            keys=KEYS,
            ttl_s=DEADLINE_S,
            part=Part.whole(GEOMETRY.groups),
        ),
        0.0,
    )
    _play(core, script, _sender_event)


def fuzz_receiver(data: bytes) -> None:
    script = Script(data)
    core = Receiver(
        Ends(TRANSFER_ID, 0, DECODE, PREFILL),
        Order(
            ticket=TICKET,
            plane=script.pick(("shm", "zmq")),
            geometry=GEOMETRY,
            keys=KEYS,
            deadline_s=DEADLINE_S,
            part=Part.whole(GEOMETRY.groups),
        ),
        0.0,
    )
    _play(core, script, _receiver_event)


def _play(core: Transfer, script: Script, draw: Callable[[Script], e.Event]) -> None:
    now, was_closed = 0.0, False
    for _ in range(MAX_STEPS):
        if script.is_over:
            break
        now += script.byte() / 16
        try:
            event = draw(script)
        except ValueError:  # a value that no reader would give to the core
            continue
        try:
            actions = core.handle(event, now)
        except (RemoteProtocolError, LocalProtocolError):
            continue
        assert not any(isinstance(action, Verified) for action in actions), "decoding what nobody sealed"
        assert not was_closed or core.is_over, "a transfer that is over began again"
        was_closed = core.is_over
        if any(isinstance(action, StopLanding) for action in actions):
            core.handle(e.LandingStopped(), now)
        if core.state is State.CLOSED:
            assert not any(isinstance(action, Land) for action in actions), "landing after the end"


def _wire(message: p.TransferMessage | p.Refused) -> e.MessageArrived:
    """As it arrives: through the codec. What cannot be encoded is replaced, since no peer could send it."""
    try:
        return e.MessageArrived(decode(encode(message)))
    except LocalProtocolError:
        return e.MessageArrived(p.Refused("field", "a", "b", transfer_id=TRANSFER_ID))


def _header(script: Script, source: str, destination: str) -> p.Header:
    odd = script.byte()
    if odd < 240:
        return p.Header(source, destination, TRANSFER_ID, 0, script.byte())
    changes = {240: (destination, source), 241: (source, source), 242: ("x", destination)}
    who = changes.get(odd, (source, destination))
    return p.Header(*who, TRANSFER_ID, script.small(), script.wide())


def _units(script: Script) -> tuple[UnitName, ...]:
    return tuple(UnitName(script.small(), script.small()) for _ in range(script.byte() % 4))


def _sender_event(script: Script) -> e.Event:
    header = _header(script, DECODE, PREFILL)
    match script.byte() % 16:
        case 0 | 1:
            return _wire(p.Fetch(header, TICKET, len(PROMPT), REQUIRED, script.pick(("shm", "zmq"))))
        case 2:
            count, admits = script.byte() % 4, script.pick((TICKET, b"", b"x"))
            runs = tuple(GroupRuns(script.small(), ((script.small(), script.small()),)) for _ in range(count))
            return _wire(p.Fetch(header, admits, script.small(), runs, script.pick(("shm", "x"))))
        case 3:
            return _wire(p.Received(header, script.small() - 1))
        case 4:
            return _wire(p.Ack(header))
        case 5:
            return _wire(p.Cancel(header, script.pick(("digest", "cancelled", "non_finite")), _units(script)))
        case 6:
            return e.Pinned(script.byte() % 3)
        case 7 | 8:
            ordinals = {0: range(7), 1: range(4, 7)}
            group = script.byte() % 2
            units = tuple(
                HashedUnit(group, o, 0, 10 + o, 3, script.byte()) for o in ordinals[group] if script.byte() % 4
            )
            return e.UnitsFinal(script.byte() % 3, units)
        case 9:
            return e.PromptComputed(script.byte() % 3, FIRST)
        case 10:
            return e.SoftDropped(script.byte() % 3)
        case 11:
            return e.FinishedEarly(script.byte() % 3)
        case 12:
            return script.pick(ENDS)
        case 13:
            return e.LeaseRenewed()
        case 14:
            return _wire(p.Refused(script.pick(("ticket", "stale_peer")), "a", "b", PREFILL, TRANSFER_ID))
        case _:
            return e.Tick()


def _receiver_event(script: Script) -> e.Event:
    header = _header(script, PREFILL, DECODE)
    match script.byte() % 16:
        case 0:
            return e.Reserved(REQUIRED, len(PROMPT))
        case 1:
            return _wire(p.Accepted(header, script.small()))
        case 2 | 3:
            return _wire(p.Slice(header, script.small(), tuple(_run(script) for _ in range(script.byte() % 4))))
        case 4:
            entries = tuple(_digests(script) for _ in range(script.byte() % 3))
            return _wire(p.Done(header, script.small(), script.small(), script.small(), entries, FIRST, b"mac"))
        case 5:
            return _wire(p.Failed(header, script.pick(("deadline", "failed")), _units(script)))
        case 6:
            return _wire(p.Cancelled(header, script.pick(("finished", "cancelled"))))
        case 7:
            return _wire(p.Closed(header))
        case 8:
            return _wire(p.Refused(script.pick(("ticket", "stale_peer")), "a", "b", DECODE, TRANSFER_ID))
        case 9 | 10:
            names = [(script.byte() % 2, script.small()) for _ in range(script.byte() % 5)]
            landed = tuple(e.LandedUnit(g, o, script.byte(), script.byte() != 0) for g, o in names)
            return e.SliceLanded(script.small(), landed)
        case 11:
            return e.LandingFailed(script.small(), script.pick(("source changed", "lost: gone")))
        case 12:
            return e.LandingStopped()
        case 13:
            return script.pick(ENDS[:2])
        case 14:
            return e.LeaseRenewed()
        case _:
            return e.Tick()


def _digests(script: Script) -> GroupDigests:
    named = {script.small(): script.byte() for _ in range(1 + script.byte() % 8)}
    return GroupDigests.of(script.small(), (0, 2, 0, 2), named)


def _run(script: Script) -> UnitRun:
    group, first, count = script.small(), script.small(), script.byte() % 8
    if script.byte() % 2:
        return UnitRun(group, first, count)
    return UnitRun(group, first, count, tuple(range(count)), tuple(range(2, 2 + count)))


# --- pairing ------------------------------------------------------------------------------------------------


def fuzz_hello(data: bytes) -> None:
    """What a prefill worker answers to a HELLO: a refusal that can be sent, or a WELCOME with units cut for it."""
    script = Script(data)
    node = Node(PREFILL, "prefill", IDENTITY, PAIRED, KEYS, joins_ranks=bool(script.byte() % 2))
    side = SendingSide(node, cast(ControlServer, None), {}, cast(PromptHost, None), REGIONS)
    planes = tuple(script.pick(("shm", "tcp", "")) for _ in range(script.byte() % 4))
    hello = _as_sent(p.Hello(DECODE, "decode", _identity(script), _geometry(script), planes))
    if isinstance(hello, p.Hello):
        side._answer_hello(b"route", hello)
        _, answer = side._outbox.get_nowait()
        decode(encode(answer))
        assert isinstance(answer, p.Welcome) == (DECODE in side._peers)


def fuzz_welcome(data: bytes) -> None:
    """What a decode worker makes of a WELCOME: it refuses the pair, or has a plane cut for it."""
    script = Script(data)
    node = Node(DECODE, "decode", IDENTITY, PAIRED, KEYS, joins_ranks=bool(script.byte() % 2))
    target = PeerTarget(PREFILL, "prefill", "tcp://127.0.0.1:1")
    link = PeerLink(node, target, {}, REGIONS, _nothing, _nothing, _nothing, cast(Sockets, None))
    welcome = _as_sent(p.Welcome(PREFILL, "prefill", _identity(script), _geometry(script), ()))
    with contextlib.suppress(PeerRefused, RemoteProtocolError):
        theirs = link._check_welcome(welcome).geometry
        plane, _ = link._suited(InprocLandingPlane(InprocHub()), theirs)
        assert (theirs == PAIRED) == isinstance(plane, InprocLandingPlane)


def _nothing(*_: Any) -> Any:
    return None


def _as_sent(message: p.PeerMessage) -> Any:
    """As it arrives; None where no peer could send it."""
    try:
        return decode(encode(message))
    except LocalProtocolError:
        return None


def _identity(script: Script) -> Identity:
    if script.byte() < 240:
        return IDENTITY
    return replace(IDENTITY, max_model_len=max(1, script.small()), adapter_ids=("x",) * script.byte())


def _geometry(script: Script) -> Geometry:
    """Ours with up to three fields drawn, mostly such as a worker may have; slots mostly as these make them."""
    drawn = PAIRED
    for _ in range(script.byte() % 4):
        name = script.pick(tuple(DRAWS))
        with contextlib.suppress(ValueError):  # no reader would take it
            drawn = replace(drawn, **{name: DRAWS[name](script)})
    if script.byte() % 4:
        with contextlib.suppress(ValueError, ArithmeticError, LookupError):  # of what contradicts itself
            drawn = replace(drawn, slot_nbytes=natural_slot_nbytes(drawn))
    return drawn


def _groups(script: Script) -> tuple[GroupSemantics, ...]:
    drawn = (script.small(), script.small(), script.small(), tuple(script.small() for _ in range(script.byte() % 4)))
    group = GroupSemantics(script.pick((None, 8, -1)), *drawn)
    return script.pick((PAIRED.groups[:1], (*PAIRED.groups, group), (PAIRED.groups[0], group), ()))


def _scales(script: Script) -> tuple[Any, ...]:
    scale = script.pick((1.0, 0.5, 0.0, -1.0, float("nan"), float("inf"), 1e300))
    num_heads, num_layers = script.pick((2, 1, 0)), script.pick((2, 3))
    return ((((scale,) * num_heads,) * 2,) * num_layers,) * script.pick((2, 1))


def _stages(script: Script) -> tuple[tuple[int, ...], ...]:
    odd = tuple(tuple(script.small() for _ in range(script.byte() % 4)) for _ in range(script.byte() % 3))
    return script.pick((((0, 1), (2, 3)), ((0, 1, 2, 3),), ((3, 2), (1, 0)), odd))


DRAWS: Final[dict[str, Callable[[Script], Any]]] = {
    "block_size": lambda script: script.pick((1, 2, 8, 16, 64, 3, 0, -4, 2**31, script.wide())),
    "kv_dtype": lambda script: script.pick(("bfloat16", "float16", "float8_e4m3fn", "float64", "float32,bfloat16", "")),
    "groups": _groups,
    "slot_nbytes": lambda script: tuple(script.wide() for _ in range(script.byte() % 3)),
    "tensor_parallel_size": lambda script: script.pick((1, 2, 4, 0, -1, script.wide())),
    "pipeline_parallel_size": lambda script: script.pick((1, 2, 0, script.wide())),
    "slot_layout": lambda script: script.pick((PAIRED.slot_layout, "layer-kv-token-head-dim")),
    "kv_scales": _scales,
    "stages": _stages,
    "rank": lambda script: script.pick((0, 1, 2, 3, -1, script.wide())),
}
"""How each field of a geometry is drawn."""


# --- all ----------------------------------------------------------------------------------------------------

TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "codec": fuzz_codec,
    "tcp": fuzz_tcp,
    "zmq": fuzz_zmq,
    "sender": fuzz_sender,
    "receiver": fuzz_receiver,
    "hello": fuzz_hello,
    "welcome": fuzz_welcome,
}


def seeds(target: str, golden: Sequence[bytes]) -> list[bytes]:
    """Inputs that are right, from which wrong ones are made."""
    if target == "codec":
        return list(golden)
    if target == "tcp":
        header = tcp_wire.SliceHeader(tcp_wire.wire_name(TRANSFER_ID, 1), 2, 4096)
        return [header.pack() * 2, greeting.greeting(PREFILL, bytes(16))]
    if target == "zmq":
        heads = (
            frames.DataHello(DECODE, bytes(16)),
            frames.Credit(3),
            frames.ProbeRequest(),
            frames.SliceHead("t", 1, 2, 4096),
        )
        return [data for head in heads for data in (frames.pack(head), frames.pack(head)[:-4])]
    return [bytes(range(start, start + 64)) for start in range(0, 192, 16)]
