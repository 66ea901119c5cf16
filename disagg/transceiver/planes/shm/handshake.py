"""What two processes on one host say over a unix socket before one maps the other's pools.

reader -> owner: magic, token, length of the incarnation, the incarnation.
owner -> reader: magic, number of pools, then (num_slots, slot_nbytes, slots_offset) per pool; with these bytes travel
the file descriptors: one page that starts with the offer's nonce, then one memfd per pool. A refusal is an end of file.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from disagg.transceiver.memory.regions import PoolRegion
from disagg.transceiver.planes.greeting import HANDSHAKE_S, MAGIC, greeting
from disagg.transceiver.wire.errors import PeerLost, PlaneRefused, Shortage

MAX_POOLS: Final = 64
"""Pools are distinct slot sizes of one model: a handful. The kernel passes at most 253 descriptors in one message."""

ANSWER: Final = struct.Struct("<4sI")
POOL: Final = struct.Struct("<QQQ")

_REQUIRED_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FUTURE_WRITE: Final = 0x10  # F_SEAL_FUTURE_WRITE, not named by Python 3.11


@dataclass(frozen=True, slots=True)
class PoolShape:
    """Where slots lie in one memfd: generations (uint64 per slot) first, slots from byte `slots_offset`."""

    num_slots: int
    slot_nbytes: int
    slots_offset: int

    @property
    def nbytes(self) -> int:
        return self.slots_offset + self.num_slots * self.slot_nbytes


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end, as the kernel recorded it."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


def check_shareable(pool: PoolRegion) -> None:
    """Raise `PlaneRefused` for a pool whose memory must not be handed to another process."""
    if pool.fd < 0:
        raise PlaneRefused("shm: this pool is not host memory that can be shared; use zmq")
    if not fcntl.fcntl(pool.fd, fcntl.F_GET_SEALS) & _FUTURE_WRITE:
        raise PlaneRefused("shm: this pool's memfd is not sealed against writers")


def send_pools(sock: socket.socket, nonce: bytes, pools: Sequence[PoolRegion]) -> None:
    """Answer a greeting: shapes and descriptors in one message."""
    shapes = b"".join(POOL.pack(*pool.slots.shape, pool.slots_offset) for pool in pools)
    nonce_fd = os.memfd_create("disagg-nonce", os.MFD_CLOEXEC)
    try:
        os.write(nonce_fd, nonce)
        socket.send_fds(sock, [ANSWER.pack(MAGIC, len(pools)) + shapes], [nonce_fd, *(pool.fd for pool in pools)])
    finally:
        os.close(nonce_fd)


def request_pools(sock: socket.socket, me: str, token: bytes, nonce: bytes) -> list[tuple[int, PoolShape]]:
    """Blocking: greet, and receive (fd, shape) per pool, checked. The caller closes the fds. Raises `PlaneRefused`."""
    if peer_uid(sock) != os.geteuid():
        raise PlaneRefused("shm: the listener at that address belongs to another user")
    sock.sendall(greeting(me, token))
    fds: list[int] = []
    try:
        pools = _parse_answer(_receive_answer(sock, fds), fds, nonce)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    os.close(fds[0])
    return pools


def _receive_answer(sock: socket.socket, fds: list[int]) -> bytes:
    data = b""
    while len(data) < ANSWER.size or len(data) < _answer_nbytes(data):
        part, new_fds, flags, _ = _receive(sock)
        fds += new_fds
        if flags & socket.MSG_CTRUNC:
            raise Shortage("shm: no descriptors left for the source's pools, or it passed too many")
        if not part:
            raise PlaneRefused("shm: the source refused the token, or ended")
        data += part
    return data


def _receive(sock: socket.socket) -> tuple[bytes, list[int], int, object]:
    descriptors = array.array("i")
    space = socket.CMSG_SPACE((MAX_POOLS + 1) * descriptors.itemsize)
    try:
        # Close-on-exec from the start: another thread may be about to spawn a process.
        data, messages, flags, address = sock.recvmsg(4096, space, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError as exc:
        raise PeerLost(f"shm: the source did not answer within {HANDSHAKE_S:g} s") from exc
    for level, kind, payload in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return data, list(descriptors), flags, address


def _answer_nbytes(data: bytes) -> int:
    magic, num_pools = ANSWER.unpack_from(data)
    if magic != MAGIC or num_pools > MAX_POOLS:
        raise PlaneRefused("shm: the listener at that address speaks another protocol")
    return ANSWER.size + int(num_pools) * POOL.size


def _parse_answer(data: bytes, fds: list[int], nonce: bytes) -> list[tuple[int, PoolShape]]:
    shapes = [PoolShape(*POOL.unpack_from(data, at)) for at in range(ANSWER.size, len(data), POOL.size)]
    if len(fds) != len(shapes) + 1:
        raise PlaneRefused(f"shm: expected {len(shapes) + 1} descriptors, got {len(fds)}")
    # The nonce came over the control link, so a process that shows it in shared memory is the peer, on this host.
    if os.pread(fds[0], len(nonce), 0) != nonce:
        raise PlaneRefused("shm: the process at that address is not the peer that made the offer")
    for fd, shape in zip(fds[1:], shapes, strict=True):
        _check_file(fd, shape)
    return list(zip(fds[1:], shapes, strict=True))


def _check_file(fd: int, shape: PoolShape) -> None:
    """A file that can shrink would end this process by SIGBUS in the middle of a copy: only sealed ones are mapped."""
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _REQUIRED_SEALS != _REQUIRED_SEALS:
        raise PlaneRefused("shm: the peer's pool is not sealed against shrinking")
    aligned = shape.slots_offset % 4096 == 0 and shape.slots_offset >= 8 * shape.num_slots
    if not aligned or shape.num_slots < 1 or shape.slot_nbytes < 1 or os.fstat(fd).st_size < shape.nbytes:
        raise PlaneRefused(f"shm: the peer's pool file does not hold what it says: {shape}")
