"""Registrations, leases and losses under a clock that the test holds."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster.router_harness import GEOMETRY, IDENTITY, make_lease, make_register

from disagg.router.pairing import pair_difference
from disagg.router.registry import MAX_CLAIMANTS, PROOF_S, Admitted, Claimed, Registry, WorkerState
from disagg.transceiver.wire.messages.peer import Refused
from disagg.transceiver.wire.messages.router import Register
from disagg.transceiver.wire.timing import LOST_S, SUSPECT_S


def test_a_silent_worker_is_suspect_then_lost() -> None:
    registry = Registry()
    registry.register(make_register("p0", "prefill"), 10.0)
    worker = registry.get("p0")
    assert worker is not None
    assert worker.state(10.0 + SUSPECT_S - 0.01) is WorkerState.READY
    assert worker.state(10.0 + SUSPECT_S) is WorkerState.SUSPECT
    assert registry.expire(10.0 + LOST_S - 0.01) == []
    assert registry.expire(10.0 + LOST_S) == [worker]
    assert len(registry) == 0
    assert not registry.renew(make_lease("p0"), 14.0)


def test_a_lease_makes_a_suspect_worker_ready_again() -> None:
    registry = Registry()
    registry.register(make_register("p0", "prefill"), 0.0)
    assert registry.renew(make_lease("p0"), 2.0)
    worker = registry.get("p0")
    assert worker is not None
    assert worker.state(2.0) is WorkerState.READY
    assert registry.expire(4.9) == []


def test_a_repeated_registration_is_one_worker() -> None:
    registry = Registry()
    for now in (0.0, 0.5, 1.0):
        assert registry.register(make_register("p0", "prefill"), now) == Admitted()
    assert len(registry) == 1
    assert registry.expire(3.9) == []


def replacement() -> tuple[Registry, Register]:
    """A registry with `p0`, and what another process of that name says."""
    registry = Registry()
    registry.register(make_register("p0", "prefill", incarnation="old"), 0.0)
    return registry, make_register("p0", "prefill", incarnation="new")


def test_a_name_whose_worker_lives_is_refused_to_a_second_one_naming_both_processes() -> None:
    registry, second = replacement()
    assert isinstance(registry.register(second, 0.1), Claimed)
    registry.renew(make_lease("old"), 0.1 + PROOF_S - 0.01)
    assert isinstance(registry.register(second, 0.6), Claimed), "said before it could have died since"
    registry.renew(make_lease("old"), 0.1 + PROOF_S)
    refused = registry.register(second, 0.6)
    assert isinstance(refused, Refused)
    assert (refused.field, refused.ours) == ("worker_id", "`p0` (pid 4711 on testhost)")
    assert [worker.incarnation for worker in registry] == ["old"]
    registry.check_invariants()


def test_a_pulse_alone_proves_that_the_worker_of_a_name_lives() -> None:
    pulses = {"old": 0.5}
    registry = Registry(pulse_at=lambda incarnation: pulses.get(incarnation, float("-inf")))
    registry.register(make_register("p0", "prefill", incarnation="old"), 0.0)
    second = make_register("p0", "prefill", incarnation="new")
    assert isinstance(registry.register(second, 4.0), Admitted), "silent for long by both ways"
    pulses["new"] = 9.0
    third = make_register("p0", "prefill", incarnation="third")
    assert isinstance(registry.register(third, 9.0), Claimed)
    pulses["new"] = 9.5
    assert isinstance(registry.register(third, 9.5), Refused)
    assert registry.expire(9.6) == [], "its event loop is busy, and it lives"


def test_a_restart_gets_in_once_the_worker_before_it_was_lost() -> None:
    registry, second = replacement()
    assert isinstance(registry.register(second, 0.1), Claimed)
    registry.remove("old")
    assert registry.register(second, 0.2) == Admitted()


def test_a_restart_supersedes_a_worker_that_was_silent_for_too_long() -> None:
    registry, second = replacement()
    assert isinstance(registry.register(second, 0.1), Claimed)
    admitted = registry.register(second, SUSPECT_S)
    assert isinstance(admitted, Admitted)
    assert admitted.superseded is not None
    assert admitted.superseded.incarnation == "old"
    assert [worker.incarnation for worker in registry] == ["new"]
    registry.check_invariants()


def test_those_who_wait_for_a_name_are_bounded() -> None:
    registry, _ = replacement()
    for number in range(3 * MAX_CLAIMANTS):
        registry.register(make_register("p0", "prefill", incarnation=f"new-{number}"), 0.1)
    worker = registry.get("old")
    assert worker is not None
    assert len(worker.claimed_at) == MAX_CLAIMANTS


def test_a_worker_of_another_model_than_the_router_is_refused_with_both_values() -> None:
    registry = Registry(expected_fingerprint="a" * 32)
    refused = registry.register(make_register("p0", "prefill"), 0.0)
    assert refused == Refused("model_fingerprint", "a" * 32, "f" * 32, destination="p0")
    assert len(registry) == 0


def test_every_identity_field_is_compared_with_the_workers_registered_now() -> None:
    registry = Registry()
    registry.register(make_register("p0", "prefill"), 0.0)
    others = {
        "protocol_major": 2,
        "model_fingerprint": "0" * 32,
        "attention": "other",
        "compute_dtype": "bfloat16",
        "max_model_len": 256,
        "hash_key_id": "0" * 16,
        "adapter_ids": ("lora",),
    }
    for field, value in others.items():
        identity = replace(IDENTITY, **{field: value})
        refused = registry.register(make_register("d0", "decode", identity=identity), 0.0)
        assert isinstance(refused, Refused)
        assert (refused.field, refused.ours, refused.theirs) == (field, str(getattr(IDENTITY, field)), str(value))


def test_the_last_worker_may_come_back_with_another_model() -> None:
    registry = Registry()
    registry.register(make_register("p0", "prefill", incarnation="old"), 0.0)
    other = make_register("p0", "prefill", incarnation="new", identity=replace(IDENTITY, model_fingerprint="0" * 32))
    assert isinstance(registry.register(other, SUSPECT_S), Admitted)
    registry.check_invariants()


def test_an_unknown_role_is_refused() -> None:
    refused = Registry().register(make_register("x", "verify"), 0.0)
    assert isinstance(refused, Refused)
    assert (refused.field, refused.theirs) == ("role", "verify")


def test_other_geometry_registers_but_does_not_pair() -> None:
    registry = Registry()
    ours, theirs = (
        make_register("p0", "prefill"),
        make_register("d0", "decode", geometry=replace(GEOMETRY, block_size=24)),
    )
    assert isinstance(registry.register(ours, 0.0), Admitted)
    assert isinstance(registry.register(theirs, 0.0), Admitted)
    difference = pair_difference(ours, theirs)
    assert difference is not None
    assert (difference.field, difference.ours, difference.theirs) == ("block_size", "16", "24")


names = st.sampled_from(["w0", "w1", "w2"])
fingerprints = st.sampled_from(["a" * 32, "b" * 32])
registrations = st.tuples(st.just("register"), names, st.integers(0, 3), fingerprints)
moves = st.one_of(
    registrations,
    st.tuples(st.just("lease"), names, st.integers(0, 3), st.none()),
    st.tuples(st.just("pause"), st.none(), st.integers(0, 4), st.none()),
)


@settings(max_examples=200, deadline=None)
@given(schedule=st.lists(moves, max_size=30), expected=st.sampled_from([None, "a" * 32]))
def test_the_registry_holds_whom_a_plain_model_would_hold(
    schedule: list[tuple[str, str, int, str]], expected: str | None
) -> None:
    registry, now = Registry(expected), 0.0
    alive: dict[str, tuple[str, str, float]] = {}  # worker id -> incarnation, fingerprint, last sign
    claims: dict[tuple[str, str], float] = {}  # (has the name, asks for it) -> since
    for kind, name, number, fingerprint in schedule:
        incarnation = f"{name}-{number}"
        if kind == "register":
            identity = replace(IDENTITY, model_fingerprint=fingerprint)
            answer = registry.register(make_register(name, "both", incarnation=incarnation, identity=identity), now)
            known = alive.get(name)
            if known and known[0] == incarnation:
                alive[name] = (incarnation, known[1], now)
                continue
            others = {print_ for other, (_, print_, _) in alive.items() if other != name} | (
                {expected} if expected else set()
            )
            if known and others <= {fingerprint} and now - known[2] < SUSPECT_S:
                since = claims.setdefault((known[0], incarnation), now)
                assert isinstance(answer, Refused if known[2] > since else Claimed)
                continue
            assert isinstance(answer, Admitted) == (others <= {fingerprint})
            if isinstance(answer, Admitted):
                claims = {pair: since for pair, since in claims.items() if incarnation not in pair}
                alive[name] = (incarnation, fingerprint, now)
        elif kind == "lease":
            is_known = name in alive and alive[name][0] == incarnation
            assert registry.renew(make_lease(incarnation), now) == is_known
            if is_known:
                alive[name] = (incarnation, alive[name][1], now)
        else:
            now += number
            lost = {worker.incarnation for worker in registry.expire(now)}
            assert lost == {inc for inc, _, sign in alive.values() if now - sign >= LOST_S}
            alive = {key: value for key, value in alive.items() if value[0] not in lost}
        registry.check_invariants()
        assert {worker.incarnation for worker in registry} == {inc for inc, _, _ in alive.values()}
        lengths = (worker.register.identity.max_model_len for worker in registry)
        assert registry.max_model_len() == min(lengths, default=None)


def test_time_costs_a_look_at_a_worker_only_when_its_last_known_sign_is_old() -> None:
    """Workers that live: each is looked at once in `LOST_S`, by its lease's time, not at each tick."""
    looks = 0

    def pulse_at(incarnation: str) -> float:
        nonlocal looks
        looks += 1
        return float("-inf")

    registry = Registry(pulse_at=pulse_at)
    for number in range(100):
        registry.register(make_register(f"p{number}", "prefill"), 0.0)
    looks = 0
    for tick in range(1, 49):
        for number in range(100):
            registry.renew(make_lease(f"p{number}"), tick / 4)
        assert registry.expire(tick / 4) == []
    assert looks <= 100 * 2 * (48 / 4 / LOST_S + 1)
    assert len(registry.expire(12.0 + LOST_S)) == 100
