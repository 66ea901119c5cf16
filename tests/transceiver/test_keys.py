from __future__ import annotations

import hashlib
import hmac
from dataclasses import astuple

import pytest
import zmq

from disagg.transceiver.wire.keys import ClusterKeys

SECRET = bytes(range(32))


def hkdf(secret: bytes, label: bytes) -> bytes:
    """RFC 5869 by hand: extract with a zero salt, expand one block."""
    extracted = hmac.digest(bytes(32), secret, hashlib.sha256)
    return hmac.digest(extracted, label + b"\x01", hashlib.sha256)


def test_every_key_is_hkdf_of_the_secret_and_its_label() -> None:
    keys = ClusterKeys.from_secret(SECRET)
    assert keys.ticket == hkdf(SECRET, b"ticket")
    assert keys.manifest_mac == hkdf(SECRET, b"manifest-mac")
    assert keys.prefix_hash == hkdf(SECRET, b"prefix-hash")
    assert zmq.utils.z85.decode(keys.curve_secret) == hkdf(SECRET, b"curve")


def test_the_curve_pair_belongs_together() -> None:
    keys = ClusterKeys.from_secret(SECRET)
    assert zmq.curve_public(keys.curve_secret) == keys.curve_public


def test_two_secrets_share_no_key() -> None:
    one, other = ClusterKeys.from_secret(SECRET), ClusterKeys.from_secret(SECRET[::-1])
    assert all(a != b for a, b in zip(astuple(one)[:-1], astuple(other)[:-1], strict=True))


def test_the_hash_key_id_is_stable_and_is_not_the_key() -> None:
    keys = ClusterKeys.from_secret(SECRET)
    assert keys.hash_key_id == ClusterKeys.from_secret(SECRET).hash_key_id
    assert len(keys.hash_key_id) == 16
    assert keys.hash_key_id not in keys.prefix_hash.hex()


def test_printing_keys_shows_none_of_them() -> None:
    keys = ClusterKeys.from_secret(SECRET)
    assert not any(str(value) in repr(keys) for value in astuple(keys)[:5])


def test_a_short_secret_is_refused_with_its_length() -> None:
    with pytest.raises(ValueError, match="15 bytes, expected at least 16"):
        ClusterKeys.from_secret(bytes(15))


def test_published_keys_say_that_they_are_insecure() -> None:
    assert ClusterKeys.published().insecure
    assert not ClusterKeys.from_secret(SECRET).insecure
