"""One process of the fleet: an embedded HTTP server and the microservices under one lifecycle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import uvicorn
from django.apps import apps

from .conf import get_settings
from .exceptions import ConfigurationError
from .http import HttpConnection
from .instruments import Bound
from .lifecycle import State, exit_now, lifecycle, until_signalled
from .microservice import get_executor
from .transports import sockets

logger = logging.getLogger("microservices")

BACKLOG = 1024  # connections that wait to be taken
MAX_WEBSOCKET_MESSAGE = 4096  # bytes: browsers listen more than they say


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handling: the process has one owner, and it is not this."""

    servers: list[asyncio.Server] = []  # noqa: RUF012 - uvicorn's own, before it has started
    cancelled = 0
    """How many requests were not waited for to their end."""

    def __init__(self, application: Any) -> None:
        settings = get_settings()
        super().__init__(
            uvicorn.Config(
                application,
                http=partial(HttpConnection, name=settings.name, most=settings.connection_limit),  # type: ignore[arg-type]  # is called
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                # Without Channels, as beside a service's health page, there is nobody to speak to.
                ws="websockets-sansio" if apps.is_installed("channels") else "none",
                ws_max_size=MAX_WEBSOCKET_MESSAGE,
                ws_per_message_deflate=False,  # it costs each connection memory for what is short anyway
                server_header=False,
            )
        )

    @property
    def bounds(self) -> list[Bound]:
        """How many are connected."""
        limit = get_settings().connection_limit
        return [Bound("http-connections", len(self.server_state.connections), limit)] if limit else []

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    async def stop_listening(self) -> None:
        """Take no more connections."""
        for server in self.servers:
            server.close()

    def part(self) -> None:
        """Let each answer from now on be the last one of its connection."""
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)  # from the next second on
        self.server_state.default_headers.append(close)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        self.cancelled = sum(task.cancelling() > 0 for task in self.server_state.tasks)

    def finish(self, grace: float) -> None:
        """Take no more requests and end when the running ones have, or after `grace` seconds."""
        self.config.timeout_graceful_shutdown = grace  # type: ignore[assignment]  # it takes fractions, too
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on a port. Raises ConfigurationError where it is taken."""
    # Bound here, since inside its loop uvicorn would answer a taken port with SystemExit.
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        # At once: whoever asks while the process starts waits for an answer, and is not refused.
        bound.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"HTTP cannot listen on {host}:{port}: {reason}") from error
    bound.set_inheritable(False)
    return bound


Prepare = Callable[[], Awaitable[None]]


def run(
    application: Any,
    host: str,
    port: int | None,
    *,
    page: str = "http",
    urls: Mapping[str, Sequence[str]] | None = None,
    prepare: Prepare | None = None,
) -> int:
    """Serve HTTP and the microservices of this process until SIGTERM or SIGINT, drain, and return the exit code.

    Without a `port` there is no HTTP. `page` is what others find there: "http" for all pages, "health"
    for those alone. `urls` names, by service, the doors to open in place of the map's. `prepare` is waited for
    before they open. The code is 1 where work had to be cancelled. Raises ConfigurationError when the process
    cannot start, as when a port is taken.
    """
    with ExitStack() as stack, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        bound = None if port is None else stack.enter_context(sockets.inherited("http") or bind(host, port))
        if bound is not None:
            shown = f"[{host}]" if ":" in host else host
            lifecycle.pages = {page: f"http://{shown}:{bound.getsockname()[1]}"}
        cancelled = runner.run(_serve(application, bound, urls, prepare))
    if cancelled:
        logger.error("%d handlers or requests were still at work after DRAIN_TIMEOUT, and were cancelled", cancelled)
    if get_executor().busy:
        logger.error("a handler is still at work after DRAIN_TIMEOUT; it is left behind")
        exit_now(1)
    return 1 if cancelled else 0


async def _serve(
    application: Any,
    bound: socket.socket | None,
    urls: Mapping[str, Sequence[str]] | None,
    prepare: Prepare | None,
) -> int:
    http = None
    signalled = asyncio.create_task(until_signalled(), name="signals")
    working: set[asyncio.Task[Any]] = {signalled}
    if bound is not None:
        http = HttpServer(application)
        lifecycle.bounded.append(http)
        lifecycle.on_drain.add(http.stop_listening)
        working.add(asyncio.create_task(http.serve(sockets=[bound]), name="http"))
    # Health is served first, so that probes hear "starting" instead of nothing.
    starting = asyncio.create_task(_start(urls, prepare), name="start")
    try:
        await asyncio.wait({*working, starting}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            logger.info("ready%s", "" if bound is None else ", http on {}:{}".format(*bound.getsockname()[:2]))
            await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        if signalled.done():
            logger.info("%s: draining", signal.Signals(signalled.result()).name)
    finally:
        starting.cancel()
        await asyncio.wait([starting])
        if http is not None:
            http.part()
        if lifecycle.state is not State.STOPPED:
            await lifecycle.drain()
        if http is not None:
            http.finish(lifecycle.patience)
        await asyncio.gather(*(working - {signalled}))
        await lifecycle.stop()
        signalled.cancel()
        if http is not None:
            lifecycle.on_drain.discard(http.stop_listening)
        logger.info("stopped")
    return lifecycle.cancelled + (0 if http is None else http.cancelled)


async def _start(urls: Mapping[str, Sequence[str]] | None, prepare: Prepare | None) -> None:
    lifecycle.state = State.STARTING
    if prepare is not None:
        await prepare()
    await lifecycle.start(urls)
    gc.freeze()  # what start-up has made stays: the collector need not look at it again


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
