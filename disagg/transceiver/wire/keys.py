"""Keys of one cluster, all derived from its one secret (protocol.md section 8).

HKDF-SHA256(secret, label) gives each use its own key, so that what one use reveals says nothing about another.
Every process of a cluster holds the same CURVE key pair: a client proves that it knows the secret by owning the key
that servers allow-list.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

import zmq
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from zmq.utils import z85

MIN_SECRET_NBYTES: Final = 16
"""128 bits: below this a secret can be searched offline from one captured ticket."""

INSECURE_SECRET: Final = b"disagg --insecure: a published constant that protects nothing"


@dataclass(frozen=True, slots=True, repr=False)
class ClusterKeys:
    """Raw 32-byte keys, the CURVE pair in Z85, and the public id of the prefix-hash key. `repr` shows no key.

    `event_hash`, `event_curve` (Z85): for the blocks that are published to subscribers outside of the cluster.
    """

    ticket: bytes
    manifest_mac: bytes
    prefix_hash: bytes
    curve_public: bytes
    curve_secret: bytes
    hash_key_id: str
    event_hash: bytes
    event_curve: bytes
    insecure: bool = field(default=False)

    @classmethod
    def from_secret(cls, secret: bytes, insecure: bool = False) -> ClusterKeys:
        """Derive every key. `insecure` marks keys of the published constant. Raises `ValueError` for a short secret."""
        if len(secret) < MIN_SECRET_NBYTES:
            raise ValueError(f"cluster secret: {len(secret)} bytes, expected at least {MIN_SECRET_NBYTES}")
        curve_secret = z85.encode(_derive(secret, b"curve"))
        prefix_hash = _derive(secret, b"prefix-hash")
        return cls(
            ticket=_derive(secret, b"ticket"),
            manifest_mac=_derive(secret, b"manifest-mac"),
            prefix_hash=prefix_hash,
            curve_public=zmq.curve_public(curve_secret),
            curve_secret=curve_secret,
            hash_key_id=blake2b(key=prefix_hash, digest_size=8, person=b"hash-key-id").hexdigest(),
            event_hash=_derive(secret, b"kv-events-hash"),
            event_curve=z85.encode(_derive(secret, b"kv-events-curve")),
            insecure=insecure,
        )

    @classmethod
    def published(cls) -> ClusterKeys:
        """The keys of `--insecure`: anyone can derive them, so they serve loopback and tests only."""
        return cls.from_secret(INSECURE_SECRET, insecure=True)

    def __repr__(self) -> str:
        return f"ClusterKeys(hash_key_id={self.hash_key_id!r}, insecure={self.insecure})"


def _derive(secret: bytes, label: bytes) -> bytes:
    # No salt: the secret is uniformly random or an operator's file, and every process must derive the same key.
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=label).derive(secret)
