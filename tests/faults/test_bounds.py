"""What does not fit, and what comes twice: each costs the one attempt that it belongs to, and no worker."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from typing import Any

import pytest
import support.faults.table as table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.faults.cells import Cell, outcome_of
from support.links.impostor import Impostor
from support.links.shell_pair import IDENTITY, ShellTrio
from support.links.unchecked import changed

from disagg.transceiver.layout.ranks import natural_slot_nbytes
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.errors import LocalProtocolError, RemoteProtocolError
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.values import Geometry

SHM = pytest.param("shm", 0.2)


async def honest_request(trio: ShellTrio) -> None:
    assert outcome_of(await trio.ask()) == "a1"
    await trio.settle()
    trio.check()


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_more_units_than_a_manifest_holds_are_computed_where_they_are_needed(
    arena: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(trio: ShellTrio) -> None:
        request = trio.request()
        with monkeypatch.context() as patch:
            patch.setattr("disagg.transceiver.protocol.sender.MAX_MANIFEST_ENTRIES", 1)
            assert outcome_of(await trio.ask(request)) == "a2"
        record = trio.router.record(request.request_id)
        assert record is not None
        assert "required: expected at most 1 units, got" in record["attempts"][0]["outcome"]
        await trio.settle()
        await honest_request(trio)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_a_dispatch_that_comes_again_while_its_transfer_stops_starts_nothing(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        cell = Cell(trio, (Role.SENDER, State.SENDING), table.DROPPED)
        cell.client = trio.begin()
        await cell.halt()
        attempts = trio.prefill.attempts
        dispatch = attempts._live[cell.key].dispatch
        attempts.cancel(cell.key, "cancelled")
        assert trio.prefill.core(cell.key).state is State.STOPPED
        attempts.take_message(dispatch)
        assert cell.key not in attempts
        cell.resume()
        assert outcome_of(await cell.reply()) == "a2"
        await trio.settle()
        attempts.take_message(dispatch)  # nor when it is over
        assert cell.key not in attempts
        await honest_request(trio)

    arena.run(story)


# --- geometries that no worker has --------------------------------------------------------------------------

INTEGERS = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 4, 8, 64, 2**31, 2**63 - 1])
SCALES = st.sampled_from([1.0, 0.5, 0.0, -1.0, float("nan"), float("inf")])
PAIRS = st.tuples(st.lists(SCALES, max_size=2).map(tuple), st.lists(SCALES, max_size=2).map(tuple))
ODD = {
    "block_size": INTEGERS,
    "kv_dtype": st.sampled_from(["bfloat16", "float8_e4m3fn", "float64", "float32,bfloat16", ""]),
    "groups": st.just(()),
    "slot_nbytes": st.lists(INTEGERS, max_size=3).map(tuple),
    "tensor_parallel_size": INTEGERS,
    "pipeline_parallel_size": INTEGERS,
    "slot_layout": st.just("another"),
    "kv_scales": st.lists(st.lists(PAIRS, max_size=2).map(tuple), max_size=2).map(tuple),
    "stages": st.lists(st.lists(INTEGERS, max_size=3).map(tuple), max_size=2).map(tuple),
    "rank": INTEGERS,
}
CHANGES = st.fixed_dictionaries({}, optional=ODD)


def test_every_field_of_a_geometry_is_drawn() -> None:
    assert set(ODD) == {field.name for field in fields(Geometry)}


@given(changes=CHANGES, is_consistent=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@pytest.mark.parametrize(("plane", "scale"), [SHM])
def test_a_hello_of_any_geometry_is_answered_and_harms_nobody(
    arena: Any, changes: dict[str, Any], is_consistent: bool
) -> None:
    async def story(trio: ShellTrio) -> None:
        async with Impostor.connected(trio) as impostor:
            geometry = changed(impostor.geometry, **changes)
            if is_consistent:
                with contextlib.suppress(ValueError, ArithmeticError, LookupError):
                    geometry = changed(geometry, slot_nbytes=natural_slot_nbytes(geometry))
            hello = p.Hello(impostor.incarnation, "x", IDENTITY, geometry, ("shm", "zmq"))
            try:
                await impostor.client.send(hello)
                decode(encode(hello))
            except LocalProtocolError:  # some of these no codec carries
                return
            except RemoteProtocolError:  # and some no reader takes: they are dropped, and harm nobody
                await impostor.hello()
                await honest_request(trio)
                return
            answer = await impostor.next((p.Welcome, p.Refused))
            assert isinstance(answer, p.Refused) or geometry == impostor.geometry or is_consistent
            await honest_request(trio)

    arena.run(story)
