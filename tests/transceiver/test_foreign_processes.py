"""Foreign engines' tensors as source and as destination, between two processes: every layout, every number."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from support.links import foreign_sender as foreign

from disagg.transceiver.memory.gather import Unpacker, digests
from disagg.transceiver.memory.regions import Destination, LandingJob, PoolRegion
from disagg.transceiver.planes.tcp.landing import TcpLandingPlane

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.timeout(90)]

LAYOUTS = {
    "K and V apart, NHD": "sthd",
    "K and V apart, HND": "shtd",
    "packed as vLLM's": "shtD",
    "packed, NHD": "sthD",
    "interleaved": "shtdk",
    "FlashInfer's pages, NHD": "skthd",
    "FlashInfer's pages, HND": "skhtd",
    "stacked": "kshtd",
}


@pytest.fixture(scope="module")
def sender() -> Iterator[Connection]:
    pipe, process = foreign.start()
    yield pipe
    pipe.send(None)
    process.join(20)
    assert process.exitcode == 0


async def receive(pipe: Connection, axes: str) -> dict[int, foreign.ForeignLayer]:
    layers = foreign.make_layers(axes, foreign.UNIT, foreign.DTYPE)
    unpacker = Unpacker(foreign.area_of(layers, axes, foreign.DTYPE), foreign.SOURCE_DTYPE)
    copies, plane = foreign.COPIES, TcpLandingPlane()
    rows = np.empty((len(copies), unpacker.unit_nbytes), dtype=np.uint8)
    offer, expected = await asyncio.to_thread(pipe.recv)
    await plane.connect("receiver", offer, [PoolRegion(rows, np.zeros(len(rows), dtype=np.uint64), -1, 0)])
    pipe.send("connected")
    places = tuple(Destination(0, ordinal, 0, row) for row, ordinal in enumerate(copies.ordinals.tolist()))
    job = LandingJob("sender", "foreign", 0, 0, places)
    await plane.fetch(job)
    plane.land(job)
    unpacker.scatter(torch.from_numpy(rows), copies.slots, copies.tokens)
    assert digests(unpacker.reread(copies.slots, copies.tokens)) == expected
    pipe.send("landed")
    await plane.close()
    return layers


@pytest.mark.parametrize("name", LAYOUTS)
def test_tensors_of_every_layout_are_a_source_and_a_destination(name: str, sender: Connection) -> None:
    """Each is the source of one transfer and the destination of another; the other end has the next one's layout."""
    names = list(LAYOUTS)
    other = LAYOUTS[names[(names.index(name) + 3) % len(names)]]
    for source, destination in ((LAYOUTS[name], other), (other, LAYOUTS[name])):
        sender.send(source)
        layers = asyncio.run(receive(sender, destination))
        for layer, token, where in foreign.places(foreign.BLOCKS, foreign.UNIT):
            tensor, index = foreign.at(layers, destination, layer, where)
            assert float(tensor[index]) == foreign.truth(layer, token, where), f"layer {layer}, token {token}, {where}"
