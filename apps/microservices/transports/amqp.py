"""One connection to RabbitMQ: AMQP 0-9-1 with pamqp as its codec, frames out in batches, messages in."""

from __future__ import annotations

import asyncio
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
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
from .flow import FlowProtocol
from .tls import TlsOptions

logger = logging.getLogger("microservices.amqp")

Properties = commands.Basic.Properties

_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_KINDS = (_METHOD, _HEADER, _BODY, _HEARTBEAT)
_FRAME = struct.Struct(">BHI")
_FRAME_END = b"\xce"
_BEAT = _FRAME.pack(_HEARTBEAT, 0, 0) + _FRAME_END
_DELIVER = commands.Basic.Deliver.index.to_bytes(4, "big")
_MAX_FRAME = 131_072
_MAX_UNSENT = 1024 * 1024
_LAST_WORDS = 1.0
_NO_AMQP = (struct.error, ValueError, LookupError, TypeError)
"""What pamqp raises for bytes that it cannot read, and for names and tables that it cannot write."""
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
    properties: Properties = Properties()
    body: bytes = b""

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


class _Sent(NamedTuple):
    """A message that the broker has not confirmed yet; the future tells whether a queue took it."""

    future: asyncio.Future[bool]
    key: str
    body: bytes


class Channel:
    """One channel of a connection. Its end is the end of that as well."""

    def __init__(self, connection: Connection, number: int, on_return: Take) -> None:
        self.connection = connection
        self._number = number
        self._on_return = on_return
        self.on_message: Take = ignore
        self._no_ack = True
        self._consumer = ""
        self._answers: deque[asyncio.Future[Any]] = deque()
        self._coming: Message
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
        header = b"\x00\x3c\x00\x00" + len(body).to_bytes(8, "big") + properties
        out = [_publishing(self._number, exchange, key, mandatory), *_framed(_HEADER, self._number, header)]
        limit = self.connection.frame_max - 8
        for start in range(0, len(body), limit):
            out += _framed(_BODY, self._number, body[start : start + limit])
        self.connection.write(*out)

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
        sent = _Sent(asyncio.get_running_loop().create_future(), key, body)
        self._unconfirmed[self._handed_over] = sent
        return await sent.future

    # Methods

    async def call(self, method: Frame) -> Any:
        """Return the broker's answer to a method. Raises ConnectionLost, also where it refuses."""
        self.connection.check()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self.post(method)
        return await answer

    def post(self, method: Frame) -> None:
        """Call a method that has no answer."""
        self.connection.write(*_called(self._number, method))

    def end(self, error: RpcException) -> None:
        """Fail all that waits for the broker."""
        for future in (*self._answers, *(sent.future for sent in self._unconfirmed.values())):
            _fail(future, error)

    # What comes

    def take(self, kind: int, payload: bytes) -> None:
        """Take a frame of this channel. Raises one of _NO_AMQP."""
        if kind == _BODY:
            self._take_body(payload)
        elif kind == _HEADER:
            self._take_header(payload)
        elif payload.startswith(_DELIVER):
            self._take_delivery(payload)
        else:
            self._take_method(_method(payload))

    def _take_delivery(self, payload: bytes) -> None:
        # By hand: pamqp stumbles over names that are no UTF-8, and each message begins with one of these.
        start = 5 + payload[4]
        tag = int.from_bytes(payload[start : start + 8], "big")
        exchange, start_of_key = _short(payload, start + 9)
        key, _ = _short(payload, start_of_key)
        self._coming = Message(self, tag, bool(payload[start + 8]), exchange, key, self._no_ack)

    def _take_header(self, payload: bytes) -> None:
        header = ContentHeader()
        try:
            header.unmarshal(payload)
        except _NO_AMQP:
            logger.debug("The properties of a message on %s cannot be read", self.connection.address)
        self._coming.properties = header.properties
        self._missing = header.body_size
        self._take_body(b"")

    def _take_body(self, payload: bytes) -> None:
        self._parts.append(payload)
        self._missing -= len(payload)
        if self._missing > 0:
            return
        message = self._coming
        message.body = b"".join(self._parts)
        self._parts.clear()
        if message.delivery_tag:
            self.on_message(message)
        else:
            self._not_routed(message)

    def _take_method(self, method: Frame) -> None:
        match method:
            case commands.Basic.Ack() | commands.Basic.Nack():
                self._confirmed(method)
            case commands.Basic.Return():
                self._coming = Message(self, 0, False, method.exchange, method.routing_key or "", True)
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

    def _confirmed(self, verdict: commands.Basic.Ack | commands.Basic.Nack) -> None:
        last = verdict.delivery_tag or 0
        tags = [tag for tag in self._unconfirmed if tag <= last] if verdict.multiple else [last]
        for tag in tags:
            future = self._unconfirmed.pop(tag).future
            if future.done():
                continue
            if isinstance(verdict, commands.Basic.Ack):
                future.set_result(True)
            else:
                future.set_exception(Unavailable(f"RabbitMQ at {self.connection.address} refused the message."))


class Connection(FlowProtocol):
    """Speaks AMQP; `ended` is done, with the reason, when the connection is lost or closed."""

    def __init__(self, address: Address, heartbeat: int, name: str) -> None:
        super().__init__()
        self.address = address
        self.frame_max = _MAX_FRAME
        self._heartbeat = heartbeat
        self._name = name
        self._buffer = b""
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
        self._buffer += data
        self._read()

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
        self.write(*_called(0, commands.Connection.Close(200, "bye", 0, 0)))
        # A broker that says nothing would keep the connection for ever.
        await asyncio.wait([self.ended], timeout=_LAST_WORDS)
        self.transport.abort()

    # Inside

    def _beat(self) -> None:
        if not self._held and self._loop.time() - self._heard > 2 * self._heartbeat:
            self.fail("the broker fell silent")
            return
        self.write(_BEAT)
        self._timer = self._loop.call_later(self._heartbeat / 2, self._beat)

    def _read(self) -> None:
        buffer, position = self._buffer, 0
        try:
            while not self._held and len(buffer) - position > _FRAME.size:
                kind, number, size = _FRAME.unpack_from(buffer, position)
                if kind not in _KINDS or size > _MAX_FRAME:
                    raise ValueError("no frame")
                start = position + _FRAME.size
                if len(buffer) <= start + size:
                    break
                position = start + size + 1
                payload = buffer[start : start + size]
                if number:
                    self._channels[number].take(kind, payload)
                elif kind == _METHOD:
                    self._control(_method(payload))
        except _NO_AMQP as error:
            self.fail(f"the broker sent what is no AMQP: {error}")
        finally:
            self._buffer = buffer[position:]

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
        self.write(*_called(0, method))


class AmqpOptions(TlsOptions, frozen=True, kw_only=True):
    """What the URL of any RabbitMQ may set beside TLS; times in seconds."""

    heartbeat: Count = 10
    """A broker that is silent for twice as long counts as lost."""


SetUp = Callable[[Connection], Awaitable[None]]


async def open_connection(address: Address, options: AmqpOptions, name: str, set_up: SetUp) -> Connection:
    """Connect to the first host that answers, and set up there. Raises Unavailable, naming RabbitMQ and the reason."""
    failure = Unavailable(f"RabbitMQ cannot be reached at {address}.")
    patience = options.connect_timeout / len(address.hosts)
    for host, port in address.hosts:
        try:
            return await _open(address._replace(host=host, port=port, others=()), options, name, set_up, patience)
        except Unavailable as error:
            failure = error
    raise failure


async def _open(address: Address, options: AmqpOptions, name: str, set_up: SetUp, patience: float) -> Connection:
    context = options.client_context() if address.scheme == "amqps" else None
    try:
        async with asyncio.timeout(patience):
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(address, options.heartbeat, name),
                address.host,
                address.port,
                ssl=context,
                server_hostname=(options.server_name or address.host) if context else None,
            )
            try:
                await connection.opened
                await set_up(connection)
            except BaseException:
                connection.transport.abort()
                raise
            return connection
    except TimeoutError:
        raise Unavailable(f"RabbitMQ at {address} did not answer within {patience:g} s.") from None
    except RpcException as error:
        raise Unavailable(error.message) from error
    except (OSError, *_NO_AMQP) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unavailable(f"RabbitMQ cannot be reached at {address}: {reason}.") from error


def ignore(message: Message) -> None:
    """Take no notice of a message."""


def marshalled(part: Frame | Properties) -> bytes:
    """Return what travels for a method or for properties. Raises RpcException for what AMQP has no room for."""
    try:
        return part.marshal()
    except _NO_AMQP as error:
        message = f"AMQP cannot carry this: {error}"
        raise RpcException({"statusCode": 400, "code": "not-amqp", "message": message}) from error


@lru_cache(maxsize=4096)
def _publishing(channel: int, exchange: str, key: str, mandatory: bool) -> bytes:
    method = commands.Basic.Publish(exchange=exchange, routing_key=key, mandatory=mandatory)
    return b"".join(_called(channel, method))


def _called(channel: int, method: Frame) -> tuple[bytes, bytes, bytes]:
    return _framed(_METHOD, channel, method.index.to_bytes(4, "big") + marshalled(method))


def _framed(kind: int, channel: int, payload: bytes) -> tuple[bytes, bytes, bytes]:
    return _FRAME.pack(kind, channel, len(payload)), payload, _FRAME_END


def _method(payload: bytes) -> Frame:
    method: Frame = commands.INDEX_MAPPING[int.from_bytes(payload[:4], "big")]()
    method.unmarshal(payload[4:])
    return method


def _short(payload: bytes, start: int) -> tuple[str, int]:
    end = start + 1 + payload[start]
    return payload[start + 1 : end].decode("utf-8", "replace"), end


def _fail(future: asyncio.Future[Any], error: RpcException) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen, even where nobody waits for it any more
