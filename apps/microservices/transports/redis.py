"""NestJS's Redis transport (nest-wire.md section 8): pub/sub, at most once."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from .. import codec
from ..dispatcher import Dispatcher
from ..exceptions import PacketError, RpcException, Unavailable
from ..instruments import dropped
from ..packets import Event, Packet, Request, Response
from . import Address, Count, Seconds, read_options
from .base import Server, Status
from .resp import RedisProxy, RespConnection, open_connection

logger = logging.getLogger("microservices.redis")

REPLY = ".reply"


class Options(msgspec.Struct, frozen=True):
    """What a URL may set; times in seconds."""

    connect_timeout: Seconds = 5
    max_in_flight: Count = 256
    max_retry_delay: Seconds = 2


class RedisServer(Server):
    """Hears requests and events on the channels named as the service's routes."""

    scheme = "redis"
    opens_port = False

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self.options: Options = read_options(Options, address)
        self._connection: RespConnection | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._subscribed = asyncio.Event()

    async def listen(self) -> None:
        """Subscribe; where Redis is away, go on trying in the background."""
        self._keeping = asyncio.get_running_loop().create_task(self._keep_subscribed(), context=Context())
        with suppress(TimeoutError):  # told already, with the reason
            async with asyncio.timeout(self.options.connect_timeout):
                await self._subscribed.wait()

    async def close(self, grace: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        if self._connection is not None:
            # What Redis has already sent is still taken.
            await asyncio.wait([self._connection.unsubscribe()], timeout=grace)
        await self.finish(end - loop.time())
        if self._connection is not None:
            await self._connection.close()
        self.status = Status.CLOSED

    def unwrap(self) -> RespConnection | None:
        return self._connection

    async def _keep_subscribed(self) -> None:
        delay, told = 0.05, ""
        while True:
            self.status = Status.CONNECTING
            try:
                connection = await self._subscribe()
                self.status = Status.CONNECTED
                self._subscribed.set()
                delay, reason = 0.05, "the connection was lost"
                await asyncio.wait([connection.ended])
            except (RpcException, TimeoutError) as error:
                reason = str(error) or "Redis did not answer in time"
            self.status = Status.DISCONNECTED
            if reason != told:  # once, not with every attempt
                logger.warning("%s does not hear %s: %s", self.dispatcher.service, self.address, reason)
                told = reason
            await asyncio.sleep(delay * random.uniform(0.5, 1))  # noqa: S311 - only to spread reconnects
            delay = min(delay * 2, self.options.max_retry_delay)

    async def _subscribe(self) -> RespConnection:
        timeout = self.options.connect_timeout
        connection = self._connection = await open_connection(self.address, self._on_push, timeout=timeout)
        if routes := [route.encode() for route in self.dispatcher.routes]:
            try:
                async with asyncio.timeout(timeout):
                    await connection.subscribe(*routes)
            except BaseException:
                connection.transport.abort()
                raise
        return connection

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == b"message" and self._connection is not None:
            self._take(push[1].decode("utf-8", "replace"), push[2], self._connection)

    def _take(self, channel: str, body: bytes, connection: RespConnection) -> None:
        answer = _Answer(connection, channel)
        task = self.handle(read_packet(body), answer, peer=str(self.address), channel=channel)
        if task is not None:
            answer.task = task
            task.add_done_callback(partial(self._done, connection))
            if len(self._tasks) >= self.options.max_in_flight:
                connection.hold()

    def _done(self, connection: RespConnection, _: asyncio.Task[Any]) -> None:
        if len(self._tasks) < self.options.max_in_flight:
            connection.release()


class _Answer:
    """Publishes the packets of one answer, as long as anybody listens."""

    __slots__ = ("_channel", "_connection", "task")

    def __init__(self, connection: RespConnection, channel: str) -> None:
        self._connection = connection
        self._channel = f"{channel}{REPLY}".encode()
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, response: Response) -> Awaitable[None] | None:
        body = codec.encode(response)
        if response.is_disposed is UNSET:
            self._connection.command(b"PUBLISH", self._channel, body).add_done_callback(self._published)
        else:
            self._connection.post(b"PUBLISH", self._channel, body)
        congestion = self._connection.congestion()
        return None if congestion is None else asyncio.shield(congestion)

    def _published(self, heard: asyncio.Future[int]) -> None:
        # Nobody tells that he has gone, and a stream may have no end.
        if self.task is not None and (heard.exception() is not None or not heard.result()):
            self.task.cancel()


def read_packet(body: bytes) -> Packet:
    """Return NestJS's packet, or an event with the whole message as its data (nest-wire.md section 6.1)."""
    try:
        packet = codec.decode_packet(body)
    except PacketError:
        return Packet(data=Raw(body))  # a list or a number of somebody else's
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Packet(data=Raw(codec.encode(body.decode("utf-8", "replace"))))
    if packet.pattern is UNSET and packet.data is UNSET:
        return Packet(data=Raw(body))
    return packet


class RedisClient(RedisProxy):
    """Publishes requests and events; one subscription a pattern carries all its answers."""

    scheme = "redis"
    # Every client of a pattern sees every answer: an id must not be guessed.
    id_bytes = 16

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self.options: Options = read_options(Options, address)
        self.connect_timeout = self.options.connect_timeout
        self._channels: dict[str, asyncio.Future[None]] = {}

    async def publish(self, request: Request, route: str) -> None:
        connection = self.live()
        body = encode(request)
        sent = partial(self._sent, request.id, route)
        subscribed = self._channels.get(route)
        if subscribed is None:
            subscribed = self._channels[route] = connection.subscribe(f"{route}{REPLY}".encode())
        if not subscribed.done():
            # Nobody waits for it: Redis takes the commands of a connection in their order.
            subscribed.add_done_callback(sent)
        connection.command(b"PUBLISH", route.encode(), body).add_done_callback(sent)

    async def dispatch_event(self, event: Event, route: str) -> None:
        heard = await self.live().command(b"PUBLISH", route.encode(), encode(event))
        if not heard:
            dropped.add(self.service, self.scheme, "nobody-listens")

    def on_push(self, push: list[Any]) -> None:
        if push[0] != b"message":
            return
        try:
            self.receive(codec.decode_reply(push[2]))
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError):
            dropped.add(self.service, self.scheme, "no-packet")

    def on_lost(self) -> None:
        self._channels.clear()

    def _sent(self, id: str, route: str, reply: asyncio.Future[int | None]) -> None:
        error = reply.exception()
        if isinstance(error, RpcException):
            if self._channels.get(route) is reply:
                del self._channels[route]
            self.fail(id, error)
        elif reply.result() == 0:
            # NestJS ignores this number, and its callers wait for ever.
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))


def encode(packet: Request | Event) -> bytes:
    """Return a packet's JSON. Raises RpcException where its data has none."""
    try:
        return codec.encode(packet)
    except codec.UNENCODABLE as error:
        raise codec.not_json(error) from error
