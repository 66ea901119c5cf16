"""Ports are tried together before anything starts: taken, given twice, not ours, not allowed."""

from __future__ import annotations

import socket
from itertools import permutations

import pytest

from disagg.cli.main import main
from disagg.cli.ports import LOOPBACK, Address, hold_port, require_free_ports
from disagg.config.errors import ConfigError

FLAGS = ("--port", "--admin-port", "--control-port")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_free_ports_are_free_again_afterwards() -> None:
    addresses = [Address(flag, "127.0.0.1", free_port()) for flag in FLAGS]
    require_free_ports(*addresses)
    require_free_ports(*addresses)


def test_zero_takes_a_free_port_however_often_it_is_given() -> None:
    require_free_ports(*(Address(flag, "127.0.0.1", 0) for flag in FLAGS))


@pytest.mark.parametrize("command", ["up", "router", "demo"])
@pytest.mark.parametrize(
    ("first", "second"), [(a, b) for a, b in permutations(FLAGS, 2) if FLAGS.index(a) < FLAGS.index(b)]
)
def test_one_port_given_twice_is_one_sentence_and_exit_code_2(
    command: str, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    zero = [word for flag in FLAGS for word in (flag, "0")]
    assert main([command, "--insecure", *zero, first, port, second, port]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"disagg: `{first}` and `{second}` are both {port}: give each a port of its own, or 0"


@pytest.mark.parametrize("hosts", [("127.0.0.1", "localhost"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
def test_a_port_is_given_twice_under_two_names_of_an_address_too(hosts: tuple[str, str]) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match="`--a` and `--b` are both"):
        require_free_ports(Address("--a", hosts[0], port), Address("--b", hosts[1], port))


def test_one_port_on_two_addresses_is_two_places() -> None:
    port = free_port()
    require_free_ports(Address("--a", "127.0.0.1", port), Address("--b", "127.0.0.2", port))


def test_a_port_that_may_not_be_taken_says_which_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ConfigError, match=r"port 80 \(`--port`\): permission denied: choose one from 1024 on"):
        require_free_ports(Address("--port", "127.0.0.1", 80))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 300, "192.0.2.1", "1.2.3.4.5"])
def test_a_host_that_is_not_ours_is_a_sentence(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^cannot listen on `.*` port 0 \(`--host`\): "):
        require_free_ports(Address("--host", host, 0))


def test_a_held_port_can_be_listened_at_by_a_server_that_reuses_addresses() -> None:
    with hold_port(LOOPBACK, 0) as held:
        port = held.getsockname()[1]
        require_free_ports(Address("--control-port", LOOPBACK, port))
        with socket.create_server((LOOPBACK, port)), socket.create_connection((LOOPBACK, port)):
            pass


def test_a_held_port_is_taken_for_a_server_that_does_not_reuse_addresses() -> None:
    with hold_port(LOOPBACK, 0) as held, socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(held.getsockname())


def test_a_port_where_a_server_listens_cannot_be_held() -> None:
    with socket.create_server((LOOPBACK, 0)) as server, pytest.raises(OSError, match="in use"):
        hold_port(LOOPBACK, server.getsockname()[1])
