"""How many requests and WebSockets a process takes at a time, whatever server brings them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from .instruments import Bound, dropped
from .resilience.turns import Turns

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPERATORS = frozenset(("/livez", "/readyz", "/startupz", "/health", "/metrics"))
"""Pages that a process under load must answer, too."""

TRY_LATER = 1013


class Gate:
    """Wraps an ASGI application: `requests` at a time, as many more waiting, and `sockets`; 0 for any number.

    A request waits at most `patience` seconds. What is refused gets 503 with Retry-After, and its body is not read:
    each request of a sync view is a thread, so that without a bound a crowd would end the process. `name` is what
    this process calls itself.
    """

    def __init__(
        self, application: Application, name: str, *, requests: int = 200, sockets: int = 1000, patience: float = 5.0
    ) -> None:
        self._application = application
        self._name = name
        self._turns = Turns(requests, requests)
        self._sockets = Turns(sockets, 0)
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._turns.capacity and scope["path"] not in OPERATORS:
            if not self._turns.take() and not await self._wait():
                await _refuse(scope, send)
                return
            turns = self._turns
        elif scope["type"] == "websocket" and self._sockets.capacity:
            if not self._sockets.take():
                dropped.add(self._name, "websockets", "overloaded")
                await send({"type": "websocket.close", "code": TRY_LATER})
                return
            turns = self._sockets
        else:
            await self._application(scope, receive, send)
            return
        try:
            await self._application(scope, receive, send)
        finally:
            turns.give_back()

    @property
    def bounds(self) -> list[Bound]:
        """What is worked on, what waits, and who is connected."""
        turns, sockets = self._turns, self._sockets
        bounds = (
            Bound("http", turns.taken, turns.capacity),
            Bound("http-queue", turns.waiting, turns.queue),
            Bound("websockets", sockets.taken, sockets.capacity),
        )
        return [bound for bound in bounds if bound.limit]

    async def _wait(self) -> bool:
        if self._turns.full:
            dropped.add(self._name, "http", "overloaded")
            return False
        try:
            await self._turns.wait(self._patience)
        except TimeoutError:
            dropped.add(self._name, "http", "no-time")
            return False
        return True


async def _refuse(scope: Scope, send: Send) -> None:
    problem = {
        "type": "/problems/overloaded",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "More is asked of this process than it can do.",
        "instance": scope["path"],
        "code": "overloaded",
        "retryable": True,
    }
    headers = [(b"content-type", b"application/problem+json"), (b"retry-after", b"1"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(problem)})
