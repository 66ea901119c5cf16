"""Negative controls of the digests, through the real shells: one wrong byte, wherever and whenever, is never decoded.

Each case bends one thing and sees the transfer fail for that very reason; the request is then answered rightly by the
next attempt (the decode worker computes the prompt itself), and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import support.faults.table as table
from support.faults.cells import Cell, outcome_of
from support.faults.wrong import Wrong
from support.links.shell_pair import KEYS, ShellTrio

from disagg.transceiver.memory.regions import LandingJob
from disagg.transceiver.protocol.manifest import seal
from disagg.transceiver.protocol.state import Role, State
from disagg.transceiver.wire import reasons
from disagg.transceiver.wire.messages import peer as p
from disagg.transceiver.wire.messages.digests import GroupDigests
from disagg.transceiver.wire.messages.values import UnitRun

POSITIONS = {"first of K": 0.0, "last of K": 0.5, "first of V": 0.5, "last of V": 1.0}
"""Where a byte lies in the last layer of its slot, [K, V][head][token][dim], as a part of that layer."""
BEGINNING = (Role.SENDER, State.PINNING)
"""The prompt is computed and hashed; nothing was announced."""


def byte_at(position: str, slot_nbytes: int, num_layers: int) -> int:
    """Offset in the slot of the byte at a place of its last layer's K or V."""
    layer_nbytes = slot_nbytes // num_layers
    end = (num_layers - 1) * layer_nbytes + int(POSITIONS[position] * layer_nbytes)
    return end - position.startswith("last")


def num_digest_failures(trio: ShellTrio) -> int:
    counters = trio.prefill.parts.metrics._counters
    return sum(count for (name, _), count in counters.items() if name == "disagg_digest_failures_total")


async def failing_story(trio: ShellTrio, bend: Callable[[Cell], None], reason: str) -> None:
    """A request whose transfer is bent while it stands at its beginning."""
    num_failures = len(trio.decode.failures)
    cell = Cell(trio, BEGINNING, table.SOURCE_FLIP)
    cell.client = trio.begin()
    await cell.halt()
    bend(cell)
    cell.resume()
    outcome = outcome_of(await cell.reply())
    if outcome == "a1":
        raise Wrong("the first attempt was verified, and what it moved was bent")
    assert outcome == "a2"
    trio.links.control.rewrite = None
    assert trio.decode.failures[num_failures:] == [reason]
    await trio.settle()
    trio.check()
    assert outcome_of(await trio.ask()) == "a1"
    await trio.settle()


PLANES = [pytest.param("shm", 0.2), pytest.param("zmq", 0.2), pytest.param("tcp", 0.2)]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("plane", "scale"), PLANES)
def test_a_byte_that_changes_at_the_sender_after_its_digest_is_not_decoded(arena: Any, position: str) -> None:
    async def story(trio: ShellTrio) -> None:
        def bend(cell: Cell) -> None:
            unit = cell._final_unit(-1)
            pool, group = cell._pool(unit.group), trio.prefill.engine.cache.layout.groups[unit.group]
            pool.memory[unit.slot, byte_at(position, pool.slot_nbytes, len(group.layers))] ^= 1

        before = num_digest_failures(trio)
        await failing_story(trio, bend, reasons.DIGEST)
        assert num_digest_failures(trio) == before + 1, "exactly the bent block is named to the sender"

    arena.run(story)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("plane", "scale"), PLANES)
def test_a_byte_that_changes_between_copy_and_hash_is_not_decoded(arena: Any, position: str) -> None:
    async def story(trio: ShellTrio) -> None:
        def place(job: LandingJob, pools: Any) -> tuple[int, int, int]:
            unit = job.destinations[-1]
            group = trio.decode.engine.cache.layout.groups[unit.group]
            return unit.pool, unit.slot, byte_at(position, pools[unit.pool].slots.shape[1], len(group.layers))

        def bend(cell: Cell) -> None:
            trio.decode.landing.flip_at = place

        before = trio.decode.landing.num_flipped, num_digest_failures(trio)
        await failing_story(trio, bend, reasons.DIGEST)
        assert (trio.decode.landing.num_flipped, num_digest_failures(trio)) == (before[0] + 1, before[1] + 1)

    arena.run(story)


@pytest.mark.parametrize("at", [32, -1, 300, -300])
@pytest.mark.parametrize(("plane", "scale"), [("zmq", 0.2), ("tcp", 0.2)])
def test_a_byte_that_changes_in_flight_is_not_decoded(arena: Any, at: int) -> None:
    async def story(trio: ShellTrio) -> None:
        def bend(cell: Cell) -> None:
            trio.links.data.flip_payload_at = at

        before = trio.links.data.num_flipped
        await failing_story(trio, bend, reasons.DIGEST)
        assert trio.links.data.num_flipped == before + 1

    arena.run(story)


def swapped(direction: str, message: Any) -> Any:
    """SLICE with two ordinals of one group swapped."""
    if not isinstance(message, p.Slice):
        return message
    at, run = next((i, run) for i, run in enumerate(message.units) if run.count > 1)
    singles = [
        UnitRun(run.group, run.first + i, 1, run.slots[i : i + 1], run.generations[i : i + 1]) for i in range(run.count)
    ]
    if run.slots:  # the receiver reads: the swap is in where it reads from
        first, second = singles[0], singles[1]
        singles[0] = replace(first, slots=second.slots, generations=second.generations)
        singles[1] = replace(second, slots=first.slots, generations=first.generations)
    else:  # the sender pushes: the swap is in the order of what it pushed
        singles[0], singles[1] = singles[1], singles[0]
    return replace(message, units=(*message.units[:at], *singles, *message.units[at + 1 :]))


@pytest.mark.parametrize(("plane", "scale"), PLANES)
def test_two_swapped_ordinals_are_not_decoded(arena: Any) -> None:
    async def story(trio: ShellTrio) -> None:
        def bend(cell: Cell) -> None:
            trio.links.control.rewrite = swapped

        before = num_digest_failures(trio)
        await failing_story(trio, bend, reasons.DIGEST)
        assert num_digest_failures(trio) == before + 2

    arena.run(story)


def resealed(done: p.Done, header: p.Header) -> p.Done:
    """The same units sealed for another attempt, and then passed off as this one's."""
    sealed = seal(
        KEYS.manifest_mac,
        header,
        rank=done.rank,
        num_ranks=done.num_ranks,
        num_slices=done.num_slices,
        manifest=done.manifest,
        first_token=done.first_token,
    )
    return replace(sealed, header=done.header)


def of_another_digest(entry: GroupDigests) -> GroupDigests:
    return replace(entry, digests=bytes([entry.digests[0] ^ 1]) + entry.digests[1:])


FORGERIES: dict[str, Callable[[p.Done], p.Done]] = {
    "of another epoch": lambda done: resealed(done, replace(done.header, epoch=done.header.epoch + 1)),
    "of another transfer": lambda done: resealed(done, replace(done.header, transfer_id="0" * 32)),
    "of another sender": lambda done: resealed(done, replace(done.header, source="0" * 32)),
    "for another receiver": lambda done: resealed(done, replace(done.header, destination="0" * 32)),
    "of another digest": lambda done: replace(done, manifest=(of_another_digest(done.manifest[0]), *done.manifest[1:])),
    "of another first token": lambda done: replace(
        done,
        first_token=replace(done.first_token, token_id=done.first_token.token_id ^ 1),  # type: ignore[type-var, union-attr]
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize(("plane", "scale"), [("shm", 0.2)])
def test_a_manifest_of_something_else_is_not_believed(arena: Any, forgery: str) -> None:
    async def story(trio: ShellTrio) -> None:
        def bend(cell: Cell) -> None:
            trio.links.control.rewrite = lambda direction, message: (
                FORGERIES[forgery](message) if isinstance(message, p.Done) else message
            )

        await failing_story(trio, bend, reasons.MAC)

    arena.run(story)


@pytest.mark.parametrize(("plane", "scale"), [("shm", 0.2)])
def test_the_manifest_of_an_earlier_request_replayed_in_a_later_one_is_not_believed(arena: Any) -> None:
    """The prompt is the same, so are the digests: only the MAC tells the two apart."""

    async def story(trio: ShellTrio) -> None:
        trio.links.control.history.clear()
        request = trio.request()
        assert outcome_of(await trio.ask(request)) == "a1"
        earlier = trio.links.control.last("down", p.Done)
        assert earlier is not None
        done = earlier.message

        def replay(direction: str, message: Any) -> Any:
            return replace(done, header=message.header) if isinstance(message, p.Done) else message

        trio.links.control.rewrite = replay
        num_failures = len(trio.decode.failures)
        assert outcome_of(await trio.ask(replace(request, request_id="the replay"))) == "a2"
        trio.links.control.rewrite = None
        assert trio.decode.failures[num_failures:] == [reasons.MAC]
        await trio.settle()
        trio.check()

    arena.run(story)
