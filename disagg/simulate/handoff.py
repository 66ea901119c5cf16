"""A prompt that one worker computes while another has room for it, and the KV that goes from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from disagg.simulate.agenda import Agenda
from disagg.simulate.cores import Cores
from disagg.simulate.geometry import KvGeometry
from disagg.simulate.network import Network
from disagg.simulate.rates import ClusterRates
from disagg.simulate.requests import AnswerWork, PromptStage, PromptWork, ReservationWork, SimulatedRequest
from disagg.simulate.worker import SimulatedWorker


@dataclass(frozen=True, slots=True)
class Ground:
    """What everything in one run stands on."""

    agenda: Agenda
    cores: Cores
    network: Network
    rates: ClusterRates
    geometry: KvGeometry


class Handoff:
    """Both ends are asked at once, and answer in any order. `on_landed` is told of the answer that begins."""

    def __init__(
        self,
        ground: Ground,
        prompt: PromptWork,
        prefill: SimulatedWorker,
        server: SimulatedWorker,
        on_landed: Callable[[AnswerWork], None],
    ) -> None:
        self._ground, self._prompt, self._prefill, self._server = ground, prompt, prefill, server
        self._on_landed = on_landed
        traced = prompt.request.traced
        peaks = ground.geometry.peaks(traced.prompt_len + traced.answer_len, traced.prompt_len, 1)
        self._reservation = ReservationWork(prompt.request, peaks, self._note_reserved)
        self._reserved_at: float | None = None
        prompt.on_computed = self._note_computed

    def begin(self) -> None:
        self._prefill.compute(self._prompt)
        self._server.reserve(self._reservation)

    def _note_reserved(self, _: ReservationWork) -> None:
        """The decode worker asks for the KV."""
        self._reserved_at = self._ground.agenda.now
        self._prefill.pin(self._prompt)
        if self._prompt.stage is PromptStage.COMPUTED:  # one that gave way since is computed anew first
            self._send()

    def _note_computed(self, _: PromptWork) -> None:
        if self._reserved_at is not None:
            self._send()

    def _send(self) -> None:
        """What was computed before the last chunk, or before the decode worker asked, has gone already or goes now."""
        assert self._reserved_at is not None
        request, ground, prompt = self._prompt.request, self._ground, self._prompt
        length, resident = request.traced.prompt_len, self._reservation.resident
        request.handoff_nbytes = ground.geometry.moved(length, resident)
        arrives_at = ground.network.send(
            self._prefill.number,
            self._server.number,
            sum(request.handoff_nbytes),
            tail=sum(ground.geometry.moved(length, resident, prompt.chunk_begun)),
            begun_at=max(prompt.first_chunk_at, self._reserved_at),
            ready_at=ground.agenda.now,
        )
        ground.agenda.at(arrives_at, lambda: ground.cores.start(2 * ground.rates.handoff_cpu_s, self._land))

    def _land(self) -> None:
        self._prefill.release(self._prompt)
        self._on_landed(self._server.receive(self._reservation))


def fetch_prefix(
    ground: Ground,
    request: SimulatedRequest,
    source: SimulatedWorker,
    sink: SimulatedWorker,
    num_blocks: int,
    on_there: Callable[[], None],
) -> None:
    """The first blocks of a prompt, as far as the source has them still, go to the sink, which keeps them."""
    traced, store, unit = request.traced, sink.store, ground.geometry.unit
    there = source.store.usable(traced.hashes[:num_blocks], num_blocks * unit + 1)
    if there <= store.usable(traced.hashes, traced.prompt_len):
        ground.agenda.after(2 * ground.rates.link_latency_s, on_there)  # a question and an answer
        return
    hashes, now, length = traced.hashes[:there], ground.agenda.now, there * unit
    request.prefix_nbytes = ground.geometry.moved(length, store.held(hashes, length))
    nbytes = sum(request.prefix_nbytes)
    arrives_at = ground.network.send(source.number, sink.number, nbytes, tail=nbytes, begun_at=now, ready_at=now)

    def land() -> None:
        before = store.usable(traced.hashes, traced.prompt_len)
        store.take_in(hashes, length)
        request.num_fetched = (store.usable(traced.hashes, traced.prompt_len) - before) * unit
        on_there()

    ground.agenda.at(arrives_at, lambda: ground.cores.start(2 * ground.rates.handoff_cpu_s, land))
