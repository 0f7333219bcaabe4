"""Channels consumers whose methods are event handlers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from contextvars import Context
from functools import partial
from types import ModuleType
from typing import Any

from channels.consumer import AsyncConsumer
from channels.layers import get_channel_layer
from django.utils.module_loading import import_string

from .context import current
from .handlers import Handler, doors_of
from .mailbox import Mailbox
from .microservice import get_executor


class EventConsumer(AsyncConsumer):
    """A Channels consumer for events: mark its methods with `@event_pattern`.

    A method takes (data, context), as a handler function does: `def` runs on a thread and may touch
    the ORM, `async def` runs on the event loop. At most `concurrency` events are handled at a time.
    """

    concurrency = 50

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle events until cancelled.

        Channels' own method also listens on the channel layer, and ends with it.
        """
        self.scope = scope
        self.base_send = send
        self.channel_layer = get_channel_layer(self.channel_layer_alias)
        self._room = asyncio.Semaphore(self.concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                await self.dispatch(await receive())
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=1)

    async def dispatch(self, message: dict[str, Any]) -> None:
        """Start handling an event as soon as there is room.

        Channels' own method handles one message at a time, hops to a thread for each, and an
        exception ends the consumer.
        """
        await self._room.acquire()
        task = asyncio.get_running_loop().create_task(self._handle(message), context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._handled)

    async def _handle(self, message: dict[str, Any]) -> None:
        method, arguments, context = getattr(self, message["method"]), message["arguments"], message["context"]
        current.set(context)
        try:
            if inspect.iscoroutinefunction(method):
                await method(*arguments)
            else:
                await get_executor().run(partial(method, *arguments), context)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # What the method awaited was cancelled, and whoever delivered the event still waits.
            await self.send({"type": "event.failed", "id": message["id"]})
        except Exception as error:  # noqa: BLE001 - reported to whoever delivered the event
            await self.send({"type": "event.failed", "id": message["id"], "error": error})
        else:
            await self.send({"type": "event.done", "id": message["id"]})

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()


class EventRouter:
    """Runs the consumer that an event scope names; stands under "event" in the ProtocolTypeRouter."""

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        consumer: type[EventConsumer] = import_string(scope["consumer"])
        await consumer.as_asgi()(scope, receive, send)


def consumer_handlers(service: str, module: ModuleType) -> Iterator[Handler]:
    """Yield the handlers among the methods of a module's consumers, each class with one mailbox."""
    for value in vars(module).values():
        if not (isinstance(value, type) and issubclass(value, EventConsumer) and value.__module__ == module.__name__):
            continue
        path = f"{value.__module__}.{value.__qualname__}"
        mailbox = Mailbox({"type": "event", "service": service, "consumer": path}, EventRouter())
        for _, method in inspect.getmembers(value, inspect.isfunction):
            if doors_of(method):
                yield Handler(method, mailbox)
