"""Slots on their way between a device and its host side: which bytes, in how many launches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.model.interpreter import missing_interpreter

from disagg.cache import staging
from disagg.cache.slot_memory import SlotMemory
from disagg.kernels.dispatch import CALLS, forced

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=["torch", "triton"])
def served(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and (missing := missing_interpreter()):
        pytest.skip(missing)
    with forced(request.param):
        CALLS.clear()
        yield request.param


def make(device: str = "cpu") -> SlotMemory:
    """Twelve slots of 40 bytes, the host side full of 2 and the device's full of 1 with each slot's number in front."""
    memory = SlotMemory(40, 12, device, is_staged=True)
    memory.host.fill_(2)
    memory.slots.fill_(1)
    memory.slots[:, 0] = torch.arange(12, dtype=torch.uint8, device=memory.slots.device)
    return memory


CHOSEN = np.array([7, 2, 11, 3, 0])


@pytest.mark.parametrize(("nbytes", "launches"), [(16 << 20, 1), (80, 3), (1, 5)])
def test_slots_are_gathered_to_the_host_and_scattered_from_it(
    nbytes: int, launches: int, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most as many at a time as staging holds, and one at least."""
    monkeypatch.setattr(staging, "STAGING_NBYTES", nbytes)
    memory = make()
    memory.publish(CHOSEN)
    assert CALLS[f"{served}:gather_slots"] == launches
    rest = np.setdiff1d(np.arange(12), CHOSEN)
    assert torch.equal(memory.host[CHOSEN], memory.slots[CHOSEN])
    assert (memory.host[rest] == 2).all()
    memory.host[CHOSEN] += 100
    memory.take_in(CHOSEN)
    assert CALLS[f"{served}:scatter_slots"] == launches
    assert torch.equal(memory.slots[CHOSEN], memory.host[CHOSEN])
    assert (memory.slots[rest, 1:] == 1).all()
    memory.close()


@pytest.mark.parametrize("device", DEVICES)
def test_copies_one_after_another_do_not_meet_in_the_buffer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STAGING_NBYTES", 80)
    memory = make(device)
    for turn in range(1, 6):
        memory.host[:] = turn * torch.arange(12, dtype=torch.uint8)[:, None]
        memory.take_in(np.arange(12))
        memory.host.zero_()
        memory.publish(np.arange(11, -1, -1))
        assert torch.equal(memory.host[:, 5], turn * torch.arange(12, dtype=torch.uint8))
    memory.close()


def test_no_slot_is_no_launch_and_no_buffer(served: str) -> None:
    memory = make()
    memory.publish(np.empty(0, np.int64))
    memory.take_in(np.empty(0, np.int64))
    assert not [name for name in CALLS if name.startswith("kernel:")]
    assert memory.host.unique().tolist() == [2]
    memory.close()


def test_a_wrong_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make()
    exact = staging.Staging._index
    monkeypatch.setattr(staging.Staging, "_index", lambda self, chosen: exact(self, (chosen + 1) % 12))
    memory.publish(CHOSEN)
    assert not torch.equal(memory.host[CHOSEN], memory.slots[CHOSEN])
    memory.close()


class SlowBus:
    """Copies that arrive when they are waited for, and not before: what is read or overwritten earlier is noticed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, reads: bool) -> None:
        self.log: list[str] = []
        self.on_the_way: dict[int, torch.Tensor] = {}
        names: dict[int, str] = {}

        def mark(buffer: staging._Buffer) -> None:
            name = names.setdefault(id(buffer), str(len(names)))
            self.log.append(f"queue {name}")
            self.on_the_way[id(buffer)] = buffer.host.clone()
            if reads:
                buffer.host.fill_(0xEE)

        def wait(buffer: staging._Buffer) -> None:
            self.log.append(f"wait {names.get(id(buffer), '-')}")
            if (arrived := self.on_the_way.pop(id(buffer), None)) is not None:
                if not reads:
                    assert torch.equal(buffer.host, arrived), "a buffer was filled anew while it was on the bus"
                buffer.host.copy_(arrived)

        monkeypatch.setattr(staging._Buffer, "mark", mark)
        monkeypatch.setattr(staging._Buffer, "wait", wait)
        monkeypatch.setattr(staging, "STAGING_NBYTES", 80)


def test_one_buffer_is_emptied_while_the_other_is_on_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, memory = SlowBus(monkeypatch, reads=True), make()
    memory.publish(CHOSEN)
    assert bus.log == ["queue 0", "queue 1", "wait 0", "queue 0", "wait 1", "wait 0"]
    assert torch.equal(memory.host[CHOSEN], memory.slots[CHOSEN])
    memory.close()


def test_no_buffer_is_filled_before_its_last_copy_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bus, memory = SlowBus(monkeypatch, reads=False), make()
    memory.take_in(np.arange(8))
    assert bus.log == ["wait -", "queue 0", "wait -", "queue 1", "wait 0", "queue 0", "wait 1", "queue 1"]
    assert torch.equal(memory.slots[:8], memory.host[:8])
    memory.close()


def test_a_copy_that_is_not_waited_for_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    SlowBus(monkeypatch, reads=True)
    memory = make()
    monkeypatch.setattr(staging, "_arrived", lambda some, buffer: (some, buffer.host[: len(some)].numpy()))
    memory.publish(CHOSEN)
    assert not torch.equal(memory.host[CHOSEN], memory.slots[CHOSEN])
    memory.close()
