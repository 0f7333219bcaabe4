"""NestJS's Redis transport (nest-wire.md section 8): pub/sub, at most once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import PacketError, RpcException, Unavailable
from ..instruments import dropped
from ..packets import Event, Request, Response
from . import Address
from .base import BrokerServer
from .envelope import read_packet
from .resp import RedisError, RedisOptions, RedisProxy, RespConnection, open_connection

_REPLY = b".reply"


class Options(RedisOptions, frozen=True, kw_only=True):
    """What a URL may set beside Sentinel and TLS."""

    wildcards: bool = False
    """Whether routes are patterns of channels, with `*`, `?` and `[...]`: PSUBSCRIBE."""
    cluster: bool = False
    """Whether it is a Redis Cluster: there PUBLISH does not tell whether anybody listens."""


class RedisServer(BrokerServer):
    """Hears requests and events on the channels named as the service's routes."""

    scheme = "redis"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._connection: RespConnection | None = None
        self._read = self.reader(read_packet)
        self._doors: dict[bytes, _Door] = {}

    async def subscribe(self) -> None:
        connection = self._connection = await open_connection(self.address, self.options, self._on_push)
        if routes := [route.encode() for route in self.routes]:
            async with asyncio.timeout(self.options.connect_timeout):
                await connection.subscribe(*routes, patterns=self.options.wildcards)

    async def until_lost(self) -> str:
        if self._connection is not None:
            await asyncio.wait([self._connection.ended])
        return "the connection was lost"

    async def unsubscribe(self) -> None:
        if self._connection is not None:
            # What Redis has already sent is still taken.
            await asyncio.wait([self._connection.unsubscribe()])

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> RespConnection | None:
        return self._connection

    def _on_push(self, push: list[Any]) -> None:
        connection = self._connection
        if connection is None:
            return
        if push[0] == b"message":
            _, name, body = push
            # No channel comes that was not subscribed to.
            door = self._doors.get(name) or self._doors.setdefault(name, self._door(name, name))
            self._take(connection, door, body)
        elif push[0] == b"pmessage":
            _, pattern, name, body = push
            if not name.endswith(_REPLY):  # our own answers, to a pattern as `users.*`
                self._take(connection, self._door(pattern, name), body)

    def _door(self, pattern: bytes, name: bytes) -> _Door:
        route = self.dispatcher.routes.get(pattern.decode("utf-8", "replace"))
        return _Door(name.decode("utf-8", "replace"), name + _REPLY, route)

    def _take(self, connection: RespConnection, door: _Door, body: bytes) -> None:
        answer = _Answer(self, connection, door.reply)
        packet = self._read(body)
        # Not by `handle`: here one call more of Python is felt.
        task = self.dispatcher.dispatch(
            packet,
            answer,
            transport=self.scheme,
            peer=self.url,
            channel=door.channel,
            route=door.route,
            native=connection,
        )
        if task is not None:
            answer.task = self.keep(task)
            task.add_done_callback(self._done)
            if self.full:
                connection.hold()
        elif connection.congestion() is not None:
            connection.hold_while_congested()

    def _done(self, _: asyncio.Task[Any]) -> None:
        # Not the connection that the message came by: there may be another one since, held for this one's sake.
        if not self.full and self._connection is not None:
            self._connection.release()


class _Door(NamedTuple):
    """A channel that messages come by: its name, where answers go, and the route behind it."""

    channel: str
    reply: bytes
    route: Route | None


class _Answer:
    """Publishes the packets of one answer, as long as anybody listens."""

    __slots__ = ("_channel", "_connection", "_server", "task")

    def __init__(self, server: RedisServer, connection: RespConnection, channel: bytes) -> None:
        self._server = server
        self._connection = connection
        self._channel = channel
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, response: Response) -> Awaitable[None] | None:
        connection, body = self._connection, self._server.encode(response)
        if response.is_disposed is UNSET and not self._server.options.cluster:
            connection.command(b"PUBLISH", self._channel, body).add_done_callback(self._published)
        else:
            connection.publish(self._channel, body)
        congestion = connection.congestion()
        return None if congestion is None else asyncio.shield(congestion)

    def _published(self, heard: asyncio.Future[int]) -> None:
        # Nobody tells that he has gone, and a stream may have no end.
        if self.task is not None and (heard.exception() is not None or not heard.result()):
            self.task.cancel()


class RedisClient(RedisProxy):
    """Publishes requests and events; one subscription a pattern carries all its answers."""

    scheme = "redis"
    Options = Options
    # Every client of a pattern sees every answer: an id must not be guessed.
    id_bytes = 16

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._read = self.reader(codec.decode_reply)
        self._channels: dict[str, asyncio.Future[None]] = {}

    def publish(self, request: Request, context: RpcContext) -> None:
        connection, route = self.live(), context.pattern
        body = self.encode(request)
        subscribed = self._channels.pop(route, None)
        if subscribed is None:
            self._make_room(connection)
            subscribed = connection.subscribe(route.encode() + _REPLY)
        self._channels[route] = subscribed  # the last one used stands last
        if not subscribed.done():
            # Nobody waits for it: Redis takes the commands of a connection in their order.
            subscribed.add_done_callback(partial(self._subscribed, request.id, route))
        connection.publish(route.encode(), body, partial(self._heard, request.id))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        heard = await self.live().command(b"PUBLISH", context.pattern.encode(), self.encode(event))
        if not heard and not self.options.cluster:
            dropped.add(self.service, self.scheme, "nobody-listens")

    def on_push(self, push: list[Any]) -> None:
        if push[0] != b"message":
            return
        try:
            self.receive(self._read(push[2]))
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError):
            dropped.add(self.service, self.scheme, "no-packet")

    def on_lost(self) -> None:
        self._channels.clear()

    def _make_room(self, connection: RespConnection) -> None:
        # Callers may make names from data, for a server with wildcards. As many as calls may wait are kept.
        if len(self._channels) >= self.max_pending:
            oldest = next(iter(self._channels))
            del self._channels[oldest]
            connection.command(b"UNSUBSCRIBE", oldest.encode() + _REPLY, pushes=1)

    def _subscribed(self, id: str, route: str, reply: asyncio.Future[None]) -> None:
        error = reply.exception()
        if isinstance(error, RpcException):
            if self._channels.get(route) is reply:
                del self._channels[route]
            self.fail(id, error)

    def _heard(self, id: str, by: int | RedisError) -> None:
        if isinstance(by, RedisError):
            self.fail(id, by)
        elif not by and not self.options.cluster:
            # NestJS ignores this number, and its callers wait for ever. Soon, after what is told of the subscription.
            nobody = Unavailable(f"Nobody listens for {self.service} on {self.address}.")
            self._loop.call_soon(self.fail, id, nobody)
