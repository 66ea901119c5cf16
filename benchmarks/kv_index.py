"""What the index of cached blocks costs: CPU at a rate of events, memory per million blocks, time of a question.

    .venv/bin/python benchmarks/kv_index.py [--rate 62000] [--seconds 10] [--blocks 1000000] [--workers 1 8 64]

CPU seconds are each process's own. The index process is the router's own (`disagg.router.index`), told at `--rate`
blocks stored and as many dropped a second, in messages as workers send them; this process does what the router's event
loop does with a message: decode it, look whose it is, pass it on. Worker: what making those messages takes of its loop,
and noting the events of its model thread.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

from disagg.bench.circumstances import circumstances
from disagg.cache.identity import BlockHasher
from disagg.cache.journal import BlockDropped, BlockEvent, BlockStored, JournalRestart
from disagg.router.index.block_index import BlockIndex, GroupSpan
from disagg.router.index.process import chain_of
from disagg.router.index.remote import PrefixIndex
from disagg.transceiver.wire.codec import decode, encode
from disagg.transceiver.wire.messages.blocks import MAX_EVENTS, BlockEvents
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.messages.values import Geometry, GroupSemantics, Identity
from disagg.worker.block_news import events_message

BLOCK_SIZE, CHAIN = 16, 64
"""Blocks are told in chains of a thousand tokens, as prompts make them."""
GROUPS = (GroupSemantics(None, 0, 8, 128, (0,)), GroupSemantics(1024, 0, 8, 128, (1,)))
TELL_S = 0.5
QUESTIONS = (1 << 10, 8 << 10, 128 << 10)


def name(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def stores(first: int) -> Iterator[BlockEvent]:
    """Blocks in both groups, without end, in chains."""
    number = first
    while True:
        parent = name(number - 1) if number % CHAIN else b""
        yield BlockStored(name(number), (0, 1), parent, b"")
        number += 1


def churn(first: int) -> Iterator[BlockEvent]:
    """A block is stored, one of long ago is dropped."""
    for number, event in enumerate(stores(first)):
        yield event
        yield BlockDropped(name(number), (0, 1))


def registered(number: int) -> Register:
    identity = Identity(2, "model", "full", "bfloat16", 131072, "key")
    geometry = Geometry(BLOCK_SIZE, "bfloat16", GROUPS, (BLOCK_SIZE * 4096,))
    worker = f"w{number}"
    return Register(
        incarnation=worker,
        worker_id=worker,
        role="both",
        identity=identity,
        geometry=geometry,
        planes=("shm",),
        peer_endpoint="",
        pid=1,
        host="here",
        device="cpu",
        num_slots=(1,),
        tells_blocks=True,
    )


def messages(worker: str, events: Sequence[BlockEvent], sequence: int) -> list[BlockEvents]:
    cuts = range(0, len(events), MAX_EVENTS)
    return [events_message(worker, sequence + n, BLOCK_SIZE, events[at : at + MAX_EVENTS]) for n, at in enumerate(cuts)]


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_memory(num_blocks: int, num_workers: int) -> None:
    """Bytes of the structure itself, by this process's resident memory."""
    index, made = BlockIndex([GroupSpan(None), GroupSpan(1024)]), stores(0)
    for number in range(num_workers):
        index.add(f"w{number}", BLOCK_SIZE)
    num_events = 0
    shared = [list(islice(made, MAX_EVENTS)) for _ in range(-(-num_blocks // MAX_EVENTS))]
    held, taking_s = resident(), 0.0
    for number in range(num_workers):
        sequence = 0
        parts: list[list[BlockEvent]] = [[JournalRestart()], *shared]
        for events in parts:
            message = events_message(f"w{number}", sequence, BLOCK_SIZE, events)
            sequence, num_events = sequence + 1, num_events + len(events)
            began_at = time.process_time()
            assert index.take(message)
            taking_s += time.process_time() - began_at
    nbytes = resident() - held
    print(
        f"{len(index):>9} blocks, each of {num_workers:>3} workers: {nbytes / len(index):6.0f} bytes a block, "
        f"{nbytes / len(index):.0f} MB a million; {taking_s / num_events * 1e6:.2f} us an event"
    )


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_questions() -> None:
    """A chain that a worker holds whole, one that none holds, and hashing alone; in this process."""
    hasher = BlockHasher(b"k" * 32, "model")
    for num_tokens in QUESTIONS:
        tokens = array("q", range(num_tokens)).tobytes()
        chain = list(chain_of(hasher, "", tokens, BLOCK_SIZE))
        index = BlockIndex([GroupSpan(None), GroupSpan(1024)])
        for worker in ("a", "b", "c", "d"):
            index.add(worker, BLOCK_SIZE)
            index.take(events_message(worker, 0, BLOCK_SIZE, [JournalRestart()]))
            for number, at in enumerate(range(0, len(chain), MAX_EVENTS), 1):
                events = [BlockStored(one, (0, 1), b"", b"") for one in chain[at : at + MAX_EVENTS]]
                index.take(events_message(worker, number, BLOCK_SIZE, events))
        hashing_s = least(lambda: list(chain_of(hasher, "", tokens, BLOCK_SIZE)))  # noqa: B023
        asking_s = least(lambda: index.holders(chain, BLOCK_SIZE, 4))  # noqa: B023
        unknown_s = least(lambda: index.holders(chain_of(hasher, "salt", tokens, BLOCK_SIZE), BLOCK_SIZE, 4))  # noqa: B023
        print(
            f"{num_tokens:>7} tokens: hashed in {hashing_s * 1e3:6.2f} ms, held by four in {asking_s * 1e3:6.2f}, "
            f"held by none in {unknown_s * 1e3:6.3f}"
        )


def least(call: object) -> float:
    took = []
    for _ in range(5):
        began_at = time.process_time()
        call()  # type: ignore[operator]
        took.append(time.process_time() - began_at)
    return min(took)


async def measure_rate(rate: int, seconds: float, num_workers: int) -> None:
    """The process told at a rate, and what passing on takes of this one."""
    num_ticks = round(seconds / TELL_S)
    ticks, making_s = told(num_ticks, round(2 * rate * TELL_S / num_workers), num_workers)
    asked = asyncio.Event()
    async with PrefixIndex.open(b"k" * 32, lambda worker, message: asked.set()) as index:
        for number in range(num_workers):
            index.add(registered(number))
        await asked.wait()
        assert index._process is not None
        pid, passing_s, answered = index._process.pid, 0.0, []
        began_cpu_s, began_at = cpu_s(pid), time.monotonic()
        for tick, data in enumerate(ticks, 1):
            at = time.process_time()
            for one in data:
                index.take(decode(one))
            passing_s += time.process_time() - at
            at = time.monotonic()
            await index.who_holds(range(1024), "")
            answered.append(time.monotonic() - at)
            await asyncio.sleep(max(0.0, began_at + tick * TELL_S - time.monotonic()))
        took, used = time.monotonic() - began_at, cpu_s(pid) - began_cpu_s
    print(
        f"{rate * num_ticks * TELL_S / took:.0f} blocks stored and as many dropped a second, {num_workers} workers, "
        f"{took:.0f} s: index process {used / took:.1%} of a core, passing on {passing_s / took:.1%} of the router's, "
        f"making messages {making_s / took / num_workers:.1%} of each worker's loop"
    )
    print(
        f"questions beside a batch of all workers: slowest {max(answered) * 1e3:.1f} ms, median "
        f"{sorted(answered)[num_ticks // 2] * 1e3:.1f}, unanswered {index.num_unanswered} of {num_ticks}"
    )


def told(num_ticks: int, num_events: int, num_workers: int) -> tuple[list[list[bytes]], float]:
    """Of each half second, the encoded messages of all workers; and the CPU seconds that making them took."""
    feeds, sequences = [churn(number << 40) for number in range(num_workers)], [0] * num_workers
    ticks, making_s = [], 0.0
    for _ in range(num_ticks):
        data = []
        for number in range(num_workers):
            events = list(islice(feeds[number], num_events))
            if not sequences[number]:
                events.insert(0, JournalRestart())
            at = time.process_time()
            data += [encode(message) for message in messages(f"w{number}", events, sequences[number])]
            making_s += time.process_time() - at
            sequences[number] += -(-len(events) // MAX_EVENTS)
        ticks.append(data)
    return ticks, making_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=62_000, help="blocks stored, and as many dropped, a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 8, 64])
    options = parser.parse_args()
    print(circumstances())
    asyncio.run(measure_rate(options.rate, options.seconds, 8))
    for num_workers in options.workers:
        if (pid := os.fork()) == 0:  # memory that a run gave back would hide what the next takes
            measure_memory(max(MAX_EVENTS, options.blocks if num_workers < 64 else options.blocks // 8), num_workers)
            os._exit(0)
        os.waitpid(pid, 0)
    measure_questions()


if __name__ == "__main__":
    main()
