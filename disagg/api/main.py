"""The router process: HTTP above, control below, until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import zmq

from disagg.api.app import check_text, create_admin_app, open_app
from disagg.api.http.acceptor import BACKLOG
from disagg.api.http.connections import Connections, connections_within
from disagg.api.http.server import Listener, bind, serve
from disagg.api.processes.fleet import ApiProcesses
from disagg.api.settings import ApiSettings
from disagg.config.api_keys import ApiKey, api_keys
from disagg.config.descriptors import raise_descriptor_limit
from disagg.config.errors import ConfigError, found_in
from disagg.config.event_keys import read_event_keys
from disagg.config.quantities import endpoint_host
from disagg.config.resources import num_api_processes, num_cores
from disagg.config.settings import RouterSettings
from disagg.config.signals import heeded_signals
from disagg.engine.model.checkpoint import ModelRefused, fingerprint, generation_defaults, resolve_model
from disagg.router.index.publisher import PublishOptions
from disagg.router.index.remote import PrefixIndex
from disagg.router.router import Router, RouterOptions
from disagg.router.tenants import TenantLimits
from disagg.transceiver.wire.errors import EndpointRefused
from disagg.transceiver.wire.keys import ClusterKeys
from disagg.transceiver.wire.sockets import bracketed

log = logging.getLogger(__name__)

Announce = Callable[[dict[str, Any]], None]

ADMIN_HOST = "127.0.0.1"  # administration has no key of its own
ADMIN_CONNECTIONS = 16  # operators and their tools, beside a public port that is full


def run(settings: RouterSettings, secret: bytes, announce: Announce) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP. Raises ConfigError for a model, host or port that cannot be used."""
    keys = ClusterKeys.from_secret(secret, insecure=settings.insecure)
    clients = api_keys(settings.api_key, settings.api_key_file)
    try:
        folder = resolve_model(settings.model)
        return asyncio.run(_serve(settings, folder, keys, clients, announce))
    except Exception as exc:  # what is raised while the router runs arrives in the group of its tasks
        if (refusal := found_in(exc, ModelRefused, EndpointRefused, ConfigError)) is None:
            raise
        raise ConfigError(str(refusal)) from exc


async def _serve(
    settings: RouterSettings, folder: Path, keys: ClusterKeys, clients: Sequence[ApiKey], announce: Announce
) -> int:
    descriptors = raise_descriptor_limit()
    stopped = asyncio.Event()
    for number in heeded_signals():
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    control = f"tcp://{bracketed(settings.control_host)}:{settings.control_port}"
    async with contextlib.AsyncExitStack() as stack:
        with _reading(folder):
            options = _router_options(settings, folder, clients)
        router = await stack.enter_async_context(Router.open(control, keys, options))
        if settings.policy == "prefix-aware" or settings.kv_events is not None:
            publish, tokens = _publish_options(settings, keys), settings.kv_events_tokens
            index = PrefixIndex.open(keys.prefix_hash, router.ask_blocks, publish, tokens=tokens)
            router.use(await stack.enter_async_context(index))
        with _reading(folder):
            api_settings = _api_settings(settings, folder, clients)
            check_text(api_settings)
        try:
            admin = await stack.enter_async_context(_admin_api(router, settings))
            public = await stack.enter_async_context(_public_api(router, settings, api_settings, descriptors))
        except OSError as exc:
            raise ConfigError(str(exc.strerror or exc)) from exc
        gc.collect()
        gc.freeze()  # what was imported and read stays: each full collection would look at all of it, 20 ms
        stack.callback(router.shut_down)  # first on the way out: streams end before their listeners wait for them
        announce(
            {"event": "ready", "url": public.url, "admin": admin.url, "control": router.endpoint, "pid": os.getpid()}
        )
        await stopped.wait()
    return 0


def _admin_api(router: Router, settings: RouterSettings) -> AbstractAsyncContextManager[Listener]:
    operators = Connections(ADMIN_CONNECTIONS)
    return serve(create_admin_app(router), ADMIN_HOST, settings.admin_port, connections=operators)


@contextlib.asynccontextmanager
async def _public_api(
    router: Router, settings: RouterSettings, api_settings: ApiSettings, descriptors: int
) -> AsyncIterator[Listener]:
    """In this process, or in some of their own behind one socket."""
    if not (count := num_api_processes(settings.api_processes, num_cores())):
        book = Connections(connections_within(descriptors))
        async with contextlib.AsyncExitStack() as stack:
            with _reading(api_settings.model_folder):
                app = await stack.enter_async_context(open_app(router, api_settings, is_warm=True))
            yield await stack.enter_async_context(serve(app, settings.host, settings.port, connections=book))
        return
    with await bind(settings.host, settings.port) as listening:
        listening.listen(BACKLOG)
        async with ApiProcesses.open(router, api_settings, listening, count, settings.log_level) as processes:
            router.figures.add(processes)
            yield Listener(*listening.getsockname()[:2])


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Raises ModelRefused for whatever goes wrong inside: what a model's files can make libraries raise has no end."""
    try:
        yield
    except ModelRefused:
        raise
    except Exception as exc:
        reason = (str(exc).strip() or "no message").splitlines()[0]
        raise ModelRefused(f"model folder `{folder}` cannot be used: {type(exc).__name__}: {reason}") from exc


def _router_options(settings: RouterSettings, folder: Path, clients: Sequence[ApiKey]) -> RouterOptions:
    return RouterOptions(
        expected_fingerprint=fingerprint(folder, verify_weights=settings.verify_weights),
        max_attempts=settings.max_attempts,
        max_continuations=0 if settings.no_continue else settings.max_continuations,
        max_queued=settings.max_queued,
        policy=settings.policy,
        max_local_prefill=settings.max_local_prefill,
        request_timeout_s=settings.request_timeout_s,
        tenants={key.tenant: TenantLimits(key.weight, key.max_requests, key.max_tokens) for key in clients},
        connect=settings.connect,
    )


def _publish_options(settings: RouterSettings, keys: ClusterKeys) -> PublishOptions | None:
    """Where cached blocks are published. Raises ConfigError for a file of keys that cannot be used."""
    if settings.kv_events is None:
        if settings.kv_events_tokens or settings.kv_events_keys is not None:
            raise ConfigError("`--kv-events-tokens` and `--kv-events-keys` say how: say where too, with `--kv-events`")
        return None
    host, port = endpoint_host(settings.kv_events), urlsplit(settings.kv_events).port or 0
    replay = f"tcp://{bracketed(host)}:{port + 1 if port else 0}"
    allowed = read_event_keys(settings.kv_events_keys) if settings.kv_events_keys is not None else ()
    if allowed:
        log.info("subscribers to cached blocks need this public key: %s", zmq.curve_public(keys.event_curve).decode())
    secret = keys.event_curve if allowed else b""
    return PublishOptions(settings.kv_events, replay, keys.event_hash, settings.served_name, secret, allowed)


def _api_settings(settings: RouterSettings, folder: Path, clients: Sequence[ApiKey]) -> ApiSettings:
    return ApiSettings(
        model_folder=folder,
        served_model_name=settings.served_name,
        defaults=generation_defaults(folder),
        api_keys={key.key: key.tenant for key in clients},
    )
