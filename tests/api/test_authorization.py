from __future__ import annotations

import pytest

from disagg.api.http.authorization import KeyRing


@pytest.mark.parametrize(
    "header", ["Bearer sesame", "bearer sesame", "BEARER sesame", "  Bearer   sesame\t", "bEaReR sesame "]
)
def test_the_scheme_is_known_in_any_case_and_spaces_mean_nothing(header: str) -> None:
    assert KeyRing({"sesame": "t"}).tenant_of(header)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "sesame", "Basic sesame", "Bearer Sesame", "Bearer sesame x", "Bearersesame"]
)
def test_another_scheme_or_key_opens_nothing(header: str) -> None:
    assert not KeyRing({"sesame": "t"}).tenant_of(header)


def test_a_key_is_known_in_both_encodings_that_clients_send() -> None:
    key = KeyRing({"sésame": "t"})
    assert key.tenant_of(b"Bearer s\xe9same".decode("latin-1"))
    assert key.tenant_of("Bearer sésame".encode().decode("latin-1"))
    assert not key.tenant_of("Bearer s?same")


def test_a_key_outside_of_latin_1_is_known_as_utf_8_only() -> None:
    key = KeyRing({"🦙": "t"})
    assert key.tenant_of("Bearer 🦙".encode().decode("latin-1"))
    assert not key.tenant_of("Bearer ?")


def test_each_key_has_its_tenant() -> None:
    ring = KeyRing({"one": "a", "two": "b", "three": "b"})
    assert [ring.tenant_of(f"Bearer {key}") for key in ("one", "two", "three", "four")] == ["a", "b", "b", None]
