"""One-time tokens: an offer sent over the control link opens the plane once, for the incarnation it was made for."""

from __future__ import annotations

import hmac
import secrets
from typing import Final

TOKEN_NBYTES: Final = 16
"""128 random bits cannot be guessed within a peer's life."""


class OneTimeTokens:
    """Tokens of offers that were not used yet."""

    def __init__(self) -> None:
        self._unused: dict[str, bytes] = {}

    def mint(self, peer: str) -> bytes:
        """The token for `peer`. Stays the same until it is used, since HELLO, which asks for it, is repeated."""
        return self._unused.setdefault(peer, secrets.token_bytes(TOKEN_NBYTES))

    def redeem(self, peer: str, token: bytes) -> bool:
        """Whether `token` is the unused one of `peer`; uses it up. A wrong one costs the peer nothing."""
        unused = self._unused.get(peer)
        if unused is None or not hmac.compare_digest(unused, token):
            return False
        del self._unused[peer]
        return True

    def revoke(self, peer: str) -> None:
        self._unused.pop(peer, None)
