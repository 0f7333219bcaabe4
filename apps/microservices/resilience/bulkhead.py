"""How many calls one target may have at a time, so that a slow one does not take all there is."""

from __future__ import annotations

from typing import Any

from ..context import RpcContext
from ..exceptions import DeadlineExceeded, Unavailable
from ..instruments import Bound, dropped
from ..middleware import Endpoint
from .turns import Turns


class Bulkhead:
    """A Middleware that lets `capacity` calls through at a time; `queue` more wait, none beyond its deadline.

    One of them stands before all patterns of a target. What is refused raises Unavailable with the code
    "overloaded", which is nobody's failure: neither breaker nor balancer counts it.
    """

    def __init__(self, target: str, capacity: int = 100, queue: int = 50) -> None:
        self.target = target
        self._turns = Turns(capacity, queue)

    @property
    def bounds(self) -> list[Bound]:
        """What is under way, and what waits for its turn."""
        turns = self._turns
        return [
            Bound("bulkhead", turns.taken, turns.capacity),
            Bound("bulkhead-queue", turns.waiting, turns.queue),
        ]

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        turns = self._turns

        async def limited(data: Any, context: RpcContext) -> Any:
            if not turns.take():
                await self._wait(context)
            try:
                return await endpoint(data, context)
            finally:
                turns.give_back()

        return limited

    async def _wait(self, context: RpcContext) -> None:
        if self._turns.full:
            dropped.add(self.target, "bulkhead", "overloaded")
            raise Unavailable(f"Too many calls to {self.target} are under way.", code="overloaded")
        try:
            await self._turns.wait(context.remaining())
        except TimeoutError:
            dropped.add(self.target, "bulkhead", "no-time")
            raise DeadlineExceeded(f"The call to {self.target} did not get its turn in time.") from None
