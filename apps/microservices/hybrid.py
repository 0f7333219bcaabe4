"""The ASGI application that starts and stops the microservices together with HTTP."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable
from typing import Any

from .bodies import Receive
from .conf import get_settings
from .exceptions import MicroserviceError
from .gate import Application, Gate, Scope, Send
from .lifecycle import Lifecycle, exit_now, lifecycle

logger = logging.getLogger("microservices")


class HybridApplication:
    """Wraps the project's ASGI application; NestJS's `connectMicroservice` and `startAllMicroservices`.

    A server that speaks lifespan (uvicorn, granian, hypercorn) starts the microservices through
    it. daphne does not, so its reactor is followed instead; only one of both ever runs.
    """

    def __init__(self, application: Application, owner: Lifecycle = lifecycle) -> None:
        settings = get_settings()
        gate = Gate(
            application,
            settings.name,
            requests=settings.http_limit,
            sockets=settings.socket_limit,
            body=settings.body_limit,
            patience=settings.call_timeout,
        )
        owner.bounded = [gate]
        self._application = gate
        self._lifecycle = owner
        owner.application = application  # it runs the consumers of events, too
        self._reactor = _Reactor(owner) if "twisted.internet.reactor" in sys.modules else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._reactor is not None and self._reactor.running:
            await self._reactor.shelter(self._application(scope, receive, send))
        else:
            await self._application(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._lifecycle.start()
                except Exception as error:
                    # uvicorn takes an exception for "speaks no lifespan" and would serve without the services.
                    expected = isinstance(error, MicroserviceError)
                    if not expected:
                        logger.critical("The microservices could not start", exc_info=error)
                    await self._end()
                    reason = str(error) if expected else f"{type(error).__name__}: {error}"
                    await send({"type": "lifespan.startup.failed", "message": reason})
                    return
                await send({"type": "lifespan.startup.complete"})
            else:
                await self._end()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _end(self) -> None:
        await self._lifecycle.drain()
        await self._lifecycle.stop()


class _Reactor:
    """daphne's event loop: starts the microservices with it, and drains before it ends."""

    def __init__(self, owner: Lifecycle) -> None:
        self._lifecycle = owner
        self._reactor: Any = sys.modules["twisted.internet.reactor"]
        self._requests: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._starting: asyncio.Task[None] | None = None
        self.running = False
        self._reactor.callWhenRunning(self._when_running)

    async def shelter(self, request: Awaitable[None]) -> None:
        """Run a request so that daphne's cancelling at shutdown does not reach it.

        daphne cancels all requests when it stops; a client that goes away cancels its own.
        """
        task = asyncio.ensure_future(request)
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        while True:
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.done():
                    raise
                if not self._stopping:
                    task.cancel()
                    raise

    def _when_running(self) -> None:
        self.running = True
        self._reactor.addSystemEventTrigger("before", "shutdown", self._before_shutdown)
        # The asyncio loop turns only after this callback has returned.
        self._reactor.callLater(0, self._start)

    def _start(self) -> None:
        self._starting = asyncio.get_event_loop().create_task(self._lifecycle.start())
        self._starting.add_done_callback(self._started)

    def _started(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            logger.critical("The microservices could not start: %s", task.exception())
            # daphne itself would end with 0, and a supervisor take that for success.
            self._reactor.addSystemEventTrigger("after", "shutdown", exit_now, 1)
            self._reactor.stop()

    def _before_shutdown(self) -> Any:
        from twisted.internet.defer import Deferred

        self._stopping = True  # at once: daphne cancels its requests right after this returns
        return Deferred.fromFuture(asyncio.ensure_future(self._finish()))

    async def _finish(self) -> None:
        await self._lifecycle.drain()
        if self._requests:
            await asyncio.wait(self._requests, timeout=self._lifecycle.remaining)
        await self._lifecycle.stop()
