"""Move KV between plain torch tensors of two processes, without our engine.

    .venv/bin/python examples/move_tensors.py

One process holds bfloat16 pages as vLLM lays them out, `(block, head, token, K dims then V dims)` in blocks of 16; the
other float32 tensors of K and V apart, `(block, token, head, dim)` in blocks of 8. Both know the cluster's secret and
which blocks of theirs belong to the sequence; `pipe` stands for the channel on which engines talk to each other. The
bytes travel over tcp, and what was landed is licensed to be decoded as between two of our workers: every unit's digest
and one MAC over all of them and the first token, or `fetch` raises.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection

import torch

from disagg.transceiver.library.tensor_ends import Model, TensorDestination, TensorSource
from disagg.transceiver.memory.foreign_pools import ForeignPools
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.messages.values import AttemptKey, GroupSemantics

KEYS = ClusterKeys.from_secret(b"a secret that both processes know")
GROUP = GroupSemantics(window=None, num_sink_tokens=0, num_kv_heads=4, head_dim=32, layers=(0, 1))
MODEL = Model("an example", "float32", max_model_len=64, groups=(GROUP,))
KEY, PROMPT = AttemptKey("0123456789abcdef0123456789abcdef", 1), tuple(range(40))
SOURCE_BLOCKS, BLOCKS = {0: 3, 1: 0, 2: 5}, {0: 1, 1: 4, 2: 2, 3: 0, 4: 6}  # the sequence's blocks, in order


async def send(pipe: Connection) -> None:
    torch.manual_seed(0)
    layers = {layer: torch.randn(6, 4, 16, 64).bfloat16() for layer in GROUP.layers}
    pools = ForeignPools.of([layers], "shtD", dtype="bfloat16")
    async with TensorSource.open(MODEL, pools, KEYS) as source:
        pipe.send(source.target)
        peer = await asyncio.to_thread(pipe.recv)
        await source.send(KEY, PROMPT, 7, [SOURCE_BLOCKS], peer)
        pipe.send(layers)  # only to compare below
        await asyncio.to_thread(pipe.recv)


async def receive(pipe: Connection) -> None:
    layers = {layer: (torch.zeros(8, 8, 4, 32), torch.zeros(8, 8, 4, 32)) for layer in GROUP.layers}
    pools = ForeignPools.of([layers], "sthd", dtype="float32")
    target = await asyncio.to_thread(pipe.recv)
    async with TensorDestination.open(MODEL, pools, KEYS, target) as destination:
        pipe.send(destination.peer)
        first_token, record = await destination.fetch(KEY, PROMPT, [BLOCKS])
        compare(await asyncio.to_thread(pipe.recv), layers)
        pipe.send("done")
    num_units, nbytes = sum(record.blocks.values()), sum(record.nbytes.values())
    print(f"{len(PROMPT)} tokens of {len(layers)} layers in {num_units} units of {nbytes // num_units} bytes: equal")
    print(f"the first token is {first_token.token_id}")


def compare(theirs: dict[int, torch.Tensor], ours: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Token by token, as plainly as it can be written."""
    for layer, pages in theirs.items():
        for token in range(len(PROMPT)):
            sent = pages[SOURCE_BLOCKS[token // 16], :, token % 16].float()
            k, v = (half[BLOCKS[token // 8], token % 8] for half in ours[layer])
            assert torch.equal(torch.cat([k, v], -1), sent), f"layer {layer}, token {token}"


def run_sender(pipe: Connection) -> None:
    asyncio.run(send(pipe))


def main() -> None:
    here, there = multiprocessing.Pipe()
    sender = multiprocessing.get_context("spawn").Process(target=run_sender, args=(there,))
    sender.start()
    asyncio.run(receive(here))
    sender.join()


if __name__ == "__main__":
    main()
