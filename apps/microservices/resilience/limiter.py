"""How much a service takes on at a time: as much as it does without becoming slower (operations.md section 1)."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Any

from ..context import RpcContext
from ..exceptions import RpcException
from ..instruments import Bound, dropped
from ..middleware import Call, Endpoint

PRIORITIES = ("interactive", "background", "batch")
"""What the metadata `priority` may say, the most urgent first; whoever says nothing is interactive."""

_SHORT, _LONG = 0.1, 0.005
"""The weight of one call in the average of recent times, and in the one of usual times."""
_TOLERANCE = 2.0
"""How many times as long as usual calls may take before less is taken on."""
_SMOOTHING = 0.2
_EACH = 10
"""Calls from one look at the averages to the next."""


class Gradient:
    """A limit that grows while calls take as long as they usually do, and shrinks as they take longer."""

    def __init__(self, start: int = 20, least: int = 4, most: int = 200) -> None:
        start = min(start, most)
        self._limit = float(start)
        self._least = least
        self._most = most
        self._recent = 0.0
        self._usual = 0.0
        self._count = 0
        self.value = start
        """How many calls may be under way."""

    def add(self, seconds: float, in_flight: int) -> None:
        """Learn how long a call took, and how many were under way with it."""
        if not self._usual:
            self._recent = self._usual = seconds
        self._recent += (seconds - self._recent) * _SHORT
        self._usual += (seconds - self._usual) * _LONG
        if self._recent < self._usual:  # it has become quicker: that is what is usual now
            self._usual += (self._recent - self._usual) * _SHORT
        self._count += 1
        if self._count % _EACH == 0 and (in_flight * 2 >= self._limit or self._recent > self._usual * _TOLERANCE):
            self._adapt()

    def _adapt(self) -> None:
        # Where it is not used, a limit has proved nothing, and stays as it is.
        gradient = min(1.0, max(0.5, self._usual * _TOLERANCE / self._recent)) if self._recent else 1.0
        wanted = self._limit * gradient + self._limit**0.5
        if gradient < 1:
            wanted = self._limit * gradient
        self._limit += (wanted - self._limit) * _SMOOTHING
        self._limit = min(float(self._most), max(float(self._least), self._limit))
        self.value = int(self._limit)


class Limiter:
    """A Middleware of a service: so many requests under way, `queue` more waiting, the rest refused with `retryAfter`.

    What waits is taken by priority, and in a full queue makes room for what is more urgent. A refusal comes
    before the payload is looked at. Events are not refused: their transports bring no more than is worked on.
    Inline handlers never wait, and are not counted. Streams hold no place.
    """

    def __init__(
        self,
        service: str,
        limit: Gradient | None = None,
        queue: int = 200,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.service = service
        self.limit = limit or Gradient()
        self._queue = queue
        self.in_flight = 0
        self.refused = 0
        self._clock = clock
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = tuple(deque() for _ in PRIORITIES)

    @property
    def waiting(self) -> int:
        """How many calls wait for their turn."""
        return sum(len(queue) for queue in self._waiting)

    @property
    def bounds(self) -> list[Bound]:
        """What it has taken on, and what waits."""
        return [
            Bound("limiter", self.in_flight, self.limit.value),
            Bound("limiter-queue", self.waiting, self._queue),
        ]

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def limited(data: Any, context: RpcContext) -> Any:
            if context.raw_id is None:
                return await endpoint(data, context)
            if self.in_flight < self.limit.value:
                self.in_flight += 1
            else:
                await self._turn(context)
            began = self._clock()
            try:
                return await endpoint(data, context)
            finally:
                # As it was with this call, not after: else one alone would always look idle.
                self.limit.add(self._clock() - began, self.in_flight)
                self._release()

        return limited

    def in_place(self, call: Call) -> Call:
        """Leave inline handlers as they are: they take no time that could be waited for."""
        return call

    async def _turn(self, context: RpcContext) -> None:
        rank = _rank(context)
        if self.waiting >= self._queue and not self._evict(rank):
            raise self._refusal(PRIORITIES[rank])
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[rank].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # By the deadline, or since the peer has gone: the dispatcher says which.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release()
            elif turn in self._waiting[rank]:
                self._waiting[rank].remove(turn)
            raise

    def _evict(self, rank: int) -> bool:
        for less_urgent in range(len(PRIORITIES) - 1, rank, -1):
            queue = self._waiting[less_urgent]
            while queue:
                last = queue.pop()
                if not last.done():
                    last.set_exception(self._refusal(PRIORITIES[less_urgent]))
                    return True
        return False

    def _refusal(self, priority: str) -> RpcException:
        self.refused += 1
        dropped.add(self.service, "limiter", priority)
        message = f"{self.service} has more to do than it can."
        return RpcException({"statusCode": 503, "code": "overloaded", "message": message, "retryAfter": 1})

    def _release(self) -> None:
        # One place may serve nobody, where the limit has shrunk, or several, where it has grown.
        self.in_flight -= 1
        for queue in self._waiting:
            while queue and self.in_flight < self.limit.value:
                turn = queue.popleft()
                if not turn.done():
                    self.in_flight += 1
                    turn.set_result(None)


def _rank(context: RpcContext) -> int:
    told = context.metadata.get("priority", "")
    return PRIORITIES.index(told) if told in PRIORITIES else 0
