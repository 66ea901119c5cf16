"""A cluster whose workers run by `faulty_worker.py`, and whose router can be replaced by one with other settings."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from support.cluster.system import START_TIMEOUT_S, STOP_TIMEOUT_S, System
from support.cluster.three_processes import LISTENS, Part
from support.faults.switches import Faults

FAULTY = Path(__file__).with_name("faulty_worker.py")


@dataclass
class Cluster:
    """`system` speaks to the router that runs now, always at the same ports."""

    model: Path
    faults: Faults
    shared: tuple[str, ...]
    workers: dict[str, Part] = field(default_factory=dict)
    max_attempts: int = 0
    _router: Part | None = None
    _system: System | None = None

    @property
    def system(self) -> System:
        assert self._system is not None
        return self._system

    def allow_attempts(self, max_attempts: int) -> System:
        """A router with so many attempts: the one that runs, or a new one, which the workers find by themselves."""
        if self.max_attempts == max_attempts:
            return self.system
        ports = ["0", "0", "0"]
        if self._router is not None:
            ports = [endpoint.rpartition(":")[2].rstrip("/") for endpoint in self._router.wait_for(LISTENS).groups()]
            self._router.stop()
        argv = [word for pair in zip(("--port", "--admin-port", "--control-port"), ports, strict=True) for word in pair]
        argv += ["--model", str(self.model), "--max-attempts", str(max_attempts)]
        argv += ["--insecure"] if "--insecure" in self.shared else []
        self._router = Part.start("router", *argv)
        listens = self._router.wait_for(LISTENS)
        self._system = System(self._router.process, url=listens["url"].rstrip("/"), admin=listens["admin"].rstrip("/"))
        self.max_attempts, self._control = max_attempts, listens["control"]
        if self.workers:
            self.wait_until_linked()
        return self.system

    def start_worker(self, role: str, name: str, *flags: str) -> None:
        argv = [role, "--router", self._control, "--worker-id", name, "--model", str(self.model), "--threads", "1"]
        program = (str(FAULTY), str(self.faults.folder))
        self.workers[name] = Part.start(*argv, *self.shared, *flags, program=program)

    def stop_worker(self, name: str) -> None:
        self.workers.pop(name).stop()

    def wait_until_linked(self) -> None:
        """Until each worker is registered and each decode worker has a link to each prefill worker."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._is_linked():
            for name, worker in self.workers.items():
                assert worker.process.poll() is None, f"{name} ended:\n{worker.text}"
            assert time.monotonic() < deadline, "not linked\n" + "".join(part.text for part in self.workers.values())
            time.sleep(0.05)

    def stop(self) -> None:
        """All by SIGTERM at once; each must end by itself, with exit code 0."""
        parts = [*self.workers.values(), *([self._router] if self._router else [])]
        for part in parts:
            part.process.send_signal(signal.SIGTERM)
        for part in parts:
            assert part.wait_for_end(STOP_TIMEOUT_S) == 0, part.text

    def kill(self) -> None:
        for part in (*self.workers.values(), self._router):
            if part is not None and part.process.poll() is None:
                part.kill()

    def _is_linked(self) -> bool:
        try:
            known = self.system.workers()
        except OSError:
            return False
        if {worker["id"] for worker in known} != set(self.workers):
            return False
        num_prefill = sum(worker["role"] == "prefill" for worker in known)
        links = [[link["state"] for link in w["links"]] for w in known if w["role"] == "decode"]
        return all(states == ["ready"] * num_prefill for states in links)


@contextlib.contextmanager
def cluster(model: Path, faults: Path, *shared: str) -> Iterator[Cluster]:
    """Nothing runs yet. `shared`: flags of every worker. `faults`: the folder of `support.faults.switches`."""
    faults.mkdir(exist_ok=True)
    made = Cluster(model, Faults(faults), shared)
    try:
        yield made
        made.stop()
    finally:
        made.kill()
