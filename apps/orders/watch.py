"""Who watches which order in this process, to be woken when it has changed."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from microservices import Unavailable
from microservices.lifecycle import State, lifecycle

FINAL = ("delivered", "cancelled", "refunded")

# Seconds after which a watcher looks for itself: an event may be lost, or be heard by another process alone.
LOOK_AGAIN = 5.0
MAX_WATCHERS = 1000


class Changes:
    """The changes of one order, for one watcher; several at once count as one."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Tell that the order may have changed."""
        self._changed.set()

    async def next(self) -> None:
        """Wait for a change, or for the time to look again. Raises Unavailable when the process is about to end."""
        try:
            async with asyncio.timeout(LOOK_AGAIN):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()
        if lifecycle.state is State.DRAINING:
            raise Unavailable("This process ends; another one goes on.", code="draining")


class Feed:
    """All watchers of this process. They live on its event loop, as the events do that wake them."""

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[Changes]] = defaultdict(set)
        self._count = 0

    @contextmanager
    def watching(self, order_id: str) -> Iterator[Changes]:
        """Give the changes of an order. Raises Unavailable when too many watch already."""
        if self._count >= MAX_WATCHERS:
            raise Unavailable("Too many watch their orders already.", code="overloaded")
        changes = Changes()
        self._count += 1
        self._watchers[order_id].add(changes)
        lifecycle.on_drain.add(self._leave)
        try:
            yield changes
        finally:
            self._count -= 1
            self._watchers[order_id].discard(changes)
            if not self._watchers[order_id]:
                del self._watchers[order_id]
            if not self._watchers:
                lifecycle.on_drain.discard(self._leave)

    def changed(self, order_id: str) -> None:
        """Wake those who watch an order."""
        for changes in self._watchers.get(order_id, ()):
            changes.wake()

    async def _leave(self) -> None:
        for watchers in self._watchers.values():
            for changes in watchers:
                changes.wake()


# The one mutable thing of this module: consumer and handlers of a process share it.
feed = Feed()
