"""Mapping a peer's pool in pieces, so that a large one does not hold up the threads of the process that maps it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
import pytest

from disagg.cache.pool import SlotPool
from disagg.transceiver.planes.shm import mapping
from disagg.transceiver.planes.shm.handshake import PoolShape
from disagg.transceiver.planes.shm.mapping import PoolMapping

PIECE_NBYTES = 64 << 10


class Recorder:
    """Stands for libc: remembers what was advised, and answers `code`."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[tuple[int, int, int]] = []

    def madvise(self, address: int, nbytes: int, advice: int) -> int:
        self.calls.append((address, nbytes, advice))
        return self.code


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    made = SlotPool(4096, 50)
    yield made
    made.close()


def mapped(pool: SlotPool) -> PoolMapping:
    pool.memory[2:] = 7
    return PoolMapping(pool.sides.fd, PoolShape(pool.num_slots, pool.slot_nbytes, pool.sides.slots_offset))


@pytest.mark.parametrize("advice", [22, mmap.MADV_DONTNEED])
def test_every_byte_is_advised_once_in_pieces(pool: SlotPool, monkeypatch: pytest.MonkeyPatch, advice: int) -> None:
    libc = Recorder(0)
    monkeypatch.setattr(mapping, "_libc", libc)
    monkeypatch.setattr(mapping, "_ADVISED_NBYTES", PIECE_NBYTES)
    mapped(pool).close()
    pieces = [(address, nbytes) for address, nbytes, given in libc.calls if given == advice]
    assert len(pieces) > 2
    assert max(nbytes for _, nbytes in pieces) == PIECE_NBYTES
    assert [address for address, _ in pieces[1:]] == [address + nbytes for address, nbytes in pieces[:-1]]
    assert sum(nbytes for _, nbytes in pieces) == pool.sides.slots_offset + pool.num_slots * pool.slot_nbytes


def test_a_kernel_without_the_advice_is_asked_once_and_the_pages_are_touched(
    pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc = Recorder(-1)
    monkeypatch.setattr(mapping, "_libc", libc)
    monkeypatch.setattr(mapping, "_ADVISED_NBYTES", PIECE_NBYTES)
    made = mapped(pool)
    assert [given for _, _, given in libc.calls] == [22]
    assert np.array_equal(made.region.slots, pool.memory.numpy())
    made.close()
