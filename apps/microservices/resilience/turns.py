"""So many places, and a bounded queue for them."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """`capacity` places; `queue` more wait for one, in the order in which they came."""

    __slots__ = ("_waiting", "capacity", "queue", "taken")

    def __init__(self, capacity: int, queue: int) -> None:
        self.capacity = capacity
        self.queue = queue
        self.taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether nobody more may even wait."""
        return len(self._waiting) >= self.queue and self.taken >= self.capacity

    def take(self) -> bool:
        """Take a place; False where there is none, or others have waited for it."""
        if self.taken >= self.capacity or self._waiting:
            return False
        self.taken += 1
        return True

    async def wait(self, seconds: float | None) -> None:
        """Wait for a place, and take it. Raises TimeoutError after so many seconds."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(seconds):
                await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.give_back()  # it was given to us in the moment that we left
            else:
                self._waiting.remove(turn)
            raise

    def give_back(self) -> None:
        """Leave a place; whoever waits longest is given it, so that nobody who comes now overtakes."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.taken -= 1
