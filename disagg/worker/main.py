"""The worker process: make the engine, register, serve until told to stop or refused."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from disagg.cache.errors import BudgetTooSmall, PoolMemoryShort
from disagg.config.descriptors import raise_descriptor_limit
from disagg.config.errors import ConfigError, found_in
from disagg.config.settings import Role, WorkerSettings
from disagg.config.signals import heeded_signals
from disagg.engine.model.checkpoint import ModelRefused
from disagg.engine.step_memory import StepMemoryShort
from disagg.transceiver.wire.errors import EndpointRefused, Shortage, first_cause
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.node import Node, draw_id
from disagg.worker.build import make_engine
from disagg.worker.device import use_device
from disagg.worker.drain import Drain
from disagg.worker.model_thread import ModelThread
from disagg.worker.parts import EngineParts, WorkerParts
from disagg.worker.registration import Registration
from disagg.worker.router_link import RegistrationRefused, RouterLost

log = logging.getLogger(__name__)

EXIT_BROKEN = 1

REFUSALS: Final = (
    *(ModelRefused, BudgetTooSmall, StepMemoryShort, PoolMemoryShort),
    *(EndpointRefused, RegistrationRefused, ConfigError),
)
"""What can never succeed however often this worker is started."""

SHORT_S: Final = 1.0
"""Pause of a worker that has no descriptor for its registration: as long as a link waits first."""

Announce = Callable[[dict[str, Any]], None]


def run(settings: WorkerSettings, role: Role, secret: bytes, announce: Announce) -> int:
    """Serve as `role` until SIGTERM or SIGINT, then finish what is here (see `Drain`).

    Returns the exit code: 0, or 1 when the engine broke.

    Raises ConfigError when this worker can never serve as it was told to: a model, budget or identity that is refused.
    """
    raise_descriptor_limit()
    keys = ClusterKeys.from_secret(secret, insecure=settings.insecure)
    try:
        made = make_engine(settings, role, keys, lambda stage: announce({"event": "progress", "stage": stage}))
        gc.collect()
        gc.freeze()  # torch's modules and the model's: each full collection would look at all of them, 0.1 s and more
        return asyncio.run(_serve(made, keys, announce))
    except Exception as exc:  # what is raised during a registration arrives in the group of its tasks
        if (refusal := found_in(exc, *REFUSALS)) is None:
            raise
        raise ConfigError(str(refusal)) from exc


async def _serve(made: EngineParts, keys: ClusterKeys, announce: Announce) -> int:
    stopped: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with _running(made, keys, announce, stopped) as parts:
        _drain_on_signals(parts.drain)
        serving = asyncio.create_task(_register_until_drained(parts, stopped))
        drained = asyncio.create_task(parts.drain.over.wait())
        try:
            await asyncio.wait((serving, stopped, drained), return_when=asyncio.FIRST_COMPLETED)
        finally:
            drained.cancel()
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving
    return stopped.result() if stopped.done() else 0


async def _register_until_drained(parts: WorkerParts, stopped: asyncio.Future[int]) -> None:
    """A lost router is looked for again, under a new incarnation. Raises `RegistrationRefused`."""
    while True:
        made = parts.made
        node = Node(
            draw_id(),
            made.worker_id,
            made.identity,
            made.geometry,
            parts.keys,
            sends=made.sends,
            receives=made.receives,
        )
        try:
            await Registration(parts, node).run()
        except (RouterLost, RegistrationRefused, Shortage, ExceptionGroup) as end:
            cause = first_cause(end)
            if not isinstance(cause, RouterLost | Shortage):
                raise cause from end
            # A cancellation that meets a loss in a task group is not heard: do not begin anew. A worker that drains
            # has nothing to finish any more: its requests ended with the router.
            if stopped.done() or parts.drain.asked.is_set() or parts.drain.over.is_set():
                return
            if isinstance(cause, Shortage):
                log.warning("%s; registering again in %g s", cause, SHORT_S)
                await asyncio.sleep(SHORT_S)
            else:
                log.warning("lost the router: %s; registering again", cause)


@contextlib.asynccontextmanager
async def _running(
    made: EngineParts, keys: ClusterKeys, announce: Announce, stopped: asyncio.Future[int]
) -> AsyncIterator[WorkerParts]:
    """Threads and sockets of this process, joined and closed in the end."""
    parts = WorkerParts(made, keys, announce)
    watching = asyncio.create_task(parts.metrics.loop_lag.run())
    loop = asyncio.get_running_loop()
    news = parts.vitals.news
    made.engine.on_step = news.tell
    parts.model = ModelThread(
        made.engine,
        loop,
        parts.take_events,
        lambda death: _stop(stopped, EXIT_BROKEN),
        on_rest=lambda: news.tell(()),
        on_begin=lambda: use_device(made.settings.device),
    )
    parts.model.start()
    try:
        yield parts
    finally:
        watching.cancel()
        await parts.close()


def _drain_on_signals(drain: Drain) -> None:
    loop = asyncio.get_running_loop()
    for number in heeded_signals():
        loop.add_signal_handler(number, drain.ask)


def _stop(stopped: asyncio.Future[int], code: int) -> None:
    if not stopped.done():
        stopped.set_result(code)
