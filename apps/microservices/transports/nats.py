"""NestJS's NATS transport (nest-wire.md section 9): at most once."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Awaitable
from functools import partial
from typing import Any, ClassVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from .. import codec
from ..context import NO_HEADERS, RpcContext
from ..dispatcher import Dispatcher, Replier, Route
from ..exceptions import ConfigurationError, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Packet, Reply, Request, Response
from . import Address
from .base import BrokerServer, ClientProxy
from .envelope import read_json, trace_headers, with_trace
from .nats_connection import NatsOptions, is_literal, is_subject, open_connection
from .nats_protocol import Message, NatsConnection

logger = logging.getLogger("microservices.nats")

_MOST_KNOWN = 4096
_MAX_WAITING_BYTES = 64 * 1024 * 1024
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
        self._read = self.reader(read_json)
        self._queue: str = own if self.options.queue is UNSET else self.options.queue
        self._connection: NatsConnection | None = None
        self._leaving = False
        # NATS holds nothing back for who reads slowly, it disconnects him: what comes waits here.
        self._waiting: deque[tuple[_Hearing, Message]] = deque()
        self._none_waits = asyncio.Event()
        self._none_waits.set()
        self._stalled: asyncio.Future[None] | None = None

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
                take = self._overhear if name[0] in "*>" else self._take
                connection.hear(name, partial(take, _Hearing(connection, route, delivery)), queue=queue)
        async with asyncio.timeout(self.options.connect_timeout):
            await connection.taken()
        if connection.denied:
            raise Unavailable(f"NATS at {self.address} does not allow {', '.join(map(repr, connection.denied))}.")

    async def open(self) -> NatsConnection:
        """Connect. Raises Unavailable."""
        self._connection = await open_connection(self.address, self.options, self.dispatcher.service)
        return self._connection

    async def until_lost(self) -> str:
        return await self.live().until_ended()

    async def unsubscribe(self) -> None:
        try:
            await self.live().hear_no_more()
            await self._none_waits.wait()
        finally:
            self._leaving = True

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> NatsConnection | None:
        return self._connection

    def live(self) -> NatsConnection:
        """Return the connection. Raises Unavailable where there is none yet."""
        if self._connection is None:
            raise Unavailable("There is no connection to NATS.")
        return self._connection

    def packet(self, message: Message) -> Packet:
        """Return what a message brings. Raises PacketError for what is no JSON."""
        packet = self._read(message.data)
        return with_trace(packet, message.headers) if message.head else packet

    def _groups(self, route: Route) -> list[tuple[Delivery | None, str]]:
        if not self._queue or not route.listeners("each"):
            return [(None, self._queue)]
        if route.request is None and not route.listeners("one"):
            return [(None, "")]
        return [("one", self._queue), ("each", "")] if self.hears_events else [("one", self._queue)]

    def _overhear(self, hearing: _Hearing, message: Message) -> None:
        # But no answers, and not what NATS tells itself.
        if not message.subject.startswith((f"{self.options.inbox_prefix}.", "_INBOX.", "$")):
            self._take(hearing, message)

    def _take(self, hearing: _Hearing, message: Message) -> None:
        if self._waiting or (self.tasks and self.full) or hearing.connection.congestion() is not None:
            self._put_off(hearing, message)
        else:
            self._dispatch(hearing, message)

    def _dispatch(self, hearing: _Hearing, message: Message) -> None:
        try:
            packet = self.packet(message)
        except PacketError:
            dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            return
        delivery = hearing.delivery
        answer: Replier = ignore
        if packet.id is UNSET:
            if not self.hears_events:
                return
        elif not self.answers or delivery == "each":  # the queue group has it, too
            return
        elif message.reply:
            answer = partial(self._answer, hearing.connection, message.reply)
        task = self.dispatcher.dispatch(
            packet,
            answer,
            transport=self.scheme,
            peer=self.url,
            channel=message.subject,
            delivery=delivery,
            route=hearing.route,
            headers=message.headers if message.head else NO_HEADERS,
            native=message,
        )
        if task is not None:
            self.keep(task)

    def _answer(self, connection: NatsConnection, inbox: str, response: Response) -> Awaitable[None] | None:
        return connection.post(inbox, self.encode(response))

    # What waits

    def _put_off(self, hearing: _Hearing, message: Message) -> None:
        size = len(message.data)
        if hearing.count >= self.options.max_waiting or hearing.size + size > _MAX_WAITING_BYTES:
            dropped.add(self.dispatcher.service, self.scheme, "slow-consumer")
            return
        hearing.count += 1
        hearing.size += size
        self._waiting.append((hearing, message))
        if len(self._waiting) == 1:
            self._none_waits.clear()
            self._go_on()

    def _go_on(self, _: object = None) -> None:
        while self._waiting and not self.full:
            hearing, message = self._waiting[0]
            congestion = hearing.connection.congestion()
            if congestion is not None:
                if congestion is not self._stalled:
                    self._stalled = congestion
                    congestion.add_done_callback(self._go_on)
                return
            self._waiting.popleft()
            hearing.count -= 1
            hearing.size -= len(message.data)
            if not self._leaving:
                try:
                    self._dispatch(hearing, message)
                except Exception:  # the others would wait for ever
                    logger.exception("%s stumbled over a message of %s", self.dispatcher.service, message.subject)
        if not self._waiting:
            self._none_waits.set()

    def ended(self, task: asyncio.Task[Any]) -> None:
        super().ended(task)
        if self._waiting:
            self._go_on()


class _Hearing(msgspec.Struct, eq=False):
    """One subscription: what it brings, and how much of that waits."""

    connection: NatsConnection
    route: Route
    delivery: Delivery | None
    count: int = 0
    size: int = 0


class NatsClient(ClientProxy):
    """Publishes requests and events; one subscription carries all its answers."""

    scheme = "nats"
    Options = Options
    Record = Record

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._read = self.reader(_read_reply)
        self._inbox = f"{self.options.inbox()}."
        self._connection: NatsConnection | None = None
        self._known: set[str] = set()

    def congestion(self) -> asyncio.Future[None] | None:
        return None if self._connection is None else self._connection.congestion()

    async def open(self) -> None:
        await self.disconnect()  # from what is left of the last one
        self._connection = connection = await open_connection(self.address, self.options, self.service)
        await self.prepare(connection)
        self._known.clear()
        connection.ended.add_done_callback(partial(self._lost, connection))

    async def prepare(self, connection: NatsConnection) -> None:
        """Do what comes before the first message of a connection. Raises Unavailable."""
        connection.hear(f"{self._inbox}*", partial(self._take, connection))
        await connection.taken()
        if connection.denied:
            raise Unavailable(f"NATS at {self.address} does not allow {self._inbox}*, where answers come.")

    async def publish(self, request: Request, context: RpcContext) -> None:
        connection, subject = self.live(), context.pattern
        known = subject in self._known
        if not known:
            self.check(subject)
        connection.put(subject, self.encode(request), self._inbox + request.id, headers(context))
        if not known:
            # NATS tells whether it is allowed, but nobody waits for that: the answer may be here sooner.
            told = partial(self._told, request.id, connection, subject, connection.denied[subject])
            connection.ping().add_done_callback(told)

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        connection, subject = self.live(), context.pattern
        self.check(subject)
        refused = connection.denied[subject]
        connection.put(subject, self.encode(event), "", headers(context))
        await connection.taken()
        if (error := self._denial(connection, subject, refused)) is not None:
            raise error

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> NatsConnection | None:
        return self._connection

    def live(self) -> NatsConnection:
        """Return the connection. Raises Unavailable where it is gone."""
        if self._connection is None or self._connection.ended.done():
            raise Unavailable("NATS closed the connection before the message was sent.")
        return self._connection

    def check(self, subject: str) -> None:
        """Raise RpcException for what can be no subject."""
        if subject not in self._known and not is_literal(subject):
            text = f"{subject!r} is no subject of NATS: no blanks, and no empty words between dots."
            raise RpcException({"statusCode": 400, "code": "bad-pattern", "message": text})

    def _denial(self, connection: NatsConnection, subject: str, refused: int) -> RpcException | None:
        if connection.denied[subject] > refused:
            text = f"NATS at {self.address} does not allow {self.service} to be sent {subject!r}."
            return RpcException({"statusCode": 403, "code": "forbidden", "message": text})
        if len(self._known) < _MOST_KNOWN:
            self._known.add(subject)
        return None

    def _told(self, id: str, connection: NatsConnection, subject: str, refused: int, _: object) -> None:
        if (error := self._denial(connection, subject, refused)) is not None:
            self.fail(id, error)

    def _take(self, connection: NatsConnection, message: Message) -> None:
        id = message.subject[len(self._inbox) :]
        if not message.data:
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))
            return
        try:
            reply = self._read(message.data)
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            dropped.add(self.service, self.scheme, "no-packet")
            text = f"{self.service} answered what is no JSON."
            self.fail(id, RpcException({"statusCode": 502, "code": "no-packet", "message": text}))
            return
        if reply.id is None:
            reply.id = id
        if reply.id == id and self.receive(reply) is not None:
            # Who takes the values gets a turn; to hold them back would hold back the answers of all others, too.
            connection.hold()
            asyncio.get_running_loop().call_soon(connection.release)

    def _lost(self, connection: NatsConnection, _: object) -> None:
        if self._connection is connection:
            self.lost(connection.gone)


def headers(context: RpcContext) -> dict[str, str]:
    """Return what travels as headers: what a message was told, and the trace."""
    record: Record | None = context.record
    if not context.metadata and record is None:
        return {}
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
