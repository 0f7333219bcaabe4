"""NestJS's Redis transport (nest-wire.md section 8): pub/sub, at most once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher
from ..exceptions import PacketError, RpcException, Unavailable
from ..instruments import dropped
from ..packets import Event, Request, Response
from . import Address
from .base import BrokerServer
from .envelope import read_packet
from .resp import RedisOptions, RedisProxy, RespConnection, open_connection

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
        if self._connection is None:
            return
        if push[0] == b"message":
            channel = push[1].decode("utf-8", "replace")
            self._take(self._connection, channel, channel, push[2])
        elif push[0] == b"pmessage" and not push[2].endswith(_REPLY):  # our own answers, to a pattern as `users.*`
            pattern, channel = (name.decode("utf-8", "replace") for name in push[1:3])
            self._take(self._connection, pattern, channel, push[3])

    def _take(self, connection: RespConnection, pattern: str, channel: str, body: bytes) -> None:
        answer = _Answer(connection, channel, self.encode, counted=not self.options.cluster)
        route = self.dispatcher.routes.get(pattern)
        packet = read_packet(self.decode(body))
        task = self.handle(packet, answer, peer=self.url, channel=channel, route=route, native=connection)
        if task is not None:
            answer.task = task
            task.add_done_callback(self._done)
            if self.full:
                connection.hold()

    def _done(self, _: asyncio.Task[Any]) -> None:
        # Not the connection that the message came by: there may be another one since, held for this one's sake.
        if not self.full and self._connection is not None:
            self._connection.release()


class _Answer:
    """Publishes the packets of one answer, as long as anybody listens."""

    __slots__ = ("_channel", "_connection", "_counted", "_encode", "task")

    def __init__(
        self, connection: RespConnection, channel: str, encode: Callable[[Response], bytes], *, counted: bool
    ) -> None:
        self._connection = connection
        self._counted = counted
        self._encode = encode
        self._channel = channel.encode() + _REPLY
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, response: Response) -> Awaitable[None] | None:
        body = self._encode(response)
        if response.is_disposed is UNSET and self._counted:
            self._connection.command(b"PUBLISH", self._channel, body).add_done_callback(self._published)
        else:
            self._connection.post(b"PUBLISH", self._channel, body)
        congestion = self._connection.congestion()
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
        self._channels: dict[str, asyncio.Future[None]] = {}

    def publish(self, request: Request, context: RpcContext) -> None:
        connection, route = self.live(), context.pattern
        body = self.encode(request)
        sent = partial(self._sent, request.id, route)
        subscribed = self._channels.pop(route, None)
        if subscribed is None:
            self._make_room(connection)
            subscribed = connection.subscribe(route.encode() + _REPLY)
        self._channels[route] = subscribed  # the last one used stands last
        if not subscribed.done():
            # Nobody waits for it: Redis takes the commands of a connection in their order.
            subscribed.add_done_callback(sent)
        connection.command(b"PUBLISH", route.encode(), body).add_done_callback(sent)

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        heard = await self.live().command(b"PUBLISH", context.pattern.encode(), self.encode(event))
        if not heard and not self.options.cluster:
            dropped.add(self.service, self.scheme, "nobody-listens")

    def on_push(self, push: list[Any]) -> None:
        if push[0] != b"message":
            return
        try:
            self.receive(codec.decode_reply(self.decode(push[2])))
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

    def _sent(self, id: str, route: str, reply: asyncio.Future[int | None]) -> None:
        error = reply.exception()
        if isinstance(error, RpcException):
            if self._channels.get(route) is reply:
                del self._channels[route]
            self.fail(id, error)
        elif reply.result() == 0 and not self.options.cluster:
            # NestJS ignores this number, and its callers wait for ever.
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))
