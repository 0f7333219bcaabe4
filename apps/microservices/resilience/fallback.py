"""What a caller is told in place of an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from msgspec import Raw

from ..codec import encode
from ..context import RpcContext
from ..exceptions import RpcException
from ..middleware import Endpoint


class Fallback:
    """A Middleware that answers with `fallback(data, error)` where the service could not.

    The service's own refusals (4xx) are answers, and pass. The fallback is a `def` that does not block, or
    an `async def`; what it raises is raised to the caller.
    """

    def __init__(self, fallback: Callable[[Any, RpcException], Any]) -> None:
        self._fallback = fallback

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def guarded(data: Any, context: RpcContext) -> Any:
            try:
                return await endpoint(data, context)
            except RpcException as error:
                if error.status_code < 500 and not error.retryable:
                    raise
                value = self._fallback(data, error)
                # As JSON, so that it is decoded into what the caller asked for, like any answer.
                return Raw(encode(await value if inspect.isawaitable(value) else value))

        return guarded
