"""Flips one bit of one byte in flight, in the first large frame that passes once it is armed."""

from __future__ import annotations

from support.links.zmtp_proxy import Frame, ZmtpProxy


class FlippingProxy(ZmtpProxy):
    """`at` is the byte's offset in the frame's body, negative from its end; frames below `min_nbytes` pass untouched.

    Without CURVE the body is the payload; with it the body is a box, and the flip breaks its authenticator.
    """

    def __init__(self, target: str, *, at: int, min_nbytes: int = 2048) -> None:
        super().__init__(target)
        self._at, self._min_nbytes = at, min_nbytes
        self.is_armed = True
        self.num_flipped = 0

    def pass_on(self, frame: Frame, offset: int, chunk: bytes) -> bytes:
        position = (self._at if self._at >= 0 else frame.nbytes + self._at) - offset
        if not self.is_armed or frame.is_command or frame.nbytes < self._min_nbytes or not 0 <= position < len(chunk):
            return chunk
        self.is_armed = False
        self.num_flipped += 1
        return chunk[:position] + bytes([chunk[position] ^ 1]) + chunk[position + 1 :]
