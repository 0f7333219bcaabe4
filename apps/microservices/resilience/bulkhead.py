"""How many calls one target may have at a time, so that a slow one does not take all there is."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from ..context import RpcContext
from ..exceptions import DeadlineExceeded, Unavailable
from ..instruments import dropped
from ..middleware import Endpoint


class Bulkhead:
    """A Middleware that lets `capacity` calls through at a time; `queue` more wait, none beyond its deadline.

    One of them stands before all patterns of a target. What is refused raises Unavailable with the code
    "overloaded", which is nobody's failure: neither breaker nor balancer counts it.
    """

    def __init__(self, target: str, capacity: int = 100, queue: int = 50) -> None:
        self.target = target
        self.capacity = capacity
        self.in_flight = 0
        self._queue = queue
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return len(self._waiting)

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def limited(data: Any, context: RpcContext) -> Any:
            if self.in_flight < self.capacity and not self._waiting:
                self.in_flight += 1
            else:
                await self._turn(context)
            try:
                return await endpoint(data, context)
            finally:
                self._release()

        return limited

    async def _turn(self, context: RpcContext) -> None:
        if len(self._waiting) >= self._queue:
            dropped.add(self.target, "bulkhead", "overloaded")
            raise Unavailable(f"Too many calls to {self.target} are under way.", code="overloaded")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(context.remaining()):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._release()  # it was given to us in the moment that we left
            else:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                dropped.add(self.target, "bulkhead", "no-time")
                raise DeadlineExceeded(f"The call to {self.target} did not get its turn in time.") from None
            raise

    def _release(self) -> None:
        # Who waits is given the place itself: a call that comes now does not overtake.
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1
