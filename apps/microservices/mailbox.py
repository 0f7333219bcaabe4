"""Events on their way to a consumer, and its reports on their way back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any

from .context import RpcContext
from .exceptions import RpcException, Unavailable
from .instruments import Bound

logger = logging.getLogger("microservices.mailbox")

Message = dict[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


class Mailbox:
    """The ASGI side of one consumer class in one service.

    `application` is the ASGI application that runs the consumer with `scope`. It takes messages of
    type "event", at most `limit` waiting, and reports "event.done" or "event.failed" for each.
    """

    def __init__(self, scope: Message, application: Application, *, limit: int = 50) -> None:
        self.scope = scope
        self.application = application
        self._limit = limit
        self._queue: asyncio.Queue[Message] = asyncio.Queue(limit)
        # Who waits for room comes in the order of arrival; a queue's own putters may be overtaken.
        self._room = asyncio.Semaphore(limit)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._count = 0
        self._running: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start the consumer on the running loop, unless it runs there already."""
        loop = asyncio.get_running_loop()
        if self._running is None or self._running.done() or self._running.get_loop() is not loop:
            self._queue = asyncio.Queue(self._limit)
            self._room = asyncio.Semaphore(self._limit)
            self._waiting = {}
            self._running = loop.create_task(self._run(), context=Context())

    async def close(self) -> None:
        """End the consumer; what it has not reported counts as failed."""
        running, self._running = self._running, None
        if running is not None and running.get_loop() is asyncio.get_running_loop():
            running.cancel()
            await asyncio.wait([running])

    @property
    def bounds(self) -> list[Bound]:
        """What waits for the consumer; its own room is the bound, and who comes later waits with the transport."""
        return [Bound(f"mailbox {self.scope['consumer']}", self._queue.qsize(), self._limit)]

    async def deliver(self, method: str, arguments: tuple[Any, ...], context: RpcContext) -> None:
        """Have `method` of the consumer handle an event. Raises what it raises, or Unavailable when it ends first."""
        self.open()
        waiting, room, queue = self._waiting, self._room, self._queue
        self._count += 1
        id = self._count
        report = waiting[id] = asyncio.get_running_loop().create_future()
        message = {"type": "event", "id": id, "method": method, "arguments": arguments, "context": context}
        try:
            await room.acquire()
            if not report.done():
                queue.put_nowait(message)
            await report
        finally:
            waiting.pop(id, None)

    async def _run(self) -> None:
        waiting, room, queue = self._waiting, self._room, self._queue

        async def receive() -> Message:
            message = await queue.get()
            room.release()
            return message

        try:
            await self.application(dict(self.scope), receive, self._report)
        except Exception:
            # Who delivers next starts it again.
            logger.exception("The consumer %s has ended", self.scope["consumer"])
        finally:
            for report in waiting.values():
                if not report.done():
                    report.set_exception(Unavailable(f"The consumer {self.scope['consumer']} has ended."))
                room.release()  # who waits for room would wait for ever

    async def _report(self, message: Message) -> None:
        report = self._waiting.get(message["id"])
        if report is None or report.done():
            return
        if message["type"] == "event.done":
            report.set_result(None)
        else:
            report.set_exception(message.get("error") or RpcException())
