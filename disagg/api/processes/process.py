"""One API process: HTTP from the router's listening socket, answers over the link to the router."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from pathlib import Path
from typing import Final

from disagg.api.app import open_app
from disagg.api.http.connections import Connections, connections_within
from disagg.api.http.server import serve_on
from disagg.api.processes.link import ProcessLink
from disagg.api.processes.messages import ProcessReady, ProcessSettings, ProcessVitals
from disagg.api.processes.remote_backend import RemoteBackend
from disagg.api.settings import ApiSettings
from disagg.config.descriptors import raise_descriptor_limit
from disagg.engine.model.checkpoint import generation_defaults
from disagg.loop_lag import LoopLag

VITALS_EVERY_S: Final = 1.0  # four times as often as metrics are scraped at most

log: Final = logging.getLogger(__name__)


async def serve_clients(end: socket.socket, listening: socket.socket) -> None:
    """Serve until the router says stop or is gone. Owns both sockets; the listening one is shared with others."""
    descriptors = raise_descriptor_limit()
    link = await ProcessLink.open(end)
    settings = _settings(await link.receive())
    backend, book, lag = RemoteBackend(link), Connections(connections_within(descriptors)), LoopLag()
    hearing = asyncio.create_task(backend.run(), name="the router")
    watching = [
        asyncio.create_task(lag.run(), name="loop lag"),
        asyncio.create_task(_tell_vitals(link, lag, book), name="vitals"),
    ]
    try:
        async with (
            open_app(backend, settings, is_warm=True) as app,
            serve_on(listening, app, connections=book),
        ):
            gc.collect()
            gc.freeze()  # as in a router: what was imported stays
            link.send(ProcessReady())
            await asyncio.wait({hearing})
            if not hearing.exception():  # the router said stop; running answers still need it
                hearing = asyncio.create_task(backend.run(), name="the router")
    finally:
        for task in (hearing, *watching):
            task.cancel()
        await asyncio.gather(hearing, *watching, return_exceptions=True)
        link.close()


def _settings(first: ProcessSettings) -> ApiSettings:
    folder = Path(first.model_folder)
    return ApiSettings(
        model_folder=folder,
        served_model_name=first.served_model_name,
        defaults=generation_defaults(folder),
        api_keys=dict(first.api_keys),
    )


async def _tell_vitals(link: ProcessLink, lag: LoopLag, connections: Connections) -> None:
    while True:
        buckets, sum_s = lag.lag.histogram()
        link.send(ProcessVitals(tuple(buckets), sum_s, len(connections), time.process_time()))
        await asyncio.sleep(VITALS_EVERY_S)
