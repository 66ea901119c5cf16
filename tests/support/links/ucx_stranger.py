"""A process that was told nothing by the protocol, at a port of UCX. argv: what it tries, and what it knows.

`frame PORT ADDRESS`: one frame of UCX's tcp transport that says where in the other process's memory it belongs.
`endpoint WORKER_ADDRESS_HEX ADDRESS`: an endpoint of UCX itself, then a get and a put under a key of its own making.
Prints what it read, in hex, if it read anything.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
import time
from typing import Any

WRITTEN = b"stranger"

_MAGIC = 0xCAFEBABE12345678
_PUT_REQUEST = 33


def send_frame(port: int, address: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=2) as sock:
        request = struct.pack("<QQI", address, len(WRITTEN), 1)
        sock.sendall(struct.pack("<QBI", _MAGIC, _PUT_REQUEST, len(request)) + request + WRITTEN)
        time.sleep(1)


def use_endpoint(worker_address: bytes, address: int) -> None:
    import numpy as np

    from disagg.transceiver.planes.ucx.library import library

    core = library()
    features = (core.Feature.TAG, core.Feature.WAKEUP, core.Feature.RMA)
    context = core.UCXContext({"TLS": "tcp,self", "NET_DEVICES": "lo"}, feature_flags=features)
    worker = core.UCXWorker(context)
    worker.init_blocking_progress_mode()
    peer = core.UCXAddress.create_from_buffer(worker_address)
    endpoint = worker.create_endpoint_from_worker_address(peer, endpoint_error_handling=True)
    ucp, mine = _ucp(), np.frombuffer(bytearray(len(WRITTEN)), dtype=np.uint8)
    key = _forged_key(ucp, context, endpoint, mine)
    plain = (ctypes.c_uint64 * 32)()
    ucp.ucp_get_nbx(endpoint.handle, mine.ctypes.data, len(mine), address, key, plain)
    _progress(worker)
    print(bytes(mine).hex(), flush=True)
    mine[:] = np.frombuffer(WRITTEN, dtype=np.uint8)
    ucp.ucp_put_nbx(endpoint.handle, mine.ctypes.data, len(mine), address, key, plain)
    ucp.ucp_ep_flush_nbx(endpoint.handle, plain)
    _progress(worker)


def _ucp() -> Any:
    ucp: Any = ctypes.CDLL("libucp.so.0")
    pointer, size, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
    for name, arguments in {
        "ucp_mem_map": [pointer] * 3,
        "ucp_rkey_pack": [pointer] * 4,
        "ucp_ep_rkey_unpack": [pointer] * 3,
        "ucp_get_nbx": [pointer, pointer, size, word, pointer, pointer],
        "ucp_put_nbx": [pointer, pointer, size, word, pointer, pointer],
        "ucp_ep_flush_nbx": [pointer] * 2,
    }.items():
        function = getattr(ucp, name)
        function.argtypes = arguments
        function.restype = pointer if name.endswith("nbx") else ctypes.c_int8
    return ucp


def _forged_key(ucp: Any, context: Any, endpoint: Any, mine: Any) -> ctypes.c_void_p:
    """The key of memory of our own, which says nothing of where it lies."""
    parameters = (ctypes.c_uint64 * 16)(3, mine.ctypes.data, len(mine))  # address and length are given
    memory, packed, size, key = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_void_p()
    done = [
        ucp.ucp_mem_map(context.handle, parameters, ctypes.byref(memory)),
        ucp.ucp_rkey_pack(context.handle, memory, ctypes.byref(packed), ctypes.byref(size)),
        ucp.ucp_ep_rkey_unpack(endpoint.handle, packed, ctypes.byref(key)),
    ]
    assert done == [0, 0, 0], done
    return key


def _progress(worker: Any) -> None:
    for _ in range(1000):
        worker.progress_once()
        time.sleep(0.001)


if __name__ == "__main__":
    if sys.argv[1] == "frame":
        send_frame(int(sys.argv[2]), int(sys.argv[3]))
    else:
        use_endpoint(bytes.fromhex(sys.argv[2]), int(sys.argv[3]))
