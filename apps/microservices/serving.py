"""One process of the fleet: an embedded HTTP server and the microservices under one lifecycle."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Mapping, Sequence
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


def run(
    application: Any,
    host: str,
    port: int | None,
    *,
    page: str = "http",
    urls: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Serve HTTP and the microservices of this process until SIGTERM or SIGINT, then drain.

    Without a `port` there is no HTTP. `page` is what others find there: "http" for all pages, "health"
    for those alone. `urls` names, by service, the doors to open in place of the map's.
    Raises ConfigurationError when a port cannot be bound.
    """
    with ExitStack() as stack, asyncio.Runner(loop_factory=_loop_factory()) as runner:
        bound = None if port is None else stack.enter_context(sockets.inherited("http") or bind(host, port))
        if bound is not None:
            shown = f"[{host}]" if ":" in host else host
            lifecycle.pages = {page: f"http://{shown}:{bound.getsockname()[1]}"}
        runner.run(_serve(application, bound, urls))
    if get_executor().busy:
        logger.error("a handler is still at work after DRAIN_TIMEOUT; it is left behind")
        exit_now(1)


async def _serve(application: Any, bound: socket.socket | None, urls: Mapping[str, Sequence[str]] | None) -> None:
    http = None
    signalled = asyncio.create_task(until_signalled(), name="signals")
    working: set[asyncio.Task[Any]] = {signalled}
    if bound is not None:
        http = HttpServer(application)
        lifecycle.bounded.append(http)
        working.add(asyncio.create_task(http.serve(sockets=[bound]), name="http"))
    try:
        # Health is served first, so that probes hear "starting" instead of nothing.
        await lifecycle.start(urls)
        gc.freeze()  # what start-up has made stays: the collector need not look at it again
        logger.info("ready%s", "" if bound is None else ", http on {}:{}".format(*bound.getsockname()[:2]))
        done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        if signalled in done:
            logger.info("%s: draining", signal.Signals(signalled.result()).name)
    finally:
        if lifecycle.state is not State.STOPPED:
            await lifecycle.drain()
        if http is not None:
            http.finish(lifecycle.remaining)
        await asyncio.gather(*(working - {signalled}))
        await lifecycle.stop()
        signalled.cancel()
        logger.info("stopped")


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
