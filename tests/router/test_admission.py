"""The order at the router's gate: fair between tenants, by priority within one, bounded, and nothing starves."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.router.admission import Admission
from disagg.router.drain_rate import LONGEST_S, SHORTEST_S, DrainRate
from disagg.router.tenants import QueuedRequest, TenantLimits
from disagg.waiting_line import OLDEST_EVERY, WaitingLine


def turn(tenant: str = "", priority: int = 0, prompt: int = 10, most: int = 10, at: float = 0.0) -> QueuedRequest:
    return QueuedRequest(tenant, priority, prompt, most, at, at + 60)


def admission(max_queued: int = 1000, **tenants: TenantLimits) -> Admission:
    return Admission(tenants, max_queued=max_queued)


def served_in_turn(policy: Admission, count: int) -> list[QueuedRequest]:
    """One place after another, each given as soon as the one before is over."""
    order = []
    for now in range(count):
        (only,) = policy.admit(1, float(now))
        policy.begin(only)
        policy.end(only, only.max_tokens, float(now))
        order.append(only)
    return order


# --- the line ---------------------------------------------------------------------------------------------------


class ListLine:
    """The oracle of `WaitingLine`: a list in order of arrival, looked through each time."""

    def __init__(self) -> None:
        self.items: list[tuple[int, int]] = []
        self.num_taken = 0

    def take(self) -> tuple[int, int]:
        self.num_taken += 1
        best = self.items[0] if self.num_taken % OLDEST_EVERY == 0 else min(self.items, key=lambda item: item[1])
        self.items.remove(best)
        return best


@given(st.lists(st.one_of(st.integers(-3, 3), st.just("take"), st.just("leave")), max_size=80), st.randoms())
def test_the_line_gives_what_its_oracle_gives(script: list[object], random: object) -> None:
    line, oracle = WaitingLine[tuple[int, int]](), ListLine()
    for number, word in enumerate(script):
        if isinstance(word, int):
            line.add((number, word), word)
            oracle.items.append((number, word))
        elif oracle.items and word == "take":
            head = line.head
            assert line.take() == oracle.take() == head
        elif oracle.items:
            gone = random.choice(oracle.items)  # type: ignore[attr-defined]
            line.remove(gone)
            oracle.items.remove(gone)
        line.check_invariants()
        assert list(line) == sorted(oracle.items, key=lambda item: item[1])


def test_the_next_behind_the_head_come_in_order_and_bounded() -> None:
    line = WaitingLine[str]()
    for name, priority in (("a", 2), ("b", 0), ("c", 1), ("d", 0)):
        line.add(name, priority)
    assert (line.head, line.behind_head(2), line.last) == ("b", ["d", "c"], "a")


def test_one_of_low_priority_is_served_beside_a_flood_of_more_important_ones() -> None:
    line = WaitingLine[int]()
    line.add(-1, 100)
    for number in range(2 * OLDEST_EVERY):
        line.add(number, 0)
        if line.take() == -1:
            return
    raise AssertionError("it starves")


# --- tenants ----------------------------------------------------------------------------------------------------


def test_a_tenant_with_a_flood_does_not_delay_another() -> None:
    policy = admission()
    for _ in range(50):
        policy.arrive(turn("flood"), 0.0)
    policy.arrive(turn("calm"), 1.0)
    order = served_in_turn(policy, 3)
    assert "calm" in [each.tenant for each in order[:2]]


def test_the_order_of_arrival_would_delay_it() -> None:
    """The control of the one above: both use one key."""
    policy = admission()
    for _ in range(50):
        policy.arrive(turn("same"), 0.0)
    last = turn("same", at=1.0)
    policy.arrive(last, 1.0)
    assert served_in_turn(policy, 51)[-1] is last


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_two_tenants_share_by_tokens_and_weight_whatever_the_size_of_their_requests(weight: float) -> None:
    policy = admission(5000, one=TenantLimits(weight))
    for _ in range(400):
        policy.arrive(turn("one", prompt=100, most=50), 0.0)
        policy.arrive(turn("two", prompt=10, most=5), 0.0)
    for _ in range(1600):
        policy.arrive(turn("two", prompt=10, most=5), 0.0)
    tokens = Counter[str]()
    for each in served_in_turn(policy, 600):
        tokens[each.tenant] += each.most_tokens
    assert tokens["one"] / tokens["two"] == pytest.approx(weight, rel=0.1)


def test_a_tenant_that_was_idle_saved_nothing_up() -> None:
    policy = admission()
    for _ in range(40):
        policy.arrive(turn("busy"), 0.0)
    served_in_turn(policy, 30)
    for _ in range(10):
        policy.arrive(turn("late"), 30.0)
    assert Counter(each.tenant for each in served_in_turn(policy, 8)) == {"busy": 4, "late": 4}


def test_what_an_answer_did_not_use_is_not_charged() -> None:
    policy = admission()
    for tenant in ("short", "long"):
        policy.arrive(turn(tenant, most=5000), 0.0)
    for each in policy.admit(2, 0.0):
        policy.end(each, 1 if each.tenant == "short" else 4000, 1.0)
    served = policy.served_by_tenant()
    assert (served["short"], served["long"]) == (11, 4010)


# --- bounds -----------------------------------------------------------------------------------------------------


def test_a_full_line_costs_the_tenant_that_fills_it() -> None:
    policy = admission(max_queued=4)
    flood = [turn("flood") for _ in range(5)]
    refused = [each for arriving in flood for each, _ in policy.arrive(arriving, 0.0)]
    assert refused == [flood[4]]
    calm = turn("calm")
    ((loser, why),) = policy.arrive(calm, 0.0)
    assert (loser, why.status) == (flood[3], 503)
    assert calm.is_waiting


def test_in_a_full_line_the_more_important_takes_the_place_of_the_least() -> None:
    policy = admission(max_queued=2)
    least = turn(priority=9)
    for each in (turn(), least):
        assert policy.arrive(each, 0.0) == []
    assert [each for each, _ in policy.arrive(turn(priority=1), 0.0)] == [least]


def test_limits_count_what_waits_and_what_runs() -> None:
    policy = admission(one=TenantLimits(max_requests=2, max_tokens=50))
    first, second = turn("one"), turn("one")
    assert policy.arrive(first, 0.0) + policy.arrive(second, 0.0) == []
    policy.admit(1, 0.0)
    ((_, why),) = policy.arrive(turn("one"), 0.0)
    assert why.status == 429
    assert why.retry_after_s is not None
    policy.end(first, 3, 1.0)
    ((_, why),) = policy.arrive(turn("one", prompt=25), 1.0)
    assert (why.status, "35" in why.message) == (429, True)
    assert policy.arrive(turn("one"), 1.0) == []
    assert policy.arrive(turn("two"), 1.0) == []


def test_a_request_beyond_its_key_s_tokens_can_never_be_served() -> None:
    ((_, why),) = admission(one=TenantLimits(max_tokens=19)).arrive(turn("one"), 0.0)
    assert (why.status, why.retry_after_s) == (400, None)


def test_a_deadline_passes_while_a_request_waits() -> None:
    policy = admission()
    early, late = turn(at=0.0), turn(at=10.0)
    policy.arrive(early, 0.0)
    policy.arrive(late, 10.0)
    assert policy.expire(59.9) == []
    assert policy.expire(60.0) == [early]
    assert list(policy.waiting()) == [late]


def test_retry_after_is_the_time_that_the_line_takes_to_drain() -> None:
    policy = admission(max_queued=30)
    for _ in range(30):
        policy.arrive(turn(), 0.0)
    for second in range(100):  # two a second leave, two a second come
        for _ in range(2):
            (left,) = policy.admit(1, float(second))
            policy.begin(left)
            policy.end(left, 1, float(second))
            policy.arrive(turn(), float(second))
    ((_, why),) = policy.arrive(turn(), 99.0)
    assert why.retry_after_s == pytest.approx(15, rel=0.2)


def test_a_drain_rate_is_bounded_and_forgets() -> None:
    rate = DrainRate()
    assert rate.seconds_for(5, 0.0) == SHORTEST_S
    rate.note(1, 0.0)
    assert rate.seconds_for(1000, 0.0) == LONGEST_S
    assert rate.per_second(1000.0) < 1e-9


# --- all together -----------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.tuples(st.just("arrive"), st.sampled_from("abc"), st.integers(-2, 2), st.integers(1, 30)),
    st.tuples(st.sampled_from(("admit", "begin", "end", "expire")), st.integers(0, 5)),
)


@given(st.lists(WORDS, max_size=120))
def test_whatever_happens_counts_and_limits_hold_and_nobody_is_lost(script: list[tuple[object, ...]]) -> None:
    policy = admission(6, a=TenantLimits(2.0, max_requests=4), b=TenantLimits(max_tokens=60))
    live: list[QueuedRequest] = []
    gone: list[QueuedRequest] = []
    for now, (word, *rest) in enumerate(script):
        if word == "arrive":
            tenant, priority, size = rest
            came = QueuedRequest(str(tenant), int(str(priority)), int(str(size)), 5, now, now + 20)
            live.append(came)
            refused = [each for each, _ in policy.arrive(came, now)]
            gone += refused
            live = [each for each in live if each not in refused]
        elif word == "admit":
            policy.admit(int(str(rest[0])), now)
            assert policy.num_ahead <= max(int(str(rest[0])), sum(e.is_admitted and not e.has_begun for e in live))
        elif word == "expire":
            late = policy.expire(now)
            assert all(each.deadline <= now for each in late)
            live = [each for each in live if each not in late]
            gone += late
        elif live:
            one = live[int(str(rest[0])) % len(live)]
            if word == "begin":
                policy.begin(one)
            else:
                policy.end(one, 3, now)
                live.remove(one)
                gone.append(one)
        policy.check_invariants()
        assert policy.num_ahead == sum(each.is_admitted and not each.has_begun for each in live)
        assert sorted(map(id, policy.waiting())) == sorted(id(each) for each in live if each.is_waiting)
        assert all(each.is_over for each in gone)
