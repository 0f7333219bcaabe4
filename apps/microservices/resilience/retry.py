"""A call that failed is made again, where that is safe and does not make things worse (operations.md section 1)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..context import RpcContext
from ..exceptions import ConnectionLost, RpcException, Unavailable
from ..handlers import Retry as Kind
from ..instruments import Counter
from ..middleware import Endpoint

retries = Counter(
    "microservices_retries_total", "Calls that failed and might be made again.", ("service", "target", "outcome")
)

_SECONDS = 10


class Budget:
    """How many retries a target may cost: a share of the calls of the last ten seconds, and a few beside them.

    Without it each layer multiplies the load of a service that is already too slow. `share` is of all calls,
    `floor` a number of retries a second.
    """

    def __init__(self, share: float = 0.2, floor: float = 3.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._reserve = floor * _SECONDS
        self._clock = clock
        self._second = int(clock())
        self._calls = [0] * _SECONDS
        self._taken = [0] * _SECONDS

    def deposit(self) -> None:
        """Count a call."""
        second = int(self._clock())
        if second != self._second:
            self._advance(second)
        self._calls[second % _SECONDS] += 1

    def take(self) -> bool:
        """Take a retry out of the budget; False where it is spent."""
        second = int(self._clock())
        if second != self._second:
            self._advance(second)
        if self.left < 1:
            return False
        self._taken[second % _SECONDS] += 1
        return True

    @property
    def left(self) -> float:
        """How many retries may be made now."""
        return self._share * sum(self._calls) + self._reserve - sum(self._taken)

    @property
    def ratio(self) -> float:
        """Which part of the budget is left, from 0 to 1."""
        return max(0.0, self.left) / (self._share * sum(self._calls) + self._reserve or 1)

    def _advance(self, second: int) -> None:
        for passed in range(self._second + 1, min(second, self._second + _SECONDS) + 1):
            self._calls[passed % _SECONDS] = self._taken[passed % _SECONDS] = 0
        self._second = second


class Retry:
    """A Middleware that makes a call again after an error that may pass, with a pause that grows and has full jitter.

    `kind` is what the pattern's handler declares: "safe" may be repeated, "keyed" where its data has an
    `idempotency_key`, "never" may not. A call that was never sent may in any case. `delay` is in seconds. An
    error whose retries are spent tells so (`retried`), and no layer above repeats it.
    """

    def __init__(
        self,
        budget: Budget,
        kind: Kind = "never",
        *,
        source: str = "",
        times: int = 2,
        delay: float = 0.05,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._budget = budget
        self._kind = kind
        self._source = source
        self._times = times
        self._delay = delay
        self._sleep = sleep
        self._jitter = jitter

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def first(data: Any, context: RpcContext) -> Any:
            self._budget.deposit()
            try:
                return await endpoint(data, context)
            except RpcException as error:
                if not self._may_repeat(error, data):
                    raise
                failure = error
            return await again(failure, data, context)

        async def again(failure: RpcException, data: Any, context: RpcContext) -> Any:
            for attempt in range(self._times):
                pause = self._jitter(0, self._delay * 2**attempt)
                left = context.remaining()
                if left is not None and left <= pause:
                    self._count(context, "no-time")
                    raise failure
                if not self._budget.take():
                    self._count(context, "no-budget")
                    raise _spent(failure)
                await self._sleep(pause)
                try:
                    result = await endpoint(data, context)
                except RpcException as error:
                    failure = error
                    if not self._may_repeat(error, data):
                        break
                else:
                    self._count(context, "succeeded")
                    return result
            self._count(context, "failed")
            raise _spent(failure)

        return first if self._times else endpoint

    def _may_repeat(self, error: RpcException, data: Any) -> bool:
        if never_sent(error):
            return True
        if isinstance(error, Unavailable) and not isinstance(error, ConnectionLost):
            return False  # refused here: by a limit, a breaker, or since the client is closed
        if self._kind == "never" or not error.retryable or _is_spent(error):
            return False
        return self._kind == "safe" or has_key(data)

    def _count(self, context: RpcContext, outcome: str) -> None:
        retries.add(self._source, context.service, outcome)


def never_sent(error: RpcException) -> bool:
    """Return whether a call surely was not begun, so that nothing is done twice."""
    return (isinstance(error, Unavailable) and error.code == "unavailable") or error.code == "draining"


def has_key(data: Any) -> bool:
    """Return whether a payload says by what its repetition is known."""
    key = data.get("idempotency_key") if isinstance(data, Mapping) else getattr(data, "idempotency_key", None)
    return bool(key)


def _is_spent(error: RpcException) -> bool:
    return isinstance(error.error, Mapping) and error.error.get("retried") is True


def _spent(error: RpcException) -> RpcException:
    if isinstance(error.error, Mapping):
        error.error = {**error.error, "retried": True}
    return error
