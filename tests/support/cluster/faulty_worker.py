"""`disagg`, with faults: `python faulty_worker.py FAULTS COMMAND FLAGS...`.

FAULTS is a folder that a test writes and every process of the run reads (see `support/faults/switches.py`). Each fault
patches one thing and is off until `now.json` names it; whenever one fires it leaves a file, so a test can tell that it
did. `up` starts its workers by this script too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.cluster import halting
from support.faults.switches import Faults
from support.links.zmtp_proxy import Frame, ZmtpProxy


def start_workers_by_this_script(faults: Faults) -> None:
    from disagg.cli import up
    from disagg.cli.child import ChildSpec

    plain = up._spec

    def spec(name: str, command: str, flags: Sequence[str], env: Any) -> ChildSpec:
        made = plain(name, command, flags, env)
        if command == "router":
            return made
        return replace(made, argv=(sys.executable, "-P", __file__, str(faults.folder), command, *flags))

    up._spec = spec


def flip_source(faults: Faults) -> None:
    """At the sender, after its digest."""
    from disagg.transceiver.peers import landing_threads as landing

    plain = landing.LandingThreads._digest_unit

    def digest_unit(self: Any, unit: Any) -> Any:
        done = plain(self, unit)
        slot = self._pools[unit.pool].slots[unit.slot]
        if (byte := faults.byte_to_flip("flip_source", unit.group)) is not None:
            slot[byte] ^= 1
        return done

    landing.LandingThreads._digest_unit = digest_unit


def flip_copy(faults: Faults) -> None:
    """In the landing thread's copy: the memcpy of shm writes one wrong byte. First contact's probe is left alone.

    The compiled helper copies and hashes in one call that nothing can interrupt: this worker does without.
    """
    from disagg.kernels import native
    from disagg.transceiver.memory import hashing
    from disagg.transceiver.planes import reading
    from disagg.transceiver.planes.probe import PROBE_ID

    plain_land, plain_copy = reading.ReadingLandingPlane.land, hashing.copy_rows
    landing = threading.local()

    def copy_rows(destination: Any, source: Any) -> None:
        plain_copy(destination, source)
        group = getattr(landing, "group", None)
        if group is not None and (byte := faults.byte_to_flip("flip_copy", group)) is not None:
            destination.reshape(-1)[byte] ^= 1

    def land(self: Any, job: Any, *options: Any) -> int:
        landing.group = None if job.transfer_id == PROBE_ID else job.destinations[0].group
        try:
            return plain_land(self, job, *options)
        finally:
            landing.group = None

    native.can_land = lambda nbytes: False
    hashing.copy_rows, reading.ReadingLandingPlane.land = copy_rows, land


def use_landing_hook(faults: Faults) -> None:
    """After the copy and before the hash: a flipped byte, or a pause. Without one of these, landing is as always."""
    from disagg.worker import parts

    def after_copy(job: Any, pools: Sequence[Any]) -> None:
        for unit in job.destinations:
            if (byte := faults.byte_to_flip("flip_landed", unit.group)) is not None:
                pools[unit.pool].slots[unit.slot][byte] ^= 1
        faults.pause("pause_landing")

    class HookedLanding(parts.LandingThreads):  # type: ignore[misc, name-defined]
        @property
        def _after_copy(self) -> Any:
            return after_copy if faults.names_any("flip_landed", "pause_landing") else None

        @_after_copy.setter
        def _after_copy(self, hook: None) -> None: ...

    parts.LandingThreads = HookedLanding


def meet_poison(faults: Faults, chunks: Sequence[Any]) -> None:
    """`poison`: a step that computes token `byte` ends the process, by SIGKILL or, with `raises`, by an exception."""
    fault = faults.now("poison")
    if fault is None or not any(fault["byte"] in chunk.token_ids for chunk in chunks):
        return
    faults.fires("poison")
    time.sleep(fault.get("seconds", 0.0))
    if fault.get("raises"):
        raise RuntimeError("poison, by the test")
    os.kill(os.getpid(), signal.SIGKILL)


def change_steps(faults: Faults) -> None:
    """Slow steps, and attention whose window is off by one."""
    from disagg.engine.run import runner

    plain = runner.Runner.execute

    def execute(self: Any, chunks: Sequence[Any]) -> Any:
        meet_poison(faults, chunks)
        faults.pause("pause_prefill" if any(len(chunk.token_ids) > 1 for chunk in chunks) else "pause_decode")
        return plain(self, chunks)

    def batch(runs: Any, block_size: int, window: int | None, num_sink_tokens: int) -> Any:
        if window is not None and faults.fires("narrow_window"):
            window -= 1
        if window is not None and faults.is_wide:
            window -= block_size
        return paged_batch(runs, block_size, window, num_sink_tokens)

    paged_batch = runner.PagedBatch
    runner.PagedBatch, runner.Runner.execute = batch, execute


def widen_layout(faults: Faults) -> None:
    """Every window is stored, and fetched, one block wider than any query looks; attention itself is right."""
    from disagg.worker import build

    plain = build.derive_layout

    def derive_layout(layers: Sequence[Any], *, block_size: int, **options: Any) -> Any:
        wide = [replace(layer, window=layer.window and layer.window + block_size) for layer in layers]
        return plain(wide, block_size=block_size, **options)

    if faults.is_wide:
        build.derive_layout = derive_layout


def stage(faults: Faults) -> None:
    """Pools with a host side, and copies to and from it that may be forgotten."""
    from functools import partial

    from disagg.cache.slot_memory import SlotMemory
    from disagg.worker import build

    def unless(name: str, plain: Any) -> Any:
        return lambda self, slots: None if faults.fires(name) else plain(self, slots)

    if faults.is_staged:
        build.KVCache = partial(build.KVCache, is_staged=True)
        SlotMemory.publish = unless("forget_publish", SlotMemory.publish)
        SlotMemory.take_in = unless("forget_take_in", SlotMemory.take_in)


def recompute(faults: Faults) -> None:
    """A decode worker that fetches nothing and computes the prompt itself."""
    from disagg.worker import attempts

    plain = attempts.Attempts._dispatch

    def dispatch(self: Any, order: Any, **options: Any) -> None:
        if order.mode == "decode" and faults.fires("recompute"):
            order = replace(order, mode="serve", peer=None)
        plain(self, order, **options)

    attempts.Attempts._dispatch = dispatch


class Wire(ZmtpProxy):
    """Between the two ends of the zmq plane: counts payload, and flips a byte of a large frame when asked to."""

    def __init__(self, target: str, faults: Faults) -> None:
        super().__init__(target)
        self._faults = faults
        self._byte: int | None = None
        self._payload_nbytes = 0

    def pass_on(self, frame: Frame, offset: int, chunk: bytes) -> bytes:
        if frame.is_command:
            return chunk
        if frame.index > 0:
            self._payload_nbytes += len(chunk)
            self._faults.tell(f"wire-{os.getpid()}-{id(self)}", str(self._payload_nbytes))
        if offset == 0:
            self._byte = self._faults.byte_to_flip("flip_wire", 0) if frame.nbytes >= 1024 else None
        if self._byte is None:
            return chunk
        position = self._byte % frame.nbytes - offset
        if not 0 <= position < len(chunk):
            return chunk
        return chunk[:position] + bytes([chunk[position] ^ 1]) + chunk[position + 1 :]


def tap_the_wire(faults: Faults) -> None:
    from disagg.worker import plane_classes as planes

    plain = planes.ZmqLandingPlane

    class TappedLandingPlane(plain):  # type: ignore[misc, valid-type]
        _tap: Any = None

        async def connect(self, me: str, offer: Any, pools: Any) -> None:
            wire = Wire(offer.address, faults)
            self._tap = wire.running()
            await self._tap.__aenter__()
            await super().connect(me, replace(offer, address=wire.endpoint), pools)

        async def close(self) -> None:
            await super().close()
            if self._tap is not None:
                tap, self._tap = self._tap, None
                await tap.__aexit__(None, None, None)

    planes.ZmqLandingPlane = TappedLandingPlane


PATCHES = (
    *(flip_source, flip_copy, use_landing_hook, change_steps, widen_layout, stage, recompute, tap_the_wire),
    *halting.PATCHES,
)


def main(argv: Sequence[str]) -> int:
    faults = Faults(Path(argv[0]))
    if argv[1] == "up":
        start_workers_by_this_script(faults)
    else:
        for patch in PATCHES:
            patch(faults)
    from disagg.cli.main import main as disagg

    return disagg(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
