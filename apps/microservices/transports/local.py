"""Services of the same process: called through codec and dispatcher, and told of events in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET, Raw

from .. import codec
from ..context import NO_HEADERS, RpcContext
from ..dispatcher import Dispatcher
from ..exceptions import RpcException, Unavailable
from ..packets import Event, Packet, Reply, Request, Response
from . import Address
from .base import ClientProxy, Status

Headers = Mapping[str, Any]


class _Deliveries:
    """Events on their way to handlers of this process, never more than `limit` at a time."""

    limit = 1000
    patience = 5.0

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(self.limit)

    async def start(self, dispatcher: Dispatcher, packet: Packet, transport: str, headers: Headers) -> None:
        """Hand an event to a dispatcher, as soon as there is room."""
        await self._room.acquire()
        task = dispatcher.dispatch(packet, _nobody, transport=transport, peer="", headers=headers)
        if task is None:
            self._room.release()
        else:
            self._tasks.add(task)
            task.add_done_callback(self._done)

    async def finish(self) -> None:
        """Let running handlers finish for a moment: what was emitted is not taken back."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.patience)
        for task in list(self._tasks):
            task.cancel()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()


class LocalClient(ClientProxy):
    """Calls a service that lives in this process. No object is shared: every value becomes JSON and back."""

    scheme = "local"

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__(Address("local", "", 0, {}), dispatcher.service)
        self.status = Status.CONNECTED
        self._dispatcher = dispatcher
        self._requests: dict[str, asyncio.Task[None]] = {}
        self._events = _Deliveries()

    def ready(self) -> bool:
        return self.status is Status.CONNECTED

    async def connect(self) -> None:
        """Nothing to connect to."""

    def read_record(self, options: Mapping[str, Any]) -> Headers:
        # Elsewhere this service may be reached over any transport: what that takes is taken here.
        return _headers(options)

    async def publish(self, request: Request, context: RpcContext) -> None:
        packet = codec.decode_packet(self.encode(request))
        headers = context.record or NO_HEADERS
        task = self._dispatcher.dispatch(packet, self._reply, transport=self.scheme, peer="", headers=headers)
        if task is not None:
            self._requests[request.id] = task
            task.add_done_callback(lambda _: self._requests.pop(request.id, None))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        headers = context.record or NO_HEADERS
        await self._events.start(self._dispatcher, codec.decode_packet(self.encode(event)), self.scheme, headers)

    def abandon(self, id: str) -> None:
        task = self._requests.get(id)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        self.status = Status.CLOSED
        self.fail_pending(Unavailable(f"The client of {self.service} is closed.", code="closed"))
        for task in list(self._requests.values()):
            task.cancel()
        await self._events.finish()

    def unwrap(self) -> Dispatcher:
        return self._dispatcher

    def _reply(self, response: Response) -> asyncio.Future[None] | None:
        value = response.response
        return self.receive(
            Reply(
                id=codec.decode(response.id),
                response=value if value is UNSET else Raw(codec.encode(value)),
                err=None if response.err is UNSET else codec.decode(codec.encode(response.err)),
                is_disposed=response.is_disposed is True or response.err is not UNSET,
            )
        )


class MemoryBus(ClientProxy):
    """The event bus of one process: each service that hears an event gets it once, after `emit` returns."""

    scheme = "memory"

    def __init__(self, address: Address, dispatchers: Sequence[Dispatcher]) -> None:
        super().__init__(address, "events")
        self.status = Status.CONNECTED
        self._dispatchers = dispatchers
        self._events = _Deliveries()

    def ready(self) -> bool:
        return self.status is Status.CONNECTED

    async def connect(self) -> None:
        """Nothing to connect to; `emit` waits for room instead."""

    def read_record(self, options: Mapping[str, Any]) -> Headers:
        return _headers(options)

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        packet = codec.decode_packet(self.encode(event))
        for dispatcher in self._dispatchers:
            if dispatcher.hears(context.pattern):
                await self._events.start(dispatcher, packet, self.scheme, context.record or NO_HEADERS)

    async def close(self) -> None:
        self.status = Status.CLOSED
        await self._events.finish()

    def unwrap(self) -> Sequence[Dispatcher]:
        return self._dispatchers


def _headers(options: Mapping[str, Any]) -> Headers:
    headers: Headers = options.get("headers") or NO_HEADERS
    return headers


def _nobody(response: Response) -> None:
    """Where the answer to an event goes."""
