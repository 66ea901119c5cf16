"""The link between two machines goes down without a word: no RST, no FIN, only silence.

Router, prefill and decode worker each have a network of their own, so the router still hears both workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from support.cluster import namespaces as ns
from support.cluster.hand_started import FAULTY
from support.cluster.namespaces import Namespace, namespaces
from support.cluster.system import System
from support.cluster.three_processes import LISTENS, Part
from support.faults.switches import Faults
from support.faults.wrong import same
from support.model.families import Reference, build_family, safe_prompts, save_family

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(240)]

LOST_S, PROMISED_S = 3.0, 5.0
SLACK_S = 0.75  # a tick of the router, a heartbeat on its way and a step of the model, on cores that may be shared
NUM_TOKENS = 12
FLAGS = (
    *("--dtype", "float32", "--block-size", "8", "--max-model-len", "400", "--threads", "1"),
    *("--max-num-seqs", "8", "--max-num-batched-tokens", "37"),
)
CABLE = "between"


@dataclass
class Case:
    """`machines`: the router's, the prefill worker's, the decode worker's."""

    machines: list[Namespace]
    parts: list[Part]
    system: System
    faults: Faults
    reference: Reference

    def ask(self, request_id: str) -> tuple[int, Any, float]:
        """(status, answer, when it came); from the router's machine."""
        options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        with self.machines[0].inside():
            status, body = self.system.complete(list(self.reference.prompt), request_id=request_id, **options)
        return status, body, time.monotonic()

    def link_state(self) -> str:
        with self.machines[0].inside():
            return str([link["state"] for worker in self.system.workers("decode") for link in worker["links"]])

    def wait_for_link(self, state: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.link_state() != state:
            texts = "".join(part.text for part in self.parts)
            assert all(part.process.poll() is None for part in self.parts), texts
            assert time.monotonic() < deadline, f"the link is {self.link_state()}, not {state}\n{texts}"
            time.sleep(0.05)

    def set_link(self, state: str) -> None:
        for machine in self.machines[1:]:
            machine.ip("link", "set", CABLE, state)


@pytest.fixture(scope="module", params=["tcp", "zmq"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    if reason := ns.missing():
        pytest.skip(f"network namespaces: {reason}")
    model = save_family("gemma3", tmp_path_factory.mktemp("gemma3"))
    faults = Faults(tmp_path_factory.mktemp("faults"))
    program = (str(FAULTY), str(faults.folder))
    shared = ("--model", str(model), *FLAGS, "--planes", request.param)
    parts: list[Part] = []
    with namespaces(3) as machines:
        hub, left, right = machines
        hub.join(left, "left", "10.77.1.1/24", "10.77.1.2/24")
        hub.join(right, "right", "10.77.2.1/24", "10.77.2.2/24")
        left.join(right, CABLE, "10.77.3.1/24", "10.77.3.2/24")
        try:
            with hub.inside():
                ports = ("--port", "0", "--admin-port", "0", "--control-host", "0.0.0.0", "--control-port", "8998")
                parts.append(Part.start("router", "--model", str(model), *ports))
            with left.inside():
                argv = ("prefill", "--worker-id", "prefill-0", "--router", "tcp://10.77.1.1:8998")
                parts.append(Part.start(*argv, *shared, "--host", "10.77.3.1", program=program))
            with right.inside():
                argv = ("decode", "--worker-id", "decode-0", "--router", "tcp://10.77.2.1:8998")
                parts.append(Part.start(*argv, *shared, "--host", "10.77.3.2", program=program))
            listens = parts[0].wait_for(LISTENS)
            url, admin = listens["url"].rstrip("/"), listens["admin"].rstrip("/")
            (reference,) = safe_prompts(build_family("gemma3"), (150,), NUM_TOKENS)
            made = Case(machines, parts, System(parts[0].process, url=url, admin=admin), faults, reference)
            made.wait_for_link("['ready']", 90)
            yield made
            for part in reversed(parts):
                part.stop()
        finally:
            for part in parts:
                if part.process.poll() is None:
                    part.kill()


@pytest.fixture(autouse=True)
def up_again(case: Case) -> Iterator[None]:
    case.wait_for_link("['ready']", 30)
    yield
    case.faults.set()
    case.set_link("up")


def assert_answered(case: Case, name: str, status: int, body: Any, modes: list[str]) -> None:
    assert status == 200, body
    same(tuple(body["choices"][0]["token_ids"]), case.reference.token_ids)
    with case.machines[0].inside():
        assert [attempt["mode"] for attempt in case.system.record(name)["attempts"]] == modes


def assert_idle(case: Case) -> None:
    with case.machines[0].inside():
        case.system.settle()
        case.system.wait_until_idle()


@pytest.mark.parametrize("phase", ["transfer", "prefill"])
def test_a_link_that_goes_down_costs_seconds_and_no_answer(case: Case, phase: str) -> None:
    """Halted where bytes land, or where the prompt is half computed; the link dies there. Both workers live on."""
    name = f"down-{phase}"
    halt = "pause_landing" if phase == "transfer" else "pause_prefill"
    # Steps are slow until the link is down: the later chunks' blocks have not left yet.
    case.faults.set(pause_prefill={"seconds": 0.5}, pause_landing={"seconds": 0.5, "times": 1})
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(case.ask, name)
        deadline = time.monotonic() + 20
        while not case.faults.num_fired(halt):
            assert not asked.done(), asked.result()
            assert time.monotonic() < deadline, "".join(part.text for part in case.parts)
            time.sleep(0.005)
        down_at = time.monotonic()
        case.set_link("down")
        case.faults.set()
        case.wait_for_link("['lost']", LOST_S + SLACK_S)
        status, body, answered_at = asked.result()
    assert_answered(case, name, status, body, ["transfer", "local"])
    print(f"answered {answered_at - down_at:.1f} s after the link went down")
    assert answered_at - down_at < PROMISED_S
    assert_idle(case)  # the prefill worker's sources too, though nobody can tell it anything
    case.set_link("up")
    case.wait_for_link("['ready']", 30)
    status, body, _ = case.ask(f"{name}-next")
    assert_answered(case, f"{name}-next", status, body, ["transfer"])
    assert_idle(case)


def test_while_the_link_is_down_requests_end_with_a_true_status(case: Case) -> None:
    case.set_link("down")
    case.wait_for_link("['lost']", LOST_S + SLACK_S)
    begun_at = time.monotonic()
    status, body, answered_at = case.ask("while-down")
    assert status == 503, body
    assert "prefill-0" in body["error"]["message"], body
    assert answered_at - begun_at < PROMISED_S
    case.set_link("up")
    case.wait_for_link("['ready']", 30)
    assert case.ask("up-again")[0] == 200
    assert_idle(case)
