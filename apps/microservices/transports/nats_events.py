"""Events over NATS: its own, at most once; or those of a JetStream stream, acknowledged after their handlers.

A stream keeps the events under `<stream>.<route>`. Every service that hears a route has a durable consumer
there, so each gets a copy, and one of its processes takes it. What a process says nothing about for a while,
another one gets.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, ClassVar

from msgspec import UNSET

from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import InvalidPayload, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Request
from . import Address, Count, Seconds
from .jetstream import is_end, keep, make_consumer, make_stream, nanoseconds, place, pull, remove_consumer
from .nats import NatsClient, NatsServer, Options, headers, ignore
from .nats_protocol import Message, NatsConnection, write_headers

logger = logging.getLogger("microservices.nats")

DEAD = "dead"
"""The stream of what was given up; each service has its subject there."""

_WAIT = 30.0
_PATIENCE = 10.0
_NO_NAME = re.compile(r"[^A-Za-z0-9_-]+")

ACK, LATER, NEVER, BUSY = b"+ACK", b"-NAK", b"+TERM", b"+WPI"


class BusOptions(Options, frozen=True, kw_only=True):
    """What the URL of a bus may set; times in seconds. All but `stream` is for JetStream."""

    stream: str = ""
    """The stream of JetStream that keeps the events; without one they are NATS' own, at most once."""
    max_length: Count = 100_000
    """Events that the stream keeps; older ones go, heard or not. For a stream that is not there yet."""
    max_age: Seconds = 7 * 24 * 3600
    replicas: Count = 1
    prefetch: Count = 50
    """How many events a process works on at a time."""
    attempts: Count = 5
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""
    ack_wait: Seconds = 15
    """How long a process may be silent about an event before another one gets it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if _NO_NAME.search(self.stream) or self.stream == DEAD:
            name = f"{self.stream!r} cannot name the stream of events"
            raise ValueError(f"{name}: letters, digits, - and _, not {DEAD!r}")

    @property
    def bounds(self) -> dict[str, Any]:
        """What a stream is made with."""
        return {"max_msgs": self.max_length, "max_age": nanoseconds(self.max_age), "num_replicas": self.replicas}


class NatsBus(NatsClient):
    """Publishes events; `emit` returns when NATS has them, and where there is a stream, when that has."""

    Options = BusOptions

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        if not self.options.stream:
            await super().dispatch_event(event, context)
            return
        self.check(context.pattern)
        subject = f"{self.options.stream}.{context.pattern}"
        await keep(self.live(), self.options.bounds, subject, self.encode(event), headers(context))

    async def prepare(self, connection: NatsConnection) -> None:
        if self.options.stream:
            await make_stream(connection, self.options.stream, self.options.bounds)


class _Feed:
    """What one consumer of a stream brings to this process."""

    def __init__(self, service: str, route: Route, delivery: Delivery, limit: int) -> None:
        self.route, self.delivery, self._limit = route, delivery, limit
        digest = hashlib.sha256(f"{service}\0{route.name}".encode()).hexdigest()[:8]
        self.name = f"{_NO_NAME.sub('-', service)[:60]}_{_NO_NAME.sub('-', route.name)[:60]}_{digest}"
        if delivery == "each":
            self.name = f"{self.name}_{os.urandom(6).hex()}"
        self.running: dict[int, Message] = {}
        """The events at work, by their number in the stream."""
        self._room = asyncio.Event()
        self._room.set()

    async def room(self) -> int:
        """Return how many more events may come, when any may."""
        await self._room.wait()
        return self._limit - len(self.running)

    def add(self, number: int, message: Message) -> None:
        """Count an event that is worked on."""
        self.running[number] = message
        if len(self.running) >= self._limit:
            self._room.clear()

    def done(self, number: int, _: object) -> None:
        """Forget an event that is worked on no more."""
        del self.running[number]
        self._room.set()


class NatsListener(NatsServer):
    """Hears the events of a bus: NATS' own, or those of a stream where the option `stream` names one."""

    Options = BusOptions
    answers: ClassVar[bool] = False
    # Not that of its server, which may hear the same subjects: each message must come to both.
    group = "{}-events"

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        ways: tuple[Delivery, ...] = ("one", "each")
        heard = [(route, way) for route in self.routes.values() for way in ways if route.listeners(way)]
        share = max(1, self.options.prefetch // max(1, len(heard)))
        self._feeds = [_Feed(dispatcher.service, route, way, share) for route, way in heard]
        self._made: object = None
        self._slots = asyncio.Semaphore(self.options.prefetch)
        self._loops: list[asyncio.Task[None]] = []

    @property
    def routes(self) -> dict[str, Route]:
        """The routes of events."""
        return {name: route for name, route in self.dispatcher.routes.items() if route.events}

    async def listen(self) -> None:
        """Subscribe. Raises ConfigurationError for a pattern that can be no subject, naming it."""
        if self.routes:
            await super().listen()

    async def subscribe(self) -> None:
        if not self.options.stream:
            await super().subscribe()
            return
        connection, stream = await self.open(), self.options.stream
        self._made = await make_stream(connection, stream, self.options.bounds)
        await make_stream(connection, DEAD, self.options.bounds)
        for feed in self._feeds:
            subject, lasts = f"{stream}.{feed.route.name}", feed.delivery == "one"
            await make_consumer(connection, stream, feed.name, subject, self.options.ack_wait, lasts=lasts)
        pulling = [self._pull(connection, feed) for feed in self._feeds]
        self._loops = [asyncio.create_task(work) for work in (self._say_busy(connection), *pulling)]

    async def until_lost(self) -> str:
        ended = asyncio.create_task(super().until_lost())
        try:
            await asyncio.wait([ended, *self._loops], return_when=asyncio.FIRST_COMPLETED)
            for task in self._loops:
                if task.done():
                    task.result()
            return await ended
        finally:
            ended.cancel()

    async def unsubscribe(self) -> None:
        self._leaving = bool(self.options.stream)  # what still comes is given back
        await super().unsubscribe()

    async def finish(self, grace: float) -> int:
        late = await super().finish(grace)
        own = [feed.name for feed in self._feeds if self._loops and feed.delivery == "each"]
        removing = (remove_consumer(self.live(), self.options.stream, name) for name in own)
        await asyncio.gather(*removing, return_exceptions=True)
        return late

    async def disconnect(self) -> None:
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await super().disconnect()

    # Events of a stream

    async def _pull(self, connection: NatsConnection, feed: _Feed) -> None:
        inbox, messages = self.options.inbox(), asyncio.Queue[Message]()
        connection.hear(inbox, messages.put_nowait)
        while True:
            count = await feed.room()
            pull(connection, self.options.stream, feed.name, count, _WAIT, inbox)
            with suppress(TimeoutError):
                async with asyncio.timeout(_WAIT + _PATIENCE):
                    for _ in range(count):
                        message = await messages.get()
                        if is_end(message):
                            break
                        self._begin(connection, feed, message)

    def _begin(self, connection: NatsConnection, feed: _Feed, message: Message) -> None:
        number = place(message).number
        if self._leaving:
            connection.post(message.reply, LATER)  # another process need not wait
        elif number not in feed.running:  # else the connection was lost, and the work goes on
            task = asyncio.get_running_loop().create_task(self._work(feed, message), context=Context())
            feed.add(number, message)
            task.add_done_callback(partial(feed.done, number))
            self.keep(task)

    async def _say_busy(self, connection: NatsConnection) -> None:
        while True:
            await asyncio.sleep(self.options.ack_wait / 3)
            for feed in self._feeds:
                for message in feed.running.values():
                    connection.post(message.reply, BUSY)

    async def _work(self, feed: _Feed, message: Message) -> None:
        made = self._made
        try:
            async with self._slots:
                outcome = await self._outcome(feed, message)
        except asyncio.CancelledError:
            self.live().post(message.reply, LATER)
            raise

        async def tell(connection: NatsConnection) -> None:
            if self._made == made:  # else another event has this number
                connection.put(message.reply, outcome)
                await connection.taken()

        await self._certainly(tell)

    async def _outcome(self, feed: _Feed, message: Message) -> bytes:
        attempt = place(message).attempt
        if attempt > self.options.attempts:
            return await self._bury(feed, message, f"its process ended {attempt - 1} times")
        try:
            packet = self.packet(message)
        except PacketError:
            return await self._bury(feed, message, "it is no packet")
        packet.id = UNSET
        channel = message.subject.removeprefix(f"{self.options.stream}.")
        task = self.handle(
            packet,
            ignore,
            peer=self.url,
            channel=channel,
            delivery=feed.delivery,
            route=feed.route,
            headers=message.headers,
            native=message,
        )
        failures = await task if task is not None else []
        if not failures or feed.delivery == "each":
            return ACK
        if all(isinstance(failure, InvalidPayload) for failure in failures):
            return await self._bury(feed, message, str(failures[0]))
        if attempt >= self.options.attempts:
            return await self._bury(feed, message, f"attempt {attempt} failed: {failures[0]!r}")
        pause = self.options.retry_after * 5 ** (attempt - 1)
        return LATER + b' {"delay":%d}' % int(pause * 1e9)

    async def _bury(self, feed: _Feed, message: Message, why: str) -> bytes:
        service = self.dispatcher.service
        logger.error("%s gives up an event of %s: %s", service, message.subject, why)
        if feed.delivery == "each":
            dropped.add(service, self.scheme, "failed-event")
            return NEVER
        dropped.add(service, self.scheme, "dead-letter")
        number = str(place(message).number)
        told = {"stream": self.options.stream, "subject": message.subject, "number": number, "error": why}
        subject = f"{DEAD}.{_NO_NAME.sub('-', service)}"
        fits = len(message.data) + len(write_headers(told)) <= self.live().info.max_payload
        await self._certainly(
            lambda connection: keep(connection, self.options.bounds, subject, message.data, told if fits else None)
        )
        return NEVER

    async def _certainly(self, work: Callable[[NatsConnection], Awaitable[None]]) -> None:
        # The handlers have run: a connection that is lost now is no reason to run them twice.
        while True:
            await self.connected.wait()
            try:
                await work(self.live())
                return
            except Unavailable as error:
                logger.debug("%s", error)
                await asyncio.sleep(0.05)
