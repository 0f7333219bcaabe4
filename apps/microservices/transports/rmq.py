"""NestJS's RabbitMQ transport (nest-wire.md section 11), and durable events over a topic exchange.

AMQP 0-9-1 is spoken here, with pamqp, aiormq's own codec, for the frames: one connection in each direction,
whose reading stops while as many messages are worked on as may be, and no task or queue for each message.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, cast
from urllib.parse import unquote

import msgspec
from msgspec import UNSET, Raw, UnsetType
from pamqp import commands
from pamqp import frame as frames
from pamqp.base import Frame
from pamqp.exceptions import PAMQPException
from pamqp.header import ContentHeader, ProtocolHeader

from .. import codec
from ..context import NO_HEADERS, RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, ConnectionLost, InvalidPayload, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Reply, Request, Response
from . import Address, Count, Seconds
from .base import BrokerServer, ClientProxy
from .envelope import read_json, read_packet, trace_headers, with_trace
from .tls import TlsOptions
from .wildcards import Wildcards

logger = logging.getLogger("microservices.rmq")

DEAD = "dead."

_MAX_NAME = 255
_MAX_UNSENT = 1024 * 1024
_MAX_LETTERS = 100_000
_MAX_RETRY = 24 * 3600.0
_LAST_WORDS = 1.0

Natural = Annotated[int, msgspec.Meta(ge=0)]
Properties = commands.Basic.Properties


# Options


class Connecting(TlsOptions, frozen=True, kw_only=True):
    """What any URL of a RabbitMQ may set beside TLS; times in seconds."""

    heartbeat: Count = 10
    """A broker that is silent for twice as long counts as lost."""


class Options(Connecting, frozen=True, kw_only=True):
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

    prefetch_count: Natural = 0
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


class EventOptions(Connecting, frozen=True, kw_only=True):
    """What the URL of the event bus may set; times in seconds."""

    exchange: str = "events"
    prefetch: Count = 50
    """How many events a process works on at a time."""
    attempts: Count = 5
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""
    queue_type: Literal["classic", "quorum"] = "classic"


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


# The protocol

_FRAME = struct.Struct(">BHI")
_BODY, _HEADER, _METHOD, _HEARTBEAT = 3, 2, 1, 8
_END = b"\xce"
_BEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_DELIVER = b"\x00\x3c\x00\x3c"
_NO_AMQP = (PAMQPException, struct.error, ValueError, LookupError, TypeError)
"""What pamqp raises for bytes that it cannot read, and for names and tables that it cannot write."""
_CAPABILITIES = (
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "publisher_confirms",
)


class Message:
    """What the broker delivered. `no_ack` says that it wants to hear nothing about it."""

    __slots__ = ("body", "channel", "delivery_tag", "exchange", "properties", "redelivered", "routing_key", "settled")

    def __init__(
        self, channel: Channel, delivery_tag: int, redelivered: bool, exchange: str, routing_key: str, settled: bool
    ) -> None:
        self.channel = channel
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.exchange = exchange
        self.routing_key = routing_key
        self.settled = settled
        self.properties = Properties()
        self.body = b""

    @property
    def headers(self) -> Mapping[str, Any]:
        """The table of headers, which may be empty."""
        return self.properties.headers or NO_HEADERS

    def ack(self) -> None:
        """Tell the broker to forget it. Whoever is first settles a message."""
        self._settle(commands.Basic.Ack(self.delivery_tag))

    def nack(self, *, requeue: bool = False) -> None:
        """Give it back to the queue, or to its dead-letter exchange."""
        self._settle(commands.Basic.Nack(self.delivery_tag, False, requeue))

    def _settle(self, verdict: Frame) -> None:
        if not self.settled:
            self.settled = True
            self.channel.post(verdict)


Take = Callable[[Message], None]


class _Sent:
    """A message that the broker has not confirmed yet."""

    __slots__ = ("body", "future", "key", "routed")

    def __init__(self, future: asyncio.Future[bool], key: str, body: bytes) -> None:
        self.future = future
        self.key = key
        self.body = body
        self.routed = True


class Channel:
    """One channel of a connection. Its end, other than by the connection's own, is the end of that as well."""

    def __init__(self, connection: Connection, number: int, on_return: Take | None) -> None:
        self.connection = connection
        self.number = number
        self._on_return = on_return
        self._on_message: Take | None = None
        self._no_ack = False
        self._consumer = ""
        self._calls: deque[asyncio.Future[Any]] = deque()
        self._coming: Message | None = None
        self._returned = False
        self._parts: list[bytes] = []
        self._missing = 0
        self._tag = 0
        self._unconfirmed: dict[int, _Sent] = {}

    # Out

    def call(self, method: Frame) -> asyncio.Future[Any]:
        """Call a method of the broker; the future holds its answer, an Unavailable or a ConnectionLost."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.connection.ended.done():
            _fail(future, ConnectionLost(self.connection.ended.result()))
            return future
        self._calls.append(future)
        self.post(method)
        return future

    def post(self, method: Frame) -> None:
        """Call a method that has no answer."""
        self.connection.write(frames.marshal(method, self.number))

    async def consume(self, queue: str, take: Take, *, no_ack: bool, tag: str = "") -> None:
        """Have the messages of a queue handed to `take`."""
        self._on_message, self._no_ack = take, no_ack
        consuming = await self.call(commands.Basic.Consume(queue=queue, no_ack=no_ack, consumer_tag=tag))
        self._consumer = consuming.consumer_tag

    async def cancel(self) -> None:
        """Have no more messages handed over; returns when the last one has been."""
        await self.call(commands.Basic.Cancel(consumer_tag=self._consumer))

    def publish(self, exchange: str, key: str, properties: bytes, body: bytes, *, mandatory: bool = False) -> None:
        """Hand over a message, its `properties` marshalled. Raises RpcException for a name that is too long."""
        limit = self.connection.frame_max - 8
        header = b"\x00\x3c\x00\x00" + len(body).to_bytes(8, "big") + properties
        out = [_publishing(self.number, exchange, key, mandatory), *_framed(_HEADER, self.number, header)]
        if len(body) <= limit:
            if body:
                out += _framed(_BODY, self.number, body)
        else:
            for start in range(0, len(body), limit):
                out += _framed(_BODY, self.number, body[start : start + limit])
        self.connection.write(*out)

    async def confirm(self) -> None:
        """Have the broker confirm what is published from now on, by `hand_over` alone."""
        await self.call(commands.Confirm.Select())

    async def hand_over(self, exchange: str, key: str, properties: bytes, body: bytes, *, mandatory: bool) -> bool:
        """Publish and wait for the broker's confirm; returns whether a queue took it, if that is `mandatory`.

        Raises Unavailable where the broker refused it, ConnectionLost where it said nothing, RpcException
        for a name that is too long.
        """
        if self.connection.ended.done():
            raise ConnectionLost(self.connection.ended.result())
        self.publish(exchange, key, properties, body, mandatory=mandatory)
        self._tag += 1
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._unconfirmed[self._tag] = _Sent(future, key, body)
        return await future

    # In

    def take(self, kind: int, payload: bytes) -> None:
        """Take a frame of this channel. Raises one of _NO_AMQP."""
        if kind == _BODY:
            self._take_body(payload)
        elif kind == _HEADER:
            self._take_header(payload)
        elif payload.startswith(_DELIVER):
            self._take_delivery(payload)
        else:
            self._take_method(cast(Frame, _unmarshalled(_METHOD, self.number, payload)))

    def _take_delivery(self, payload: bytes) -> None:
        # By hand: pamqp stumbles over names that are no UTF-8, and each message begins with one of these.
        start = 5 + payload[4]
        tag = int.from_bytes(payload[start : start + 8], "big")
        exchange, start_of_key = _short(payload, start + 9)
        key, _ = _short(payload, start_of_key)
        self._returned = False
        self._coming = Message(self, tag, bool(payload[start + 8]), exchange, key, self._no_ack)

    def _take_method(self, method: Frame) -> None:
        if isinstance(method, commands.Basic.Ack | commands.Basic.Nack):
            self._confirmed(method.delivery_tag or 0, method.multiple, isinstance(method, commands.Basic.Ack))
        elif isinstance(method, commands.Basic.Return):
            self._returned = True
            self._coming = Message(self, 0, False, method.exchange, method.routing_key or "", True)
        elif isinstance(method, commands.Basic.Cancel):
            self.connection.fail("the queue is gone")
        elif isinstance(method, commands.Channel.Close):
            reason = f"{method.reply_code} {method.reply_text}"
            self.post(commands.Channel.CloseOk())
            self.connection.fail(reason, Unavailable(f"RabbitMQ at {self.connection.place} refused: {reason}."))
        elif isinstance(method, commands.Channel.Flow):
            self.post(commands.Channel.FlowOk(method.active))
        elif self._calls:
            future = self._calls.popleft()
            if not future.done():
                future.set_result(method)

    def _take_header(self, payload: bytes) -> None:
        if self._coming is None:
            raise ValueError("a header without a message")
        self._missing = int.from_bytes(payload[4:12], "big")
        try:
            header = cast(ContentHeader, _unmarshalled(_HEADER, self.number, payload))
            self._coming.properties = header.properties
        except _NO_AMQP:
            logger.debug("The properties of a message on %s cannot be read", self.connection.place)
        if not self._missing:
            self._complete(b"")

    def _take_body(self, payload: bytes) -> None:
        self._missing -= len(payload)
        if self._missing > 0:
            self._parts.append(payload)
            return
        if self._parts:
            self._parts.append(payload)
            payload = b"".join(self._parts)
            self._parts.clear()
        self._complete(payload)

    def _complete(self, body: bytes) -> None:
        message, self._coming = self._coming, None
        if message is None:
            raise ValueError("a body without a message")
        message.body = body
        if self._returned:
            self._not_routed(message)
        elif self._on_message is not None:
            try:
                self._on_message(message)
            except Exception:
                # Of this message alone: whatever is raised from here ends the connection.
                logger.exception("A message of %s could not be taken", self.connection.place)

    def _not_routed(self, message: Message) -> None:
        if self._on_return is not None:
            self._on_return(message)
        # The broker tells the message and not its number; it tells so before it confirms it.
        for sent in self._unconfirmed.values():
            if sent.routed and sent.key == message.routing_key and sent.body == message.body:
                sent.routed = False
                return

    def _confirmed(self, tag: int, multiple: bool, taken: bool) -> None:
        tags = [earlier for earlier in self._unconfirmed if earlier <= tag] if multiple else [tag]
        for each in tags:
            sent = self._unconfirmed.pop(each, None)
            if sent is None or sent.future.done():
                continue
            if taken:
                sent.future.set_result(sent.routed)
            else:
                sent.future.set_exception(Unavailable(f"RabbitMQ at {self.connection.place} refused the message."))

    def end(self, error: RpcException) -> None:
        """Fail all that waits for the broker."""
        calls, self._calls = self._calls, deque()
        sent, self._unconfirmed = self._unconfirmed, {}
        for future in (*calls, *(each.future for each in sent.values())):
            _fail(future, error)


class Connection(asyncio.Protocol):
    """Speaks AMQP; `ended` is done, with the reason, when the connection is lost or closed."""

    transport: asyncio.Transport

    def __init__(self, address: Address, options: Connecting, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._address = address
        self._heartbeat = options.heartbeat
        self._name = name
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._flushing = False
        self._held = False
        self._deaf = False
        self._blocked = False
        self._paused = False
        self._clear: asyncio.Future[None] | None = None
        self._channels: dict[int, Channel] = {}
        self._heard = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.frame_max = 4096
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[str] = self._loop.create_future()

    @property
    def place(self) -> Address:
        """Where it leads."""
        return self._address

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)
        self.write(ProtocolHeader().marshal())
        self._timer = self._loop.call_later(self._heartbeat / 2, self._beat)

    def connection_lost(self, error: Exception | None) -> None:
        self._over(str(error) if error else "the connection was lost")

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._buffer += data
        self._read()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._let_go_on()

    # What its owners use

    def congestion(self) -> asyncio.Future[None] | None:
        """What to await while the broker takes nothing: it reads too slowly, or is short of memory or disk."""
        if not (self._paused or self._blocked):
            return None
        if self._clear is None:
            self._clear = self._loop.create_future()
        return self._clear

    def hold(self) -> None:
        """Read nothing more for now."""
        if not self._held and not self.transport.is_closing():
            self._held = True
            self.transport.pause_reading()

    def release(self) -> None:
        """Read on."""
        if self._held and not self.transport.is_closing():
            self._held = False
            self._heard = self._loop.time()
            self.transport.resume_reading()
            self._read()  # what had already come

    def write(self, *parts: bytes) -> None:
        """Send bytes with the others of this turn of the loop."""
        self._out += parts
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    async def channel(self, on_return: Take | None = None) -> Channel:
        """Open one more channel."""
        number = len(self._channels) + 1
        channel = self._channels[number] = Channel(self, number, on_return)
        await channel.call(commands.Channel.Open())
        return channel

    def fail(self, reason: str, error: RpcException | None = None) -> None:
        """End it for a reason: what waits for the broker fails at once, with `error` where that tells more."""
        self._flush()
        self.transport.close()
        self._loop.call_later(_LAST_WORDS, self.transport.abort)  # a broker that reads nothing would keep it open
        self._over(reason, error)

    async def close(self) -> None:
        """Say good-bye; what was published before has arrived then."""
        if not self.ended.done():
            self._deaf = True
            self.release()
            self.write(frames.marshal(commands.Connection.Close(200, "bye", 0, 0), 0))
            # A broker that says nothing would keep the connection for ever.
            await asyncio.wait([self.ended], timeout=_LAST_WORDS)
            self.transport.abort()

    # Inside

    def _flush(self) -> None:
        self._flushing = False
        if self._out and not self.transport.is_closing():
            self.transport.write(b"".join(self._out))
        self._out.clear()

    def _over(self, reason: str, error: RpcException | None = None) -> None:
        if self.ended.done():
            return
        if self._timer is not None:
            self._timer.cancel()
        # First of all, so that whoever is told of a failure finds a connection that has ended.
        self.ended.set_result(reason)
        _fail(self.opened, Unavailable(reason))
        for channel in self._channels.values():
            channel.end(error or ConnectionLost(f"The connection to {self.place} ended: {reason}."))
        self._blocked = self._paused = False
        self._let_go_on()

    def _let_go_on(self) -> None:
        if self._clear is not None and not (self._paused or self._blocked):
            clear, self._clear = self._clear, None
            clear.set_result(None)

    def _beat(self) -> None:
        if not self._held and self._loop.time() - self._heard > 2 * self._heartbeat:
            self._over("the broker fell silent")
            self.transport.abort()
            return
        self.write(_BEAT)
        self._timer = self._loop.call_later(self._heartbeat / 2, self._beat)

    def _read(self) -> None:
        buffer, position = self._buffer, 0
        try:
            while not self._held and len(buffer) - position >= 8:
                kind, number, size = _FRAME.unpack_from(buffer, position)
                if kind not in (_METHOD, _HEADER, _BODY, _HEARTBEAT) or size > max(self.frame_max, 131_072):
                    raise ValueError("no frame")
                end = position + size + 8
                if len(buffer) < end:
                    break
                payload = bytes(buffer[position + 7 : end - 1])
                position = end
                if number == 0:
                    self._control(kind, payload)
                elif number in self._channels and not self._deaf:
                    self._channels[number].take(kind, payload)
        except _NO_AMQP as error:
            self.fail(f"the broker sent what is no AMQP: {error}")
        finally:
            del buffer[:position]

    def _control(self, kind: int, payload: bytes) -> None:
        method = _unmarshalled(kind, 0, payload) if kind == _METHOD else None
        if isinstance(method, commands.Connection.Start):
            self._introduce()
        elif isinstance(method, commands.Connection.Tune):
            self.frame_max = method.frame_max or 131_072
            self._call(commands.Connection.TuneOk(method.channel_max, self.frame_max, self._heartbeat))
            self._call(commands.Connection.Open(virtual_host=unquote(self._address.path[1:]) or "/"))
        elif isinstance(method, commands.Connection.OpenOk):
            self.opened.set_result(None)
        elif isinstance(method, commands.Connection.Close):
            self._call(commands.Connection.CloseOk())
            self.fail(f"{method.reply_code} {method.reply_text}")
        elif isinstance(method, commands.Connection.CloseOk):
            self.fail("the connection was closed")
        elif isinstance(method, commands.Connection.Blocked):
            self._blocked = True
            logger.warning("RabbitMQ at %s takes nothing for now: %s", self.place, method.reason)
        elif isinstance(method, commands.Connection.Unblocked):
            self._blocked = False
            self._let_go_on()

    def _introduce(self) -> None:
        user, password = self._address.username or "guest", self._address.password
        secret = password or ("guest" if user == "guest" else "")
        facts: dict[str, Any] = {"product": "microservices", "connection_name": self._name}
        facts["capabilities"] = dict.fromkeys(_CAPABILITIES, True)
        self._call(commands.Connection.StartOk(facts, "PLAIN", f"\0{user}\0{secret}", "en_US"))

    def _call(self, method: Frame) -> None:
        self.write(frames.marshal(method, 0))


async def open_connection(address: Address, options: Connecting, name: str) -> Connection:
    """Connect to the first host that answers. Raises Unavailable, naming RabbitMQ and the reason."""
    failure = Unavailable(f"RabbitMQ cannot be reached at {address}.")
    for host, port in address.hosts:
        try:
            return await _open(address._replace(host=host, port=port, others=()), options, name)
        except Unavailable as error:
            failure = error
    raise failure


async def _open(address: Address, options: Connecting, name: str) -> Connection:
    context = options.client_context() if address.scheme == "amqps" else None
    connection: Connection | None = None
    try:
        async with asyncio.timeout(options.connect_timeout):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(address, options, name),
                address.host,
                address.port,
                ssl=context,
                server_hostname=(options.server_name or address.host) if context else None,
            )
            await connection.opened
    except BaseException as error:
        if connection is not None:
            connection.transport.abort()
        if isinstance(error, TimeoutError):
            raise Unavailable(f"RabbitMQ at {address} did not answer within {options.connect_timeout:g} s.") from None
        if isinstance(error, OSError | RpcException | UnicodeError):
            reason = getattr(error, "strerror", None) or error
            raise Unavailable(f"RabbitMQ cannot be reached at {address}: {reason}.") from error
        raise
    return connection


def _fail(future: asyncio.Future[Any], error: RpcException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen, even where nobody waits for it any more


def _framed(kind: int, channel: int, payload: bytes) -> tuple[bytes, bytes, bytes]:
    return _FRAME.pack(kind, channel, len(payload)), payload, _END


def _unmarshalled(kind: int, channel: int, payload: bytes) -> Any:
    return frames.unmarshal(b"".join(_framed(kind, channel, payload)))[2]


def _short(payload: bytes, start: int) -> tuple[str, int]:
    end = start + 1 + payload[start]
    return payload[start + 1 : end].decode("utf-8", "replace"), end


@lru_cache(maxsize=4096)
def _publishing(channel: int, exchange: str, key: str, mandatory: bool) -> bytes:
    parts = [b"\x00\x3c\x00\x28\x00\x00"]
    for name in (exchange.encode(), key.encode()):
        if len(name) > _MAX_NAME:
            message = f"{key[:40]}... is too long: RabbitMQ's names have {_MAX_NAME} bytes at most."
            raise RpcException({"statusCode": 400, "code": "name-too-long", "message": message})
        parts += [bytes([len(name)]), name]
    return b"".join(_framed(_METHOD, channel, b"".join([*parts, bytes([mandatory])])))


def _marshalled(properties: Properties) -> bytes:
    try:
        return properties.marshal()
    except _NO_AMQP as error:
        message = f"AMQP cannot carry these properties: {error}"
        raise RpcException({"statusCode": 400, "code": "not-amqp", "message": message}) from error


# Queues and exchanges


def _table(text: str, option: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"The option {option!r} is no JSON object: {error}") from error


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


class _Names:
    """What an URL says of a queue and an exchange, as both sides read it."""

    def __init__(self, options: Options, service: str) -> None:
        self._options = options
        self.queue = options.queue or ("" if options.exclusive else service)
        self.exchange = options.exchange or (self.queue if options.wildcards else "")
        self.kind = "topic" if options.wildcards else options.exchange_type
        self.by_exchange = bool(self.exchange) and (options.wildcards or self.kind == "fanout")
        """Whether clients publish to the exchange, and not to the queue itself."""
        self._queue_arguments = self._arguments()
        self._exchange_arguments = _table(options.exchange_arguments, "exchange_arguments")
        if (options.wildcards or self.kind == "fanout") and not self.exchange:
            raise ConfigurationError("An exchange needs a name: give the option 'exchange' or 'queue'.")

    def _arguments(self) -> dict[str, Any]:
        options = self._options
        arguments: dict[str, Any] = {
            "x-message-ttl": None if options.message_ttl is None else _milliseconds(options.message_ttl),
            "x-expires": None if options.expires is None else _milliseconds(options.expires),
            "x-dead-letter-exchange": options.dead_letter_exchange,
            "x-dead-letter-routing-key": options.dead_letter_routing_key,
            "x-max-length": options.max_length,
            "x-max-priority": options.max_priority,
            "x-queue-type": options.queue_type,
        }
        told = {name: value for name, value in arguments.items() if value is not None}
        return {**told, **_table(options.queue_arguments, "queue_arguments")}

    async def declare_queue(self, channel: Channel) -> str:
        """Declare the queue, unless it is somebody else's; return its name."""
        options = self._options
        if options.no_assert and self.queue:
            return self.queue
        declared = await channel.call(
            commands.Queue.Declare(
                queue=self.queue,
                durable=options.durable,
                exclusive=options.exclusive,
                auto_delete=options.auto_delete,
                arguments=self._queue_arguments,
            )
        )
        return str(declared.queue)

    async def declare_exchange(self, channel: Channel) -> None:
        """Declare the exchange, durable as NestJS has it."""
        arguments = self._exchange_arguments
        await channel.call(
            commands.Exchange.Declare(
                exchange=self.exchange, exchange_type=self.kind, durable=True, arguments=arguments
            )
        )

    async def bind(self, channel: Channel, queue: str, key: str) -> None:
        """Have the exchange hand messages to the queue."""
        await channel.call(commands.Queue.Bind(queue=queue, exchange=self.exchange, routing_key=key))


def _check_keys(routes: Mapping[str, Route]) -> None:
    for route in routes:
        if len(route.encode()) > _MAX_NAME:
            raise ConfigurationError(f"{route[:40]}... is too long for a binding: RabbitMQ takes {_MAX_NAME} bytes.")


# Requests and events of a service


class _Hearing(BrokerServer):
    """A server with one connection to RabbitMQ."""

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._connection: Connection | None = None
        self._consuming: list[Channel] = []

    async def subscribe(self) -> None:
        connection = self._connection = await open_connection(self.address, self.options, self.dispatcher.service)
        self._consuming = []
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                await self._set_up(connection)
        except _NO_AMQP as error:
            raise Unavailable(f"AMQP cannot say that: {error}") from error

    async def _set_up(self, connection: Connection) -> None:
        raise NotImplementedError

    async def _consume(self, channel: Channel, queue: str, take: Take, *, no_ack: bool, tag: str) -> None:
        self._consuming.append(channel)
        await channel.consume(queue, take, no_ack=no_ack, tag=tag)

    async def until_lost(self) -> str:
        if self._connection is None:
            return ""
        await asyncio.wait([self._connection.ended])
        return self._connection.ended.result()

    async def unsubscribe(self) -> None:
        # What RabbitMQ has already sent is still taken.
        for channel in self._consuming:
            await channel.cancel()

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> Connection | None:
        return self._connection


class RmqServer(_Hearing):
    """Hears what comes to the service's queue."""

    scheme = "amqp"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._names = _Names(self.options, dispatcher.service)
        if self.options.wildcards:
            _check_keys(dispatcher.routes)
        self._wildcards = Wildcards(
            dispatcher.routes if self.options.wildcards else {}, separator=".", one="*", rest="#"
        )

    async def _set_up(self, connection: Connection) -> None:
        options, names = self.options, self._names
        channel = await connection.channel()
        queue = await names.declare_queue(channel)
        if names.exchange:
            await names.declare_exchange(channel)
            if names.kind == "fanout" or options.routing_key:
                await names.bind(channel, queue, "" if names.kind == "fanout" else options.routing_key)
            if options.wildcards:
                for route in self.routes:
                    await names.bind(channel, queue, route)
        if not options.no_ack:
            count = options.prefetch_count or options.max_in_flight
            await channel.call(commands.Basic.Qos(prefetch_count=count, global_=options.is_global_prefetch_count))
        await self._consume(channel, queue, self._take, no_ack=options.no_ack, tag=options.consumer_tag)

    def _take(self, message: Message) -> None:
        properties, headers = message.properties, message.headers
        packet = with_trace(read_packet(self.decode(message.body)), headers)
        if not properties.reply_to:
            packet.id = UNSET  # nobody can be answered
        answer = _Answer(message.channel, properties, self.encode)
        route = self._route(packet.pattern)
        task = self.handle(
            packet,
            answer,
            peer=str(self.address),
            channel=message.routing_key if route else None,
            route=route,
            headers=headers,
            native=message,
        )
        if task is None:
            if not message.settled:
                if route is None:
                    message.nack()
                else:
                    message.ack()
            return
        task.add_done_callback(partial(self._worked, message))
        if self.full:
            message.channel.connection.hold()

    def _route(self, pattern: Raw | UnsetType) -> Route | None:
        route = self.dispatcher.find(pattern)
        if route is None and self.options.wildcards and isinstance(pattern, Raw):
            try:
                return self._wildcards.find(msgspec.json.decode(pattern, type=str))
            except (msgspec.DecodeError, UnicodeDecodeError):
                return None
        return route

    def _worked(self, message: Message, task: asyncio.Task[Any]) -> None:
        if not message.settled and not task.cancelled():  # a cancelled one goes back as the connection ends
            error = task.exception()
            failures = [error] if error is not None else task.result()
            if not failures:
                message.ack()
            else:
                fits = not all(isinstance(failure, InvalidPayload) for failure in failures)
                again = self.options.on_failure == "requeue" and fits and not message.redelivered
                message.nack(requeue=again)
        if not self.full:
            message.channel.connection.release()


class _Answer:
    """Publishes the packets of one answer."""

    __slots__ = ("_channel", "_encode", "_key", "_properties")

    def __init__(self, channel: Channel, properties: Properties, encode: Callable[[Response], bytes]) -> None:
        self._channel = channel
        self._encode = encode
        self._key = properties.reply_to or ""
        id = (properties.correlation_id or "").encode()
        # The headers that NestJS sends, which are none, and the correlation id.
        self._properties = b"\x24\x00\x00\x00\x00\x00" + bytes([len(id)]) + id

    def __call__(self, response: Response) -> Awaitable[None] | None:
        if response.status is UNSET:
            response.id = UNSET  # the property tells
        self._channel.publish("", self._key, self._properties, self._encode(response))
        congestion = self._channel.connection.congestion()
        return None if congestion is None else asyncio.shield(congestion)


class _Proxy(ClientProxy):
    """A client with one connection to RabbitMQ, opened when first used and again after a loss."""

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._connection: Connection | None = None
        self._confirming: Channel | None = None

    def ready(self) -> bool:
        return self._connection is not None and self._connection.congestion() is None

    async def connect(self) -> None:
        await super().connect()
        congestion = self._live().congestion()
        if congestion is not None:
            await asyncio.shield(congestion)

    async def open(self) -> None:
        connection = await open_connection(self.address, self.options, f"client of {self.service}")
        try:
            await self._set_up(connection)
            self._confirming = await connection.channel()
            await self._confirming.confirm()
            if connection.ended.done():
                raise Unavailable(f"RabbitMQ at {self.address} ended the connection: {connection.ended.result()}.")
        except BaseException as error:
            connection.transport.abort()
            if isinstance(error, _NO_AMQP):
                raise Unavailable(f"AMQP cannot say that: {error}") from error
            raise
        self._connection = connection
        connection.ended.add_done_callback(partial(self._lost, connection))

    async def _set_up(self, connection: Connection) -> None:
        raise NotImplementedError

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> Connection | None:
        return self._connection

    async def hand_over(self, exchange: str, key: str, properties: Properties, body: bytes, *, mandatory: bool) -> bool:
        """Publish an event, and wait for the broker's confirm. Raises as `Channel.hand_over`."""
        if self._confirming is None:
            raise self._gone()
        marshalled = _marshalled(properties)
        return await self._confirming.hand_over(exchange, key, marshalled, body, mandatory=mandatory)

    def _live(self) -> Connection:
        if self._connection is None:
            raise self._gone()
        return self._connection

    def _gone(self) -> Unavailable:
        return Unavailable(f"RabbitMQ at {self.address} ended the connection before the message was sent.")

    def _lost(self, connection: Connection, ended: asyncio.Future[str]) -> None:
        if self._connection is connection:
            self._connection = self._confirming = None
            self.lost(f"The connection to RabbitMQ at {self.address} ended: {ended.result()}.")


class RmqClient(_Proxy):
    """Publishes to a service's queue; the answers come by direct reply-to."""

    scheme = "amqp"
    Options = Options
    Record = Record

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._names = _Names(self.options, service)
        self._headers = _table(self.options.headers, "headers")
        self._asking: Channel | None = None

    async def _set_up(self, connection: Connection) -> None:
        options, names = self.options, self._names
        channel = self._asking = await connection.channel(self._not_routed)
        if names.by_exchange:
            await names.declare_exchange(channel)
        else:
            queue = await names.declare_queue(channel)
            if names.exchange and options.routing_key:
                await names.bind(channel, queue, options.routing_key)
        # Direct reply-to asks for both: no acknowledgements, and the channel on which requests are published.
        await channel.consume(options.reply_queue, self._answered, no_ack=True)

    async def publish(self, request: Request, context: RpcContext) -> None:
        if self._asking is None or self._connection is None:
            raise self._gone()
        properties = self._properties(context)
        properties.correlation_id = request.id
        if properties.reply_to is None:
            properties.reply_to = self.options.reply_queue
        remaining = context.remaining()
        if properties.expiration is None and remaining is not None:
            properties.expiration = str(_milliseconds(remaining))
        exchange, key = self._place(context)
        body = self.encode(request)
        self._asking.publish(exchange, key, _marshalled(properties), body, mandatory=self.options.mandatory)

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        exchange, key = self._place(context)
        properties, mandatory = self._properties(context), self.options.mandatory
        if await self.hand_over(exchange, key, properties, self.encode(event), mandatory=mandatory):
            return
        if exchange:
            dropped.add(self.service, self.scheme, "nobody-listens")
        else:
            raise self._nobody()

    def _place(self, context: RpcContext) -> tuple[str, str]:
        names = self._names
        return (names.exchange, context.pattern) if names.by_exchange else ("", names.queue)

    def _properties(self, context: RpcContext) -> Properties:
        record: Record = context.record or _NO_RECORD
        persistent = self.options.persistent if record.persistent is None else record.persistent
        headers = {**self._headers, **trace_headers(context.metadata), **record.headers}
        properties = Properties(headers=headers, delivery_mode=2 if persistent else 1)
        if record is not _NO_RECORD:
            properties.priority = record.priority
            properties.expiration = None if record.expiration is None else str(_milliseconds(record.expiration))
            properties.message_id = record.message_id
            properties.content_type = record.content_type
            properties.content_encoding = record.content_encoding
            properties.reply_to = record.reply_to
            properties.timestamp = None if record.timestamp is None else datetime.fromtimestamp(record.timestamp, UTC)
            properties.message_type = record.type
            properties.user_id = record.user_id
            properties.app_id = record.app_id
        return properties

    def _nobody(self) -> Unavailable:
        return Unavailable(f"Nobody listens for {self.service} on {self.address}.")

    def _not_routed(self, message: Message) -> None:
        self.fail(message.properties.correlation_id or "", self._nobody())

    def _answered(self, message: Message) -> None:
        id = message.properties.correlation_id
        if id not in self._pending:
            return  # somebody who gave up
        try:
            reply = _read_reply(self.decode(message.body))
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            dropped.add(self.service, self.scheme, "no-packet")
            self.fail(id, RpcException({"statusCode": 502, "code": "no-packet", "message": "The answer is no JSON."}))
            return
        reply.id = id
        self.receive(reply)


_KEYS = {"id", "err", "response", "isDisposed", "status"}


def _read_reply(body: bytes) -> Reply:
    try:
        reply = codec.decode_reply(body)
    except PacketError:
        return Reply(response=Raw(body), is_disposed=True)  # a list or a number of somebody else's
    if reply.response is UNSET and not reply.err and not reply.is_disposed:
        value = codec.decode(body)
        if not isinstance(value, dict) or not _KEYS.issuperset(value):
            return Reply(response=Raw(body), is_disposed=True)
    return reply


# Events of many services


_ATTEMPT, _ROUTE, _ERROR = "x-attempt", "x-route", "x-error"


class RmqBus(_Proxy):
    """Publishes events, persistent; `emit` returns when RabbitMQ has confirmed them."""

    scheme = "amqp"
    Options = EventOptions
    Record = Record

    async def _set_up(self, connection: Connection) -> None:
        await _declare_events(await connection.channel(), self.options)

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        record: Record = context.record or _NO_RECORD
        properties = Properties(headers={**trace_headers(context.metadata), **record.headers}, delivery_mode=2)
        properties.priority, properties.message_id = record.priority, record.message_id
        # Not mandatory: an event need not be heard.
        await self.hand_over(self.options.exchange, context.pattern, properties, self.encode(event), mandatory=False)


class RmqListener(_Hearing):
    """Takes the events that a service hears, a bounded number at a time, and acknowledges what was handled.

    Its durable queue is `<service>.<exchange>`, by default `<service>.events`. A failed event goes to
    `<queue>.retry.<milliseconds>`, from where the broker gives it back after that time, and in the end to
    `dead.<service>`.
    """

    scheme = "amqp"
    Options = EventOptions

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._queue = f"{dispatcher.service}.{self.options.exchange}"
        self._dead = f"{DEAD}{dispatcher.service}"
        self._heard = {"one": self._routes("one"), "each": self._routes("each")}
        self._retrying: Channel | None = None

    def _routes(self, delivery: Delivery) -> Wildcards | None:
        routes = {
            name: route for name, route in self.dispatcher.routes.items() if self.dispatcher.hears(name, delivery)
        }
        _check_keys(routes)
        return Wildcards(routes, separator=".", one="*", rest="#") if routes else None

    async def listen(self) -> None:
        if self._heard["one"] or self._heard["each"]:
            await super().listen()

    async def _set_up(self, connection: Connection) -> None:
        options = self.options
        self._retrying = await connection.channel()
        await _declare_events(self._retrying, options)
        await self._retrying.confirm()
        kind = {"x-queue-type": options.queue_type}
        bound = {**kind, "x-max-length": _MAX_LETTERS}
        if self._heard["one"]:
            await self._declare(self._dead, bound)
            await self._declare(self._queue, kind)
            await self._hear("one", self._queue, await connection.channel())
        if self._heard["each"]:
            channel = await connection.channel()
            own = await channel.call(commands.Queue.Declare(exclusive=True, auto_delete=True))
            await self._hear("each", own.queue, channel)

    async def _hear(self, delivery: Delivery, queue: str, channel: Channel) -> None:
        for route in self.dispatcher.routes:
            if self.dispatcher.hears(route, delivery):
                binding = commands.Queue.Bind(queue=queue, exchange=self.options.exchange, routing_key=route)
                await channel.call(binding)
        await channel.call(commands.Basic.Qos(prefetch_count=self.options.prefetch))
        take = self._take if delivery == "one" else self._tell
        await self._consume(channel, queue, take, no_ack=False, tag="")

    async def _declare(self, queue: str, arguments: dict[str, Any]) -> None:
        if self._retrying is not None:
            await self._retrying.call(commands.Queue.Declare(queue=queue, durable=True, arguments=arguments))

    def _tell(self, message: Message) -> None:
        try:
            task = self._handle(message, "each")
        except PacketError:
            dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            task = None
        if task is None:
            message.ack()
        else:
            task.add_done_callback(lambda _: message.ack())

    def _take(self, message: Message) -> None:
        if message.redelivered:
            # A process has ended over it, and nobody has counted that.
            self._spawn(self._count(message))
            return
        try:
            task = self._handle(message, "one")
        except PacketError:
            self._spawn(self._bury(message, "it is no packet"))
            return
        if task is None:
            message.ack()
        else:
            task.add_done_callback(partial(self._worked, message))

    def _handle(self, message: Message, delivery: Delivery) -> asyncio.Task[Any] | None:
        headers = message.headers
        packet = with_trace(read_json(self.decode(message.body)), headers)
        packet.id = UNSET
        name = _told(headers, _ROUTE, message.routing_key)
        heard = self._heard[delivery]
        return self.handle(
            packet,
            _nobody,
            peer=str(self.address),
            channel=name,
            delivery=delivery,
            route=heard.find(name) if heard is not None else None,
            headers=headers,
            native=message,
        )

    def _worked(self, message: Message, task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            return  # it goes back as the connection ends
        error = task.exception()
        failures = [error] if error is not None else task.result()
        attempt = _told(message.headers, _ATTEMPT, 1)
        if not failures:
            message.ack()
        elif all(isinstance(failure, InvalidPayload) for failure in failures):
            self._spawn(self._bury(message, str(failures[0])))
        elif attempt >= self.options.attempts:
            self._spawn(self._bury(message, f"attempt {attempt} failed: {failures[0]!r}"))
        else:
            self._spawn(self._again(message, attempt))

    # What failed

    def _spawn(self, work: Any) -> None:
        self.keep(asyncio.get_running_loop().create_task(self._surely(work)))

    async def _surely(self, work: Awaitable[None]) -> None:
        try:
            await work
        except RpcException as error:
            # Not acknowledged, it comes again.
            logger.debug("%s keeps an event: %s", self.dispatcher.service, error)

    async def _count(self, message: Message) -> None:
        attempt = _told(message.headers, _ATTEMPT, 1)
        if attempt >= self.options.attempts:
            await self._bury(message, f"its process ended {attempt} times")
        else:
            await self._move(message, self._queue, {_ATTEMPT: attempt + 1})

    async def _again(self, message: Message, attempt: int) -> None:
        pause = _milliseconds(min(self.options.retry_after * 5 ** (attempt - 1), _MAX_RETRY))
        queue = f"{self._queue}.retry.{pause}"
        arguments = {
            "x-queue-type": self.options.queue_type,
            "x-message-ttl": pause,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": self._queue,
            "x-expires": 2 * pause + 60_000,  # counted from here: it is declared for each event that it takes
        }
        await self._declare(queue, arguments)
        await self._move(message, queue, {_ATTEMPT: attempt + 1})

    async def _bury(self, message: Message, why: str) -> None:
        name = _told(message.headers, _ROUTE, message.routing_key)
        logger.error("%s gives up an event of %s: %s", self.dispatcher.service, name, why)
        dropped.add(self.dispatcher.service, self.scheme, "dead-letter")
        await self._move(message, self._dead, {_ERROR: why})

    async def _move(self, message: Message, queue: str, facts: dict[str, Any]) -> None:
        # First there, then gone here: what is killed between leaves two of them, and never none.
        name = _told(message.headers, _ROUTE, message.routing_key)
        kept = {
            key: value for key, value in message.headers.items() if not key.startswith(("x-death", "x-first-death"))
        }
        properties = message.properties
        properties.headers = {**kept, _ROUTE: name, **facts}
        properties.delivery_mode, properties.expiration, properties.user_id = 2, None, None
        if self._retrying is None:
            return
        taken = await self._retrying.hand_over("", queue, _marshalled(properties), message.body, mandatory=True)
        if not taken:
            raise Unavailable(f"The queue {queue} is gone.")
        message.ack()


async def _declare_events(channel: Channel, options: EventOptions) -> None:
    await channel.call(commands.Exchange.Declare(exchange=options.exchange, exchange_type="topic", durable=True))


def _told(headers: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    value = headers.get(key)
    return value if type(value) is type(otherwise) else otherwise


def _nobody(response: Response) -> None:
    """Where the answer to an event goes."""
