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

_RECENT = 0.1
"""The weight of one call in the average of recent ones."""
_USUAL = 0.02
"""The same in what is usual of a pattern."""
_TOLERANCE = 2.0
"""How many times as long as usual calls may take before less is taken on."""
_OUTLIER = 10.0
"""More than so many times as long says no more: one call that hung must not halve the limit."""
_SMOOTHING = 0.2
_EACH = 10
"""Calls from one look at the average to the next."""
_MOST_PATTERNS = 256
_OTHERS = ""


class Gradient:
    """A limit that grows while calls take as long as they usually do, and shrinks as they take longer.

    What is usual is each pattern's own, and is learned while there is no crowd: in one that lasts, calls that
    wait for each other would pass for usual, and the limit grow with what it should keep out.
    """

    def __init__(self, start: int = 20, least: int = 4, most: int = 200) -> None:
        start = min(start, most)
        self._limit = float(start)
        self._least = min(least, most)
        self._most = most
        self._usual: dict[str, float] = {}
        self._stretch = 1.0
        self._seconds = 0.0
        self._count = 0
        self.value = start
        """How many calls may be under way."""

    def add(self, pattern: str, seconds: float, in_flight: int) -> None:
        """Learn how long a call took, and how many were under way with it."""
        if pattern not in self._usual and len(self._usual) >= _MOST_PATTERNS:
            pattern = _OTHERS  # a wildcard's, which are without number
        usual = self._usual.get(pattern) or seconds or 1e-6
        self._seconds += (seconds - self._seconds) * (_RECENT if self._count else 1)
        self._stretch += (min(seconds / usual, _OUTLIER) - self._stretch) * _RECENT
        if seconds < usual or in_flight * 2 < self._limit or in_flight <= self._least:
            # Where only a few may be under way, that is no crowd: if it still takes longer, it is slower for good.
            usual += (seconds - usual) * _USUAL
        self._usual[pattern] = usual
        self._count += 1
        if self._count % _EACH == 0 and (in_flight * 2 >= self._limit or self._stretch > _TOLERANCE):
            self._adapt()

    def takes(self, pattern: str) -> float:
        """Return how many seconds a call of a pattern usually takes; 0 where that is not known."""
        return self._usual.get(pattern, 0.0)

    def wait(self, before: int) -> float:
        """Return after how many seconds it is the turn of one who has so many before him."""
        return (before + 1) * self._seconds / self.value

    def _adapt(self) -> None:
        # Where it is not used, a limit has proved nothing, and stays as it is.
        gradient = min(1.0, max(0.5, _TOLERANCE / self._stretch))
        wanted = self._limit * gradient
        if gradient == 1:
            wanted += self._limit**0.5
        self._limit += (wanted - self._limit) * _SMOOTHING
        self._limit = min(float(self._most), max(float(self._least), self._limit))
        self.value = int(self._limit)


class Limiter:
    """A Middleware of a service: so many requests under way, `queue` more waiting, the rest refused with `retryAfter`.

    What waits is taken by priority, and in a full queue makes room for what is more urgent. Who would wait for
    more than half of the time that is left to him is told at once, so that he can ask elsewhere, and what can no
    longer end in time is not begun: else all work of a crowd would come too late. A refusal comes before the
    payload is looked at. Events are not refused: their transports bring no more than is worked on. Inline
    handlers never wait, and are not counted. Streams hold no place.
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
        self.taken = 0
        self.refused = 0
        self._looked = (0, 0)
        self._shedding_since: float | None = None
        self._clock = clock
        self._waiting: tuple[deque[_Turn], ...] = tuple(deque() for _ in PRIORITIES)

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

    def look(self, now: float) -> None:
        """See how much was refused since the last look; called about once a second, with the time."""
        taken, refused = self.taken - self._looked[0], self.refused - self._looked[1]
        self._looked = self.taken, self.refused
        if refused <= taken:
            self._shedding_since = None
        elif self._shedding_since is None:
            self._shedding_since = now

    def shedding(self, now: float) -> float:
        """Return for how many seconds more than half has been refused; 0 while it is not."""
        return 0.0 if self._shedding_since is None else now - self._shedding_since

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        async def limited(data: Any, context: RpcContext) -> Any:
            if context.raw_id is None:
                return await endpoint(data, context)
            if self.in_flight < self.limit.value:
                self.in_flight += 1
            else:
                await self._turn(context)
            self.taken += 1
            began = self._clock()
            try:
                return await endpoint(data, context)
            finally:
                # As it was with this call, not after: else one alone would always look idle.
                self.limit.add(context.pattern, self._clock() - began, self.in_flight)
                self._release()

        return limited

    def in_place(self, call: Call) -> Call:
        """Leave inline handlers as they are: they take no time that could be waited for."""
        return call

    async def _turn(self, context: RpcContext) -> None:
        rank = _rank(context)
        left = context.remaining()
        before = sum(len(queue) for queue in self._waiting[: rank + 1])
        late = left is not None and self.limit.wait(before) > left / 2
        if late or (self.waiting >= self._queue and not self._evict(rank)):
            raise self._refusal(rank)
        turn = _Turn(context, self.limit.takes(context.pattern))
        self._waiting[rank].append(turn)
        try:
            await turn.comes
        except asyncio.CancelledError:
            # By the deadline, or since the peer has gone: the dispatcher says which.
            if turn.has_come:
                self._release()
            elif turn in self._waiting[rank]:
                self._waiting[rank].remove(turn)
            raise

    def _evict(self, rank: int) -> bool:
        for less_urgent in range(len(PRIORITIES) - 1, rank, -1):
            queue = self._waiting[less_urgent]
            while queue:
                last = queue.pop()
                if not last.comes.done():
                    last.comes.set_exception(self._refusal(less_urgent))
                    return True
        return False

    def _refusal(self, rank: int) -> RpcException:
        self.refused += 1
        dropped.add(self.service, "limiter", PRIORITIES[rank])
        message = f"{self.service} has more to do than it can."
        return RpcException({"statusCode": 503, "code": "overloaded", "message": message, "retryAfter": 1})

    def _release(self) -> None:
        # One place may serve nobody, where the limit has shrunk, or several, where it has grown.
        self.in_flight -= 1
        for rank, queue in enumerate(self._waiting):
            while queue and self.in_flight < self.limit.value:
                turn = queue.popleft()
                if turn.comes.done():
                    continue
                if turn.late:
                    turn.comes.set_exception(self._refusal(rank))
                else:
                    self.in_flight += 1
                    turn.comes.set_result(None)


class _Turn:
    """One who waits."""

    __slots__ = ("_context", "_takes", "comes")

    def __init__(self, context: RpcContext, takes: float) -> None:
        self._context = context
        self._takes = takes
        self.comes: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def late(self) -> bool:
        """Whether what he waits for can no longer end in time."""
        left = self._context.remaining()
        return left is not None and left < self._takes

    @property
    def has_come(self) -> bool:
        """Whether a place is his."""
        return self.comes.done() and not self.comes.cancelled() and self.comes.exception() is None


def _rank(context: RpcContext) -> int:
    told = context.metadata.get("priority", "")
    return PRIORITIES.index(told) if told in PRIORITIES else 0
