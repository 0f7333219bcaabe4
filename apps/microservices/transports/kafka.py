"""NestJS's Kafka transport (nest-wire.md section 12).

A server hears in a group and commits what is done. A client reads its answers from one partition without a group.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Raw

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, ConnectionLost, RpcException, Unavailable
from ..instruments import dropped
from ..packets import Event, Packet, Reply, Request, Response
from . import Address, Seconds
from . import kafka_records as records
from .answers import Stream
from .base import BrokerServer, ClientProxy
from .kafka_connection import KafkaConnection, KafkaOptions, driver_facts
from .kafka_consumers import Group, Replies
from .kafka_records import Headers

_END = (records.DISPOSED, b"\x00")
_MOST_WAITING = 64

Key = tuple[str, int, bytes]
"""A topic, its partition, and the key of a record."""


class Options(KafkaOptions, frozen=True, kw_only=True):
    """What a URL may set beside that; times in seconds."""

    prefix: str = ""
    """Stands before every topic and group, so that several systems can share a cluster."""
    group: str = ""
    """The consumer group; the service's name where there is none."""
    postfix: str = "-server"
    """What a server adds to its group, as NestJS does. A listener adds nothing."""
    alone: bool = False
    """For a service of one process: it takes all partitions at once, without joining the group (3 s and more)."""
    begin: Literal["earliest", "latest"] = "earliest"
    """Where a group begins that has never committed. Requests past their deadline are not run in either case."""
    session_timeout: Seconds = 10
    """After how long a silent member of a group is given up."""
    reply_partition: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Where a client hears its answers: many can share them out."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say beside one message; `timestamp` in milliseconds since 1970.

    The deadline of a request counts from its timestamp: an old one makes it too late.
    """

    key: str | None = None
    headers: dict[str, str] = {}
    partition: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timestamp: int | None = None


_PLAIN = Record()


def _check(address: Address, options: Options) -> None:
    """Raise ConfigurationError, at start, for what would only be found when it connects."""
    if not records.is_legal(f"{options.prefix}x"):
        raise ConfigurationError(
            f"{address}: {options.prefix!r} cannot stand before a topic: letters, digits, dots, _ and - only."
        )
    driver_facts(address, options, "")


class KafkaServer(BrokerServer):
    """Hears requests and events on the topics named as the service's routes, in the group of the service."""

    scheme = "kafka"
    Options: ClassVar[type[Options]] = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        _check(address, self.options)
        self._routes = self._by_topic(self.routes)
        self._connection: KafkaConnection | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._keys: dict[Key, asyncio.Task[Any]] = {}
        name = f"{self.options.prefix}{self.options.group or dispatcher.service}{self.postfix}"
        self._group = Group(name, self.options.session_timeout, self._start, self.free, self.let_go)

    @property
    def postfix(self) -> str:
        """What follows the name of the group."""
        return str(self.options.postfix)

    def let_go(self) -> None:
        """Stop work that can be begun anew: its partitions go to another process, or this one closes."""

    def unwrap(self) -> Any:
        return self._group.consumer

    async def subscribe(self) -> None:
        options = self.options
        connection = self._connection = KafkaConnection(self.address, options, self.dispatcher.service)
        async with asyncio.timeout(options.connect_timeout):
            await connection.open()
        self._routes = self._by_topic(self.routes)
        if self._routes:
            await connection.ensure(dict.fromkeys(self._routes, options.partitions))
            await self._group.join(connection, list(self._routes), options.begin, options.alone)
            self._readers.append(connection.run(self._group.read()))

    async def until_lost(self) -> str:
        return "" if self._connection is None else await asyncio.shield(self._connection.lost)

    async def unsubscribe(self) -> None:
        # The heartbeats and the commits go on until what runs is done.
        for reader in self._readers:
            reader.cancel()
            await asyncio.wait([reader])
        self.let_go()

    async def finish(self, grace: float) -> int:
        late = await super().finish(grace)
        if self._connection is not None:
            await self._connection.flush()
            await self._group.settle()
        return late

    async def disconnect(self) -> None:
        self._readers.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _by_topic(self, routes: dict[str, Route]) -> dict[str, Route]:
        return {topic: routes[name] for topic, name in records.by_topic(routes, self.options.prefix).items()}

    async def free(self) -> int:
        """Wait until one more record may be worked on; return how many may."""
        await self.room()
        return int(max(1, self.options.max_in_flight - len(self.tasks)))

    def packet(self, record: Any, headers: dict[str, str]) -> Packet:
        """Return what a record says, as an event."""
        value = records.read_value(record.value, dict(record.headers).get(records.TYPE), self.decode)
        return Packet(data=value, metadata=records.metadata_of(headers, record.timestamp))

    def _start(self, record: Any) -> asyncio.Task[Any] | None:
        raw, headers = dict(record.headers), records.read_headers(record)
        route, packet = self._routes[record.topic], self.packet(record, headers)
        answer: Callable[[Response], Awaitable[None] | None] = nobody
        id, topic = headers.get(records.CORRELATION), headers.get(records.REPLY_TOPIC)
        # As in NestJS, an event handler gets an event, whoever waits for an answer.
        if id and topic and route.request is not None:
            packet.id = Raw(codec.encode(id))
            partition = headers.get(records.REPLY_PARTITION, "")
            answer = _Answer(self, topic, int(partition) if partition.isdecimal() else 0, raw[records.CORRELATION])
        elif not self.hears_events:
            return None  # it comes by the bus, too
        handle = partial(
            self.handle,
            packet,
            answer,
            peer=self.url,
            channel=record.topic,
            route=route,
            headers=headers,
            native=record,
        )
        if record.key is None or packet.id is not UNSET:
            return handle()
        # Events of one key in their order, wherever their handlers run.
        before = self.running(record)
        if before is None:
            return self.lock(record, handle())
        work = self._after(before, handle)
        return self.lock(record, self.keep(asyncio.get_running_loop().create_task(work, context=Context())))

    @staticmethod
    async def _after(before: asyncio.Task[Any], handle: Callable[[], asyncio.Task[Any] | None]) -> None:
        await asyncio.wait([before])
        task = handle()
        if task is not None:
            await task

    def running(self, record: Any) -> asyncio.Task[Any] | None:
        """Return the work on the record before this one, of its key, if that is not done."""
        return self._keys.get((record.topic, record.partition, record.key))

    def lock(self, record: Any, task: asyncio.Task[Any] | None) -> asyncio.Task[Any] | None:
        """Let the next record of this one's key wait for a task."""
        if task is not None:
            key = (record.topic, record.partition, record.key)
            self._keys[key] = task
            task.add_done_callback(partial(self._unlock, key))
        return task

    def _unlock(self, key: Key, task: asyncio.Task[Any]) -> None:
        if self._keys.get(key) is task:
            del self._keys[key]

    def write(self, data: Any) -> tuple[bytes | None, bytes | None]:
        """Return the value of an answer, and its type. Raises RpcException where it is too large."""
        value, kind = records.write_value(data, self._codec)
        if value is not None and len(value) > self.options.max_message:
            message = f"The answer has more than {self.options.max_message} bytes."
            raise RpcException({"statusCode": 500, "code": "too-large", "message": message})
        return value, kind

    async def answer(self, topic: str, partition: int, packets: deque[tuple[bytes | None, Headers]]) -> None:
        """Send packets to where somebody waits for them, if there is such a place."""
        connection, reason = self._connection, "no-reply-topic"
        with suppress(RpcException):
            if connection is not None and self.connected.is_set() and records.is_legal(topic):
                await connection.partitions(topic)
                reason = "unsendable-answer"
                while packets:
                    await connection.send(topic, *packets[0], partition=partition)
                    packets.popleft()
        while packets:
            packets.popleft()
            dropped.add(self.dispatcher.service, self.scheme, reason)


def nobody(response: Response) -> None:
    """Where the answer to an event goes."""


class _Answer:
    """The packets of one answer, in their order; while some wait, a task sends them."""

    __slots__ = ("_correlation", "_packets", "_partition", "_sending", "_server", "_topic")

    def __init__(self, server: KafkaServer, topic: str, partition: int, correlation: bytes) -> None:
        self._server = server
        self._topic = topic
        self._partition = partition
        self._correlation = (records.CORRELATION, correlation)
        self._packets: deque[tuple[bytes | None, Headers]] = deque()
        self._sending: asyncio.Task[Any] | None = None

    def __call__(self, response: Response) -> Awaitable[None] | None:
        value, kind, headers = None, None, [self._correlation]
        if response.err is not UNSET:
            error, kind = records.write_value(response.err)
            headers.append((records.ERROR, error or b""))
        elif response.response is not UNSET:
            value, kind = self._server.write(response.response)
        elif self._packets:
            self._packets[-1][1].append(_END)  # as NestJS does: no packet of its own
            return None
        else:
            kind = b"none"
        if kind is not None:
            headers.append((records.TYPE, kind))
        if response.is_disposed is True:
            headers.append(_END)
        self._packets.append((value, headers))
        if self._sending is None or self._sending.done():
            work = self._server.answer(self._topic, self._partition, self._packets)
            self._sending = self._server.keep(asyncio.get_running_loop().create_task(work, context=Context()))
        if self._sending is not None and len(self._packets) >= _MOST_WAITING:
            return asyncio.shield(self._sending)
        return None


class KafkaClient(ClientProxy):
    """Sends requests and events; hears the answers to a topic on `<topic>.reply`."""

    scheme = "kafka"
    Options: ClassVar[type[Options]] = Options
    Record = Record
    # Every client of a pattern reads every answer: an id must not be guessed.
    id_bytes = 16

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        _check(address, self.options)
        self._connection: KafkaConnection | None = None
        self._replies: Replies | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._partition = str(self.options.reply_partition).encode()
        self._begun: set[str] = set()

    async def open(self) -> None:
        connection = KafkaConnection(self.address, self.options, self.service)
        try:
            await connection.open()
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        self._replies = Replies(connection, self.options.reply_partition, self._on_reply)
        self._begun.clear()
        connection.lost.add_done_callback(partial(self._on_lost, connection))

    def _on_lost(self, connection: KafkaConnection, lost: asyncio.Future[str]) -> None:
        if self._connection is connection:
            self._connection = None
            self.lost(f"{self.service} cannot be reached at {self.address}: {lost.result()}.")
            task = asyncio.get_running_loop().create_task(connection.close(), context=Context())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
        if self._closing:
            await asyncio.wait(self._closing)

    def unwrap(self) -> Any:
        return None if self._connection is None else self._connection.producer

    def abandon(self, id: str) -> None:
        self._begun.discard(id)

    async def publish(self, request: Request, context: RpcContext) -> None:
        connection, topic = self._live(), records.topic_of(context.pattern, self.options.prefix)
        reply_topic = f"{topic}{records.REPLY}"
        ours = {
            records.CORRELATION: request.id.encode(),
            records.REPLY_TOPIC: reply_topic.encode(),
            records.REPLY_PARTITION: self._partition,
        }
        try:
            async with asyncio.timeout(context.remaining()):
                if self._replies is not None and not self._replies.hears(reply_topic):
                    partitions = {topic: self.options.partitions, reply_topic: self.options.reply_partition + 1}
                    await connection.ensure(partitions)
                    await self._replies.join(reply_topic)
                if (left := context.remaining()) is not None:
                    ours["deadline"] = str(int(left * 1000)).encode()  # it counts from now
                sent = await connection.send(topic, **self._record(request, context, ours))
        except TimeoutError:
            return  # the call has a timer of its own
        except Unavailable as error:
            self.fail(request.id, error)
            return
        sent.add_done_callback(partial(self._on_sent, connection, request.id))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        connection, topic = self._live(), records.topic_of(context.pattern, self.options.prefix)
        record = self._record(event, context, {})
        await connection.ensure({topic: self.options.partitions})
        await connection.certainly(topic, **record)

    def _record(self, packet: Request | Event, context: RpcContext, ours: dict[str, bytes]) -> dict[str, Any]:
        told: Record = context.record or _PLAIN
        try:
            value, kind = records.write_value(packet.data, self._codec)
        except codec.UNENCODABLE as error:
            raise codec.not_json(error) from error
        texts = {**(packet.metadata or {}), **told.headers}
        return {
            "value": value,
            "headers": records.write_headers(texts, {**ours, records.TYPE: kind}),
            "key": None if told.key is None else told.key.encode(),
            "partition": told.partition,
            "timestamp": told.timestamp,
        }

    def _live(self) -> KafkaConnection:
        if self._connection is None:
            raise ConnectionLost(f"{self.service} cannot be reached at {self.address}: the connection was lost.")
        return self._connection

    def _on_sent(self, connection: KafkaConnection, id: str, sent: asyncio.Future[Any]) -> None:
        if not sent.cancelled() and (error := sent.exception()) is not None:
            self.fail(id, connection.trouble(error))

    def _on_reply(self, record: Any) -> asyncio.Future[None] | None:
        headers = dict(record.headers)
        id = (headers.get(records.CORRELATION) or b"").decode("utf-8", "replace")
        if id not in self._pending:
            return None  # somebody else's, or of one who gave up
        kind, reply = headers.get(records.TYPE), Reply(id=id)
        if records.ERROR in headers:
            reply.err = codec.decode(records.read_value(headers[records.ERROR], kind))
            reply.is_disposed = True
        else:
            reply.is_disposed = records.DISPOSED in headers
            # NestJS has no word for an end without a value: after others, null is none.
            ended = record.value is None and kind is None and reply.is_disposed and id in self._begun
            if kind != b"none" and not ended:
                reply.response = records.read_value(record.value, kind, self.decode)
        if reply.is_disposed:
            self._begun.discard(id)
        elif isinstance(self._pending[id], Stream):
            self._begun.add(id)
        return self.receive(reply)
