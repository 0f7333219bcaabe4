"""Durable events over Redis Streams: a consumer group a service, acknowledged after the handler.

An event is one entry of the stream `events:<route>`. Every service that hears it has a group there,
so each gets a copy, and one of its processes takes it. What is not acknowledged stays pending: its
own process tries again, and another takes over what a dead process has left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher
from ..exceptions import ConnectionLost, InvalidPayload, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Packet, Request, Response
from . import Address, Count, Seconds
from .base import BrokerServer
from .resp import RedisError, RedisOptions, RedisProxy, RespConnection, ignore, open_connection

logger = logging.getLogger("microservices.redis_streams")

STREAM = "events:"
DEAD = "dead:"

_BLOCK = 2.0
_PATIENCE = 10.0
_PAGE = 100
_FORGET_AFTER = 24 * 3600 * 1000

Key = tuple[bytes, bytes]
"""A stream, and the id of one of its entries."""


class Options(RedisOptions, frozen=True, kw_only=True):
    """What a URL may set beside Sentinel and TLS; times in seconds."""

    max_length: Count = 100_000
    """Entries that a stream keeps, about; older ones go, heard or not."""
    prefetch: Count = 50
    """How many events a process works on at a time."""
    attempts: Count = 5
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""
    take_over_after: Seconds = 15
    """How long another process may be silent about an entry before it is taken over."""


class StreamsBus(RedisProxy):
    """Appends events; `emit` returns when Redis has them."""

    scheme = "redis-streams"
    Options = Options

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        body = self.encode(event)
        bound = (b"MAXLEN", b"~", b"%d" % self.options.max_length)
        await self.live().command(b"XADD", f"{STREAM}{context.pattern}".encode(), *bound, b"*", b"packet", body)


class StreamsListener(BrokerServer):
    """Takes the events that a service hears, a bounded number at a time."""

    scheme = "redis-streams"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._group = dispatcher.service.encode()
        # Never used again: what a process has left must not look like the work of its successor.
        self._consumer = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}".encode()
        self._streams = self._heard("one")
        # What every process gets: read without a group, from the entry after the last one read.
        self._last: dict[bytes, bytes] = dict.fromkeys(self._heard("each"), b"")
        self._running: dict[Key, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(self.options.prefetch)
        self._room = asyncio.Event()
        self._room.set()
        self._reader: RespConnection | None = None
        self._writer: RespConnection | None = None
        self._follower: RespConnection | None = None

    async def listen(self) -> None:
        if self._streams or self._last:
            await super().listen()

    async def unsubscribe(self) -> None:
        for connection in (self._reader, self._follower):
            if connection is not None:
                await connection.close()

    async def finish(self, grace: float) -> int:
        late = await super().finish(grace)
        with suppress(RpcException):
            await self._leave()
        return late

    async def disconnect(self) -> None:
        for connection in (self._reader, self._writer, self._follower):
            if connection is not None:
                await connection.close()

    def unwrap(self) -> RespConnection | None:
        return self._writer

    # Reading

    async def subscribe(self) -> None:
        connect = partial(open_connection, self.address, self.options, ignore)
        # One connection blocks while it waits for entries; the other acknowledges meanwhile.
        self._reader, self._writer = await connect(), await connect()
        if self._last:
            self._follower = await connect()
        for stream, last in self._last.items():
            if not last:
                newest = await self._command(b"XREVRANGE", stream, b"+", b"-", b"COUNT", b"1")
                self._last[stream] = newest[0][0] if newest else b"0-0"
        for stream in self._streams:
            try:
                # From the first entry: an event may be older than the first start of its listener.
                await self._command(b"XGROUP", b"CREATE", stream, self._group, b"0", b"MKSTREAM")
            except RedisError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            await self._forget_the_dead(stream)

    async def _forget_the_dead(self, stream: bytes) -> None:
        for consumer in await self._command(b"XINFO", b"CONSUMERS", stream, self._group):
            if not consumer[b"pending"] and consumer[b"idle"] > _FORGET_AFTER:
                await self._command(b"XGROUP", b"DELCONSUMER", stream, self._group, consumer[b"name"])

    async def until_lost(self) -> str:
        # No TaskGroup: cancelled while one of its tasks fails, it goes on.
        work = [self._read(), self._look_after()] if self._streams else []
        work += [self._follow()] if self._last else []
        tasks = [asyncio.create_task(each) for each in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return ""

    async def _read(self) -> None:
        command = (b"XREADGROUP", b"GROUP", self._group, self._consumer, b"BLOCK", b"%d" % int(_BLOCK * 1000))
        news = (b"STREAMS", *self._streams, *(b">" for _ in self._streams))
        while True:
            await self._room.wait()
            # The count is one for each stream.
            free = max(1, (self.options.prefetch - len(self._running)) // len(self._streams))
            found = await _answer(self._reader, *command, b"COUNT", b"%d" % free, *news)
            for stream, entries in (found or {}).items():
                for entry, fields in entries:
                    self._start((stream, entry), fields, attempt=1)

    async def _follow(self) -> None:
        while True:
            await self._room.wait()
            ids = (b"STREAMS", *self._last, *self._last.values())
            block = (b"BLOCK", b"%d" % int(_BLOCK * 1000))
            found = await _answer(self._follower, b"XREAD", b"COUNT", b"%d" % self.options.prefetch, *block, *ids)
            for stream, entries in (found or {}).items():
                for entry, fields in entries:
                    self._last[stream] = entry
                    async with self._slots:
                        await self._tell(stream, fields)

    async def _tell(self, stream: bytes, fields: Any) -> None:
        packet = self._packet(fields)
        if packet is None:
            dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            return
        channel = stream.decode().removeprefix(STREAM)
        task = self.handle(packet, _nobody, peer=self.url, channel=channel, delivery="each")
        if task is not None:
            await asyncio.wait([task])  # which goes on, and closing waits for it, when this is cancelled

    def _heard(self, delivery: Delivery) -> list[bytes]:
        routes = self.dispatcher.routes
        return [f"{STREAM}{route}".encode() for route in routes if self.dispatcher.hears(route, delivery)]

    def _start(self, key: Key, fields: Any, *, attempt: int) -> None:
        if key in self._running:
            return
        task = asyncio.get_running_loop().create_task(self._work(key, fields, attempt), context=Context())
        self._running[key] = task
        self.keep(task)
        task.add_done_callback(partial(self._worked, key))
        if len(self._running) >= self.options.prefetch:
            self._room.clear()

    def _worked(self, key: Key, task: asyncio.Task[None]) -> None:
        del self._running[key]
        if len(self._running) < self.options.prefetch:
            self._room.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s stumbled over an event", self.dispatcher.service, exc_info=error)

    async def _work(self, key: Key, fields: Any, attempt: int) -> None:
        async with self._slots:
            packet = self._packet(fields)
            if packet is None:
                await self._bury(key, "it is no packet")
                return
            channel = key[0].decode().removeprefix(STREAM)
            task = self.handle(packet, _nobody, peer=self.url, channel=channel, delivery="one")
            failures = await task if task is not None else []
            if not failures:
                await self._certainly(b"XACK", key[0], self._group, key[1])
            elif all(isinstance(failure, InvalidPayload) for failure in failures):
                await self._bury(key, str(failures[0]))
            elif attempt >= self.options.attempts:
                await self._bury(key, f"attempt {attempt} failed: {failures[0]!r}")

    def _packet(self, fields: Any) -> Packet | None:
        try:
            body = dict(zip(fields[::2], fields[1::2], strict=True))[b"packet"]
            packet = codec.decode_packet(self.decode(body))
        except (KeyError, PacketError, msgspec.DecodeError, UnicodeDecodeError):
            return None
        packet.id = UNSET
        return packet

    # What was not acknowledged

    async def _look_after(self) -> None:
        pause = min(1.0, self.options.retry_after, self.options.take_over_after / 3)
        while True:
            await asyncio.sleep(pause)
            for stream in self._streams:
                await self._look_at(stream)

    async def _look_at(self, stream: bytes) -> None:
        least = min(self.options.retry_after, self.options.take_over_after / 3)
        ours = []
        async for entry, owner, idle, attempts in self._pending(stream, b"IDLE", b"%d" % int(least * 1000)):
            if (stream, entry) in self._running:
                if owner == self._consumer:
                    ours.append(entry)
            elif idle / 1000 >= self._pause(owner, attempts):
                await self._again((stream, entry), idle, attempts)
        if ours:
            # Still at work: say so, or another process would take it over.
            await self._command(b"XCLAIM", stream, self._group, self._consumer, b"0", *ours, b"JUSTID")

    async def _pending(self, stream: bytes, *idle: bytes, consumer: bytes | None = None) -> AsyncIterator[Any]:
        start, of = b"-", () if consumer is None else (consumer,)
        while True:
            page = await self._command(b"XPENDING", stream, self._group, *idle, start, b"+", b"%d" % _PAGE, *of)
            for pending in page:
                yield pending
            if len(page) < _PAGE:
                return
            start = b"(" + page[-1][0]

    def _pause(self, owner: bytes, attempts: int) -> float:
        pause = float(self.options.retry_after * 5 ** max(0, attempts - 1))
        return pause if owner == self._consumer else max(pause, self.options.take_over_after)

    async def _again(self, key: Key, idle: int, attempts: int) -> None:
        if len(self._running) >= 2 * self.options.prefetch:
            return  # the next look will do; reading stops earlier, so that these come first
        least = b"%d" % idle  # whoever claims it first has reset its idle time for the others
        claimed = await self._command(b"XCLAIM", key[0], self._group, self._consumer, least, key[1])
        for _, fields in claimed:
            if attempts >= self.options.attempts:
                await self._bury(key, f"its process ended {attempts} times")
            else:
                self._start(key, fields, attempt=attempts + 1)

    async def _bury(self, key: Key, why: str) -> None:
        stream, entry = key
        logger.error("%s gives up an entry of %s: %s", self.dispatcher.service, stream.decode(), why)
        dropped.add(self.dispatcher.service, self.scheme, "dead-letter")
        found = await self._certainly(b"XRANGE", stream, entry, entry)
        fields = [part for _, parts in found for part in parts]
        where = (b"stream", stream, b"entry", entry, b"error", why.encode())
        bound = (b"MAXLEN", b"~", b"%d" % self.options.max_length)
        await self._certainly(b"XADD", DEAD.encode() + self._group, *bound, b"*", *where, *fields)
        await self._certainly(b"XACK", stream, self._group, entry)

    async def _leave(self) -> None:
        for stream in self._streams:
            left = [entry async for entry, *_ in self._pending(stream, consumer=self._consumer)]
            if left:
                # As if it had been silent for long: another process need not wait.
                idle = (b"IDLE", b"%d" % int(self.options.take_over_after * 1000))
                await self._command(b"XCLAIM", stream, self._group, self._consumer, b"0", *left, *idle, b"JUSTID")

    # Commands

    async def _command(self, *parts: bytes) -> Any:
        return await _answer(self._writer, *parts)

    async def _certainly(self, *parts: bytes) -> Any:
        # The work is done: a connection that is lost now is no reason to do it twice.
        while True:
            await self.connected.wait()
            try:
                return await self._command(*parts)
            except Unavailable as error:
                logger.debug("%s", error)
                await asyncio.sleep(0.05)


async def _answer(connection: RespConnection | None, *parts: bytes) -> Any:
    if connection is None:
        raise ConnectionLost("There is no connection to Redis.")
    try:
        async with asyncio.timeout(_PATIENCE):
            return await connection.command(*parts)
    except TimeoutError:
        raise Unavailable(f"Redis did not answer within {_PATIENCE:g} s.") from None


def _nobody(response: Response) -> None:
    """Where the answer to an event goes."""
