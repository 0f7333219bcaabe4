"""NestJS's RabbitMQ transport (nest-wire.md section 11): the queue of a service, and answers by direct reply-to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Raw

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher, Replier, Route
from ..exceptions import ConfigurationError, InvalidPayload, PacketError, RpcException, Unavailable
from ..instruments import dropped
from ..packets import Event, Reply, Request, Response
from . import Address, Count, Seconds
from .amqp import AmqpOptions, Channel, Connection, Message, Properties, marshalled
from .amqp_frames import NO_AMQP, long, short
from .envelope import read_packet, trace_headers, with_trace
from .rmq_peers import AmqpProxy, AmqpServer
from .wildcards import Wildcards

_MAX_NAME = 255
_ARGUMENTS = (
    "message_ttl",
    "expires",
    "dead_letter_exchange",
    "dead_letter_routing_key",
    "max_length",
    "max_priority",
    "queue_type",
)


class Options(AmqpOptions, frozen=True, kw_only=True):
    """NestJS's options; both sides must tell the same of the queue. Tables are JSON objects."""

    queue: str = ""
    """Where none is given: the service's name; for an `exclusive` one a name of the broker's own."""
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    message_ttl: Seconds | None = None
    expires: Seconds | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    max_length: Count | None = None
    max_priority: Count | None = None
    queue_type: Literal["classic", "quorum"] | None = None
    queue_arguments: str = ""
    """More of what the queue is declared with, by its names in AMQP."""
    no_assert: bool = False
    """Whether the queue is somebody else's, and declared by neither side."""

    exchange: str = ""
    exchange_type: Literal["topic", "fanout", "direct", "headers"] = "topic"
    exchange_arguments: str = ""
    routing_key: str = ""
    wildcards: bool = False
    """Whether routes are binding keys of a topic exchange, with `*` and `#`: `exchange`, else named as the queue."""

    prefetch_count: Annotated[int, msgspec.Meta(ge=0)] = 0
    """How many unacknowledged messages the broker hands over; `max_in_flight` where it is 0."""
    is_global_prefetch_count: bool = False
    no_ack: bool = True
    """NestJS's default: what a process has been given and not worked on is lost with it."""
    on_failure: Literal["reject", "requeue"] = "reject"
    """What becomes of a failed event: rejected, for the queue's dead-letter exchange, or given once more before."""
    consumer_tag: str = ""

    reply_queue: str = "amq.rabbitmq.reply-to"
    persistent: bool = False
    mandatory: bool = True
    """Whether the broker tells when no queue takes a message."""
    headers: str = ""
    """What each message of a client carries."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What one message carries, and how long the broker keeps it; times in seconds."""

    headers: dict[str, Any] = {}
    priority: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None
    expiration: Annotated[float, msgspec.Meta(ge=0)] | None = None
    """A request that says nothing expires at its deadline: nobody waits for its answer any more."""
    persistent: bool | None = None
    message_id: str | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    reply_to: str | None = None
    timestamp: int | None = None
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None


_NO_RECORD = Record()


class _Names:
    """The queue and the exchange that a URL names, as both sides read it."""

    def __init__(self, options: Options, service: str) -> None:
        self._options = options
        self.queue = options.queue or ("" if options.exclusive else service)
        self.exchange = options.exchange or (self.queue if options.wildcards else "")
        self._kind = "topic" if options.wildcards else options.exchange_type
        self.by_exchange = self._kind == "fanout" or options.wildcards
        """Whether clients publish to the exchange, and not to the queue itself."""
        if self.by_exchange and not self.exchange:
            raise ConfigurationError("An exchange needs a name: give the option 'exchange' or 'queue'.")
        told = {name: getattr(options, name) for name in _ARGUMENTS}
        self._queue_arguments = {
            f"x-{name.replace('_', '-')}": milliseconds(value) if isinstance(value, float) else value
            for name, value in told.items()
            if value is not None
        } | _table(options.queue_arguments, "queue_arguments")
        self._exchange_arguments = _table(options.exchange_arguments, "exchange_arguments")

    async def declare_queue(self, channel: Channel) -> str:
        """Declare the queue, unless it is somebody else's; return its name."""
        options = self._options
        if options.no_assert and self.queue:
            return self.queue
        return await channel.declare_queue(
            self.queue,
            durable=options.durable,
            exclusive=options.exclusive,
            auto_delete=options.auto_delete,
            arguments=self._queue_arguments,
        )

    async def declare_exchange(self, channel: Channel) -> None:
        """Declare the exchange."""
        await channel.declare_exchange(self.exchange, self._kind, self._exchange_arguments)

    def keys(self, routes: Mapping[str, Route]) -> list[str]:
        """Return with which keys the queue of these routes is bound to the exchange."""
        keys = [*routes] if self._options.wildcards else []
        if self.exchange and (self._kind == "fanout" or self._options.routing_key):
            keys.append(self._options.routing_key)
        return keys


class RmqServer(AmqpServer):
    """Hears what comes to the service's queue."""

    scheme = "amqp"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._names = _Names(self.options, dispatcher.service)
        self._read = self.reader(read_packet)
        self._wildcards = bindings(dispatcher.routes if self.options.wildcards else {})
        self._holding: Connection | None = None

    async def set_up(self, connection: Connection) -> None:
        options, names = self.options, self._names
        channel = await connection.channel()
        queue = await names.declare_queue(channel)
        if names.exchange:
            await names.declare_exchange(channel)
        for key in names.keys(self.routes):
            await channel.bind(queue, names.exchange, key)
        if not options.no_ack:
            count = options.prefetch_count or options.max_in_flight
            await channel.prefetch(count, whole_channel=options.is_global_prefetch_count)
        await channel.consume(queue, self._take, no_ack=options.no_ack, tag=options.consumer_tag)

    def _take(self, message: Message) -> None:
        headers = message.headers
        packet = with_trace(self._read(message.body), headers)
        answer: Replier = nobody
        if message.reply_to:
            answer = partial(self._answer, message)
        else:
            packet.id = UNSET  # nobody can be answered
        route = self.dispatcher.find(packet.pattern)
        if route is None and self.options.wildcards and packet.pattern is not UNSET:
            route = self._wildcards.find(message.routing_key)
        task = self.dispatcher.dispatch(
            packet,
            answer,
            transport=self.scheme,
            peer=self.url,
            channel=message.routing_key if route else None,
            route=route,
            headers=headers,
            native=message,
        )
        if task is not None:
            self.keep(task)
            if not message.settled:
                task.add_done_callback(partial(self._worked, message))
            if self.full:
                self._holding = message.channel.connection
                self._holding.hold()
            return
        if route is None:
            message.nack()
        else:
            message.ack()
        message.channel.connection.hold_while_congested()

    def _answer(self, message: Message, response: Response) -> Awaitable[None] | None:
        if response.status is UNSET:
            response.id = UNSET  # the property tells
        # With a table of headers, as NestJS has it, which is empty.
        id = message.correlation_id
        properties = b"\x24\0\0\0\0\0" + id if id else b"\x20\0\0\0\0\0"
        message.channel.answer(message.reply_to, properties, self.encode(response))
        congestion = message.channel.connection.congestion()
        return None if congestion is None else asyncio.shield(congestion)

    def _worked(self, message: Message, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():  # a cancelled one goes back as the connection ends
            error = task.exception()
            failures = [error] if error is not None else task.result()
            if not failures:
                message.ack()
            else:
                fits = not all(isinstance(failure, InvalidPayload) for failure in failures)
                message.nack(requeue=self.options.on_failure == "requeue" and fits and not message.redelivered)

    def ended(self, task: asyncio.Task[Any]) -> None:
        super().ended(task)
        holding = self._holding
        if holding is not None and not self.full:
            self._holding = None
            holding.release()


class RmqClient(AmqpProxy):
    """Publishes to a service's queue; the answers come by direct reply-to."""

    scheme = "amqp"
    Options = Options
    Record = Record

    _asking: Channel

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._names = _Names(self.options, service)
        self._read = self.reader(_read_reply)
        self._headers = _table(self.options.headers, "headers")
        try:
            # What a message begins with that is told nothing, and where its answer goes.
            self._plain = Properties(headers=self._headers, delivery_mode=1 + self.options.persistent).marshal()[2:]
            self._reply_to = short(self.options.reply_queue)
        except NO_AMQP as error:
            raise ConfigurationError(f"AMQP cannot carry this: {error}") from error

    async def set_up(self, connection: Connection) -> None:
        options, names = self.options, self._names
        self._asking = await connection.channel(self._not_routed)
        if names.by_exchange:
            await names.declare_exchange(self._asking)
        else:
            queue = await names.declare_queue(self._asking)
            for key in names.keys({}):
                await self._asking.bind(queue, names.exchange, key)
        # Direct reply-to asks for both: no acknowledgements, and the channel on which requests are published.
        await self._asking.consume(options.reply_queue, self._answered, no_ack=True)

    def publish(self, request: Request, context: RpcContext) -> None:
        self.live()
        exchange, key = self._place(context)
        body = self.encode(request)
        remaining = context.remaining()
        if remaining is not None and is_plain(context):
            id, ends = request.id.encode(), b"%d" % milliseconds(remaining)
            facts = (self._plain, len(id), id, self._reply_to, len(ends), ends)
            properties = b"\x37\0%b%c%b%b%c%b" % facts  # headers, delivery mode, id, reply-to, expiration
        else:
            told = self._properties(context)
            told.correlation_id = request.id
            told.reply_to = told.reply_to or self.options.reply_queue
            if told.expiration is None and remaining is not None:
                told.expiration = str(milliseconds(remaining))
            properties = marshalled(told)
        self._asking.publish(exchange, key, properties, body, mandatory=self.options.mandatory)

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        exchange, key = self._place(context)
        properties = b"\x30\0" + self._plain if is_plain(context) else marshalled(self._properties(context))
        mandatory = self.options.mandatory
        taken = await self._confirming.hand_over(exchange, key, properties, self.encode(event), mandatory=mandatory)
        if taken:
            return
        if not exchange:
            raise self._nobody()
        dropped.add(self.service, self.scheme, "nobody-listens")

    def _place(self, context: RpcContext) -> tuple[str, str]:
        return (self._names.exchange, context.pattern) if self._names.by_exchange else ("", self._names.queue)

    def _properties(self, context: RpcContext) -> Properties:
        return properties_of(context, persistent=self.options.persistent, headers=self._headers)

    def _nobody(self) -> Unavailable:
        return Unavailable(f"Nobody listens for {self.service} on {self.address}.")

    def _not_routed(self, message: Message) -> None:
        self.fail(long(message.correlation_id), self._nobody())

    def _answered(self, message: Message) -> None:
        id = long(message.correlation_id)
        try:
            reply = self._read(message.body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            dropped.add(self.service, self.scheme, "no-packet")
            self.fail(id, RpcException({"statusCode": 502, "code": "no-packet", "message": "The answer is no JSON."}))
            return
        reply.id = id
        self.receive(reply)


def is_plain(context: RpcContext) -> bool:
    """Return whether a message is told nothing of its own."""
    return context.record is None and not (context.metadata and trace_headers(context.metadata))


def properties_of(context: RpcContext, *, persistent: bool, headers: Mapping[str, Any]) -> Properties:
    """Return the properties of a message, as its record tells where it tells."""
    record: Record = context.record or _NO_RECORD
    if record.persistent is not None:
        persistent = record.persistent
    return Properties(
        headers={**headers, **trace_headers(context.metadata), **record.headers},
        delivery_mode=2 if persistent else 1,
        priority=record.priority,
        expiration=None if record.expiration is None else str(milliseconds(record.expiration)),
        message_id=record.message_id,
        content_type=record.content_type,
        content_encoding=record.content_encoding,
        reply_to=record.reply_to,
        timestamp=None if record.timestamp is None else datetime.fromtimestamp(record.timestamp, UTC),
        message_type=record.type,
        user_id=record.user_id,
        app_id=record.app_id,
    )


def bindings(routes: Mapping[str, Route]) -> Wildcards:
    """Return what finds a route by a routing key. Raises ConfigurationError for one that cannot be bound."""
    for route in routes:
        if len(route.encode()) > _MAX_NAME:
            raise ConfigurationError(f"{route[:40]}... is too long for a binding: RabbitMQ takes {_MAX_NAME} bytes.")
    return Wildcards(routes, separator=".", one="*", rest="#")


def milliseconds(seconds: float) -> int:
    """Return a time as RabbitMQ counts it."""
    return int(seconds * 1000)


def nobody(response: Response) -> None:
    """Where an answer goes that nobody waits for."""


def _table(text: str, option: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"The option {option!r} is no JSON object: {error}") from error


def _read_reply(body: bytes) -> Reply:
    try:
        reply = codec.decode_reply(body)
    except PacketError:
        return Reply(response=Raw(body), is_disposed=True)  # a list or a number of somebody else's
    if reply.response is UNSET and not reply.err and not reply.is_disposed:
        return Reply(response=Raw(body), is_disposed=True)
    return reply
