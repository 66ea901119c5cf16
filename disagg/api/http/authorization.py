"""The bearer key, compared as HTTP says: the scheme in any case, spaces around the key of no meaning."""

from __future__ import annotations

import hmac

SPACE = b" \t"


class BearerKey:
    """Knows the key in the two encodings that clients send: headers are Latin-1 by rule and UTF-8 in practice."""

    def __init__(self, key: str) -> None:
        encoded = key.encode()
        self._forms = (encoded, key.encode("latin-1")) if max(key, default="") <= "\xff" else (encoded,)

    def opens(self, header: str) -> bool:
        """Whether this value of `Authorization` carries the key. Takes as long for a wrong one."""
        scheme, _, given = header.encode("latin-1").strip(SPACE).partition(b" ")
        given = given.strip(SPACE)
        is_known = any(hmac.compare_digest(given, form) for form in self._forms)
        return is_known and scheme.lower() == b"bearer"
