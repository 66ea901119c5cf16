"""What disagg is measured against: a plain memcpy loop, NIXL and Mooncake, each as good as its interface allows."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import mmap
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from disagg.bench.cases import Case
from disagg.bench.side import ContenderSide
from disagg.transceiver.planes.shm.handshake import PoolShape
from disagg.transceiver.planes.shm.mapping import PoolMapping

Numbers = npt.NDArray[np.int64]

_COPY_C: Final = """
#include <string.h>
void copy(char *to, const char *from, const long *t, const long *f, long n, long size) {
    for (long i = 0; i < n; i++) memcpy(to + t[i] * size, from + f[i] * size, size);
}
"""

MOONCAKE_BATCH: Final = 2048
"""One batch of 13312 entries fails with EFAULT in its writeBody."""


class PeerSide(ContenderSide):
    """Flat anonymous memory, cut by layer as engines do, or into slots as ours for an equal comparison."""

    def __init__(self, is_source: bool, plane: str) -> None:
        super().__init__(is_source, plane)
        self.by_layer = not plane.endswith("-slots")

    async def open(self, case: Case, secret: bytes) -> dict[str, Any]:
        self.case = case
        self.memory = np.frombuffer(mmap.mmap(-1, self.case.pool_nbytes), dtype=np.uint8)
        self.memory[::4096] = 0
        return self.describe()

    def describe(self) -> dict[str, Any]:
        return {"address": self.memory.ctypes.data}

    async def prepare(self, number: int, mine: Numbers, theirs: Numbers) -> None:
        self.mine, self.piece_nbytes = self.case.pieces(mine, self.by_layer)
        self.theirs, _ = self.case.pieces(theirs, self.by_layer)

    def close_memory(self) -> None:
        del self.memory


class Memcpy(PeerSide):
    """The destination copies each piece out of the source's memory, mapped here: one thread, one pass, C if possible.

    The floor of what one copy costs; nothing is announced, checked or acknowledged.
    """

    async def open(self, case: Case, secret: bytes) -> dict[str, Any]:
        self.case = case
        self._fd = os.memfd_create("bench", os.MFD_ALLOW_SEALING)
        os.posix_fallocate(self._fd, 0, self.case.pool_nbytes)
        self.memory = np.frombuffer(mmap.mmap(self._fd, self.case.pool_nbytes), dtype=np.uint8)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.memory[::4096] = 0
        return {"pid": os.getpid(), "fd": self._fd}

    async def connect(self, other: dict[str, Any]) -> None:
        if self.is_source:
            return
        fd = os.open(f"/proc/{other['pid']}/fd/{other['fd']}", os.O_RDONLY)
        self._mapping = PoolMapping(fd, PoolShape(self.case.pool_nbytes >> 12, 1 << 12, 0))
        os.close(fd)
        self._copy = _compile_copy()

    async def move(self) -> int:
        if self.is_source:
            return 0
        source = self._mapping.region.slots.reshape(-1)
        if self._copy is not None:
            ends = self.memory.ctypes.data, source.ctypes.data, self.mine.ctypes.data, self.theirs.ctypes.data
            self._copy(*ends, len(self.mine), self.piece_nbytes)
        else:
            size = self.piece_nbytes
            for to, at in zip((self.mine * size).tolist(), (self.theirs * size).tolist(), strict=True):
                self.memory[to : to + size] = source[at : at + size]
        return len(self.mine)

    async def close(self) -> None:
        os.close(self._fd)


def _compile_copy() -> Any | None:
    """The loop in C where this machine has a compiler; the numpy loop costs half a microsecond more a piece."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "copy.c"), Path(folder, "copy.so")
        source.write_text(_COPY_C)
        subprocess.run([compiler, "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)  # noqa: S603
        copy = ctypes.CDLL(str(library)).copy
    copy.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2
    return copy


class Nixl(PeerSide):
    """NIXL's best mode: UCX, no progress thread, all pieces of both pools prepared once, indices per request.

    The source writes; the destination polls for the notice, as NIXL asks of it.
    """

    def describe(self) -> dict[str, Any]:
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        config = nixl_agent_config(backends=["UCX"], enable_prog_thread=False)
        self._agent = nixl_agent("source" if self.is_source else "destination", config)
        self._registered = self._agent.register_memory(
            [(self.memory.ctypes.data, self.case.pool_nbytes, 0, "")], "DRAM"
        )
        return {"address": self.memory.ctypes.data, "metadata": self._agent.get_agent_metadata().hex()}

    async def connect(self, other: dict[str, Any]) -> None:
        name = self._agent.add_remote_agent(bytes.fromhex(other["metadata"]))
        peer = name.decode() if isinstance(name, bytes) else name
        if self.is_source:
            self._agent.make_connection(peer)
            self._local = self._prepare_pool("NIXL_INIT_AGENT", self.memory.ctypes.data)
            self._remote = self._prepare_pool(peer, other["address"])

    def _prepare_pool(self, agent: str, address: int) -> Any:
        count, nbytes = self._count_pieces()
        pieces = np.zeros((count, 3), dtype=np.uint64)
        pieces[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(nbytes)
        pieces[:, 1] = nbytes
        return self._agent.prep_xfer_dlist(agent, pieces, "DRAM")

    def _count_pieces(self) -> tuple[int, int]:
        case = self.case
        if self.by_layer:
            return case.pool_blocks * case.num_layers, case.region_nbytes
        return case.pool_blocks, case.slot_nbytes

    async def move(self) -> int:
        if not self.is_source:
            while not self._agent.get_new_notifs():
                pass
            return len(self.mine)
        local, remote = self.mine.astype(np.int32), self.theirs.astype(np.int32)
        transfer = self._agent.make_prepped_xfer("WRITE", self._local, local, self._remote, remote, b"done")
        state = self._agent.transfer(transfer)
        while state == "PROC":
            state = self._agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError(f"NIXL: {state}")
        self._agent.release_xfer_handle(transfer)
        return len(self.mine)


class Mooncake(PeerSide):
    """Mooncake's transfer engine over TCP: the source writes in batches, then says so."""

    def describe(self) -> dict[str, Any]:
        from mooncake.engine import TransferEngine

        self._engine = TransferEngine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("Mooncake: cannot initialize")
        if self._engine.register_memory(self.memory.ctypes.data, self.case.pool_nbytes) != 0:
            raise RuntimeError("Mooncake: cannot register memory")
        self._notices = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._notices.bind(("127.0.0.1", 0))
        self._notices.setblocking(False)
        port = self._notices.getsockname()[1]
        return {
            "address": self.memory.ctypes.data,
            "name": f"127.0.0.1:{self._engine.get_rpc_port()}",
            "notices": port,
        }

    async def connect(self, other: dict[str, Any]) -> None:
        self._other = other

    async def move(self) -> int:
        if not self.is_source:
            await asyncio.get_running_loop().sock_recv(self._notices, 1)
            return len(self.mine)
        size = self.piece_nbytes
        local = (self.mine * size + self.memory.ctypes.data).tolist()
        remote = (self.theirs * size + self._other["address"]).tolist()
        for start in range(0, len(local), MOONCAKE_BATCH):
            part = slice(start, start + MOONCAKE_BATCH)
            sizes = [size] * len(local[part])
            if self._engine.batch_transfer_sync_write(self._other["name"], local[part], remote[part], sizes) != 0:
                raise RuntimeError("Mooncake: a write failed")
        self._notices.sendto(b"!", ("127.0.0.1", self._other["notices"]))
        return len(self.mine)
