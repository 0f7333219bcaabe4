"""NestJS's MQTT transport (nest-wire.md section 10), for MQTT 3.1.1 and 5."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import msgspec
from msgspec import UNSET

from .. import codec
from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, ConnectionLost, DeadlineExceeded, PacketError, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Packet, Request, Response
from . import Address
from .base import BrokerServer, ClientProxy
from .envelope import read_packet, trace_headers, with_trace
from .mqtt_connection import Hear, MqttConnection, MqttOptions, Qos, ignore, open_connection
from .mqtt_packets import NOBODY, UNENCODABLE, Message, encode_properties, explain
from .mqtt_topics import REPLY, Topics, encode_topic, filters, is_shared

logger = logging.getLogger("microservices.mqtt")

_PATIENCE = 10.0
_MOST_REPLY_TOPICS = 1024
_MOST_DOORS, _LONGEST_KEPT = 4096, 256


class Options(MqttOptions, frozen=True, kw_only=True):
    """What the URL of a service may set."""

    share: Annotated[str, msgspec.Meta(pattern=r"^[^/+#\0]*$")] = ""
    """The group within which each message goes to one server only."""
    clean: bool = True
    """Whether the broker forgets a server that goes. One that is remembered needs a `client_id`."""

    def __post_init__(self) -> None:
        if not self.clean and not self.client_id:
            raise ValueError("clean=false needs a client_id, another in each process")


Told = Literal["payload_format_id", "message_expiry_interval", "content_type", "response_topic", "correlation_data"]


class MqttRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one message may be told: NestJS's MqttRecordBuilder. `headers` travel as user properties."""

    headers: dict[str, str] = {}
    qos: Qos | None = None
    retain: bool = False
    dup: bool = False
    properties: dict[Told, Any] = {}
    """Of MQTT 5; all texts but the first two, which are numbers."""

    def told(self, trace: dict[str, str]) -> dict[Any, Any]:
        """Return all properties that travel."""
        headers = trace | self.headers
        return {**self.properties, "user_property": headers.items()} if headers else {**self.properties}


_NOTHING_TOLD = MqttRecord()


class MqttServer(BrokerServer):
    """Hears requests and events on the topics named as the service's routes."""

    scheme = "mqtt"
    Options: ClassVar[type[MqttOptions]] = Options
    answers: ClassVar[bool] = True

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._read = self.reader(read_packet)
        self._readers: dict[MqttConnection, list[str]] = {}
        self._writer: MqttConnection | None = None
        self._holding = False

    async def listen(self) -> None:
        self._topics = Topics(self.routes)
        # Bounded, in number and length: the peer chooses the topic.
        self._door = lru_cache(_MOST_DOORS)(self._find)
        await super().listen()

    def filters(self) -> dict[Delivery | None, list[str]]:
        """Return what is subscribed, for each kind of delivery that needs a connection of its own."""
        return {None: filters(self.routes, self.options.share)}

    @property
    def keeps(self) -> bool:
        """Whether the broker remembers the session while this process is away."""
        return not self.options.clean

    async def subscribe(self) -> None:
        self._readers, self._writer = {}, None
        if self.options.qos and self.answers:
            # Apart where answers are acknowledged: while nothing is read, no acknowledgement comes.
            self._writer = await self._open(ignore)
        for delivery, heard in self.filters().items():
            name = "-".join(each for each in (self.options.client_id, self.dispatcher.service, delivery) if each)
            reader = await self._open(partial(self._take, delivery), name if self.keeps else "")
            self._readers[reader] = heard
            self._flow()
            if heard:
                await self._subscribe(reader, heard)
            if self.options.version != "5" and any(is_shared(each) for each in heard):
                await self._check_sharing()

    async def _subscribe(self, reader: MqttConnection, heard: list[str]) -> None:
        async with asyncio.timeout(self.options.connect_timeout):
            codes = await reader.subscribe(heard, self.options.qos)
        refused = [f"{each}: {explain(code)}" for each, code in zip(heard, codes, strict=False) if code >= 0x80]
        if len(refused) == len(heard):
            raise Unavailable(f"The MQTT broker refuses the subscription to {'; '.join(refused)}.")
        if refused:  # the others are heard all the same
            logger.error("%s is not heard at %s as %s", self.dispatcher.service, self.address, "; ".join(refused))

    async def _check_sharing(self) -> None:
        # A broker of MQTT 3.1.1 may take `$share/...` for a topic like any other, which nobody ever names.
        arrived = asyncio.Event()
        topic = f"{self.dispatcher.service}/probe/{os.urandom(8).hex()}"
        probe = await self._open(lambda *_: arrived.set())
        try:
            async with asyncio.timeout(min(1, self.options.connect_timeout)):
                await probe.subscribe([f"$share/{self.dispatcher.service}/{topic}"], 0)
                probe.publish(topic.encode(), b"")
                await arrived.wait()
        except TimeoutError:
            hint = "the broker seems to know no shared subscriptions; take share out of the URL, of a bus: share=false"
            logger.error("%s may hear nothing of %s: %s", self.dispatcher.service, self.address, hint)
        finally:
            await probe.close()

    async def _open(self, hear: Hear, name: str = "") -> MqttConnection:
        # One with a name is remembered by it.
        client_id = name or unique(self.options.client_id or self.dispatcher.service)
        drop = partial(dropped.add, self.dispatcher.service, self.scheme)
        return await open_connection(self.address, self.options, client_id, hear, drop, clean=not name)

    async def until_lost(self) -> str:
        ended = [connection.ended for connection in self.unwrap()]
        done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()

    async def unsubscribe(self) -> None:
        for reader, heard in self._readers.items():
            if heard:
                # What the broker has already sent is still taken.
                await asyncio.wait([reader.unsubscribe(heard)])

    async def disconnect(self) -> None:
        for connection in self.unwrap():
            await connection.close()

    def unwrap(self) -> list[MqttConnection]:
        return [*self._readers] if self._writer is None else [*self._readers, self._writer]

    def read(self, message: Message) -> Packet:
        """Return what a message brings."""
        return with_trace(self._read(message.payload), message.headers)

    def _find(self, topic: str) -> _Door:
        own = topic.endswith(REPLY) and topic not in self._topics
        return _Door(self._topics.find(topic), f"{topic}{REPLY}".encode(), own)

    def _take(self, delivery: Delivery | None, connection: MqttConnection, message: Message) -> None:
        if message.qos:
            connection.acknowledge(message)
        topic = message.topic
        door = self._door(topic) if len(topic) <= _LONGEST_KEPT else self._find(topic)
        if door.own:
            return  # our own answer, to a pattern as `users/#`
        answer = _Answer(self, self._writer or connection, door.reply)
        work = answer.task = self.dispatcher.dispatch(
            self.read(message),
            answer,
            transport=self.scheme,
            peer=self.url,
            channel=topic,
            route=door.route,
            headers=message.headers,
            native=message,
        )
        self._watch(connection, self.keep(work))

    def _watch(self, connection: MqttConnection, work: asyncio.Task[Any] | None) -> None:
        if (work is not None and self.full) or self._congestion(connection) is not None:
            connection.hold()  # which may not be one of the readers yet
            self._flow()

    def ended(self, task: asyncio.Task[Any]) -> None:
        super().ended(task)
        if self._holding:
            self._flow()

    def _flow(self, _: object = None) -> None:
        self._holding = False
        for reader in self._readers:
            congestion = self._congestion(reader)
            if congestion is not None:
                # A broker that does not take our answers must not give us more work.
                congestion.add_done_callback(self._flow)
            if self.full or congestion is not None:
                self._holding = True
                reader.hold()
            else:
                reader.release()

    def _congestion(self, reader: MqttConnection) -> asyncio.Future[None] | None:
        return (self._writer or reader).congestion()


class _Door(NamedTuple):
    """A topic that messages come by: the route behind it, where answers go, and whether it is that of our own."""

    route: Route | None
    reply: bytes
    own: bool


class _Answer:
    """Publishes the packets of one answer, as long as anybody listens."""

    __slots__ = ("_connection", "_server", "_topic", "task")

    def __init__(self, server: MqttServer, connection: MqttConnection, topic: bytes) -> None:
        self._server = server
        self._connection = connection
        self._topic = topic
        self.task: asyncio.Task[Any] | None = None

    def __call__(self, response: Response) -> Awaitable[Any] | None:
        body = self._server.encode(response)
        goes_on = response.is_disposed is UNSET
        try:
            sent = self._connection.publish(self._topic, body, self._server.options.qos)
        except ConnectionLost:
            self._nobody(goes_on)
            return None
        if sent is not None:
            sent.add_done_callback(partial(self._sent, goes_on))
            if self._connection.behind:
                return asyncio.shield(sent)
        congestion = self._connection.congestion()
        return None if congestion is None else asyncio.shield(congestion)

    def _sent(self, goes_on: bool, sent: asyncio.Future[int]) -> None:
        code = NOBODY if sent.cancelled() or sent.exception() else sent.result()
        if code == NOBODY:
            self._nobody(goes_on)
        elif code >= 0x80:
            dropped.add(self._server.dispatcher.service, self._server.scheme, "refused-answer")

    def _nobody(self, goes_on: bool) -> None:
        # The caller cannot be reached any more, and a stream may have no end.
        if goes_on and self.task is not None:
            self.task.cancel()


class MqttClient(ClientProxy):
    """Publishes requests and events; one subscription a topic carries all its answers."""

    scheme = "mqtt"
    Options: ClassVar[type[MqttOptions]] = Options
    Record = MqttRecord
    # Every client of a topic sees every answer: an id must not be guessed.
    id_bytes = 16

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._read = self.reader(codec.decode_reply)
        self._v5 = self.options.version == "5"
        self._connection: MqttConnection | None = None
        # The topics whose answers are heard, the last used last, and which request waits for an answer to which.
        self._replies: dict[str, asyncio.Future[bytes]] = {}
        self._asked: dict[str, str] = {}

    def read_record(self, options: Mapping[str, Any]) -> MqttRecord:
        record: MqttRecord = super().read_record(options)
        where = f"{self.scheme}://"
        if (record.headers or record.properties) and self.options.version != "5":
            raise ConfigurationError(f"{where}: headers and properties need MQTT 5: set version=5 in the URL.")
        if record.dup and not self._qos(record):
            raise ConfigurationError(f"{where}: dup needs qos 1 or 2.")
        try:
            encode_properties(record.told({}))
        except UNENCODABLE as error:
            raise ConfigurationError(f"{where}: {options!r} cannot be sent: {error}.") from error
        return record

    def congestion(self) -> asyncio.Future[None] | None:
        return None if self._connection is None else self._connection.congestion()

    async def open(self) -> None:
        client_id = unique(self.options.client_id or self.service)
        drop = partial(dropped.add, self.service, self.scheme)
        self._connection = await open_connection(self.address, self.options, client_id, self._hear, drop)
        self._connection.ended.add_done_callback(self._lost)

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

    def publish(self, request: Request, context: RpcContext) -> Awaitable[None] | None:
        topic, body = encode_topic(context.pattern), self.encode(request)
        subscribed = self._hear_answers(self.live(), request.id, context.pattern)
        if not subscribed.done():
            return self._ask_when_heard(subscribed, topic, body, request.id, context)
        self._ask(subscribed, topic, body, request.id, context)
        return None

    async def _ask_when_heard(
        self, subscribed: asyncio.Future[bytes], topic: bytes, body: bytes, id: str, context: RpcContext
    ) -> None:
        limits = (context.remaining(), context.patience, _PATIENCE)
        await asyncio.wait([subscribed], timeout=min(each for each in limits if each is not None))
        if not subscribed.done():
            raise DeadlineExceeded(f"{self.service} could not be asked in time: its broker is silent.")
        self._ask(subscribed, topic, body, id, context)

    def _ask(self, subscribed: asyncio.Future[bytes], topic: bytes, body: bytes, id: str, context: RpcContext) -> None:
        code = subscribed.result()[0]
        if code >= 0x80:
            route = context.pattern
            self._replies.pop(route, None)
            raise Unavailable(f"The MQTT broker refuses the subscription to {route}{REPLY}: {explain(code)}.")
        sent = self._publish(topic, body, context)
        if sent is not None:
            sent.add_done_callback(partial(self._sent, id))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        sent = self._publish(encode_topic(context.pattern), self.encode(event), context)
        if sent is None:
            return
        try:
            async with asyncio.timeout(_PATIENCE):
                code = await sent
        except TimeoutError:
            raise Unavailable(f"The MQTT broker did not acknowledge the event within {_PATIENCE:g} s.") from None
        if code >= 0x80:
            raise Unavailable(f"The MQTT broker refuses {context.pattern}: {explain(code)}.")
        if code == NOBODY:
            dropped.add(self.service, self.scheme, "nobody-listens")

    def _publish(self, topic: bytes, body: bytes, context: RpcContext) -> asyncio.Future[int] | None:
        if context.record is None and not (self._v5 and context.metadata):
            return self.live().publish(topic, body, self.options.qos)
        record: MqttRecord = context.record or _NOTHING_TOLD
        properties = record.told(trace_headers(context.metadata))
        flags = record.dup << 3 | record.retain
        return self.live().publish(topic, body, self._qos(record), flags=flags, properties=properties)

    def _qos(self, record: MqttRecord) -> int:
        qos: int = self.options.qos if record.qos is None else record.qos
        return qos

    def _sent(self, id: str, sent: asyncio.Future[int]) -> None:
        if sent.cancelled() or sent.exception() is not None:
            return  # all who wait are told
        code = sent.result()
        if code == NOBODY:
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))
        elif code >= 0x80:
            self.fail(id, Unavailable(f"The MQTT broker refuses calls of {self.service}: {explain(code)}."))

    # Answers

    def _hear_answers(self, connection: MqttConnection, id: str, route: str) -> asyncio.Future[bytes]:
        subscribed = self._replies.pop(route, None)
        if subscribed is None:
            self._forget_the_oldest(connection)
            subscribed = connection.subscribe([route + REPLY], self.options.qos)
        self._replies[route] = subscribed  # as the last one
        self._asked[id] = route
        if len(self._asked) > 2 * self.max_pending:
            self._forget_the_answered()
        return subscribed

    def _forget_the_answered(self) -> None:
        self._asked = {id: route for id, route in self._asked.items() if id in self._pending}

    def _forget_the_oldest(self, connection: MqttConnection) -> None:
        # Topics may be made of ids: `users/17`. Neither we nor the broker can keep them all.
        if len(self._replies) < _MOST_REPLY_TOPICS:
            return
        self._forget_the_answered()
        waited_for = set(self._asked.values())
        idle = next((route for route in self._replies if route not in waited_for), None)
        if idle is not None:
            del self._replies[idle]
            connection.unsubscribe([idle + REPLY])

    def _hear(self, connection: MqttConnection, message: Message) -> None:
        if message.qos:
            connection.acknowledge(message)
        try:
            self.receive(self._read(message.payload))
        except (PacketError, msgspec.DecodeError, UnicodeDecodeError):
            dropped.add(self.service, self.scheme, "no-packet")

    def _lost(self, ended: asyncio.Future[str]) -> None:
        self._connection = None
        self._replies.clear()
        self.lost(f"The connection to the MQTT broker was lost: {ended.result()}.")


def unique(name: str) -> str:
    """Return a name that no other connection has."""
    return f"{name}-{os.urandom(6).hex()}"
