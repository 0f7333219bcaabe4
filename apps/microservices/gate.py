"""How many requests and WebSockets a process takes at a time, whatever server brings them."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec

from .bodies import Bodies, Gone, Receive, Refused
from .instruments import Bound, dropped
from .resilience.turns import Turns

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPERATORS = frozenset(("/livez", "/readyz", "/startupz", "/health", "/metrics"))
"""Pages that a process under load must answer, too."""

TRY_LATER = 1013
ANY = sys.maxsize


class Gate:
    """Wraps an ASGI application: `requests` at a time, as many more waiting, and `sockets`; 0 for any number.

    A request waits at most `patience` seconds. What is refused gets 503 with Retry-After, and its body is not read:
    each request of a sync view is a thread, so that without a bound a crowd would end the process. A body is read
    before the turn comes: `body` bytes at most, within `body_time` seconds. `name` is what this process calls itself.
    """

    def __init__(
        self,
        application: Application,
        name: str,
        *,
        requests: int = 200,
        sockets: int = 1000,
        body: int = 1024 * 1024,
        body_time: float = 30.0,
        patience: float = 5.0,
    ) -> None:
        self._application = application
        self._name = name
        self._turns = Turns(requests or ANY, requests)
        self._operators = Turns(ANY, 0)
        self._bodies = Bodies(body, requests or ANY, body_time)
        self._sockets = Turns(sockets or ANY, 0)
        self._patience = patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            turns = self._operators if scope["path"] in OPERATORS else self._turns
            try:
                receive = await self._enter(turns, scope, receive)
            except Refused as refusal:
                dropped.add(self._name, "http", refusal.code)
                await _refuse(refusal, scope, send)
                return
            except Gone:
                return
        elif scope["type"] == "websocket":
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
            Bound("http-bodies", self._bodies.taken, self._bodies.capacity),
            Bound("websockets", sockets.taken, sockets.capacity),
        )
        return [bound for bound in bounds if 0 < bound.limit < ANY]

    async def _enter(self, turns: Turns, scope: Scope, receive: Receive) -> Receive:
        if turns.full:
            raise _overloaded()
        receive = await self._bodies.read(scope["headers"], receive)
        if not turns.take():
            if turns.full:  # others have come while it was read
                raise _overloaded()
            try:
                await turns.wait(self._patience)
            except TimeoutError:
                raise _overloaded() from None
        return receive


def _overloaded() -> Refused:
    return Refused(503, "overloaded", "More is asked of this process than it can do.")


async def _refuse(refusal: Refused, scope: Scope, send: Send) -> None:
    again = refusal.status == 503
    problem = {
        "type": f"/problems/{refusal.code}",
        "title": HTTPStatus(refusal.status).phrase,
        "status": refusal.status,
        "detail": refusal.detail,
        "instance": scope["path"],
        "code": refusal.code,
        "retryable": again,
    }
    # Closed, since the rest of the body is still to come.
    headers = [(b"content-type", b"application/problem+json"), (b"connection", b"close")]
    if again:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": msgspec.json.encode(problem)})
