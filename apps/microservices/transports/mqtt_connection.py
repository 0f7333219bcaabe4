"""One connection to an MQTT broker, 3.1.1 or 5: packets out in batches, messages and acknowledgements in.

It has no driver: of those that there are none both tells when a message has been acknowledged and can be made
to read slowly.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import msgspec

from ..context import NO_HEADERS
from ..exceptions import ConnectionLost, RpcException, Unavailable
from . import Address
from . import mqtt_packets as packets
from .flow import FlowProtocol
from .mqtt_packets import Message, explain
from .tls import TlsOptions

_MAX_UNSENT = 1024 * 1024
# Messages of QoS 1 and 2 on their way to a broker that names no number of its own, and those that wait behind them.
_WINDOW = 256
_MOST_WAITING = 10_000
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)  # Linux has it

Qos = Annotated[int, msgspec.Meta(ge=0, le=2)]


class MqttOptions(TlsOptions, frozen=True, kw_only=True):
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


Hear = Callable[["MqttConnection", Message], None]
Drop = Callable[[str], None]
"""Counts what is lost, by the reason."""


def ignore(*_: Any) -> None:
    """Take no notice."""


class MqttConnection(FlowProtocol):
    """Speaks MQTT: messages to the one who hears them, each acknowledgement to the one who waits for it."""

    def __init__(self, options: MqttOptions, hear: Hear, drop: Drop = ignore) -> None:
        super().__init__()
        self._v5 = options.version == "5"
        self._hear, self._drop = hear, drop
        # Reading: from where in the bytes, what has come since, how much the next packet lacks, what is passed over.
        self._buffer, self._position = b"", 0
        self._parts: list[bytes] = []
        self._missing = self._skip = 0
        self._max_taken = options.max_packet
        self._unreleased: set[int] = set()  # of QoS 2
        # Writing
        self._max_sent = options.max_packet
        self._acks: dict[int, asyncio.Future[Any]] = {}
        self._last_id = 0
        self._unacked, self._window = 0, _WINDOW
        self._waiting: deque[tuple[Callable[[bytes], bytes], asyncio.Future[int]]] = deque()
        # The connection itself
        self._greeting: asyncio.Future[None] = self._loop.create_future()
        self._pause = options.keepalive / 4
        self._beating: asyncio.TimerHandle | None = None
        self._answer_is_due = False
        self._reason = "the connection was lost"
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Why the connection is lost or closed, when it is."""

    # The connection

    async def greet(self, packet: bytes) -> None:
        """Introduce oneself with a CONNECT. Raises Unavailable where the broker does not want that."""
        self.write(packet)
        await self._greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_MAX_UNSENT)
        self._socket = transport.get_extra_info("socket")

    def connection_lost(self, error: Exception | None) -> None:
        if self._beating is not None:
            self._beating.cancel()
        self.ended.set_result(self._reason)
        for future in (self._greeting, *self._acks.values(), *(each[-1] for each in self._waiting)):
            self._fail(future)
        self._acks.clear()
        self._waiting.clear()
        self.resume_writing()

    async def close(self) -> None:
        """Let what was sent be acknowledged, say goodbye and disconnect."""
        if not self.ended.done():
            if self._unacked:
                await asyncio.wait(list(self._acks.values()), timeout=1)
            self.write(bytes([packets.DISCONNECT, 0]))
            self.flush()
            self.transport.close()
            # A broker that takes nothing would keep the connection for ever.
            await asyncio.wait([self.ended], timeout=1)
            self.transport.abort()

    def _abort(self, reason: str) -> None:
        self._reason = reason
        self.transport.abort()

    def _beat(self) -> None:
        if self._answer_is_due and not self._held:
            self._abort("the broker says nothing any more")
            return
        self._answer_is_due = not self._held
        self.write(bytes([packets.PINGREQ, 0]))
        self._beating = self._loop.call_later(self._pause, self._beat)

    # Reading

    def read_on(self) -> None:
        self._answer_is_due = False  # nobody listened meanwhile
        self._read()

    def data_received(self, data: bytes) -> None:
        self._answer_is_due = False
        if self._skip:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
        self._parts.append(data)
        self._missing -= len(data)
        self._read()
        if _QUICKACK is not None and not self._flushing:
            # Mosquitto sends nothing small while something is unacknowledged by TCP, which takes 40 ms of its own
            # accord where nothing is sent that it can go with. The kernel forgets it with each read.
            self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)

    def _read(self) -> None:
        if self._missing > 0:
            return
        if self._parts:
            if self._position < len(self._buffer):
                self._parts.insert(0, self._buffer[self._position :])
            self._buffer, self._position = b"".join(self._parts), 0
            self._parts.clear()
        try:
            while not self._held and self._position < len(self._buffer) and not self.transport.is_closing():
                if not self._take_next(self._buffer, self._position):
                    return
        except (LookupError, ValueError, struct.error) as error:
            self._abort(f"the broker sent what is no MQTT: {error}")
        if self._position == len(self._buffer):
            self._buffer, self._position = b"", 0

    def _take_next(self, data: bytes, at: int) -> bool:
        first = data[at]
        try:
            length, start = packets.read_number(data, at + 1)
        except IndexError:
            return False
        end = start + length
        if length > self._max_taken:
            return self._take_large(first, data, start, end)
        if end > len(data):
            self._missing = end - len(data)
            return False
        self._position = end
        if first & 0xF0 == packets.PUBLISH:
            message = packets.read_message(first, data, start, end, v5=self._v5)
            if message.id not in self._unreleased:
                if message.qos == 2:
                    self._unreleased.add(message.id)
                self._hear(self, message)
        else:
            self._take(first & 0xF0, data[start:end])
        return True

    def _take_large(self, first: int, data: bytes, start: int, end: int) -> bool:
        if first & 0xF0 != packets.PUBLISH:
            raise ValueError("a packet that is too large")
        head, size = min(end, start + packets.PUBLISH_HEAD), len(data)
        if head > size:
            self._missing = head - size
            return False
        self._position, self._skip = min(end, size), max(0, end - size)
        # A broker of MQTT 3.1.1 cannot be told what is too large. Unacknowledged, it would come again.
        self._drop("too-large")
        self.acknowledge(packets.read_message(first, data, start, head, v5=False))
        return True

    def _take(self, kind: int, body: bytes) -> None:
        id = int.from_bytes(body[:2])
        if kind in (packets.PUBACK, packets.PUBREC, packets.PUBCOMP):
            self._take_ack(kind, id, body[2] if len(body) > 2 else 0)
        elif kind == packets.PUBREL & 0xF0:
            self._unreleased.discard(id)
            self.write(struct.pack("!BBH", packets.PUBCOMP, 2, id))
        elif kind in (packets.SUBACK, packets.UNSUBACK):
            length, at = packets.read_number(body, 2) if self._v5 else (0, 2)
            self._settle(id, body[at + length :])
        elif kind == packets.CONNACK:
            self._take_greeting(body)
        elif kind == packets.DISCONNECT:
            self._reason = f"the broker ended it: {explain(body[0] if body else 0)}"
            self.transport.close()

    def _take_ack(self, kind: int, id: int, code: int) -> None:
        if id not in self._acks:
            return
        if kind == packets.PUBREC and code < 0x80:
            self.write(struct.pack("!BBH", packets.PUBREL, 2, id))
            return
        self._settle(id, code)
        self._unacked -= 1
        while self._waiting and self._unacked < self._window:
            message, future = self._waiting.popleft()
            if not future.done():  # its sender still waits
                self._post(message, future)

    def _take_greeting(self, body: bytes) -> None:
        if self._greeting.done():
            return
        if body[1]:
            self._greeting.set_exception(Unavailable(explain(body[1])))
            return
        if self._v5:
            told = packets.read_properties(body, 2)[0]
            self._window = min(_WINDOW, told.get("receive_maximum", _WINDOW))
            self._max_sent = min(self._max_sent, told.get("maximum_packet_size", self._max_sent))
            self._pause = told.get("server_keep_alive", self._pause * 4) / 4
        self._greeting.set_result(None)
        if self._pause:
            self._beating = self._loop.call_later(self._pause, self._beat)

    # Writing

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
        if self.transport.is_closing():
            raise ConnectionLost("The connection to the MQTT broker was lost before the message was sent.")
        told = packets.encode_properties(properties) if self._v5 else b""
        length = 2 + len(topic) + (2 if qos else 0) + len(told) + len(body)
        if length + 5 > self._max_sent:
            text = f"A message of {length} bytes is larger than the {self._max_sent} that may be sent."
            raise RpcException({"statusCode": 413, "code": "too-large", "message": text})
        if not qos:
            self.write(packets.publish(flags, topic, b"", told, body))
            return None
        if len(self._waiting) >= _MOST_WAITING:
            raise Unavailable("Too many messages wait for the MQTT broker.", code="overloaded")
        message = partial(packets.publish, qos << 1 | flags, topic, told=told, body=body)
        future: asyncio.Future[int] = self._loop.create_future()
        if self._unacked < self._window:
            self._post(message, future)
        else:
            self._waiting.append((message, future))
        return future

    def acknowledge(self, message: Message) -> None:
        """Tell the broker that a message of QoS 1 or 2 need not come again."""
        if message.qos:
            self.write(struct.pack("!BBH", packets.PUBREC if message.qos == 2 else packets.PUBACK, 2, message.id))

    def subscribe(self, filters: Sequence[str], qos: int) -> asyncio.Future[bytes]:
        """Have messages sent; the future holds the broker's reason code for each filter, or a ConnectionLost."""
        return self._request(packets.SUBSCRIBE, [packets.text(each) + bytes([qos]) for each in filters])

    def unsubscribe(self, filters: Sequence[str]) -> asyncio.Future[bytes]:
        """Have no more messages sent; done when the last one has been."""
        return self._request(packets.UNSUBSCRIBE, [packets.text(each) for each in filters])

    def _post(self, message: Callable[[bytes], bytes], future: asyncio.Future[int]) -> None:
        self._unacked += 1
        self.write(message(self._enter(future)))

    def _request(self, kind: int, parts: Sequence[bytes]) -> asyncio.Future[bytes]:
        future: asyncio.Future[bytes] = self._loop.create_future()
        if self.ended.done():
            self._fail(future)
        else:
            body = b"".join((self._enter(future), packets.encode_properties({}) if self._v5 else b"", *parts))
            self.write(bytes([kind]), packets.number(len(body)), body)
        return future

    def _enter(self, future: asyncio.Future[Any]) -> bytes:
        while True:  # far fewer than there are numbers are in use
            self._last_id = self._last_id % 65535 + 1
            if self._last_id not in self._acks:
                self._acks[self._last_id] = future
                return struct.pack("!H", self._last_id)

    def _settle(self, id: int, result: Any) -> None:
        future = self._acks.pop(id, None)
        if future is not None and not future.done():
            future.set_result(result)

    def _fail(self, future: asyncio.Future[Any]) -> None:
        if not future.done():
            future.set_exception(ConnectionLost(f"The connection to the MQTT broker was lost: {self._reason}."))
            future.exception()  # seen, even where nobody waits for it any more


async def open_connection(
    address: Address, options: MqttOptions, client_id: str, hear: Hear, drop: Drop = ignore, *, clean: bool = True
) -> MqttConnection:
    """Connect to the first host that answers. Raises Unavailable, naming the broker and the reason."""
    failure = Unavailable(f"The MQTT broker cannot be reached at {address}.")
    greeting = _greeting(address, options, client_id, clean)
    patience = options.connect_timeout / len(address.hosts)
    for host, port in address.hosts:
        connection = MqttConnection(options, hear, drop)
        place = address._replace(host=host, port=port, others=())
        try:
            async with asyncio.timeout(patience):
                await _open(connection, place, options, greeting)
            return connection
        except TimeoutError:
            failure = Unavailable(f"The MQTT broker at {place} did not answer within {patience:g} s.")
        except (OSError, RpcException) as error:
            reason = getattr(error, "strerror", None) or error
            failure = Unavailable(f"The MQTT broker cannot be reached at {place}: {reason}.")
    raise failure


async def _open(connection: MqttConnection, place: Address, options: MqttOptions, greeting: bytes) -> None:
    context = options.client_context() if place.scheme == "mqtts" else None
    name = (options.server_name or place.host) if context else None
    transport, _ = await asyncio.get_running_loop().create_connection(
        lambda: connection, place.host, place.port, ssl=context, server_hostname=name
    )
    try:
        await connection.greet(greeting)
    except BaseException:
        transport.abort()
        raise


def _greeting(address: Address, options: MqttOptions, client_id: str, clean: bool) -> bytes:
    told = {
        "receive_maximum": min(options.max_in_flight, 65535),
        "maximum_packet_size": options.max_packet,
        "session_expiry_interval": 0 if clean else options.session_expiry,
    }
    who = (client_id, address.username, address.password)
    properties = told if options.version == "5" else None
    return packets.connect(*who, options.keepalive, clean=clean, properties=properties)
