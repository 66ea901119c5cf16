"""KV of a real prompt between two processes whose workers are cut into unequal ranks, blocks and number formats."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.links.rank_sender import (
    DEADLINE_S,
    KEYS,
    Cut,
    Job,
    RankPools,
    SenderProcess,
    geometries_of,
    identity,
    make_cache,
    make_rank,
    model_of,
    needed_ordinals,
    needed_tokens,
)
from support.model.families import gemma3_config, hf, save_family, save_tokenizer

from disagg.cache.cache import KVCache
from disagg.engine.model.load import LoadedModel
from disagg.engine.run.runner import Chunk, Runner
from disagg.transceiver.library.decode_ranks import DecodeRank, DecodeRanks
from disagg.transceiver.library.prefill_ranks import DecodePeer
from disagg.transceiver.peers.decode_side import TransferRecord
from disagg.transceiver.protocol.actions import Verified
from disagg.transceiver.protocol.leader import Outcome, Pair, part_key
from disagg.transceiver.wire import ticket
from disagg.transceiver.wire.node import Node, draw_id
from disagg.transceiver.wire.sockets import Sockets
from disagg.worker.plane_classes import landing_planes

pytestmark = [pytest.mark.processes, pytest.mark.timeout(150)]

NUM_TOKENS = 4
NBYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1}
PROMPT_LEN = 75  # ends inside a block, three windows behind

# Prompts of 75 tokens: windows of 24 leave most of them behind.
COMBINATIONS = {
    "tp2 to tp4, blocks of 16 to 8, fp32 to bf16": (
        "four-heads",
        Cut(16, "float32", tensor_ranks=2),
        Cut(8, "bfloat16", tensor_ranks=4),
        "shm",
    ),
    "tp4 pp2 to tp2, fp8 to fp8 of other scales": (
        "four-heads",
        Cut(8, "fp8_e4m3", tensor_ranks=4, num_stages=2, scale=0.05),
        Cut(8, "fp8_e4m3", tensor_ranks=2, scale=0.08),
        "tcp",
    ),
    "heads held twice, tp4 to tp2 pp2, blocks of 8 to 32, bf16 to fp32": (
        "gemma3",
        Cut(8, "bfloat16", tensor_ranks=4),
        Cut(32, "float32", tensor_ranks=2, num_stages=2),
        "zmq",
    ),
    "windows with sink tokens, pp1 to pp2 tp4, blocks of 32 to 16, fp32 to fp16": (
        "gpt_oss",
        Cut(32, "float32"),
        Cut(16, "float16", tensor_ranks=4, num_stages=2),
        "tcp",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def sender() -> Iterator[SenderProcess]:
    process = SenderProcess.start()
    yield process
    process.stop()


def save(name: str, folder: Path) -> Path:
    path = folder / name
    if path.exists():
        return path
    if name != "four-heads":
        return save_family(name, path)
    config = gemma3_config(num_key_value_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        hf.Gemma3ForCausalLM(config).save_pretrained(path)
    save_tokenizer(path)
    return path


def job_of(name: str, folder: Path) -> Job:
    family, sending, receiving, plane = COMBINATIONS[name]
    prompt = tuple(np.random.default_rng(len(name)).integers(3, 211, PROMPT_LEN).tolist())
    return Job(save(family, folder), prompt, sending, receiving, plane, 4 if family == "gpt_oss" else 0)


@dataclass
class Received:
    """All that came, and the receiver's empty cache to put it in."""

    job: Job
    model: LoadedModel
    cache: KVCache
    ranks: list[RankPools]
    decision: Outcome
    records: Mapping[Pair, TransferRecord]
    first_token: int
    truth: list[np.ndarray]


async def transfer(sender: SenderProcess, job: Job) -> Received:
    """The receiver's process is this one."""
    sender.pipe.send(job)
    model = model_of(job, job.receiver)
    cache = make_cache(model, job.receiver.block_size)
    geometries = geometries_of(cache, job.receiver)
    wanted = [needed_ordinals(group, len(job.prompt), job.receiver.block_size) for group in geometries[0].groups]
    ranks = [make_rank(geometry, wanted, 100 + number) for number, geometry in enumerate(geometries)]
    nodes = [Node(draw_id(), f"decode-{g.rank}", identity(), g, KEYS, joins_ranks=True) for g in geometries]
    targets, first_token, truth = await sender.recv()
    sockets, decided = Sockets(KEYS), asyncio.get_running_loop().create_future()
    receiving = DecodeRanks(
        [DecodeRank(node, rank.regions) for node, rank in zip(nodes, ranks, strict=True)],
        targets,
        landing_planes((job.plane,), keys=KEYS),
        sockets,
        lambda _, decision, records: decided.set_result((decision, records)),
    )
    running = asyncio.create_task(receiving.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not receiving.is_ready:  # noqa: ASYNC110 - a link has no event for it
                await asyncio.sleep(0.01)
            sender.pipe.send(([DecodePeer(n.incarnation, n.geometry) for n in nodes], receiving.pairs))
            assert await sender.recv() == "serving"
            tickets = {
                pair: ticket.mint(
                    KEYS.ticket,
                    transfer_id=part_key(job.key, pair).transfer_id,
                    epoch=job.key.epoch,
                    prefill=targets[pair[1]].incarnation,
                    decode=nodes[pair[0]].incarnation,
                    prompt=job.prompt,
                    ttl_s=DEADLINE_S,
                )
                for pair in receiving.pairs
            }
            unit = min(job.sender.block_size, job.receiver.block_size)
            destinations = [destinations_of(rank, len(job.prompt), unit) for rank in ranks]
            receiving.start(job.key, len(job.prompt), destinations, tickets, deadline_s=DEADLINE_S)
            decision, records = await decided
            assert await sender.recv() == "released"
    finally:
        running.cancel()
        await asyncio.wait({running})
        sockets.close()
        sender.pipe.send("closed")
    return Received(job, model, cache, ranks, decision, records, first_token, truth)


def destinations_of(rank: RankPools, prompt_len: int, unit: int) -> list[list[tuple[int, int]]]:
    per_slot = rank.geometry.block_size // unit
    return [
        [(n, table[n // per_slot]) for n in needed_ordinals(group, prompt_len, unit)] if table else []
        for group, table in zip(rank.geometry.groups, rank.tables, strict=True)
    ]


def stored(values: torch.Tensor, received: Received, group: int) -> torch.Tensor:
    """`[layer, half, head, token, dim]` as the receiver's cache stores such numbers: rounded once."""
    layout = received.cache.layout.groups[group]
    if layout.scales:
        values = (values / torch.tensor(layout.scales)[..., None, None]).clamp(-448, 448)
    return values.to(getattr(torch, layout.dtype))


def least_nbytes(received: Received) -> int:
    """By looking at every rank, layer and head: what each receiving rank must be sent."""
    job, total = received.job, 0
    unit = min(job.sender.block_size, job.receiver.block_size)
    for rank in received.ranks:
        for number, group in enumerate(rank.geometry.groups):
            units = len(needed_ordinals(group, len(job.prompt), unit))
            total += units * unit * len(rank.places[number]) * 2 * len(rank.heads[number]) * group.head_dim
    return total * min(NBYTES[job.sender.kv_dtype], NBYTES[job.receiver.kv_dtype])


def join(received: Received) -> KVCache:
    """One cache out of the ranks' pools. Ranks that hold the same heads must hold the same bytes."""
    cache, prompt_len = received.cache, len(received.job.prompt)
    sequence = cache.open("joined")
    assert cache.resize(sequence, capacity=prompt_len + NUM_TOKENS, history=prompt_len)
    seen: dict[tuple[int, ...], torch.Tensor] = {}
    for rank in received.ranks:
        for number, (view, table) in enumerate(zip(rank.views, rank.tables, strict=True)):
            for ordinal, slot in table.items():
                to = cache.group_view(number)[int(sequence.tables[number][ordinal])].view(torch.uint8)
                for i, place in enumerate(rank.places[number]):
                    for j, head in enumerate(rank.heads[number]):
                        part = view[slot, i, :, j].contiguous().view(torch.uint8)
                        twin = seen.setdefault((number, ordinal, place, head), part)
                        assert torch.equal(twin, part), "two ranks of one head differ"
                        to[place, :, head] = part
    return cache


def fill_directly(received: Received) -> KVCache:
    """The equal layout: the sender's numbers, rounded once, put where a cache of one rank has them."""
    cache, prompt_len = make_cache(received.model, received.job.receiver.block_size), len(received.job.prompt)
    sequence = cache.open("joined")
    assert cache.resize(sequence, capacity=prompt_len + NUM_TOKENS, history=prompt_len)
    for number, worth in enumerate(received.truth):
        values, size = stored(torch.from_numpy(worth), received, number), cache.layout.block_size
        for token in range(prompt_len):
            slot = int(sequence.tables[number][token // size])
            if slot >= 0:
                cache.group_view(number)[slot, :, :, :, token % size] = values[:, :, :, token]
    return cache


def decode(model: LoadedModel, cache: KVCache, received: Received) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens after the first, and the logprobs of each step."""
    (sequence,) = cache._sequences.values()
    runner, tokens, rows = Runner(model, cache), [received.first_token], []
    for index in range(NUM_TOKENS):
        position = len(received.job.prompt) + index
        assert cache.resize(sequence, capacity=position + 1, history=position)
        rows.append(runner.execute([Chunk(sequence.tables, [tokens[-1]], position, True)])[0].log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
    return tokens, torch.stack(rows)


def data_is_right(received: Received) -> bool:
    """Every needed token of every rank, against the sender's numbers rounded once."""
    for number, worth in enumerate(received.truth):
        values = stored(torch.from_numpy(worth), received, number)
        for rank in received.ranks:
            view, size = rank.views[number], received.job.receiver.block_size
            if view is None:
                continue
            tokens = needed_tokens(rank.geometry.groups[number], len(received.job.prompt))
            for token in tokens:
                mine = view[rank.tables[number][token // size], :, :, :, token % size]
                if not torch.equal(mine.float(), values[rank.places[number]][:, :, rank.heads[number], token].float()):
                    return False
    return True


def close(received: Received) -> None:
    received.cache.close()
    for rank in received.ranks:
        rank.close()


@pytest.mark.parametrize("name", COMBINATIONS)
def test_unequal_ranks_receive_the_minimum_and_decode_as_one(name: str, sender: SenderProcess, folder: Path) -> None:
    received = asyncio.run(transfer(sender, job_of(name, folder)))
    assert isinstance(received.decision, Verified)
    assert received.decision.first_token.token_id == received.first_token
    assert sum(sum(record.nbytes.values()) for record in received.records.values()) == least_nbytes(received)
    assert data_is_right(received)
    tokens, logprobs = decode(received.model, join(received), received)
    equal = fill_directly(received)
    wanted, expected = decode(received.model, equal, received)
    assert tokens == wanted
    assert (logprobs - expected).abs().max() < 2e-3
    equal.close()
    close(received)


def test_a_scale_that_is_wrong_by_two_fails_the_comparison(sender: SenderProcess, folder: Path) -> None:
    """The sender's HELLO says twice the scale that its numbers were stored with: digests hold, numbers do not."""
    job = job_of("tp4 pp2 to tp2, fp8 to fp8 of other scales", folder)
    lying = replace(job, sender=replace(job.sender, claimed_scale=2 * job.sender.scale))
    received = asyncio.run(transfer(sender, lying))
    assert isinstance(received.decision, Verified)
    assert not data_is_right(received)
    _, logprobs = decode(received.model, join(received), received)
    equal = fill_directly(received)
    _, expected = decode(received.model, equal, received)
    assert (logprobs[0] - expected[0]).abs().max() > 0.1
    equal.close()
    close(received)
