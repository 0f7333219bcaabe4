"""The one type that wraps a call, on both sides: retry, breaker, timeout, span, metric, log, guard."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from .context import RpcContext

Endpoint = Callable[[Any, RpcContext], Awaitable[Any]]
"""`await endpoint(data, context)` makes the call. A client's data is the object given to `send`;
a server's is the payload's JSON as it came (`msgspec.Raw`), converted by the innermost endpoint.
A streaming handler's result is its async iterator."""

Middleware = Callable[[Endpoint], Endpoint]
"""Takes the next endpoint, once, at start-up; returns the endpoint that stands before it."""


def chain(endpoint: Endpoint, middlewares: Iterable[Middleware]) -> Endpoint:
    """Fold middlewares around an endpoint; the first one named is the outermost."""
    for middleware in reversed(list(middlewares)):
        endpoint = middleware(endpoint)
    return endpoint
