from __future__ import annotations

from pathlib import Path

import pytest

from disagg.config.api_keys import MAX_KEYS, ONLY_TENANT, ApiKey, api_keys, read_key_file
from disagg.config.errors import ConfigError


def key_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_names_a_tenant_a_key_and_its_limits(tmp_path: Path) -> None:
    path = key_file(tmp_path, "# keys\n\nann s3cret#1\nbob  hush weight=2.5 max_requests=8 max_tokens=100000\n")
    assert read_key_file(path) == (
        ApiKey(tenant="ann", key="s3cret#1"),
        ApiKey(tenant="bob", key="hush", weight=2.5, max_requests=8, max_tokens=100_000),
    )


def test_the_one_key_comes_first_and_none_is_an_open_api(tmp_path: Path) -> None:
    path = key_file(tmp_path, "ann s3cret\n")
    assert [key.tenant for key in api_keys("k", path)] == [ONLY_TENANT, "ann"]
    assert api_keys(None, None) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no key"),
        ("ann\n", r"line 1: expected `TENANT KEY`"),
        ("ann hush speed=3\n", r"line 1: `speed` is no option"),
        ("ann hush weight=0\n", r"`weight=0`: expected a number above 0"),
        ("ann hush max_tokens=many\n", r"`max_tokens=many`: expected a number"),
        ("ann hush\nann other\n", "a tenant twice"),
        ("ann hush\nbob hush\n", "a key twice"),
        ("a\u00e9 hush\n", "printable ASCII"),
        ("".join(f"t{n} hush{n}\n" for n in range(MAX_KEYS + 1)), f"expected {MAX_KEYS} at most"),
    ],
)
def test_what_cannot_be_used_is_refused_without_showing_a_key(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_key_file(key_file(tmp_path, text))
    assert "hush" not in str(caught.value)


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(key_file(tmp_path, "ann hush\n", 0o644))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`--api-key-file` cannot be read"):
        read_key_file(tmp_path / "none")
