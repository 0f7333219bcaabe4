"""One connection to RabbitMQ: AMQP 0-9-1 with pamqp as its codec, frames out in batches, messages in."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

import msgspec
from pamqp import commands
from pamqp.base import Frame
from pamqp.header import ContentHeader, ProtocolHeader

from ..context import NO_HEADERS
from ..exceptions import ConnectionLost, RpcException, Unavailable
from . import Address, Count
from . import amqp_frames as frames
from .flow import FlowProtocol
from .tls import TlsOptions

logger = logging.getLogger("microservices.amqp")

Properties = commands.Basic.Properties

_MAX_FRAME = 131_072
_MAX_UNSENT = 1024 * 1024
_LAST_WORDS = 1.0
_DEFAULT = b"\0"
"""The exchange without a name."""
_CAPABILITIES = (
    "authentication_failure_close",
    "basic.nack",
    "connection.blocked",
    "consumer_cancel_notify",
    "publisher_confirms",
)


class Message(msgspec.Struct, eq=False):
    """What the broker delivered, or gave back since no queue takes it."""

    channel: Channel
    delivery_tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    settled: bool
    """Whether the broker wants to hear nothing about it any more."""
    header: bytes
    """The frame that `properties` are read from."""
    correlation_id: bytes
    reply_to: bytes
    """Both as they travel, with their length before them; `properties` has the texts."""
    has_headers: bool
    body: bytes
    _properties: Properties | None = None

    @property
    def properties(self) -> Properties:
        """All that the message says of itself, as far as it can be read."""
        if self._properties is None:
            content = ContentHeader()
            try:
                content.unmarshal(self.header)
            except frames.NO_AMQP:
                logger.debug("The properties of a message on %s cannot be read", self.channel.connection.address)
            self._properties = content.properties
        return self._properties

    @property
    def headers(self) -> Mapping[str, Any]:
        """The table of headers, which may be empty."""
        return (self.properties.headers or NO_HEADERS) if self.has_headers else NO_HEADERS

    def ack(self) -> None:
        """Tell the broker to forget it. Whoever is first settles a message."""
        if not self.settled:
            self.settled = True
            self.channel.write(frames.acked(self.channel.number, self.delivery_tag))

    def nack(self, *, requeue: bool = False) -> None:
        """Give it back to the queue, or to its dead-letter exchange."""
        if not self.settled:
            self.settled = True
            self.channel.write(frames.nacked(self.channel.number, self.delivery_tag, requeue=requeue))


Take = Callable[[Message], None]


class _Sent(NamedTuple):
    """A message that the broker has not confirmed yet; the future tells whether a queue took it."""

    future: asyncio.Future[bool]
    key: str
    body: bytes


class Channel:
    """One channel of a connection. Its end is the end of that as well."""

    def __init__(self, connection: Connection, number: int, on_return: Take) -> None:
        self.connection = connection
        self.number = number
        self.write = connection.write
        self._on_return = on_return
        self.on_message: Take = ignore
        self._no_ack = True
        self._consumer = ""
        self._answers: deque[asyncio.Future[Any]] = deque()
        # The frames of a message that has not come as a whole yet.
        self._announced = self._header = b""
        self._parts: list[bytes] = []
        self._missing = 0
        self._handed_over = 0
        self._unconfirmed: dict[int, _Sent] = {}

    # Queues and exchanges

    async def declare_queue(self, name: str = "", **properties: Any) -> str:
        """Declare a queue and return its name, which the broker chooses where none is given."""
        declared = await self.call(commands.Queue.Declare(queue=name, **properties))
        return str(declared.queue)

    async def declare_exchange(self, name: str, kind: str, arguments: dict[str, Any] | None = None) -> None:
        """Declare an exchange, durable as NestJS has it."""
        await self.call(commands.Exchange.Declare(exchange=name, exchange_type=kind, durable=True, arguments=arguments))

    async def bind(self, queue: str, exchange: str, key: str) -> None:
        """Have an exchange hand messages to a queue."""
        await self.call(commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=key))

    # Consuming

    async def prefetch(self, count: int, *, whole_channel: bool = False) -> None:
        """Be given so many unacknowledged messages at most."""
        await self.call(commands.Basic.Qos(prefetch_count=count, global_=whole_channel))

    async def consume(self, queue: str, take: Take, *, no_ack: bool, tag: str = "") -> None:
        """Have the messages of a queue handed to `take`."""
        self.on_message, self._no_ack = take, no_ack
        consuming = await self.call(commands.Basic.Consume(queue=queue, no_ack=no_ack, consumer_tag=tag))
        self._consumer = consuming.consumer_tag

    async def cancel(self) -> None:
        """Have no more messages handed over; returns when the last one has been."""
        if self._consumer:
            await self.call(commands.Basic.Cancel(consumer_tag=self._consumer))

    # Publishing

    def publish(self, exchange: str, key: str, properties: bytes, body: bytes, *, mandatory: bool = False) -> None:
        """Hand over a message, its properties `marshalled`. Raises RpcException for a name that is too long."""
        place = _place(self.number, exchange, key, mandatory)
        self.write(frames.published(self.number, place, properties, body, self.connection.frame_max))

    def answer(self, queue: bytes, properties: bytes, body: bytes) -> None:
        """Hand over a message to the `reply_to` of another."""
        place = frames.publishing(self.number, _DEFAULT, queue)
        self.write(frames.published(self.number, place, properties, body, self.connection.frame_max))

    async def confirm(self) -> None:
        """Have the broker confirm what is published from now on, by `hand_over` alone."""
        await self.call(commands.Confirm.Select())

    async def hand_over(self, exchange: str, key: str, properties: bytes, body: bytes, *, mandatory: bool) -> bool:
        """Publish and wait for the broker's confirm; returns whether a queue took it, if that is `mandatory`.

        Raises Unavailable where the broker refused it, ConnectionLost where it said nothing, RpcException
        for a name that is too long.
        """
        self.connection.check()
        self.publish(exchange, key, properties, body, mandatory=mandatory)
        self._handed_over += 1
        sent = _Sent(self.connection.future(), key, body)
        self._unconfirmed[self._handed_over] = sent
        return await sent.future

    # Methods

    async def call(self, method: Frame) -> Any:
        """Return the broker's answer to a method. Raises ConnectionLost, also where it refuses."""
        self.connection.check()
        answer: asyncio.Future[Any] = self.connection.future()
        self._answers.append(answer)
        self.post(method)
        return await answer

    def post(self, method: Frame) -> None:
        """Call a method that has no answer."""
        self.write(_called(self.number, method))

    def end(self, error: RpcException) -> None:
        """Fail all that waits for the broker."""
        for future in (*self._answers, *(sent.future for sent in self._unconfirmed.values())):
            _fail(future, error)

    # What comes

    def take(self, kind: int, payload: bytes) -> None:
        """Take a frame of this channel. Raises one of frames.NO_AMQP."""
        if kind == frames.BODY:
            self._parts.append(payload)
            self._missing -= len(payload)
            if self._missing <= 0:
                self._complete()
        elif kind == frames.HEADER:
            self._header = payload
            self._missing = int.from_bytes(payload[4:12])
            if not self._missing:
                self._complete()
        elif payload.startswith((frames.DELIVER, frames.RETURN)):
            self._announced = payload
        elif payload.startswith(frames.ACK):
            self._confirmed(int.from_bytes(payload[4:12]), multiple=payload[12] > 0)
        else:
            self._take_method(_method(payload))

    def take_message(self, delivery: bytes, header: bytes, body: bytes) -> None:
        """Take a message, by its frames. Raises one of frames.NO_AMQP."""
        # By hand: pamqp stumbles over names that are no UTF-8.
        start = 5 + delivery[4]
        tag, redelivered = frames.TAG.unpack_from(delivery, start)
        exchange, key = frames.names_of(delivery[start + frames.TAG.size :])
        facts = frames.facts_of(header)
        self.on_message(Message(self, tag, redelivered > 0, exchange, key, self._no_ack, header, *facts, body))

    def _complete(self) -> None:
        body = b"".join(self._parts)
        self._parts.clear()
        if self._announced.startswith(frames.DELIVER):
            self.take_message(self._announced, self._header, body)
        else:
            exchange, key = frames.names_of(self._announced[7 + self._announced[6] :])
            facts = frames.facts_of(self._header)
            self._not_routed(Message(self, 0, False, exchange, key, True, self._header, *facts, body))

    def _take_method(self, method: Frame) -> None:
        match method:
            case commands.Basic.Nack():
                refused = Unavailable(f"RabbitMQ at {self.connection.address} refused the message.")
                self._confirmed(method.delivery_tag or 0, multiple=bool(method.multiple), refused=refused)
            case commands.Basic.Cancel():
                self.connection.fail("the queue is gone")
            case commands.Channel.Close():
                self.post(commands.Channel.CloseOk())
                self.connection.fail(f"{method.reply_code} {method.reply_text}")
            case _:
                answer = self._answers.popleft()
                if not answer.done():
                    answer.set_result(method)

    def _not_routed(self, message: Message) -> None:
        self._on_return(message)
        # The broker tells the message and not its number; it tells so before it confirms it.
        for future, key, body in self._unconfirmed.values():
            if not future.done() and (key, body) == (message.routing_key, message.body):
                future.set_result(False)
                return

    def _confirmed(self, last: int, *, multiple: bool, refused: Unavailable | None = None) -> None:
        tags = [tag for tag in self._unconfirmed if tag <= last] if multiple else [last]
        for tag in tags:
            future = self._unconfirmed.pop(tag).future
            if future.done():
                continue
            if refused is None:
                future.set_result(True)
            else:
                future.set_exception(refused)


class Connection(FlowProtocol):
    """Speaks AMQP; `ended` is done, with the reason, when the connection is lost or closed."""

    def __init__(self, address: Address, heartbeat: int, name: str) -> None:
        super().__init__()
        self.address = address
        self.frame_max = _MAX_FRAME
        self._heartbeat = heartbeat
        self._name = name
        self._buffer, self._position = b"", 0
        self._channels: dict[int, Channel] = {}
        self._heard = self._loop.time()
        self._reason = ""
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.ended: asyncio.Future[str] = self._loop.create_future()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)
        self.write(ProtocolHeader().marshal())
        self._timer = self._loop.call_later(self._heartbeat / 2, self._beat)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self.ended.set_result(self._reason or str(error or "it was lost"))
        _fail(self.opened, self.gone())
        for channel in self._channels.values():
            channel.end(self.gone())
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        self._buffer, self._position = self._buffer[self._position :] + data if self._buffer else data, 0
        flushing, self._flushing = self._flushing, True
        self._read()
        if not flushing:
            self.flush()  # what was answered at once, without one more turn of the loop

    def read_on(self) -> None:
        self._heard = self._loop.time()  # nobody listened meanwhile
        self._read()

    # What its owners use

    async def channel(self, on_return: Take | None = None) -> Channel:
        """Open one more channel; what no queue takes is given to `on_return`."""
        number = len(self._channels) + 1
        channel = self._channels[number] = Channel(self, number, on_return or ignore)
        await channel.call(commands.Channel.Open())
        return channel

    async def cancel(self) -> None:
        """Have no more messages handed over; returns when the last one has been."""
        for channel in self._channels.values():
            await channel.cancel()

    def future(self) -> asyncio.Future[Any]:
        """Return a future of its loop."""
        return self._loop.create_future()

    def check(self) -> None:
        """Raise ConnectionLost where it has ended."""
        if self.ended.done():
            raise self.gone()

    def gone(self) -> ConnectionLost:
        """Return what everything fails with once it has ended."""
        return ConnectionLost(f"The connection to RabbitMQ at {self.address} ended: {self.ended.result()}.")

    def fail(self, reason: str) -> None:
        """End it for a reason: all that waits for the broker fails with it."""
        self._reason = self._reason or reason
        self.flush()
        self.transport.close()
        self._loop.call_later(_LAST_WORDS, self.transport.abort)  # a broker that reads nothing would keep it open

    async def close(self) -> None:
        """Say good-bye; what was published before has arrived then."""
        for channel in self._channels.values():
            channel.on_message = ignore
        self.release()
        self._answer(commands.Connection.Close(200, "bye", 0, 0))
        # A broker that says nothing would keep the connection for ever.
        await asyncio.wait([self.ended], timeout=_LAST_WORDS)
        self.transport.abort()

    # Inside

    def _beat(self) -> None:
        if not self._held and self._loop.time() - self._heard > 2 * self._heartbeat:
            self.fail("the broker fell silent")
            return
        self.write(frames.BEAT)
        self._timer = self._loop.call_later(self._heartbeat / 2, self._beat)

    def _read(self) -> None:
        try:
            while not self._held and len(self._buffer) - self._position >= frames.AROUND:
                buffer = self._buffer
                kind, number, length = frames.FRAME.unpack_from(buffer, self._position)
                if kind not in frames.KINDS or length > _MAX_FRAME:
                    raise ValueError("no frame")
                start = self._position + frames.FRAME.size
                end = start + length
                if end >= len(buffer):
                    break
                delivery = kind == frames.METHOD and buffer.startswith(frames.DELIVER, start)
                if delivery and self._read_message(buffer, number, start, end):
                    continue
                self._position, payload = end + 1, buffer[start:end]
                if number:
                    self._channels[number].take(kind, payload)
                elif kind == frames.METHOD:
                    self._control(_method(payload))
        except frames.NO_AMQP as error:
            self.fail(f"the broker sent what is no AMQP: {error}")
        if self._position == len(self._buffer):
            self._buffer, self._position = b"", 0

    def _read_message(self, buffer: bytes, number: int, delivery: int, end: int) -> bool:
        """Take a message all of whose frames have come, as nearly all do: its delivery, one header, one body."""
        if len(buffer) - end <= frames.HEAD.size:
            return False
        kind, channel, length, _, size = frames.HEAD.unpack_from(buffer, end + 1)
        header = end + frames.AROUND
        header_end = header + length
        body = header_end + frames.AROUND
        body_end = body + size
        if (
            kind != frames.HEADER
            or channel != number
            or body_end >= len(buffer)
            or length > _MAX_FRAME
            or size > _MAX_FRAME
        ):
            return False
        if frames.FRAME.unpack_from(buffer, header_end + 1) != (frames.BODY, number, size):
            return False
        self._position = body_end + 1
        self._channels[number].take_message(buffer[delivery:end], buffer[header:header_end], buffer[body:body_end])
        return True

    def _control(self, method: Frame) -> None:
        match method:
            case commands.Connection.Start():
                self._answer(self._introduction())
            case commands.Connection.Tune():
                self.frame_max = min(method.frame_max or _MAX_FRAME, _MAX_FRAME)
                self._answer(commands.Connection.TuneOk(method.channel_max, self.frame_max, self._heartbeat))
                self._answer(commands.Connection.Open(virtual_host=unquote(self.address.path[1:]) or "/"))
            case commands.Connection.OpenOk():
                self.opened.set_result(None)
            case commands.Connection.Close():
                self._answer(commands.Connection.CloseOk())
                self.fail(f"{method.reply_code} {method.reply_text}")
            case commands.Connection.CloseOk():
                self.fail("it was closed")
            case commands.Connection.Blocked():
                logger.warning("RabbitMQ at %s takes nothing for now: %s", self.address, method.reason)
                self.pause_writing()
            case commands.Connection.Unblocked():
                self.resume_writing()

    def _introduction(self) -> Frame:
        address = self.address
        user, password = (address.username, address.password) if address.username else ("guest", "guest")
        facts: dict[str, Any] = {"product": "microservices", "connection_name": self._name}
        facts["capabilities"] = dict.fromkeys(_CAPABILITIES, True)
        return commands.Connection.StartOk(facts, "PLAIN", f"\0{user}\0{password}")

    def _answer(self, method: Frame) -> None:
        self.write(_called(0, method))


class AmqpOptions(TlsOptions, frozen=True, kw_only=True):
    """What the URL of any RabbitMQ may set beside TLS; times in seconds."""

    heartbeat: Count = 10
    """A broker that is silent for twice as long counts as lost."""


def ignore(message: Message) -> None:
    """Take no notice of a message."""


def marshalled(part: Frame | Properties) -> bytes:
    """Return what travels for a method or for properties. Raises RpcException for what AMQP has no room for."""
    try:
        return part.marshal()
    except frames.NO_AMQP as error:
        message = f"AMQP cannot carry this: {error}"
        raise RpcException({"statusCode": 400, "code": "not-amqp", "message": message}) from error


@lru_cache(maxsize=4096)
def _place(channel: int, exchange: str, key: str, mandatory: bool) -> bytes:
    return _called(channel, commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory))


def _called(channel: int, method: Frame) -> bytes:
    return frames.framed(channel, method.index.to_bytes(4) + marshalled(method))


def _method(payload: bytes) -> Frame:
    method: Frame = commands.INDEX_MAPPING[int.from_bytes(payload[:4])]()
    method.unmarshal(payload[4:])
    return method


def _fail(future: asyncio.Future[Any], error: RpcException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen, even where nobody waits for it any more
