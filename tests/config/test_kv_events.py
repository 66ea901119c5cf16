"""Where cached blocks may be published, and to whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from disagg.api.main import _publish_options
from disagg.config.errors import ConfigError
from disagg.config.settings import RouterSettings
from disagg.transceiver.wire.keys import ClusterKeys

KEYS = ClusterKeys.from_secret(b"a secret of the tests, long enough")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"kv_events": "tcp://10.0.0.1:5557"}, "`10.0.0.1` is not loopback: give subscribers' keys"),
        ({"kv_events": "tcp://0.0.0.0:5557"}, "is not loopback"),
        ({"kv_events": "tcp://127.0.0.1:65535"}, "the next one replays"),
        ({"kv_events": "tcp://*:5557"}, "expected where to publish"),
        ({"kv_events": "5557"}, "expected where to publish"),
    ],
)
def test_a_stream_that_strangers_could_read_is_refused(fields: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RouterSettings(**fields)  # type: ignore[arg-type]


def test_a_stream_may_leave_the_machine_with_keys_or_insecure() -> None:
    RouterSettings(kv_events="tcp://10.0.0.1:5557", kv_events_keys=Path("/run/keys"))
    RouterSettings(kv_events="tcp://10.0.0.1:5557", insecure=True)


def test_what_is_published_is_replayed_at_the_next_port_without_encryption_on_loopback() -> None:
    options = _publish_options(RouterSettings(kv_events="tcp://[::1]:5557"), KEYS)
    assert options is not None
    assert (options.endpoint, options.replay_endpoint) == ("tcp://[::1]:5557", "tcp://[::1]:5558")
    assert (options.curve_secret, options.allowed) == (b"", ())
    assert options.hash_key not in (KEYS.prefix_hash, KEYS.ticket, KEYS.manifest_mac)
    free = _publish_options(RouterSettings(kv_events="tcp://127.0.0.1:0"), KEYS)
    assert free is not None
    assert free.replay_endpoint == "tcp://127.0.0.1:0"
    assert _publish_options(RouterSettings(), KEYS) is None


def test_keys_encrypt_under_a_key_pair_of_its_own(tmp_path: Path) -> None:
    public, _ = zmq.curve_keypair()
    (tmp_path / "keys").write_bytes(public)
    settings = RouterSettings(kv_events="tcp://10.0.0.1:5557", kv_events_keys=tmp_path / "keys")
    options = _publish_options(settings, KEYS)
    assert options is not None
    assert options.allowed == (public,)
    assert options.curve_secret == KEYS.event_curve != KEYS.curve_secret
    assert KEYS.event_curve.decode() not in repr(options) + repr(KEYS)


@pytest.mark.parametrize("fields", [{"kv_events_tokens": True}, {"kv_events_keys": Path("/run/keys")}])
def test_how_to_publish_without_where_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="say where too"):
        _publish_options(RouterSettings(**fields), KEYS)  # type: ignore[arg-type]
