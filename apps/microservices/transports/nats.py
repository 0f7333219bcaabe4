"""NestJS's NATS transport (nest-wire.md section 9): at most once."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from .. import codec
from ..context import NO_HEADERS, RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Packet, Reply, Request, Response
from . import Address
from .base import BrokerServer, ClientProxy
from .envelope import read_json, trace_headers, with_trace
from .nats_connection import Message, NatsConnection, NatsOptions, is_literal, is_subject, open_connection

_MOST_KNOWN = 4096
_REPLY_KEYS = {"id", "response", "err", "isDisposed", "status"}


class Options(NatsOptions, frozen=True, kw_only=True):
    """What a URL may set beside TLS and the bounds of a connection."""

    queue: str | UnsetType = UNSET
    """The queue group that shares the messages: the service's name, or none where it is empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queue and re.search(r"\s", self.queue):
            raise ValueError(f"the name of the queue {self.queue!r} must hold no blanks")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What may be told beside one message: NestJS's NatsRecordBuilder."""

    headers: dict[str, str] = {}


class NatsServer(BrokerServer):
    """Hears requests and events on the subjects named as the service's routes."""

    scheme = "nats"
    Options = Options
    answers: ClassVar[bool] = True
    group: ClassVar[str] = "{}"
    """The queue group of a service that names none."""

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        own = re.sub(r"\s", "-", self.group.format(dispatcher.service))
        self._queue: str = own if self.options.queue is UNSET else self.options.queue
        self._connection: NatsConnection | None = None
        self._leaving = False

    async def listen(self) -> None:
        """Subscribe. Raises ConfigurationError for a pattern that can be no subject, naming it."""
        for name, route in self.routes.items():
            if not is_subject(name):
                target = route.request or route.events[0]
                raise ConfigurationError(
                    f"{self.address}: the pattern of {target.handler.name} in {self.dispatcher.service}, "
                    f"{name!r}, is no subject of NATS: no blanks, no empty words between dots, "
                    "and * and > only as whole words."
                )
        await super().listen()

    async def subscribe(self) -> None:
        connection = await self.open()
        for name, route in self.routes.items():
            for delivery, queue in self._groups(route):
                take = partial(self._take, connection, route, delivery)
                await connection.hear(name, take, self.options.max_waiting, queue=queue)
        async with asyncio.timeout(self.options.connect_timeout):
            await connection.taken()
        if connection.denied:
            raise Unavailable(f"NATS at {self.address} does not allow {', '.join(map(repr, connection.denied))}.")

    async def open(self) -> NatsConnection:
        """Connect. Raises Unavailable."""
        self._connection = await open_connection(self.address, self.options, self.dispatcher.service, self._slow)
        return self._connection

    async def until_lost(self) -> str:
        return await self.live().until_ended()

    async def unsubscribe(self) -> None:
        try:
            await self.live().hear_no_more()
        finally:
            self._leaving = True

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.end()

    def unwrap(self) -> NatsConnection | None:
        return self._connection

    def live(self) -> NatsConnection:
        """Return the connection. Raises Unavailable where there is none yet."""
        if self._connection is None:
            raise Unavailable("There is no connection to NATS.")
        return self._connection

    def packet(self, message: Message) -> Packet:
        """Return what a message brings. Raises PacketError for what is no JSON."""
        packet = read_json(self.decode(message.data))
        return with_trace(packet, message.headers) if message.headers else packet

    def facts(self, message: Message, route: Route) -> dict[str, Any]:
        """Return what a handler may know about a message."""
        headers = message.headers or NO_HEADERS
        return {"peer": str(self.address), "route": route, "headers": headers, "native": message}

    def _groups(self, route: Route) -> list[tuple[Delivery | None, str]]:
        if not self._queue or not route.listeners("each"):
            return [(None, self._queue)]
        if route.request is None and not route.listeners("one"):
            return [(None, "")]
        return [("one", self._queue), ("each", "")] if self.hears_events else [("one", self._queue)]

    async def _take(
        self, connection: NatsConnection, route: Route, delivery: Delivery | None, message: Message
    ) -> None:
        if route.name[0] in "*>" and message.subject.startswith((f"{self.options.inbox_prefix}.", "_INBOX.", "$")):
            return  # answers, and what NATS tells itself
        while (congestion := connection.congestion()) is not None:
            await congestion
        await self.room()
        if self._leaving:
            return
        try:
            packet = self.packet(message)
        except PacketError:
            dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            return
        if packet.id is UNSET:
            if self.hears_events:
                self.handle(packet, ignore, channel=message.subject, delivery=delivery, **self.facts(message, route))
        elif self.answers and delivery != "each":  # the queue group has it, too
            answer = _Answer(connection, message.reply, self.encode) if message.reply else ignore
            self.handle(packet, answer, channel=message.subject, **self.facts(message, route))

    def _slow(self, subject: str) -> None:
        dropped.add(self.dispatcher.service, self.scheme, "slow-consumer")


class _Answer:
    """Publishes the packets of one answer."""

    __slots__ = ("_connection", "_encode", "_inbox")

    def __init__(self, connection: NatsConnection, inbox: str, encode: Callable[[Response], bytes]) -> None:
        self._connection, self._inbox, self._encode = connection, inbox, encode

    def __call__(self, response: Response) -> Awaitable[None] | None:
        return self._connection.post(self._inbox, self._encode(response))


class NatsClient(ClientProxy):
    """Publishes requests and events; one subscription carries all its answers."""

    scheme = "nats"
    Options = Options
    Record = Record

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._inbox = f"{self.options.inbox()}."
        self._connection: NatsConnection | None = None
        self._known: set[str] = set()

    def congestion(self) -> asyncio.Future[None] | None:
        return None if self._connection is None else self._connection.congestion()

    async def open(self) -> None:
        await self.disconnect()  # from what is left of the last one
        self._connection = connection = await open_connection(self.address, self.options, self.service, self._slow)
        await self.prepare(connection)
        self._known.clear()
        connection.ended.add_done_callback(partial(self._lost, connection))

    async def prepare(self, connection: NatsConnection) -> None:
        """Do what comes before the first message of a connection. Raises Unavailable."""
        await connection.hear(f"{self._inbox}*", self._take, self.options.max_waiting)
        await connection.taken()
        if connection.denied:
            raise Unavailable(f"NATS at {self.address} does not allow {self._inbox}*, where answers come.")

    async def publish(self, request: Request, context: RpcContext) -> None:
        connection, subject = self.live(), context.pattern
        refused = connection.denied[subject.lower()]
        await self._put(connection, request, context, self._inbox + request.id)
        if subject not in self._known:
            # NATS tells whether it is allowed, but nobody waits for that: the answer may be here sooner.
            told = await connection.ping()
            told.add_done_callback(partial(self._told, request.id, connection, subject, refused))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        connection, subject = self.live(), context.pattern
        refused = connection.denied[subject.lower()]
        await self._put(connection, event, context)
        await connection.taken()
        if (error := self._denial(connection, subject, refused)) is not None:
            raise error

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.end()

    def unwrap(self) -> NatsConnection | None:
        return self._connection

    def live(self) -> NatsConnection:
        """Return the connection. Raises Unavailable where it is gone."""
        if self._connection is None or self._connection.ended.done():
            raise Unavailable("NATS closed the connection before the message was sent.")
        return self._connection

    async def _put(
        self, connection: NatsConnection, packet: Request | Event, context: RpcContext, reply: str = ""
    ) -> None:
        self.check(context.pattern)
        await connection.put(context.pattern, self.encode(packet), reply, headers(context))

    def check(self, subject: str) -> None:
        """Raise RpcException for what can be no subject."""
        if subject not in self._known and not is_literal(subject):
            text = f"{subject!r} is no subject of NATS: no blanks, and no empty words between dots."
            raise RpcException({"statusCode": 400, "code": "bad-pattern", "message": text})

    def _denial(self, connection: NatsConnection, subject: str, refused: int) -> RpcException | None:
        if connection.denied[subject.lower()] > refused:
            text = f"NATS at {self.address} does not allow {self.service} to be sent {subject!r}."
            return RpcException({"statusCode": 403, "code": "forbidden", "message": text})
        if len(self._known) < _MOST_KNOWN:
            self._known.add(subject)
        return None

    def _told(self, id: str, connection: NatsConnection, subject: str, refused: int, _: object) -> None:
        if (error := self._denial(connection, subject, refused)) is not None:
            self.fail(id, error)

    async def _take(self, message: Message) -> None:
        id = message.subject[len(self._inbox) :]
        if not message.data:
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))
            return
        try:
            reply = _read_reply(self.decode(message.data))
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            dropped.add(self.service, self.scheme, "no-packet")
            text = f"{self.service} answered what is no JSON."
            self.fail(id, RpcException({"statusCode": 502, "code": "no-packet", "message": text}))
            return
        if reply.id is None:
            reply.id = id
        if reply.id == id and self.receive(reply) is not None:
            # Who takes the values gets a turn; to hold them back would hold back the answers of all others, too.
            await asyncio.sleep(0)

    def _slow(self, subject: str) -> None:
        dropped.add(self.service, self.scheme, "slow-consumer")
        overflow = {"statusCode": 500, "code": "stream-overflow", "message": "The answers came too fast."}
        self.fail(subject[len(self._inbox) :], RpcException(overflow))

    def _lost(self, connection: NatsConnection, _: object) -> None:
        if self._connection is connection:
            self.lost("The connection to NATS was lost.")


def headers(context: RpcContext) -> dict[str, str]:
    """Return what travels as headers: what a message was told, and the trace."""
    record: Record | None = context.record
    return {**trace_headers(context.metadata), **(record.headers if record else {})}


def ignore(response: Response) -> None:
    """Where the answer to an event goes."""


def _read_reply(body: bytes) -> Reply:
    """Return NestJS's packet, or an answer with the whole message as its value, of somebody who knows no packets."""
    try:
        reply = codec.decode_reply(body)
    except PacketError:
        return Reply(response=Raw(body), is_disposed=True)
    if reply.response is UNSET and reply.err is None and reply.is_disposed is False:
        told = codec.decode(body)
        if told != {} and not (isinstance(told, dict) and told.keys() <= _REPLY_KEYS):
            return Reply(response=Raw(body), is_disposed=True)
    return reply
