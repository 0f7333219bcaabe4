"""The one type that wraps a call, on both sides: retry, breaker, timeout, span, metric, log, guard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from .context import RpcContext
from .handlers import Door, Handler

Endpoint = Callable[[Any, RpcContext], Awaitable[Any]]
"""`await endpoint(data, context)` makes the call. A client's data is the object given to `send`;
a server's is the payload's JSON as it came (`msgspec.Raw`), converted by the innermost endpoint.
A streaming handler's result is its async iterator."""

Middleware = Callable[[Endpoint], Endpoint]
"""Takes the next endpoint, once, at start-up; returns the endpoint that stands before it.

One that also has a method `in_place(call)`, which does the same with calls, leaves inline handlers where they
run: on the event loop, without a task. Behind one that has none they run in a task, too. One with a method
`at(handler, door)` is asked what stands before that door in its place: a Middleware, or None for nothing."""

Call = Callable[[Any, RpcContext], Any]
"""What an endpoint is where nothing may wait: `call(data, context)` on the event loop."""


def standing(middlewares: Iterable[Middleware], handler: Handler, door: Door) -> list[Middleware]:
    """Return what stands before a door of a handler."""
    asked = [each.at(handler, door) if hasattr(each, "at") else each for each in middlewares]
    return [middleware for middleware in asked if middleware is not None]


def chain(endpoint: Endpoint, middlewares: Iterable[Middleware]) -> Endpoint:
    """Fold middlewares around an endpoint; the first one named is the outermost."""
    for middleware in reversed(list(middlewares)):
        endpoint = middleware(endpoint)
    return endpoint


def chain_in_place(call: Call, middlewares: Iterable[Middleware]) -> Call | None:
    """Fold middlewares around a call, if all of them can stand there; else None."""
    for middleware in reversed(list(middlewares)):
        in_place = getattr(middleware, "in_place", None)
        if in_place is None:
            return None
        call = in_place(call)
    return call
