"""NestJS's MQTT transport (nest-wire.md section 10), for MQTT 3.1.1 and 5, and events over the same brokers.

Of gmqtt only the packets are used. Its client neither tells when a message has been acknowledged nor can it be
made to read slowly, and it keeps on connecting by itself: `reconnect_retries=0` still means one attempt.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from functools import partial
from itertools import zip_longest
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, cast

import msgspec
from gmqtt.mqtt.handler import MQTTConnectError
from gmqtt.mqtt.package import LoginPackageFactor
from gmqtt.mqtt.property import Property
from gmqtt.mqtt.utils import pack_variable_byte_integer
from msgspec import UNSET

from .. import codec
from ..context import NO_HEADERS, RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import (
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    InvalidPayload,
    PacketError,
    RpcException,
    Unavailable,
)
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Request, Response
from . import Address, Count, Seconds
from .base import BrokerServer, ClientProxy
from .envelope import read_packet, trace_headers, with_trace
from .tls import TlsOptions
from .wildcards import Wildcards

logger = logging.getLogger("microservices.mqtt")

_REPLY = "/reply"
_SHARED = re.compile(r"\$share/[^/]*/")
_ODD_FILTER = re.compile(r"[^/][+#]|[+#][^/]|#/")

_PATIENCE = 10.0
_MAX_UNSENT = 1024 * 1024
# Messages of QoS 1 and 2 on their way to a broker that names no number of its own, and those that wait behind them.
_WINDOW = 256
_MOST_WAITING = 10_000
_MOST_REPLY_TOPICS = 1024

_PUBACK, _PUBREC, _PUBREL, _PUBCOMP = 0x40, 0x50, 0x62, 0x70
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux has it
_PING, _BYE = b"\xc0\0", b"\xe0\0"
_NOBODY = 0x10
_REASONS = {
    0x80: "unspecified error",
    0x83: "implementation specific error",
    0x87: "not authorized",
    0x8B: "the broker shuts down",
    0x8D: "keep alive timeout",
    0x8E: "another connection has taken the client_id",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x93: "receive maximum exceeded",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9E: "shared subscriptions not supported",
    0xA2: "wildcard subscriptions not supported",
}
# What one message may say in MQTT 5 beside its user properties, by gmqtt's names.
_TOLD = ("payload_format_id", "message_expiry_interval", "content_type", "response_topic", "correlation_data")

Qos = Annotated[int, msgspec.Meta(ge=0, le=2)]


class ConnectionOptions(TlsOptions, frozen=True, kw_only=True):
    """What any URL may set beside TLS; times in seconds."""

    version: Literal["3.1.1", "5"] = "3.1.1"
    qos: Qos = 0
    keepalive: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 60
    """A broker that says nothing for half of it counts as lost; with 0 the kernel alone decides."""
    client_id: str = ""
    """What the names of the connections begin with. It must differ from process to process."""
    session_expiry: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)] = 24 * 3600
    """How long a broker of MQTT 5 keeps a session whose process is away."""
    max_packet: Annotated[int, msgspec.Meta(ge=1024, le=268_435_455)] = 16 * 1024 * 1024
    """Bytes of one packet; what is larger is neither sent nor taken."""


class Options(ConnectionOptions, frozen=True, kw_only=True):
    """What the URL of a service may set."""

    share: str = ""
    """The group within which each message goes to one server only."""
    clean: bool = True
    """Whether the broker forgets a server that goes. One that is remembered needs a `client_id`."""


class BusOptions(ConnectionOptions, frozen=True, kw_only=True):
    """What the URL of a bus may set. With a `client_id` events wait for a process that is away."""

    qos: Qos = 1
    share: bool = True
    """Whether the broker has shared subscriptions; without them every process hears every event."""
    attempts: Count = 3
    """How often an event is tried that its handlers fail to take."""
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""


class MqttRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one message may be told: NestJS's MqttRecordBuilder. `headers` travel as user properties."""

    headers: dict[str, str] = {}
    qos: Qos | None = None
    retain: bool = False
    dup: bool = False
    properties: dict[str, Any] = {}
    """Of MQTT 5: `message_expiry_interval`, `content_type`, `response_topic`, `correlation_data` (a text), ..."""


class Message(msgspec.Struct):
    """A message as the broker sent it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    id: int
    properties: dict[str, Any]

    @property
    def headers(self) -> Mapping[str, str]:
        """The user properties of MQTT 5; of several with one name the last."""
        pairs = self.properties.get("user_property")
        return dict(pairs) if pairs else NO_HEADERS


Hear = Callable[["MqttConnection", Message], None]


def ignore(*_: Any) -> None:
    """Take no notice."""


class _Dialect(NamedTuple):
    """What gmqtt's packets ask of a connection."""

    proto_ver: int
    proto_name: bytes = b"MQTT"


class MqttConnection(asyncio.Protocol):
    """Speaks MQTT: packets out in batches, each acknowledgement to the one who waits for it."""

    transport: asyncio.Transport

    def __init__(self, options: ConnectionOptions, hear: Hear, flow: Callable[[], None], odd: Callable[[str], None]):
        self._loop = asyncio.get_running_loop()
        self._v5 = options.version == "5"
        self._hear, self._flow, self._odd = hear, flow, odd
        # Reading: what has come, where the next packet begins, how much of it is needed.
        self._chunks: list[bytes] = []
        self._at = self._size = self._needed = self._skip = 0
        self._held = False
        self._max_packet = options.max_packet
        self._unreleased: set[int] = set()  # of QoS 2
        # Writing
        self._out: list[bytes] = []
        self._flushing = False
        self._writable: asyncio.Future[None] | None = None
        self._max_sent = options.max_packet
        self._acks: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._unacked, self._window = 0, _WINDOW
        self._waiting: deque[tuple[int, bytes, bytes, asyncio.Future[int]]] = deque()
        # The connection itself
        self._greeting: asyncio.Future[None] = self._loop.create_future()
        self._pause = options.keepalive / 4
        self._beating: asyncio.TimerHandle | None = None
        self._answer_is_due = False
        self._reason = "the connection was lost"
        self.broker: dict[str, Any] = {}
        """What a broker of MQTT 5 has told of itself."""
        self.resumed = False
        """Whether the broker has remembered the session."""
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Why the connection is lost or closed, when it is."""

    # The connection

    async def greet(self, options: ConnectionOptions, address: Address, client_id: str, clean: bool) -> None:
        """Introduce oneself. Raises Unavailable where the broker does not want that."""
        told: dict[str, Any] = {}
        if self._v5:
            told = {"receive_maximum": min(options.max_in_flight, 65535), "maximum_packet_size": options.max_packet}
            if not clean:
                told["session_expiry_interval"] = options.session_expiry
        dialect = _Dialect(5 if self._v5 else 4)
        user = address.username.encode() if address.username or address.password else None
        password = address.password.encode() if address.password else None
        # As bytes: gmqtt counts the characters of a text.
        self._send(
            LoginPackageFactor.build_package(
                client_id.encode(), user, password, clean, options.keepalive, dialect, **told
            )
        )
        await self._greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)
        self._socket = transport.get_extra_info("socket")

    def connection_lost(self, error: Exception | None) -> None:
        if self._beating is not None:
            self._beating.cancel()
        self.ended.set_result(self._reason)
        lost = ConnectionLost(f"The connection to the MQTT broker was lost: {self._reason}.")
        for future in (self._greeting, *self._acks.values(), *(each[-1] for each in self._waiting)):
            if not future.done():
                future.set_exception(lost)
                future.exception()  # seen, even where nobody waits for it any more
        self._acks.clear()
        self._waiting.clear()
        self.resume_writing()

    async def close(self) -> None:
        """Let what was sent be acknowledged, say goodbye and disconnect."""
        if not self.ended.done():
            if self._unacked:
                await asyncio.wait(list(self._acks.values()), timeout=1)
            self._send(_BYE)
            self._flush()
            self.transport.close()
            # A broker that takes nothing would keep the connection for ever.
            await asyncio.wait([self.ended], timeout=1)
            self.transport.abort()

    def abort(self, reason: str) -> None:
        """End the connection at once."""
        if not self.ended.done():
            self._reason = reason
            self.transport.abort()

    def _beat(self) -> None:
        if self._answer_is_due and not self._held:
            self.abort("the broker says nothing any more")
            return
        self._answer_is_due = not self._held
        self._send(_PING)
        self._beating = self._loop.call_later(self._pause, self._beat)

    # Reading

    def hold(self) -> None:
        """Read nothing more for now; the broker bounds what it keeps for us."""
        if not self._held and not self.transport.is_closing():
            self._held = True
            self.transport.pause_reading()

    def release(self) -> None:
        """Read on."""
        if self._held and not self.transport.is_closing():
            self._held = self._answer_is_due = False
            self.transport.resume_reading()
            self._read()  # what had already come

    def data_received(self, data: bytes) -> None:
        self._answer_is_due = False
        if _QUICKACK is not None:
            # The kernel forgets it with each read. Mosquitto sends nothing small while something is unacknowledged
            # by TCP, which takes 40 ms of its own accord.
            self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        if self._skip:
            passed = min(self._skip, len(data))
            self._skip -= passed
            data = data[passed:]
        if data:
            self._chunks.append(data)
            self._size += len(data)
            if self._size >= self._needed:
                self._read()

    def _read(self) -> None:
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        at, size = self._at, len(data)
        self._needed = 0
        try:
            while at < size and not self._held and not self.transport.is_closing():
                try:
                    length, start = _number(data, at + 1)
                except IndexError:
                    self._needed = size + 1
                    break
                end = start + length
                if length > self._max_packet:
                    if not self._pass_over(data, at, start):
                        break
                    self._skip = max(0, end - size)
                elif end > size:
                    self._needed = end
                    break
                else:
                    self._take(data, at, start, end)
                at = min(end, size)
        except (IndexError, ValueError, struct.error) as error:
            self.abort(f"the broker sent what is no MQTT: {error}")
        if at == size:
            self._chunks, at, size = [], 0, 0
        elif self._held:
            self._chunks = [data]
        else:
            self._chunks, self._needed, at, size = [data[at:]], self._needed - at, 0, size - at
        self._at, self._size = at, size

    def _pass_over(self, data: bytes, at: int, start: int) -> bool:
        # A broker of MQTT 3.1.1 cannot be told what is too large. Unacknowledged, it would come again.
        if data[at] & 0xF0 != 0x30:
            raise ValueError("a packet that is too large")
        head = start + 2 + int.from_bytes(data[start : start + 2])
        if len(data) < start + 2 or len(data) < head + 2:
            self._needed = max(head, start) + 4
            return False
        self._odd("too-large")
        self._acknowledge(data[at] >> 1 & 3, int.from_bytes(data[head : head + 2]))
        return True

    def _take(self, data: bytes, at: int, start: int, end: int) -> None:
        kind = data[at] & 0xF0
        if kind == 0x30:
            message = self._message(data[at], data, start, end)
            if message is not None:
                self._hear(self, message)
            return
        body = data[start:end]
        if kind in (_PUBACK, _PUBREC, _PUBCOMP):
            self._on_ack(kind, int.from_bytes(body[:2]), body[2] if len(body) > 2 else 0)
        elif kind == _PUBREL & 0xF0:
            id = int.from_bytes(body[:2])
            self._unreleased.discard(id)
            self._send(struct.pack("!BBH", _PUBCOMP, 2, id))
        elif kind in (0x90, 0xB0):
            codes = body[_properties(body, 2)[1] if self._v5 else 2 :]
            self._settle(int.from_bytes(body[:2]), codes)
        elif kind == 0x20:
            self._on_connack(body)
        elif kind == 0xE0:
            reason = body[0] if body else 0
            self._reason = f"the broker ended it: {_reason(reason)}"
            self.transport.close()

    def _message(self, first: int, data: bytes, at: int, end: int) -> Message | None:
        qos, id = first >> 1 & 3, 0
        name = at + 2
        at = name + int.from_bytes(data[at:name])
        topic = data[name:at].decode()
        if qos:
            id = int.from_bytes(data[at : at + 2])
            at += 2
        properties: dict[str, Any] = {}
        if self._v5:
            properties, at = _properties(data, at)
        if at > end or qos > 2:
            raise ValueError("a broken PUBLISH")
        if qos == 2:
            if id in self._unreleased:
                return None
            self._unreleased.add(id)
        return Message(topic, data[at:end], qos, bool(first & 1), bool(first & 8), id, properties)

    def _on_connack(self, body: bytes) -> None:
        if self._greeting.done():
            return
        if body[1]:
            self._greeting.set_exception(Unavailable(str(MQTTConnectError(body[1]))))
            return
        if self._v5:
            self.broker = told = _properties(body, 2)[0]
            self._window = min(_WINDOW, told.get("receive_maximum", _WINDOW))
            self._max_sent = min(self._max_sent, told.get("maximum_packet_size", self._max_sent))
            self._pause = told.get("server_keep_alive", self._pause * 4) / 4
        self.resumed = bool(body[0] & 1)
        self._greeting.set_result(None)
        if self._pause:
            self._beating = self._loop.call_later(self._pause, self._beat)

    # Writing

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()
        self._flow()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None:
            if not writable.done():
                writable.set_result(None)
            self._flow()

    def congestion(self) -> asyncio.Future[None] | None:
        """What to await while the broker reads too slowly."""
        return self._writable

    @property
    def behind(self) -> bool:
        """Whether messages wait for the acknowledgement of others."""
        return bool(self._waiting)

    def publish(
        self, topic: bytes, body: bytes, qos: int = 0, *, flags: int = 0, properties: Mapping[str, Any] = NO_HEADERS
    ) -> asyncio.Future[int] | None:
        """Send a message; with QoS 1 and 2 the future holds the broker's reason code, or a ConnectionLost.

        Raises ConnectionLost where the connection is gone, RpcException for what the broker does not take.
        """
        if self.ended.done() or self.transport.is_closing():
            raise ConnectionLost("The connection to the MQTT broker was lost before the message was sent.")
        told = _encoded(properties) if self._v5 else b""
        length = 2 + len(topic) + (2 if qos else 0) + len(told) + len(body)
        self._check(length, qos, flags)
        first = 0x30 | qos << 1 | flags
        head = bytes([first]) + pack_variable_byte_integer(length) + struct.pack("!H", len(topic)) + topic
        rest = told + body
        if not qos:
            self._send(head, rest)
            return None
        if len(self._waiting) >= _MOST_WAITING:
            raise Unavailable("Too many messages wait for the MQTT broker.", code="overloaded")
        future: asyncio.Future[int] = self._loop.create_future()
        if self._unacked < self._window:
            self._post(head, rest, future)
        else:
            self._waiting.append((qos, head, rest, future))
        return future

    def _check(self, length: int, qos: int, flags: int) -> None:
        if length + 5 > self._max_sent:
            text = f"A message of {length} bytes is larger than the {self._max_sent} that may be sent."
            raise RpcException({"statusCode": 413, "code": "too-large", "message": text})
        if qos > self.broker.get("max_qos", 2):
            raise Unavailable(f"The MQTT broker takes no messages of QoS {qos}.")
        if flags & 1 and not self.broker.get("retain_available", 1):
            raise Unavailable("The MQTT broker retains no messages.")

    def _post(self, head: bytes, rest: bytes, future: asyncio.Future[int]) -> None:
        id = self._enter(future)
        self._unacked += 1
        self._send(head, struct.pack("!H", id), rest)

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message of QoS 1 or 2 need not come again."""
        self._acknowledge(message.qos, message.id)

    def _acknowledge(self, qos: int, id: int) -> None:
        if qos and not self.ended.done():
            self._send(struct.pack("!BBH", _PUBREC if qos == 2 else _PUBACK, 2, id))

    async def subscribe(self, filters: Sequence[str], qos: int) -> list[str]:
        """Have messages sent; returns the filters that the broker refuses, each with its reason."""
        granted = await self._request(0x82, [_text(each) + bytes([qos]) for each in filters])
        return [f"{each}: {_reason(code)}" for each, code in zip(filters, granted, strict=False) if code >= 0x80]

    def unsubscribe(self, filters: Sequence[str]) -> asyncio.Future[bytes]:
        """Have no more messages sent; done when the last one has been."""
        return self._request(0xA2, [_text(each) for each in filters])

    def _request(self, kind: int, parts: Sequence[bytes]) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self.ended.done():
            future.set_exception(ConnectionLost("The connection to the MQTT broker was lost."))
            future.exception()  # seen, even where nobody waits for it
        else:
            rest = b"".join([struct.pack("!H", self._enter(future)), b"\0" if self._v5 else b"", *parts])
            self._send(bytes([kind]), bytes(pack_variable_byte_integer(len(rest))), rest)
        return future

    def _enter(self, future: asyncio.Future[Any]) -> int:
        while True:  # far fewer than there are numbers are in use
            self._last_id = self._last_id % 65535 + 1
            if self._last_id not in self._acks:
                self._acks[self._last_id] = future
                return self._last_id

    def _on_ack(self, kind: int, id: int, code: int) -> None:
        if id not in self._acks:
            return
        if kind == _PUBREC and code < 0x80:
            self._send(struct.pack("!BBH", _PUBREL, 2, id))
            return
        self._settle(id, code)
        self._unacked -= 1
        while self._waiting and self._unacked < self._window:
            _, head, rest, future = self._waiting.popleft()
            if not future.done():  # its sender still waits
                self._post(head, rest, future)

    def _settle(self, id: int, result: Any) -> None:
        future = self._acks.pop(id, None)
        if future is not None and not future.done():
            future.set_result(result)

    def _send(self, *parts: bytes) -> None:
        self._out.extend(parts)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._out and not self.transport.is_closing():
            self.transport.write(b"".join(self._out))
        self._out.clear()


async def open_connection(
    address: Address,
    options: ConnectionOptions,
    client_id: str,
    hear: Hear,
    *,
    clean: bool = True,
    flow: Callable[[], None] = ignore,
    odd: Callable[[str], None] = ignore,
) -> MqttConnection:
    """Connect to the first host that answers. Raises Unavailable, naming the broker and the reason."""
    failure = Unavailable(f"The MQTT broker cannot be reached at {address}.")
    patience = options.connect_timeout / len(address.hosts)
    for host, port in address.hosts:
        place = address._replace(host=host, port=port, others=())
        context = options.client_context() if address.scheme == "mqtts" else None
        connection: MqttConnection | None = None
        try:
            async with asyncio.timeout(patience):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: MqttConnection(options, hear, flow, odd),
                    host,
                    port,
                    ssl=context,
                    server_hostname=(options.server_name or host) if context else None,
                )
                await connection.greet(options, place, client_id, clean)
                return connection
        except BaseException as error:
            if connection is not None:
                connection.transport.abort()
            if isinstance(error, TimeoutError):
                failure = Unavailable(f"The MQTT broker at {place} did not answer within {patience:g} s.")
            elif isinstance(error, OSError | RpcException):
                reason = getattr(error, "strerror", None) or error
                failure = Unavailable(f"The MQTT broker cannot be reached at {place}: {reason}.")
            else:
                raise
    raise failure


class MqttServer(BrokerServer):
    """Hears requests and events on the topics named as the service's routes."""

    scheme = "mqtt"
    Options: ClassVar[type[ConnectionOptions]] = Options
    answers: ClassVar[bool] = True

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._readers: list[MqttConnection] = []
        self._writer: MqttConnection | None = None
        self._check_options()

    async def listen(self) -> None:
        self._routes = _by_topic(self.heard())
        self._wildcards = Wildcards(self._routes, separator="/", one="+", rest="#")
        self._check_topics()
        await super().listen()

    def heard(self) -> dict[str, Route]:
        """Return the routes that come this way."""
        return self.routes

    def filters(self) -> dict[Delivery | None, list[str]]:
        """Return what is subscribed, for each kind of delivery that needs a connection of its own."""
        return {None: _filters(self.heard(), f"$share/{self.options.share}/" if self.options.share else "")}

    @property
    def keeps(self) -> bool:
        """Whether the broker remembers the session while this process is away."""
        return not self.options.clean

    async def subscribe(self) -> None:
        self._readers.clear()
        self._writer = None
        if self.options.qos and self.answers:
            # Apart where answers are acknowledged: while nothing is read, no acknowledgement comes.
            self._writer = await self._open("", ignore, clean=True)
        for delivery, filters in self.filters().items():
            name = f"{self.options.client_id}-{self.dispatcher.service}{f'-{delivery}' if delivery else ''}"
            reader = await self._open(name, partial(self._take, delivery), clean=not self.keeps)
            self._readers.append(reader)
            self._writer = self._writer or reader
            self._flow()
            if filters:
                await self._subscribe(reader, filters)
                await self._check_sharing(filters)

    async def _subscribe(self, reader: MqttConnection, filters: Sequence[str]) -> None:
        async with asyncio.timeout(self.options.connect_timeout):
            refused = await reader.subscribe(filters, self.options.qos)
        if len(refused) == len(filters):
            raise Unavailable(f"The MQTT broker refuses the subscription to {'; '.join(refused)}.")
        if refused:  # the others are heard all the same
            logger.error("%s is not heard at %s as %s", self.dispatcher.service, self.address, "; ".join(refused))

    async def _check_sharing(self, filters: Sequence[str]) -> None:
        if self.options.version == "5" or not any(_SHARED.match(each) for each in filters):
            return
        # A broker of MQTT 3.1.1 may take `$share/...` for a topic like any other, which nobody ever names.
        arrived = asyncio.Event()
        probe = f"{self.dispatcher.service}/probe/{os.urandom(8).hex()}"
        where = await self._open("", lambda *_: arrived.set(), clean=True)
        try:
            async with asyncio.timeout(min(1, self.options.connect_timeout)):
                await where.subscribe([f"$share/{self.dispatcher.service}/{probe}"], 0)
                where.publish(probe.encode(), b"")
                await arrived.wait()
        except TimeoutError:
            logger.error(
                "%s may hear nothing of %s: the broker seems to know no shared subscriptions; set share=%s in the URL",
                self.dispatcher.service,
                self.address,
                "false" if isinstance(self.options.share, bool) else "",
            )
        finally:
            await where.close()

    async def _open(self, name: str, hear: Hear, *, clean: bool) -> MqttConnection:
        client_id = _client_id(self.options.client_id or self.dispatcher.service) if clean or not name else name
        odd = partial(dropped.add, self.dispatcher.service, self.scheme)
        return await open_connection(self.address, self.options, client_id, hear, clean=clean, flow=self._flow, odd=odd)

    @property
    def _connections(self) -> list[MqttConnection]:
        writer = self._writer
        return self._readers if writer is None or writer in self._readers else [*self._readers, writer]

    async def until_lost(self) -> str:
        ended = [connection.ended for connection in self._connections]
        done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def unsubscribe(self) -> None:
        for reader, filters in zip(self._readers, self.filters().values(), strict=True):
            if filters:
                # What the broker has already sent is still taken.
                await asyncio.wait([reader.unsubscribe(filters)])

    async def disconnect(self) -> None:
        for connection in self._connections:
            await connection.close()

    def unwrap(self) -> list[MqttConnection]:
        return self._connections

    def _take(self, delivery: Delivery | None, connection: MqttConnection, message: Message) -> None:
        connection.acknowledge(message)
        topic = message.topic
        if topic.endswith(_REPLY) and topic not in self._routes:
            return  # our own answer, to a pattern as `users/#`
        if self._writer is None:
            return
        headers = message.headers
        packet = with_trace(read_packet(self.decode(message.payload)), headers)
        answer = _Answer(self, self._writer, topic, self.options.qos)
        task = self.handle(
            packet,
            answer,
            peer=str(self.address),
            channel=topic,
            route=self._wildcards.find(topic),
            headers=headers,
            native=message,
        )
        self._watch(connection, task)
        answer.task = task

    def _watch(self, connection: MqttConnection, task: asyncio.Task[Any] | None) -> None:
        if task is not None:
            task.add_done_callback(self._flow)
            if self.full:
                connection.hold()  # which may not be one of the readers yet
                self._flow()

    def _flow(self, _: Any = None) -> None:
        for reader in self._readers:
            # A broker that does not take our answers must not give us more work.
            if self.full or any(connection.congestion() is not None for connection in self._connections):
                reader.hold()
            else:
                reader.release()

    def _check_options(self) -> None:
        share, options = getattr(self.options, "share", ""), self.options
        if isinstance(share, str) and re.search(r"[/+#\0]", share):
            raise ConfigurationError(f"{self.address}: share={share} must hold none of / + #.")
        if self.keeps and not options.client_id:
            raise ConfigurationError(f"{self.address}: clean=false needs a client_id, another in each process.")

    def _check_topics(self) -> None:
        for route in self._routes:
            if _ODD_FILTER.search(route):
                raise ConfigurationError(
                    f"{self.dispatcher.service} cannot be heard at {self.address}: in {route!r} + must be a whole "
                    "level of a topic, and # the last one."
                )
            _encoded_topic(route)


class _Answer:
    """Publishes the packets of one answer."""

    __slots__ = ("_connection", "_qos", "_server", "_topic", "task")

    def __init__(self, server: MqttServer, connection: MqttConnection, topic: str, qos: int) -> None:
        self._server = server
        self._connection = connection
        self._topic = topic.encode() + _REPLY.encode()
        self._qos = qos
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, response: Response) -> Awaitable[Any] | None:
        body = self._server.encode(response)
        goes_on = response.is_disposed is UNSET
        try:
            sent = self._connection.publish(self._topic, body, self._qos)
        except ConnectionLost:
            # The caller cannot be reached any more, and a stream may have no end.
            if goes_on and self.task is not None:
                self.task.cancel()
            return None
        if sent is not None:
            sent.add_done_callback(partial(self._sent, goes_on))
            if self._connection.behind:
                return asyncio.shield(sent)
        congestion = self._connection.congestion()
        return None if congestion is None else asyncio.shield(congestion)

    def _sent(self, goes_on: bool, sent: asyncio.Future[int]) -> None:
        code = _NOBODY if sent.cancelled() or sent.exception() else sent.result()
        if code == _NOBODY and goes_on and self.task is not None:
            self.task.cancel()
        elif code >= 0x80:
            dropped.add(self._server.dispatcher.service, self._server.scheme, "refused-answer")


class MqttClient(ClientProxy):
    """Publishes requests and events; one subscription a topic carries all its answers."""

    scheme = "mqtt"
    Options: ClassVar[type[ConnectionOptions]] = Options
    Record = MqttRecord
    # Every client of a topic sees every answer: an id must not be guessed.
    id_bytes = 16

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._connection: MqttConnection | None = None
        self._replies: dict[str, _Replies] = {}

    def read_record(self, options: Mapping[str, Any]) -> MqttRecord:
        record: MqttRecord = super().read_record(options)
        where = f"{self.scheme}://"
        if (record.headers or record.properties) and self.options.version != "5":
            raise ConfigurationError(f"{where}: headers and properties need MQTT 5: set version=5 in the URL.")
        for name in record.properties:
            if name not in _TOLD:
                raise ConfigurationError(f"{where}: unknown property {name!r}; known are {', '.join(_TOLD)}.")
        if record.dup and not (self.options.qos if record.qos is None else record.qos):
            raise ConfigurationError(f"{where}: dup needs qos 1 or 2.")
        try:
            _encoded(record.properties)
        except (struct.error, TypeError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"{where}: {record.properties!r} cannot be sent: {error}.") from error
        return record

    def ready(self) -> bool:
        return self._connection is not None and self._connection.congestion() is None

    async def connect(self) -> None:
        await super().connect()
        congestion = self.live().congestion()
        if congestion is not None:
            await asyncio.shield(congestion)

    async def open(self) -> None:
        client_id = _client_id(self.options.client_id or self.service)
        odd = partial(dropped.add, self.service, self.scheme)
        connection = await open_connection(self.address, self.options, client_id, self._hear, odd=odd)
        self._connection = connection
        connection.ended.add_done_callback(self._lost)

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    def unwrap(self) -> MqttConnection | None:
        return self._connection

    def live(self) -> MqttConnection:
        """Return the connection. Raises Unavailable where it is gone."""
        if self._connection is None:
            raise Unavailable("The MQTT broker closed the connection before the message was sent.")
        return self._connection

    async def publish(self, request: Request, context: RpcContext) -> None:
        connection, route = self.live(), context.pattern
        topic = _encoded_topic(route, concrete=True)
        body = self.encode(request)
        await self._subscribed(connection, route, request.id, context)
        sent = self._publish(connection, topic, body, context)
        if sent is not None:
            sent.add_done_callback(partial(self._sent, request.id))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        topic = _encoded_topic(context.pattern, concrete=True)
        sent = self._publish(self.live(), topic, self.encode(event), context)
        if sent is None:
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                code = await sent
        except TimeoutError:
            raise Unavailable(f"The MQTT broker did not acknowledge the event within {_PATIENCE:g} s.") from None
        if code >= 0x80:
            raise Unavailable(f"The MQTT broker refuses {context.pattern}: {_reason(code)}.")
        if code == _NOBODY:
            dropped.add(self.service, self.scheme, "nobody-listens")

    def _publish(
        self, connection: MqttConnection, topic: bytes, body: bytes, context: RpcContext
    ) -> asyncio.Future[int] | None:
        record: MqttRecord | None = context.record
        properties: dict[str, Any] = {}
        trace = trace_headers(context.metadata) if self.options.version == "5" else {}
        if record is None:
            if trace:
                properties["user_property"] = list(trace.items())
            return connection.publish(topic, body, self.options.qos, properties=properties)
        qos = self.options.qos if record.qos is None else record.qos
        properties.update(record.properties)
        if headers := trace | record.headers:
            properties["user_property"] = list(headers.items())
        return connection.publish(topic, body, qos, flags=record.dup << 3 | record.retain, properties=properties)

    # Answers

    async def _subscribed(self, connection: MqttConnection, route: str, id: str, context: RpcContext) -> None:
        replies = self._replies.pop(route, None)
        if replies is None:
            subscribing = self._subscribe(connection, route + _REPLY)
            task = asyncio.get_running_loop().create_task(subscribing, context=Context())
            task.add_done_callback(partial(self._answerable, route))
            replies = _Replies(task)
            self._forget_the_oldest(connection)
        self._replies[route] = replies  # as the last one
        replies.add(id, self._pending)
        if replies.task.done():
            return
        limits = (context.remaining(), context.patience, _PATIENCE)
        done, _ = await asyncio.wait([replies.task], timeout=min(each for each in limits if each is not None))
        if not done:
            raise DeadlineExceeded(f"{self.service} could not be asked in time: its broker is silent.")
        replies.task.result()

    async def _subscribe(self, connection: MqttConnection, topic: str) -> None:
        refused = await connection.subscribe([topic], self.options.qos)
        if refused:
            raise Unavailable(f"The MQTT broker refuses the subscription to {refused[0]}.")

    def _answerable(self, route: str, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task.exception() is not None:
            replies = self._replies.get(route)
            if replies is not None and replies.task is task:
                del self._replies[route]

    def _forget_the_oldest(self, connection: MqttConnection) -> None:
        # Topics may be made of ids: `users/17`. Neither we nor the broker can keep them all.
        if len(self._replies) < _MOST_REPLY_TOPICS:
            return
        for route, replies in self._replies.items():
            if replies.idle(self._pending):
                del self._replies[route]
                connection.unsubscribe([route + _REPLY])
                return

    def _hear(self, connection: MqttConnection, message: Message) -> None:
        connection.acknowledge(message)
        try:
            self.receive(codec.decode_reply(self.decode(message.payload)))
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError):
            dropped.add(self.service, self.scheme, "no-packet")

    def _sent(self, id: str, sent: asyncio.Future[int]) -> None:
        if sent.cancelled() or sent.exception() is not None:
            return  # all who wait are told
        code = sent.result()
        if code == _NOBODY:
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))
        elif code >= 0x80:
            self.fail(id, Unavailable(f"The MQTT broker refuses calls of {self.service}: {_reason(code)}."))

    def _lost(self, ended: asyncio.Future[str]) -> None:
        self._connection = None
        self._replies.clear()
        self.lost(f"The connection to the MQTT broker was lost: {ended.result()}.")


class _Replies:
    """The subscription of one topic's answers, and the requests that wait for them."""

    __slots__ = ("_ids", "_limit", "task")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self._ids: set[str] = set()
        self._limit = 256

    def add(self, id: str, pending: Mapping[str, Any]) -> None:
        if len(self._ids) >= self._limit:
            self._ids.intersection_update(pending)
            self._limit = max(256, 2 * len(self._ids))
        self._ids.add(id)

    def idle(self, pending: Mapping[str, Any]) -> bool:
        return self.task.done() and self._ids.isdisjoint(pending)


class MqttBus(MqttClient):
    """Publishes events; with QoS 1 and 2 `emit` returns when the broker has them."""

    Options: ClassVar[type[ConnectionOptions]] = BusOptions

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")


class MqttListener(MqttServer):
    """Hears the events of a service: each once in the service, or once in each of its processes.

    With QoS 1 and 2 an event is acknowledged when its handlers have ended, so that the broker still has what
    a process has left; it sends that again when the same `client_id` comes back. What its handlers fail to
    take is tried again here, then given up and counted: left unacknowledged it would hold up all others.
    """

    Options: ClassVar[type[ConnectionOptions]] = BusOptions
    answers = False

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._leaving = False

    @property
    def keeps(self) -> bool:
        return bool(self.options.client_id)

    def filters(self) -> dict[Delivery | None, list[str]]:
        # A connection each: nothing in a message of MQTT 3.1.1 tells for which subscription it came.
        group = f"$share/{self.dispatcher.service}/" if self.options.share else ""
        ways: dict[Delivery, str] = {"one": group, "each": ""}
        heard: dict[Delivery | None, list[str]] = {}
        for delivery, prefix in ways.items():
            routes = [route for route in self.heard() if self.dispatcher.hears(route, delivery)]
            if routes:
                heard[delivery] = _filters(routes, prefix)
        return heard

    def heard(self) -> dict[str, Route]:
        return {name: route for name, route in self.routes.items() if route.events}

    async def listen(self) -> None:
        if self.heard():
            await super().listen()

    async def unsubscribe(self) -> None:
        self._leaving = True
        if not self.keeps:
            await super().unsubscribe()

    def _take(self, delivery: Delivery | None, connection: MqttConnection, message: Message) -> None:
        if self._leaving and self.keeps:
            return  # unacknowledged it waits for the next process of this name
        work = self._work(delivery, connection, message)
        self._watch(connection, self.keep(asyncio.get_running_loop().create_task(work, context=Context())))

    async def _work(self, delivery: Delivery | None, connection: MqttConnection, message: Message) -> None:
        for attempt in range(1, self.options.attempts + 1):
            failures = await self._try(delivery, message)
            if not failures:
                break
            if attempt == self.options.attempts or all(isinstance(each, InvalidPayload) for each in failures):
                logger.error("%s gives up an event of %s: %r", self.dispatcher.service, message.topic, failures[0])
                dropped.add(self.dispatcher.service, self.scheme, "failed-event")
                break
            await asyncio.sleep(self.options.retry_after * 5 ** (attempt - 1))
        connection.acknowledge(message)

    async def _try(self, delivery: Delivery | None, message: Message) -> list[BaseException]:
        headers = message.headers
        packet = with_trace(read_packet(self.decode(message.payload)), headers)
        packet.id = UNSET
        task = self.dispatcher.dispatch(
            packet,
            ignore,
            transport=self.scheme,
            peer=str(self.address),
            channel=message.topic,
            delivery=delivery,
            route=self._wildcards.find(message.topic),
            headers=headers,
            native=message,
        )
        return [] if task is None else cast("list[BaseException]", await task)


def _by_topic(routes: Mapping[str, Route]) -> dict[str, Route]:
    found: dict[str, Route] = {}
    for text, route in routes.items():
        topic = _SHARED.sub("", text, count=1) if text.startswith("$share/") else text
        if topic == text:
            found[topic] = route  # before one that is shared
        else:
            found.setdefault(topic, route)
    return found


def _filters(routes: Iterable[str], prefix: str) -> list[str]:
    plain: list[str] = []
    shared: list[str] = []
    for route in routes:
        (shared if _SHARED.match(route) else plain).append(route)
    # Most brokers send a message once for each filter that it matches, and each would run its handler.
    wide = [route for route in plain if "+" in route or route.endswith("#")]
    needed = [route for route in plain if not any(route != each and _covers(each, route) for each in wide)]
    return [prefix + route for route in needed] + shared


def _covers(wide: str, narrow: str) -> bool:
    if narrow.startswith("$") and wide[0] in "+#":
        return False
    for theirs, ours in zip_longest(wide.split("/"), narrow.split("/")):
        if theirs == "#":
            return True
        if ours in (None, "#") or theirs not in ("+", ours):
            return False
    return True


def _client_id(name: str) -> str:
    return f"{name}-{os.urandom(6).hex()}"


def _reason(code: int) -> str:
    return f"{_REASONS[code]} (0x{code:02x})" if code in _REASONS else f"0x{code:02x}"


def _encoded_topic(route: str, *, concrete: bool = False) -> bytes:
    # The broker would end the connection, under all the other calls on it.
    odd = "\0+#" if concrete else "\0"
    try:
        topic = route.encode()
    except UnicodeEncodeError:
        topic = b""
    if not topic or len(topic) + len(_REPLY) > 65535 or any(each in route for each in odd):
        text = f"{route[:100]!r} cannot be a topic of MQTT: it must have a name, without + and #."
        raise RpcException({"statusCode": 400, "code": "bad-topic", "message": text})
    return topic


def _text(text: str) -> bytes:
    body = text.encode()
    return struct.pack("!H", len(body)) + body


def _number(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value, shift = byte & 127, 7
    while byte >= 128:
        at += 1
        byte = data[at]
        value |= (byte & 127) << shift
        shift += 7
        if shift > 28:
            raise ValueError("a length of more than four bytes")
    return value, at + 1


def _properties(data: bytes, at: int) -> tuple[dict[str, Any], int]:
    if at >= len(data):
        return {}, at
    length, at = _number(data, at)
    left, end = data[at : at + length], at + length
    found: dict[str, Any] = {}
    while left:
        known = Property.factory(id_=left[0])
        if known is None:
            raise ValueError(f"property {left[0]}")
        told, left = known.loads(left[1:])
        for name, value in told.items():
            if name == "user_property":
                found.setdefault(name, []).append(value)
            else:
                found[name] = value
    return found, end


def _encoded(properties: Mapping[str, Any]) -> bytes:
    if not properties:
        return b"\0"
    told = b"".join(
        Property.factory(name=name).dumps(value.encode() if name == "correlation_data" else value)
        for name, value in properties.items()
    )
    return bytes(pack_variable_byte_integer(len(told))) + told
