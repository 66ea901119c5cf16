"""However a peer fills a message up to the largest legal size, little of it is built before it is refused."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
from support.abuse.mutants import Change, pack, packed_form
from support.links.sample_messages import SAMPLES

from disagg.transceiver.wire import codec, sizes
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages.peer import Heartbeat
from disagg.transceiver.wire.messages.ranges import MAX_ITEMS, MAX_UNITS
from disagg.transceiver.wire.messages.router import Lease
from disagg.transceiver.wire.schema import Record
from disagg.transceiver.wire.sizes import CONTROL, MAX_MESSAGE_NBYTES, SizeLimit, limit_of

MAX_CPU_S = (
    1.0  # the largest legal manifest takes a third of it on a busy machine; without limits it is many times that
)
ROOM_NBYTES = 8192
KINDS = {type(sample): packed_form(sample) for sample in SAMPLES}


def long_ones(kind: type, nbytes: int) -> Iterator[tuple[str, bytes]]:
    """The message with each of its lists, texts and bytes, and a field that no version knows, filled to `nbytes`."""
    form = KINDS[kind]
    for path, value in (*_within(form), (("unknown",), [[]]), (("unknown",), [0])):
        yield ".".join(map(str, path)), pack(kind, Change(path, _filled(value, nbytes - ROOM_NBYTES)).applied_to(form))


def _within(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, (list, str, bytes)) and value:
        yield here, value
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, item in entries:
        yield from _within(item, (*here, name))


def _filled(value: Any, nbytes: int) -> Any:
    return value[:1] * (nbytes // (len(msgpack.packb(value[0])) if isinstance(value, list) else 1))


def cpu_seconds(data: bytes) -> float:
    gc.collect()
    started = time.thread_time()
    with contextlib.suppress(RemoteProtocolError):
        decode(data)
    return time.thread_time() - started


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_field_filled_to_the_largest_size_holds_the_reader(kind: type) -> None:
    for field, data in long_ones(kind, limit_of(kind).nbytes):
        assert len(data) <= limit_of(kind).nbytes
        assert cpu_seconds(data) < MAX_CPU_S, field


def test_without_limits_a_field_that_no_version_knows_holds_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack(Lease, KINDS[Lease] | {"unknown": [[]] * (MAX_UNITS * 40)})
    limited = cpu_seconds(data)
    unlimited = SizeLimit(MAX_MESSAGE_NBYTES, MAX_MESSAGE_NBYTES)
    monkeypatch.setattr(codec, "limit_of", lambda _kind: unlimited)
    monkeypatch.setattr(codec, "MAX_UNITS", MAX_MESSAGE_NBYTES)
    assert cpu_seconds(data) > 20 * limited


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_message_above_the_size_of_its_kind_is_refused_on_both_sides(kind: type) -> None:
    data = pack(kind, KINDS[kind] | {"unknown": bytes(limit_of(kind).nbytes)})
    with pytest.raises(RemoteProtocolError, match=r"\d+ bytes, at most \d+"):
        decode(data)


def test_a_message_that_its_reader_refuses_for_its_size_is_not_said() -> None:
    transfers = tuple(("t" * 250, 1) for _ in range(MAX_ITEMS))
    with pytest.raises(LocalProtocolError, match=f"Heartbeat: .* at most {CONTROL.nbytes}"):
        encode(Heartbeat("a", "b", transfers))


@pytest.mark.parametrize("filler", [[[]] * 9, [0] * 80])
def test_arrays_and_items_are_counted_at_every_depth(filler: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    form = KINDS[Heartbeat]
    monkeypatch.setattr(sizes, "MAX_UNITS", 0)
    monkeypatch.setattr(codec, "limit_of", lambda _kind: SizeLimit(1000, 9))
    assert decode(pack(Heartbeat, form))
    with pytest.raises(RemoteProtocolError, match="too many arrays, maps or items"):
        decode(pack(Heartbeat, form | {"unknown": filler}))


def test_a_list_is_refused_by_its_length_before_an_item_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr("disagg.transceiver.wire.schema.Fixed.read", lambda *args: read.append(args))
    form = KINDS[Heartbeat]
    with pytest.raises(ValueError, match=rf"Heartbeat\.transfers: {MAX_ITEMS + 1} long, expected a length of 0 to"):
        Record(Heartbeat).read(form | {"transfers": [["t", 1]] * (MAX_ITEMS + 1)}, "Heartbeat")
    assert not read
