"""Move KV between plain torch tensors of two processes, without our engine: `python examples/move_tensors.py`.

One process holds bfloat16 pages as vLLM lays them out, `(block, head, token, K dims then V dims)` in blocks of 16; the
other float32 tensors of K and V apart, `(block, token, head, dim)` in blocks of 8. Both know the cluster's secret and
which blocks belong to the sequence; an engine would tell the other over its own control channel. The bytes travel over
tcp in canonical order and are hashed on both sides.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import torch

from disagg.transceiver.keys import ClusterKeys
from disagg.transceiver.messages.values import GroupSemantics
from disagg.transceiver.packed import Area, Packer, Unpacker, digests, flat
from disagg.transceiver.planes.base import Destination, LandingJob, PoolRegion, SourceUnit
from disagg.transceiver.planes.tcp import TcpSourcePlane
from disagg.transceiver.planes.tcp_landing import TcpLandingPlane
from disagg.transceiver.reshape import pair_units, required_ordinals
from disagg.transceiver.strides import foreign_layout

KEYS = ClusterKeys.from_secret(b"a secret that both processes know")
GROUP = GroupSemantics(window=None, num_sink_tokens=0, num_kv_heads=4, head_dim=32, layers=(0, 1))
WHOLE = (0, 2, 0, 4)  # first layer, layers, first head, heads: one rank on each side holds all of it
NUM_TOKENS, UNIT = 40, 8  # the unit is the finer of both block sizes

SOURCE_BLOCKS, BLOCKS = np.array([3, 0, 5]), np.array([1, 4, 2, 0, 6])  # of the sequence, in order
COPIES = pair_units(required_ordinals(GROUP, NUM_TOKENS, UNIT), UNIT, (SOURCE_BLOCKS, 16), (BLOCKS, 8))


def region(rows: np.ndarray) -> PoolRegion:
    return PoolRegion(rows, np.zeros(len(rows), dtype=np.uint64), fd=-1, slots_offset=0)


async def send(pipe: Connection) -> None:
    torch.manual_seed(0)
    layers = {layer: torch.randn(6, 4, 16, 64).bfloat16() for layer in GROUP.layers}
    layout = foreign_layout(layers, "shtD", dtype="bfloat16")
    packer = Packer(Area(layout, [flat(t) for t in layers.values()], 0, GROUP, WHOLE, UNIT), "float32")
    rows = packer.gather(COPIES.source_slots, COPIES.source_tokens)
    plane = TcpSourcePlane("127.0.0.1", KEYS)
    await plane.start([])
    pipe.send((plane.offer("receiver"), digests(rows)))
    await asyncio.to_thread(pipe.recv)  # it has connected
    units = [SourceUnit(0, ordinal, 0, row, 0) for row, ordinal in enumerate(COPIES.ordinals.tolist())]
    await plane.send("receiver", "example", 0, 0, units, [region(rows.numpy())])
    pipe.send({layer: tensor[SOURCE_BLOCKS] for layer, tensor in layers.items()})  # only to compare below
    await asyncio.to_thread(pipe.recv)  # it has landed
    await plane.close()


async def receive(pipe: Connection) -> None:
    layers = {layer: (torch.zeros(8, 8, 4, 32), torch.zeros(8, 8, 4, 32)) for layer in GROUP.layers}
    layout = foreign_layout(layers, "sthd", dtype="float32")
    buffers = [flat(tensor) for pair in layers.values() for tensor in pair]
    unpacker = Unpacker(Area(layout, buffers, 0, GROUP, WHOLE, UNIT), "bfloat16")
    staging = region(np.empty((len(COPIES), unpacker.unit_nbytes), dtype=np.uint8))
    offer, expected = await asyncio.to_thread(pipe.recv)
    plane = TcpLandingPlane()
    await plane.connect("receiver", offer, [staging])
    pipe.send("connected")
    places = tuple(Destination(0, ordinal, 0, row) for row, ordinal in enumerate(COPIES.ordinals.tolist()))
    job = LandingJob("sender", "example", 0, 0, places)
    await plane.fetch(job)
    plane.land(job)
    unpacker.scatter(torch.from_numpy(staging.slots), COPIES.slots, COPIES.tokens)
    landed = digests(unpacker.reread(COPIES.slots, COPIES.tokens))  # of what lies in the tensors now
    assert landed == expected, "a byte changed on the way"
    theirs = await asyncio.to_thread(pipe.recv)
    pipe.send("landed")
    await plane.close()
    compare(theirs, layers)
    print(f"{NUM_TOKENS} tokens of {len(layers)} layers in {len(COPIES)} units of {unpacker.unit_nbytes} bytes: equal")


def compare(theirs: dict[int, torch.Tensor], ours: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Token by token, as plainly as it can be written."""
    for layer, pages in theirs.items():
        for token in range(NUM_TOKENS):
            sent = pages[token // 16, :, token % 16].float()
            k, v = (half[BLOCKS[token // 8], token % 8] for half in ours[layer])
            assert torch.equal(torch.cat([k, v], -1), sent), f"layer {layer}, token {token}"


def main() -> None:
    here, there = multiprocessing.Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=run_sender, args=(there,))
    sender.start()
    asyncio.run(receive(here))
    sender.join()


def run_sender(pipe: Connection) -> None:
    asyncio.run(send(pipe))


if __name__ == "__main__":
    main()
