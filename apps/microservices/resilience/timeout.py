"""The time of one attempt, shorter than that of the call, so that a retry has time left."""

from __future__ import annotations

from copy import copy
from typing import Any

from ..context import RpcContext
from ..middleware import Endpoint


class AttemptTimeout:
    """A Middleware that gives each attempt `seconds` at most; the service hears of that deadline, too."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def timed(data: Any, context: RpcContext) -> Any:
            attempt = copy(context)
            attempt.cap_deadline(self._seconds)
            try:
                return await endpoint(data, attempt)
            finally:
                # For the log, and for the next attempt.
                context.id, context.peer, context.tried = attempt.id, attempt.peer, attempt.tried

        return timed
