"""The bearer keys, compared as HTTP says: the scheme in any case, spaces around the key of no meaning."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from hashlib import blake2b

SPACE = b" \t"


class KeyRing:
    """Knows whose key it is, in the two encodings that clients send: headers are Latin-1 by rule, UTF-8 in practice.

    Keys are looked up by a digest under a secret of this process: how long that takes says nothing of any key.
    """

    def __init__(self, tenants: Mapping[str, str]) -> None:
        """`tenants`: the tenant's name by key."""
        self._secret = secrets.token_bytes(32)
        self._tenants: dict[bytes, str] = {}
        for key, tenant in tenants.items():
            self._tenants[self._digest(key.encode())] = tenant
            if max(key, default="") <= "\xff":
                self._tenants[self._digest(key.encode("latin-1"))] = tenant

    def tenant_of(self, header: str) -> str | None:
        """The tenant whose key this value of `Authorization` carries; None where it carries none of ours."""
        scheme, _, given = header.encode("latin-1").strip(SPACE).partition(b" ")
        tenant = self._tenants.get(self._digest(given.strip(SPACE)))
        return tenant if scheme.lower() == b"bearer" else None

    def _digest(self, key: bytes) -> bytes:
        return blake2b(key, key=self._secret, digest_size=32).digest()
