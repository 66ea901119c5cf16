"""A process with plain tensors of another engine's layout: it packs blocks of them and sends them over tcp."""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import torch
from support.oracles.element_walk import element

from disagg.transceiver.layout.cut import pair_units, required_ordinals
from disagg.transceiver.layout.strides import Layout
from disagg.transceiver.layout.units import SourceUnit
from disagg.transceiver.memory.foreign_layout import ForeignLayer, foreign_layout
from disagg.transceiver.memory.gather import Area, Packer, digests, flat
from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.tcp.source import TcpSourcePlane
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import GroupSemantics

KEYS = ClusterKeys.from_secret(b"a secret that both processes know")
GROUP = GroupSemantics(window=None, num_sink_tokens=0, num_kv_heads=2, head_dim=4, layers=(0, 1))
WHOLE = (0, 2, 0, 2)
NUM_TOKENS, UNIT = 11, 2
SOURCE_BLOCKS, BLOCKS = np.array([3, 0, 5]), np.array([1, 4, 2, 0, 6, 3])  # of 4 and of 2 tokens
COPIES = pair_units(required_ordinals(GROUP, NUM_TOKENS, UNIT), UNIT, (SOURCE_BLOCKS, 4), (BLOCKS, UNIT))
SOURCE_DTYPE, DTYPE = "bfloat16", "float32"


def make_layers(axes: str, block_size: int, dtype: str) -> dict[int, ForeignLayer]:
    """Zeros of these axes per layer: one tensor that holds K and V, or without `k` and `D` one for each."""
    extent = {"s": 8, "h": 2, "t": block_size, "d": 4, "k": 2, "D": 8}
    shape = [extent[axis] for axis in axes]
    one = {layer: torch.zeros(shape, dtype=getattr(torch, dtype)) for layer in GROUP.layers}
    if {"k", "D"} & set(axes):
        return dict(one)
    return {layer: (tensor, torch.zeros_like(tensor)) for layer, tensor in one.items()}


def tensors_of(layers: dict[int, ForeignLayer]) -> list[torch.Tensor]:
    held = [layers[layer] for layer in sorted(layers)]
    return [tensor for one in held for tensor in (one if isinstance(one, tuple) else (one,))]


def area_of(layers: dict[int, ForeignLayer], axes: str, dtype: str) -> Area:
    layout: Layout = foreign_layout(layers, axes, dtype=dtype)
    return Area(layout, [flat(t) for t in tensors_of(layers)], 0, GROUP, WHOLE, UNIT)


def at(layers: dict[int, ForeignLayer], axes: str, layer: int, where: dict[str, int]) -> tuple[torch.Tensor, object]:
    """(tensor, index) of one number: `where` names s, h, t, d, and k = 0 for K, 1 for V."""
    held = layers[layer]
    tensor = held[where["k"]] if isinstance(held, tuple) else held
    return tensor, element(tensor, axes, where)


def truth(layer: int, token: int, where: dict[str, int]) -> float:
    """A number that no other place has, and that bfloat16 holds."""
    number = (((layer * 2 + where["k"]) * 2 + where["h"]) * 4 + where["d"]) * NUM_TOKENS + token
    return float(number if number <= 256 else 256 - number)  # whole numbers up to 256 are exact


async def _send(axes: str, pipe: Connection) -> None:
    layers = make_layers(axes, 4, SOURCE_DTYPE)
    for layer, token, where in places(SOURCE_BLOCKS, 4):
        tensor, index = at(layers, axes, layer, where)
        tensor[index] = truth(layer, token, where)
    packer = Packer(area_of(layers, axes, SOURCE_DTYPE), DTYPE)
    rows = packer.gather(COPIES.source_slots, COPIES.source_tokens)
    plane = TcpSourcePlane("127.0.0.1", KEYS)
    await plane.start([])
    pipe.send((plane.offer("receiver"), digests(rows)))
    await asyncio.to_thread(pipe.recv)  # it has connected
    units = [SourceUnit(0, ordinal, 0, row, 0) for row, ordinal in enumerate(COPIES.ordinals.tolist())]
    region = PoolRegion(rows.numpy(), np.zeros(len(rows), dtype=np.uint64), -1, 0)
    await plane.send("receiver", "foreign", 0, 0, units, [region])
    await asyncio.to_thread(pipe.recv)  # it has landed
    await plane.close()


def places(blocks: np.ndarray, block_size: int) -> list[tuple[int, int, dict[str, int]]]:
    """(layer, token, where) of every number of the sequence."""
    return [
        (layer, token, {"s": int(blocks[token // block_size]), "t": token % block_size, "h": h, "d": d, "k": k})
        for layer in GROUP.layers
        for token in range(NUM_TOKENS)
        for h in range(2)
        for d in range(4)
        for k in (0, 1)
    ]


def _run(pipe: Connection) -> None:
    while (axes := pipe.recv()) is not None:
        asyncio.run(_send(axes, pipe))


def start() -> tuple[Connection, multiprocessing.process.BaseProcess]:
    """It serves one transfer for each `axes` it is sent, until None."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(there,), daemon=True)
    process.start()
    there.close()
    return here, process
