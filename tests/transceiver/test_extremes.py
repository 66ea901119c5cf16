"""Each message with each field at its extremes costs at most its peer (as the receiving side: `test_peer_link`)."""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import replace
from typing import Any

import pytest
from support.event_loop import in_event_loop
from support.links.extremes import messages
from support.links.sample_messages import PEER_SAMPLES, SAMPLES
from support.links.sending_side import IDENTITY, Peer, Prefill, new_key
from support.links.transfer_pair import GEOMETRY
from support.links.unchecked import changed

from disagg.transceiver.layout.compatibility import geometry_difference
from disagg.transceiver.peers.prefill_side import SendingSide
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import RemoteProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages import values as v


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_what_is_decoded_can_be_said_and_what_cannot_is_named_by_its_field(sample: Any) -> None:
    num_refused = 0
    for path, data in messages(sample):
        refusal, message = _decoded(data)
        if refusal:
            num_refused += 1
            assert re.split(r"[.=]", path)[0] in refusal
            assert len(refusal) < 1000
        else:
            assert encode(decode(encode(message))) == encode(message)
    assert num_refused, "no extreme of any field was refused"


def _decoded(data: bytes) -> tuple[str, Any]:
    try:
        return "", decode(data)
    except RemoteProtocolError as refusal:
        return str(refusal), None


@pytest.mark.parametrize(
    "crooked",
    [
        {"num_kv_heads": 0},
        {"num_kv_heads": -1},
        {"head_dim": 0},
        {"head_dim": 2**62},
        {"layers": ()},
        {"layers": (1, 1)},
        {"layers": (2, 1)},
        {"layers": (-1,)},
        {"window": 0},
        {"window": -5},
        {"num_sink_tokens": -1},
    ],
    ids=str,
)
def test_a_group_that_no_cache_could_hold_is_never_built(crooked: dict[str, Any]) -> None:
    (field,) = crooked
    group = v.GroupSemantics(8, 0, 2, 16, (0, 1))
    with pytest.raises(ValueError, match=f"^{field}: "):
        replace(group, **crooked)
    said = encode(p.Hello("d" * 32, "decode", IDENTITY, replace(GEOMETRY, groups=(group,)), ("shm",)))
    assert decode(said)
    hello = p.Hello("d" * 32, "decode", IDENTITY, replace(GEOMETRY, groups=(changed(group, **crooked),)), ("shm",))
    with pytest.raises(RemoteProtocolError, match=rf"Hello\.geometry\.groups\[\]: {field}: "):
        decode(encode(hello))


@pytest.mark.parametrize("field", ["block_size", "tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("number", [0, -1, 2**31, 2**63])
def test_a_geometry_of_impossible_sizes_is_never_built(field: str, number: int) -> None:
    with pytest.raises(ValueError, match=f"^{field}: {number}, expected 1 to "):
        replace(GEOMETRY, **{field: number})
    assert geometry_difference(GEOMETRY, replace(GEOMETRY, **{field: 2})) is not None


# --- the sending side ---------------------------------------------------------------------------------------


async def say_raw(peer: Peer, data: bytes) -> None:
    peer.client._connection.send([data])


@pytest.mark.parametrize("sample", PEER_SAMPLES, ids=lambda sample: type(sample).__name__)
@in_event_loop
async def test_no_message_ends_the_sending_side_or_another_peers_transfer(sample: Any) -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as honest, Peer.known(prefill) as hostile:
        key, attacked = new_key(), new_key()
        prefill.dispatch(honest, key)
        prefill.dispatch(hostile, attacked)
        await honest.say(honest.fetch(key))
        await honest.next(p.Accepted)
        for _, data in messages(_addressed(sample, hostile, prefill, attacked)):
            if hostile.client._connection.is_lost:
                break
            with contextlib.suppress(Exception):
                await say_raw(hostile, data)
        await honest.was_heard()
        assert prefill.core(key) is not None


def _addressed(sample: Any, peer: Peer, prefill: Prefill, key: v.AttemptKey) -> Any:
    """As this peer would say it of its own transfer: what is wrong with it is the one field."""
    header = peer.header(key)
    match sample:
        case p.Fetch():
            return peer.fetch(key)
        case p.Heartbeat():
            return peer.beat(key)
        case p.Hello():
            return p.Hello(peer.incarnation, "hostile", IDENTITY, GEOMETRY, ("inproc",))
        case _ if hasattr(sample, "header"):
            return replace(sample, header=header)
    return sample


@in_event_loop
async def test_what_a_message_raises_costs_its_peers_connection_and_is_logged_with_its_name(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Prefill.running() as prefill, Peer.known(prefill) as honest, Peer.known(prefill) as hostile:
        plain = SendingSide._route

        def trips(self: SendingSide, routing_id: bytes, header: p.Header, message: Any) -> None:
            if header.source == hostile.incarnation:
                raise ZeroDivisionError("nobody thought of this")
            plain(self, routing_id, header, message)

        monkeypatch.setattr(SendingSide, "_route", trips)
        with caplog.at_level(logging.WARNING):
            await hostile.say(p.Ack(hostile.header(new_key())))
            await honest.was_heard()
        assert prefill.side._faults.count == 1
        assert list(prefill.side._peers) == [honest.incarnation]
        assert "Ack of decode worker decode cannot be taken (1 so far): ZeroDivisionError" in caplog.text
        monkeypatch.undo()
        await hostile.say(hostile.beat())
        assert (await hostile.next(p.Refused)).field == "unknown_peer"
        await hostile.hello()
