"""Counts KV payload on the wire of the zmq plane without CURVE: the bytes of every frame after a message's first."""

from __future__ import annotations

from support.links.zmtp_proxy import Frame, ZmtpProxy


class CountingProxy(ZmtpProxy):
    """`payload_nbytes` and `num_payload_frames` so far."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.payload_nbytes = 0
        self.num_payload_frames = 0

    def pass_on(self, frame: Frame, offset: int, chunk: bytes) -> bytes:
        if frame.index > 0 and not frame.is_command:
            self.payload_nbytes += len(chunk)
            self.num_payload_frames += offset == 0
        return chunk
