from __future__ import annotations

import pytest

from disagg.api.http.authorization import BearerKey


@pytest.mark.parametrize(
    "header", ["Bearer sesame", "bearer sesame", "BEARER sesame", "  Bearer   sesame\t", "bEaReR sesame "]
)
def test_the_scheme_is_known_in_any_case_and_spaces_mean_nothing(header: str) -> None:
    assert BearerKey("sesame").opens(header)


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "sesame", "Basic sesame", "Bearer Sesame", "Bearer sesame x", "Bearersesame"]
)
def test_another_scheme_or_key_opens_nothing(header: str) -> None:
    assert not BearerKey("sesame").opens(header)


def test_a_key_is_known_in_both_encodings_that_clients_send() -> None:
    key = BearerKey("sésame")
    assert key.opens(b"Bearer s\xe9same".decode("latin-1"))
    assert key.opens("Bearer sésame".encode().decode("latin-1"))
    assert not key.opens("Bearer s?same")


def test_a_key_outside_of_latin_1_is_known_as_utf_8_only() -> None:
    key = BearerKey("🦙")
    assert key.opens("Bearer 🦙".encode().decode("latin-1"))
    assert not key.opens("Bearer ?")
