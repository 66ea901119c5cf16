"""Cached blocks are published as vLLM 0.32.0 does: decoded here by that schema, written down as it was read there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
from support.cluster.router_harness import make_register
from support.event_loop import PATIENCE_S, in_event_loop, until

from disagg.cache.journal import BlockDropped, BlockEvent, BlockStored, JournalRestart
from disagg.config.errors import ConfigError
from disagg.config.event_keys import read_event_keys
from disagg.router.index import publisher
from disagg.router.index.block_index import GroupSpan
from disagg.router.index.published import event_hasher, payload_of, published
from disagg.router.index.publisher import END_SEQUENCE, KvEventsPublisher, PublishOptions
from disagg.router.index.remote import PrefixIndex
from disagg.transceiver.wire.errors import EndpointRefused
from disagg.worker.block_news import events_message

T = 4
GROUPS = (GroupSpan(None), GroupSpan(64))
HASHED = event_hasher(b"event key")
ANYWHERE = PublishOptions("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", b"event key", "demo")

REQUIRED = {
    "BlockStored": {
        "block_hashes": list,
        "parent_block_hash": (bytes, int, type(None)),
        "token_ids": list,
        "block_size": int,
        "lora_id": (int, type(None)),
        "medium": (str, type(None)),
        "lora_name": (str, type(None)),
    },
    "BlockRemoved": {"block_hashes": list, "medium": (str, type(None))},
    "AllBlocksCleared": {},
}
"""Fields without a default. An event is a map whose `type` names its kind, a batch an array."""
OPTIONAL = {
    "BlockStored": {"group_idx": int, "kv_cache_spec_kind": str, "kv_cache_spec_sliding_window": (int, type(None))},
    "BlockRemoved": {"group_idx": int},
    "AllBlocksCleared": {},
}


def read_batch(payload: bytes) -> list[dict[str, Any]]:
    """As a subscriber of that release reads it: types are checked, fields that it does not know would be ignored."""
    now, events, rank = msgpack.unpackb(payload)
    assert isinstance(now, float)
    assert rank is None
    for event in events:
        kind = event["type"]
        fields = REQUIRED[kind] | {k: v for k, v in OPTIONAL[kind].items() if k in event}
        assert event.keys() - {"type"} == fields.keys()
        for name, of in fields.items():
            assert isinstance(event[name], of), (kind, name, event[name])  # type: ignore[arg-type]
        assert all(isinstance(one, bytes) for one in event.get("block_hashes", ()))
    return events  # type: ignore[no-any-return]


@dataclass
class Subscriber:
    """Who follows the stream: what each worker holds, by topic and group, and which batches were missed."""

    held: dict[tuple[bytes, int], set[bytes]]
    expected: int = 0

    def take(self, topic: bytes, sequence: bytes, payload: bytes) -> None:
        assert int.from_bytes(sequence, "big") == self.expected, "a gap"
        self.expected += 1
        for event in read_batch(payload):
            if event["type"] == "AllBlocksCleared":
                self.held = {key: blocks for key, blocks in self.held.items() if key[0] != topic}
                continue
            blocks = self.held.setdefault((topic, event["group_idx"]), set())
            if event["type"] == "BlockStored":
                blocks |= set(event["block_hashes"])
            else:
                blocks -= set(event["block_hashes"])


def chain(*names: bytes) -> list[BlockEvent]:
    parents = [b"", *(n * 16 for n in names)]
    return [
        BlockStored(name * 16, (0, 1), parent, b"".join(t.to_bytes(8, "little") for t in range(T)))
        for name, parent in zip(names, parents, strict=False)
    ]


def told(events: Sequence[BlockEvent], *, tokens: bool = False) -> list[dict[str, Any]]:
    message = events_message("w", 0, T, events, tokens)
    return read_batch(payload_of(1.5, published(message, GROUPS, "CPU", HASHED)))


def test_a_chain_is_one_event_of_each_group_with_its_kind() -> None:
    full, window = told(chain(b"a", b"b", b"c"), tokens=True)
    assert full["block_hashes"] == [HASHED(b"a" * 16), HASHED(b"b" * 16), HASHED(b"c" * 16)]
    assert full["token_ids"] == [*range(T)] * 3
    assert (full["parent_block_hash"], full["block_size"], full["medium"]) == (None, T, "CPU")
    assert (full["group_idx"], full["kv_cache_spec_kind"]) == (0, "full_attention")
    assert (window["group_idx"], window["kv_cache_spec_sliding_window"]) == (1, 64)


def test_events_keep_their_order_and_name_their_parents() -> None:
    events = [
        *chain(b"a", b"b"),
        BlockDropped(b"b" * 16, (1,)),
        BlockDropped(b"a" * 16, (1,)),
        BlockStored(b"d" * 16, (0,), b"b" * 16, b""),
        BlockStored(b"e" * 16, (1,), b"d" * 16, b""),
    ]
    found = [(e["type"], e["group_idx"], len(e["block_hashes"]), e.get("parent_block_hash")) for e in told(events)]
    assert found == [
        ("BlockStored", 0, 2, None),
        ("BlockStored", 1, 2, None),
        ("BlockRemoved", 1, 2, None),
        ("BlockStored", 0, 1, HASHED(b"b" * 16)),
        ("BlockStored", 1, 1, HASHED(b"d" * 16)),
    ]


def test_token_ids_are_empty_unless_they_were_asked_for_and_hashes_are_no_identities() -> None:
    (event, _) = told(chain(b"a"))
    assert event["token_ids"] == []
    assert event["block_hashes"] != [b"a" * 16]
    assert event_hasher(b"another key")(b"a" * 16) != HASHED(b"a" * 16)


def test_a_worker_that_begins_anew_clears_what_it_held() -> None:
    first, *rest = told([JournalRestart(), *chain(b"a")])
    assert first == {"type": "AllBlocksCleared"}
    assert [event["type"] for event in rest] == ["BlockStored"] * 2
    assert told([JournalRestart()]) == [{"type": "AllBlocksCleared"}]


# --- sockets ----------------------------------------------------------------------------------------------------


class Clients:
    """Sockets of subscribers and of those that ask again, closed together."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def connect(self, kind: int, endpoint: str, keys: tuple[bytes, bytes, bytes] | None = None) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        if keys is not None:
            socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = keys
        if kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        return socket

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()


@pytest.fixture
def clients() -> Iterator[Clients]:
    made = Clients()
    yield made
    made.close()


def first_batch(subscriber: zmq.Socket[bytes], sending: KvEventsPublisher, *, patience_s: float = PATIENCE_S) -> bool:
    """Publish until one arrives: a subscription takes its time."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        sending.publish(b"topic", b"payload")
        if subscriber.poll(20):
            return True
    return False


def replayed(clients: Clients, sending: KvEventsPublisher, first: int) -> list[list[bytes]]:
    """As vLLM's own example asks: the first sequence wanted, then messages up to the end."""
    socket = clients.connect(zmq.DEALER, sending.endpoints[1])
    socket.send_multipart([b"", first.to_bytes(8, "big")])
    assert sending.replays.poll(int(PATIENCE_S * 1000))
    sending.answer_replay()
    found: list[list[bytes]] = []
    while True:
        assert socket.poll(int(PATIENCE_S * 1000))
        _, *frames = socket.recv_multipart()
        if frames[1] == END_SEQUENCE:
            return found
        found.append(frames)


def test_batches_are_numbered_and_replayed_from_where_a_subscriber_asks(clients: Clients) -> None:
    sending = KvEventsPublisher(ANYWHERE)
    for number in range(5):
        sending.publish(b"kv@w@demo", b"%d" % number)
    assert [frames[2] for frames in replayed(clients, sending, 3)] == [b"3", b"4"]
    assert [int.from_bytes(frames[1], "big") for frames in replayed(clients, sending, 0)] == [0, 1, 2, 3, 4]
    assert replayed(clients, sending, 9) == []
    sending.close()


def test_what_is_kept_and_what_one_peer_is_sent_is_bounded(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "KEPT_BATCHES", 8)
    monkeypatch.setattr(publisher, "MAX_REPLAYED", 3)
    sending = KvEventsPublisher(ANYWHERE)
    for number in range(20):
        sending.publish(b"t", b"%d" % number)
    assert [frames[2] for frames in replayed(clients, sending, 0)] == [b"12", b"13", b"14"]
    assert [frames[2] for frames in replayed(clients, sending, 15)] == [b"15", b"16", b"17"]
    monkeypatch.setattr(publisher, "KEPT_NBYTES", 4)
    sending.publish(b"t", b"xx")
    assert [frames[2] for frames in replayed(clients, sending, 0)] == [b"19", b"xx"]
    sending.close()


def test_what_is_no_request_is_passed_over(clients: Clients) -> None:
    sending = KvEventsPublisher(ANYWHERE)
    socket = clients.connect(zmq.DEALER, sending.endpoints[1])
    for frames in ([b"x"], [b"", b"short"], [b"", b"12345678", b"more"]):
        socket.send_multipart(frames)
        assert sending.replays.poll(int(PATIENCE_S * 1000))
        sending.answer_replay()
    assert not socket.poll(0)
    assert replayed(clients, sending, 0) == []
    sending.close()


def test_with_keys_only_those_that_are_listed_may_subscribe(clients: Clients) -> None:
    server, friend, stranger = zmq.curve_keypair(), zmq.curve_keypair(), zmq.curve_keypair()
    options = PublishOptions(ANYWHERE.endpoint, ANYWHERE.endpoint, b"k", "demo", server[1], (friend[0],))
    sending = KvEventsPublisher(options)
    assert first_batch(clients.connect(zmq.SUB, sending.endpoints[0], (*friend, server[0])), sending)
    for socket in (
        clients.connect(zmq.SUB, sending.endpoints[0], (*stranger, server[0])),
        clients.connect(zmq.SUB, sending.endpoints[0]),
    ):
        assert not first_batch(socket, sending, patience_s=0.5)
    sending.close()


def test_a_file_of_keys_names_its_wrong_line(tmp_path: Path) -> None:
    public, _ = zmq.curve_keypair()
    good = tmp_path / "keys"
    good.write_bytes(b"# subscribers\n\n" + public + b" # one\n")
    assert read_event_keys(good) == (public,)
    for content, named in ((b"# none\n", "has no key"), (public + b"\nshort\n", "line 2"), (b"\xff" * 40, "line 1")):
        good.write_bytes(content)
        with pytest.raises(ConfigError, match=named):
            read_event_keys(good)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_event_keys(tmp_path / "gone")


@pytest.mark.processes
@in_event_loop
async def test_a_subscriber_knows_what_workers_hold_through_a_gap_and_a_loss(clients: Clients) -> None:
    async with PrefixIndex.open(b"k" * 32, lambda name, message: None, ANYWHERE) as index:
        assert index.endpoints is not None
        subscriber = Subscriber({})
        stream = clients.connect(zmq.SUB, index.endpoints[0])
        replays = clients.connect(zmq.DEALER, index.endpoints[1])
        register = replace(make_register("w", "prefill"), tells_blocks=True)
        index.add(register)
        size = register.geometry.block_size

        def hear() -> None:
            replays.send_multipart([b"", subscriber.expected.to_bytes(8, "big")])
            while replays.poll(1000):
                _, topic, sequence, payload = replays.recv_multipart()
                if sequence == END_SEQUENCE:
                    return
                subscriber.take(topic, sequence, payload)

        def holds(*names: bytes) -> bool:
            hear()
            return subscriber.held.get((b"kv@w@demo", 0), set()) == {HASHED(n * 16) for n in names}

        index.take(events_message("w", 0, size, [JournalRestart(), *chain(b"a", b"b")]))
        await until(lambda: holds(b"a", b"b"), "the whole set")
        index.take(events_message("w", 1, size, [BlockDropped(b"b" * 16, (0, 1)), *chain(b"c")]))
        await until(lambda: holds(b"a", b"c"), "a change")
        index.take(events_message("w", 9, size, chain(b"x")))
        await until(lambda: holds(), "what was missed is not known, so nothing is")
        index.take(events_message("w", 10, size, [JournalRestart(), *chain(b"d")]))
        await until(lambda: holds(b"d"), "the whole set again")
        assert stream.poll(int(PATIENCE_S * 1000)), "the stream has them too"
        assert stream.recv_multipart()[0] == b"kv@w@demo"
        index.remove("w")
        await until(lambda: holds(), "it is gone")


@pytest.mark.processes
@in_event_loop
async def test_a_port_that_is_taken_is_refused_at_the_start() -> None:
    sending = KvEventsPublisher(ANYWHERE)
    taken = PublishOptions(sending.endpoints[0], "tcp://127.0.0.1:0", b"k", "demo")
    with pytest.raises(EndpointRefused, match="choose another port"):
        async with PrefixIndex.open(b"k" * 32, lambda name, message: None, taken):
            pass
    sending.close()
