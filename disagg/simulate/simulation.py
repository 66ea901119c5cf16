"""One run: requests arrive, wait at the router's admission, are placed, computed, handed over and answered."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from disagg.router.admission import Admission
from disagg.router.gate import AHEAD_PER_SERVER
from disagg.router.tenants import QueuedRequest
from disagg.simulate.agenda import Agenda
from disagg.simulate.blocks import BlockStore
from disagg.simulate.cores import Cores, OwnCores, SharedCores
from disagg.simulate.fleet import FleetShape, WorkerKind
from disagg.simulate.front import FrontEnd
from disagg.simulate.geometry import KvGeometry
from disagg.simulate.handoff import Ground, Handoff, fetch_prefix
from disagg.simulate.network import Network
from disagg.simulate.rates import ClusterRates
from disagg.simulate.requests import AnswerWork, PromptWork, SimulatedRequest, StepsDone
from disagg.simulate.routing import Route, Routing
from disagg.simulate.trace import Trace
from disagg.simulate.worker import MOST_STEPS, SimulatedWorker


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated.

    `num_cores`: shared by workers and front end; None = each worker has a device of its own, and the front end costs a
    request its time and no other's. `num_neighbours`: see `SharedCores`. `policy`, `max_queued`, `max_local_prefill` as
    of the router.
    """

    fleet: FleetShape
    kind: WorkerKind
    rates: ClusterRates
    policy: str
    num_cores: int | None = None
    num_neighbours: float = 0.0
    max_queued: int = 1024
    max_local_prefill: int = 0


@dataclass(slots=True)
class Outcome:
    """What a run left. `gaps`: (seconds between two tokens of an answer, how many of these)."""

    setting: Setting
    requests: list[SimulatedRequest]
    workers: list[SimulatedWorker]
    network: Network
    gaps: list[tuple[float, int]] = field(default_factory=list)
    ended_at: float = 0.0
    num_events: int = 0
    front_busy_s: float = 0.0


class Simulation:
    """Made for one `run`."""

    def __init__(self, trace: Trace, setting: Setting) -> None:
        self._setting, self._rates, kind = setting, setting.rates, setting.kind
        self._agenda, roles = Agenda(), setting.fleet.roles
        cores = _cores_of(setting, self._agenda)
        network = Network(len(roles), self._rates.link_bytes_per_s, self._rates.link_latency_s)
        self.ground = Ground(self._agenda, cores, network, self._rates, KvGeometry(kind.layout, trace.block_size))
        self._front = FrontEnd(cores)
        shares = setting.num_cores is not None
        self._message_cpu_s = self._rates.message_cpu_s if shares else 0.0
        self._token_cpu_s = self._rates.token_cpu_s if shares else 0.0
        self.workers = [self._worker(number, role) for number, role in enumerate(roles)]
        self._admission = Admission({}, max_queued=setting.max_queued)
        self._room = AHEAD_PER_SERVER * sum(role != "prefill" for role in roles)
        self._turns: dict[QueuedRequest, SimulatedRequest] = {}
        self._turn_of: dict[SimulatedRequest, QueuedRequest] = {}
        self._delivered_at = [0.0] * len(roles)
        self._routing = Routing(
            self.ground,
            self.workers,
            setting.policy,
            max_queued=setting.max_queued,
            max_local_prefill=setting.max_local_prefill,
        )
        requests = [SimulatedRequest(number, traced) for number, traced in enumerate(trace.requests)]
        self.outcome = Outcome(setting, requests, self.workers, network)

    def run(self) -> Outcome:
        """Until every request has ended."""
        self._arrive_from(0)
        self._agenda.run()
        self.outcome.ended_at = self._agenda.now
        self.outcome.num_events = self._agenda.num_done
        self.outcome.front_busy_s = self._front.busy_s
        return self.outcome

    def _worker(self, number: int, role: str) -> SimulatedWorker:
        kind = self._setting.kind
        store = BlockStore(self.ground.geometry, kind.num_slots, reuses=kind.reuses_prefixes)
        most_steps = 1 if self._token_cpu_s else MOST_STEPS  # tokens take cores that the next step needs
        cores, done = self.ground.cores, self._steps_done
        return SimulatedWorker(number, role, self._agenda, cores, self._rates, store, kind, done, most_steps=most_steps)

    # --- the router -----------------------------------------------------------------------------------------

    def _arrive_from(self, number: int) -> None:
        """Note the next arrival when one has come: the agenda stays small."""
        if number < len(self.outcome.requests):
            request = self.outcome.requests[number]

            def arrive() -> None:
                self._arrive_from(number + 1)
                if self._setting.num_cores:
                    self._front.do(self._rates.request_cpu_s, lambda: self._enter(request))
                else:
                    self._agenda.after(self._rates.request_cpu_s, lambda: self._enter(request))

            self._agenda.at(request.traced.arrival_s, arrive)

    def _enter(self, request: SimulatedRequest) -> None:
        traced, now = request.traced, self._agenda.now
        turn = QueuedRequest("", 0, traced.prompt_len, traced.answer_len, now, math.inf)
        self._turns[turn], self._turn_of[request] = request, turn
        for refused, refusal in self._admission.arrive(turn, now):
            self._refuse(self._turns[refused], refusal.message)
        self._admit()

    def _admit(self) -> None:
        while turns := self._admission.admit(self._room, self._agenda.now):
            for turn in turns:
                self._place(self._turns[turn])

    def _refuse(self, request: SimulatedRequest, why: str) -> None:
        request.refused = why
        self._leave(request, 0)

    def _leave(self, request: SimulatedRequest, num_tokens: int) -> None:
        turn = self._turn_of.pop(request)
        del self._turns[turn]
        self._admission.end(turn, num_tokens, self._agenda.now)

    def _place(self, request: SimulatedRequest) -> None:
        route = self._beyond(request) or self._routing.place(request)
        if isinstance(route, str):
            return self._refuse(request, route)
        request.server, request.prefill, request.source = route.server, route.prefill, route.source
        request.placed_at, request.estimate_s = self._agenda.now, route.estimate_s
        return self._begin(request, route)

    def _beyond(self, request: SimulatedRequest) -> str:
        """Why no pool could ever hold it, if so."""
        traced, kind = request.traced, self._setting.kind
        total = traced.prompt_len + traced.answer_len
        if total > kind.max_model_len:
            return f"{total} tokens, more than the model's {kind.max_model_len}"
        peaks = self.ground.geometry.peaks(total, 0, kind.max_num_batched_tokens)
        if self.workers[0].store.promises.fits_empty(peaks):
            return ""
        return f"{total} tokens need more blocks than a worker has"

    # --- the workers ----------------------------------------------------------------------------------------

    def _begin(self, request: SimulatedRequest, route: Route) -> None:
        """Fetch what is to be fetched, then compute."""
        server = self.workers[route.server]
        computing = server if route.prefill is None else self.workers[route.prefill]
        if route.source is None:
            self._dispatch(request, server, computing)
        else:
            source = self.workers[route.source]
            fetch_prefix(
                self.ground, request, source, computing, route.fetched,
                lambda: self._dispatch(request, server, computing),
            )  # fmt: skip

    def _dispatch(self, request: SimulatedRequest, server: SimulatedWorker, computing: SimulatedWorker) -> None:
        if computing is server:
            server.compute(self._prompt(request, serves=True))
        else:
            Handoff(self.ground, self._prompt(request, serves=False), computing, server, self._landed).begin()

    def _prompt(self, request: SimulatedRequest, *, serves: bool) -> PromptWork:
        traced, step = request.traced, self._setting.kind.max_num_batched_tokens
        total = traced.prompt_len + (traced.answer_len if serves else 0)
        peaks = self.ground.geometry.peaks(total, 0, step)
        kept = self.ground.geometry.peaks(total, traced.prompt_len, step)
        return PromptWork(request, peaks, kept, serves, is_soft=not serves)

    def _landed(self, answer: AnswerWork) -> None:
        """A received answer's first token goes to the client at once."""

        def deliver() -> None:
            answer.first_at = self._agenda.now
            self._note_first(answer.request)
            self._admit()

        self._front.do(self._message_cpu_s + self._token_cpu_s, deliver)

    # --- tokens ---------------------------------------------------------------------------------------------

    def _steps_done(self, steps: StepsDone) -> None:
        num_tokens = steps.num_tokens
        work_s = num_tokens * self._token_cpu_s + (steps.count * self._message_cpu_s if num_tokens else 0.0)
        self._front.do(work_s, lambda: self._deliver(steps))

    def _deliver(self, steps: StepsDone) -> None:
        """The client has the tokens of these steps."""
        now, gaps, num_joined = self._agenda.now, self.outcome.gaps, len(steps.joined)
        num_old = steps.num_answers - num_joined
        since = self._delivered_at[steps.worker] if num_old else steps.begun_at
        gap = (now - since) / steps.count
        if num_old:
            gaps.append((gap, num_old * steps.count))
        if num_joined and steps.count > 1:
            gaps.append((gap, num_joined * (steps.count - 1)))
        for answer in steps.joined:
            assert answer.first_at is not None
            gaps.append((max(0.0, now - (steps.count - 1) * gap - answer.first_at), 1))
        self._delivered_at[steps.worker] = now
        for answer in steps.first_tokens:
            answer.first_at = now
            self._note_first(answer.request)
        for answer in steps.ended:
            self._note_end(answer.request)
        if steps.first_tokens or steps.ended:
            self._admit()

    def _note_first(self, request: SimulatedRequest) -> None:
        request.first_at = self._agenda.now
        self._admission.begin(self._turn_of[request])
        self._routing.note_first(request)

    def _note_end(self, request: SimulatedRequest) -> None:
        request.ended_at = self._agenda.now
        self._routing.note_end(request)
        self._leave(request, request.traced.answer_len)


def _cores_of(setting: Setting, agenda: Agenda) -> Cores:
    if setting.num_cores is None:
        return OwnCores(agenda)
    return SharedCores(agenda, setting.num_cores, setting.num_neighbours)
