"""NestJS's NATS transport (nest-wire.md section 9): at most once; and events that last, in JetStream.

nats-py's own reconnecting is off: meanwhile it would keep messages that nobody has promised to deliver.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import partial
from typing import Any, Self, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType
from nats.aio.client import Client as Driver
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import BadHeaderError, Error, SecureConnWantedError, SlowConsumerError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, StorageType, StreamConfig, StreamInfo
from nats.js.errors import BadRequestError, NotFoundError, ServiceUnavailableError

from .. import codec
from ..context import NO_HEADERS, RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, ConnectionLost, InvalidPayload, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Packet, Reply, Request, Response
from . import Address, Count, Seconds
from .base import BrokerServer, ClientProxy
from .envelope import encode, read_json, trace_headers, with_trace
from .tls import TlsOptions

T = TypeVar("T")

logger = logging.getLogger("microservices.nats")

DEAD = "dead"
"""The stream of what was given up; each service has its subject there."""

_PING = 5  # seconds; a peer that has vanished without a word counts as lost after three of them
_FAREWELL = 1.0
_CANCELLATIONS = 5
_PATIENCE = 10.0
_MAX_UNSENT = 1024 * 1024
_MAX_WAITING_BYTES = 64 * 1024 * 1024
_MAX_SUBJECT = 2048  # bytes: NATS ends a connection that sends a longer line than 4096
_MOST_KNOWN = 4096
# What ends a word for NATS or for the driver, and half characters.
_BLANK = re.compile(r"[ \t\r\n\f\v\ud800-\udfff]")
_DENIED = re.compile(r'(?:publish|subscription) to "((?:[^"\\]|\\.)*)"')
_PULL_FOR = 30.0
_MOST_UNACKNOWLEDGED = 20_000
_TAKEN_NAME = 10058  # JetStream's error for a stream that exists with other bounds
_NO_NAME = re.compile(r"[^A-Za-z0-9_-]+")


class Options(TlsOptions, frozen=True, kw_only=True):
    """What a URL may set beside TLS, which one of its files or names asks for."""

    inbox_prefix: str = "_INBOX"
    queue: str | UnsetType = UNSET
    """The queue group that shares the messages: the service's name, or none where it is empty."""
    max_waiting: Count = 10_000
    """How many messages of a route may wait here; more are dropped, and counted."""

    @property
    def encrypts(self) -> bool:
        """Whether TLS is asked for."""
        return bool(self.certfile or self.cafile or self.server_name)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What may be told beside one message: NestJS's NatsRecordBuilder."""

    headers: dict[str, str] = {}


class Connection(Driver):
    """nats-py's client of one connection, which is not opened again; `ended` tells that it is lost or closed."""

    def __init__(self, on_slow: Callable[[SlowConsumerError], None], encrypts: bool) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self.denied: Counter[str] = Counter()
        """How often NATS refused a subject; it tells these in lower case."""
        self._on_slow = on_slow
        self._encrypts = encrypts
        self._connecting = True
        self._round: asyncio.Task[bool] | None = None
        self._next_round: asyncio.Task[bool] | None = None
        self._posts: deque[tuple[str, bytes]] = deque()
        self._unposted = 0
        self._posting: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None

    async def open(self, url: str, **options: Any) -> None:
        """Connect once, or `end`. Raises nats.errors.Error, OSError or TimeoutError."""
        work = self.connect(
            url,
            error_cb=self._complain,
            closed_cb=self._closed,
            allow_reconnect=False,
            ping_interval=_PING,
            pending_size=8 * _MAX_UNSENT,  # never reached: who publishes waits earlier, where it can be cancelled
            **options,
        )
        connecting = self._loop.create_task(work, context=Context())
        connecting.add_done_callback(_seen)
        try:
            await asyncio.wait([connecting])
            connecting.result()
        except BaseException:
            connecting.cancel()
            await asyncio.wait([connecting], timeout=_FAREWELL)
            self._connecting = False
            self._abort()
            if self.is_connected:  # all the same
                await self.end()
            raise
        self._connecting = False
        if self._reading_task is not None:
            # Sooner than the driver, which waits for a peer that may have vanished; and it may stumble and not tell.
            self._reading_task.add_done_callback(self._end)

    async def end(self) -> None:
        """Send what is left and disconnect, within a second each."""
        if self._posting is not None and not self.ended.done():
            await asyncio.wait([self._posting], timeout=_FAREWELL)
        # In a task of its own, since the driver swallows a cancellation.
        closing = self._loop.create_task(self.close(), context=Context())
        await asyncio.wait([closing], timeout=_FAREWELL)
        self._abort()
        self._end()
        left = (closing, self._posting, self._round, self._next_round)
        tasks: list[asyncio.Task[Any]] = [task for task in left if isinstance(task, asyncio.Task)]
        for task in tasks:
            task.cancel()
            task.add_done_callback(_seen)  # whatever it was, it is over
        await asyncio.wait(tasks, timeout=_FAREWELL)

    async def taken(self) -> None:
        """Return when NATS has taken all that was published before. Raises ConnectionLost.

        Those who wait at the same time share a PING.
        """
        if self._next_round is None:
            self._next_round = self._loop.create_task(self._go_round(self._round), context=Context())
        round = self._next_round
        either: list[asyncio.Future[Any]] = [round, self.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not round.done() or round.cancelled() or not round.result():
            raise ConnectionLost("The connection to NATS was lost.")

    async def put(self, subject: str, body: bytes, reply: str = "", headers: dict[str, str] | None = None) -> None:
        """Publish a message, with the others of this turn of the loop. Raises RpcException."""
        size = len(body) + (_size(headers) if headers else 0)
        if size > self.max_payload:
            # NATS would end the connection under all other calls.
            too_large = f"The message has {size} bytes; this NATS takes {self.max_payload}."
            raise RpcException({"statusCode": 413, "code": "too-large", "message": too_large})
        if self.pending_data_size > _MAX_UNSENT:
            await self.taken()
        try:
            await self.publish(subject, body, reply, headers or None)
        except (BadHeaderError, UnicodeEncodeError) as error:
            raise RpcException({"statusCode": 400, "code": "bad-header", "message": f"{error}."}) from error
        except Error as error:
            raise ConnectionLost(f"The connection to NATS was lost: {_reason(error)}.") from error

    def post(self, subject: str, body: bytes) -> asyncio.Future[None] | None:
        """Publish a message whose fate nobody asks for; gives what to await while NATS takes too little.

        Raises ValueError for one that is too large.
        """
        if len(body) > self.max_payload:
            raise ValueError(f"a message of {len(body)} bytes, where NATS takes {self.max_payload}")
        if self.ended.done():
            return None
        self._posts.append((subject, body))
        self._unposted += len(body)
        if self._posting is None:
            self._posting = self._loop.create_task(self._post_all(), context=Context())
        if self._unposted > _MAX_UNSENT and self._room is None:
            self._room = self._loop.create_future()
        return self._room

    def congestion(self) -> asyncio.Future[None] | None:
        """What to await before more is posted."""
        return self._room

    async def _post_all(self) -> None:
        try:
            while self._posts:
                subject, body = self._posts.popleft()
                self._unposted -= len(body)
                if self.pending_data_size > _MAX_UNSENT:
                    await self.taken()
                with suppress(Error):  # a reply subject that is none, or nobody left to write to
                    await self.publish(subject, body)
        except ConnectionLost:
            self._posts.clear()
        finally:
            self._posting = None
            room, self._room = self._room, None
            if room is not None and not room.done():
                room.set_result(None)

    async def _go_round(self, before: asyncio.Task[bool] | None) -> bool:
        if before is not None:
            await asyncio.wait([before])
        self._round, self._next_round = self._next_round, None
        # Longer than a silent peer counts as there: a PONG that comes after its time-out would end the driver's
        # reading, and nothing else.
        with suppress(Error, OSError):
            await self.flush(10 * _PING)
            return not self.ended.done()  # else it has not even asked
        return False

    def _abort(self) -> None:
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    def _end(self, _: object = None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    async def _closed(self) -> None:
        self._end()

    async def _complain(self, error: Exception) -> None:
        if self._connecting:
            raise error  # else the driver would go round its servers
        if isinstance(error, SlowConsumerError):
            self._on_slow(error)
        elif (denied := _DENIED.search(str(error))) is not None:
            subject = re.sub(r"\\(.)", r"\1", denied[1])
            if len(self.denied) < _MOST_KNOWN:
                self.denied[subject] += 1
                if self.denied[subject] == 1:
                    logger.error("NATS does not allow it: %s", _reason(error))
        elif self.is_connected and not isinstance(error, OSError | Error):
            logger.error("a message from NATS was stumbled over", exc_info=error)

    # What follows overrides the driver's own, which has no doors for it. Where a later version goes another
    # way, only what is said here is lost.

    def _connect_command(self) -> bytes:
        # Credentials come next. The driver encrypts only if the other side says that it must.
        if self._encrypts and not self._server_info.get("tls_required"):
            raise SecureConnWantedError
        return super()._connect_command()

    def _build_message(self, *facts: Any) -> Msg | None:
        message: Msg | None = None
        with suppress(UnicodeDecodeError):  # raised in the driver, it would end its reading for good
            message = super()._build_message(*facts)
        return message


async def _apart(work: Coroutine[Any, Any, T]) -> T:
    """Do something of the driver's in a task of its own: it may swallow a cancellation, as `wait_for` of 3.11 does."""
    task = asyncio.get_running_loop().create_task(work)
    task.add_done_callback(_seen)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        for _ in range(_CANCELLATIONS):  # it may swallow one, and go on to its next wait
            task.cancel()
            await asyncio.wait([task], timeout=0.01)
            if task.done():
                break
        raise
    return task.result()


def _seen(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


class _Opener:
    """How one client or server connects."""

    def __init__(self, address: Address, options: Options, service: str) -> None:
        self.address, self._options, self._service = address, options, service
        self._tls = options.client_context() if options.encrypts else None
        if not _is_subject(options.inbox_prefix) or options.inbox_prefix[-1] in "*>":
            raise ConfigurationError(f"{address}: {options.inbox_prefix!r} cannot start the name of an inbox.")

    def inbox(self) -> str:
        """Return a subject that nobody else has, to add a word to."""
        return f"{self._options.inbox_prefix}.{os.urandom(11).hex()}."

    async def open(self, on_slow: Callable[[SlowConsumerError], None] | None = None) -> Connection:
        """Connect to the first host that answers. Raises Unavailable, naming NATS and the reason."""
        user, password = self.address.username, self.address.password
        tls = {"tls": self._tls, "tls_hostname": self._options.server_name or None} if self._tls else {}
        timeout = self._options.connect_timeout / len(self.address.hosts)
        failure = ""
        for host, port in self.address.hosts:
            place = self.address._replace(host=host, port=port)
            connection = Connection(on_slow or self.slow, self._tls is not None)
            try:
                async with asyncio.timeout(timeout):
                    await connection.open(
                        f"nats://{place.place}",
                        name=self._service,
                        connect_timeout=timeout,
                        inbox_prefix=self._options.inbox_prefix,
                        user=user if password else None,
                        password=password or None,
                        token=None if password else user or None,
                        **tls,
                    )
            except TimeoutError:
                failure = f"no connection within {timeout:g} s"
            except (Error, OSError) as error:
                failure = _reason(error)
            else:
                return connection
        raise Unavailable(f"NATS cannot be reached at {self.address}: {failure}.")

    def slow(self, error: SlowConsumerError) -> None:
        """Count a message that the driver had no room for."""
        dropped.add(self._service, self.address.scheme, "slow-consumer")

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise Unavailable for the driver's own errors."""
        try:
            yield
        except Error as error:
            raise Unavailable(f"NATS at {self.address}: {_reason(error)}.") from error


class NatsServer(BrokerServer):
    """Hears requests and events on the subjects named as the service's routes."""

    scheme = "nats"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._opener = _Opener(address, self.options, dispatcher.service)
        own = _BLANK.sub("-", dispatcher.service)
        self._queue: str = own if self.options.queue is UNSET else self.options.queue
        if _BLANK.search(self._queue):
            raise ConfigurationError(f"{address}: the name of the queue {self._queue!r} must hold no blanks.")
        # Who shares the service's own group takes whatever it is given: nobody else would.
        self._in_own_group = self._queue == own
        self._peer = str(address)
        self._connection: Connection | None = None
        self._subscriptions: list[Subscription] = []
        self._draining: list[asyncio.Task[None]] = []
        self._deaf = False

    async def listen(self) -> None:
        """Subscribe. Raises ConfigurationError for a pattern that can be no subject, naming it."""
        for route in self.routes.values():
            if not _is_subject(route.name):
                targets = [route.request] if route.request else list(route.events)
                raise ConfigurationError(
                    f"{self.address}: the pattern of {targets[0].handler.name} in {self.dispatcher.service}, "
                    f"{route.name!r}, is no subject of NATS: no blanks, no empty words between dots, "
                    "and * and > only as whole words."
                )
        await super().listen()

    async def subscribe(self) -> None:
        connection = self._connection = await self._opener.open()
        self._subscriptions = []
        with self._opener.translated():
            for name, route in self.routes.items():
                for queue, delivery in self._groups(route):
                    take = partial(self._take, connection, route, delivery, name[0] in "*>")
                    subscription = await connection.subscribe(
                        name,
                        queue=queue,
                        cb=take,
                        pending_msgs_limit=self.options.max_waiting,
                        pending_bytes_limit=_MAX_WAITING_BYTES,
                    )
                    self._subscriptions.append(subscription)
        await self._allowed(connection)

    async def until_lost(self) -> str:
        if self._connection is not None:
            await asyncio.wait([self._connection.ended])
        return self._why_lost()

    async def unsubscribe(self) -> None:
        self._draining = [asyncio.create_task(_drained(each)) for each in self._subscriptions]
        try:
            if self._draining:
                # Not gathered: cancelled in the middle of it, the driver would stumble over the answer.
                await asyncio.wait(self._draining)
        finally:
            self._deaf = True

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.end()
        draining, self._draining = self._draining, []
        for task in draining:
            task.cancel()
        if draining:
            await asyncio.wait(draining)

    def unwrap(self) -> Connection | None:
        return self._connection

    def _why_lost(self) -> str:
        error = None if self._connection is None else self._connection.last_error
        return "the connection was lost" if error is None else f"the connection was lost: {_reason(error)}"

    def _groups(self, route: Route) -> list[tuple[str, Delivery | None]]:
        if not self._queue or not route.listeners("each"):
            return [(self._queue, None)]
        if route.request is None and not route.listeners("one"):
            return [("", None)]
        return [(self._queue, "one"), ("", "each")] if self.hears_events else [(self._queue, "one")]

    async def _allowed(self, connection: Connection) -> None:
        async with asyncio.timeout(self.options.connect_timeout):
            await connection.taken()
        if connection.denied:
            raise Unavailable(f"NATS at {self.address} does not allow {', '.join(map(repr, connection.denied))}.")

    async def _take(
        self, connection: Connection, route: Route, delivery: Delivery | None, hidden: bool, message: Msg
    ) -> None:
        if hidden and message.subject.startswith((f"{self.options.inbox_prefix}.", "_INBOX.", "$")):
            return  # answers, and what NATS tells itself, seen by a pattern such as `>`
        while (congestion := connection.congestion()) is not None:
            await asyncio.shield(congestion)
        await self.room()
        if self._deaf:
            return
        try:
            packet = read_json(message.data)
        except PacketError:
            dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            return
        if not self._wanted(packet, delivery):
            return
        headers: Mapping[str, str] = message.headers or NO_HEADERS
        self.handle(
            with_trace(packet, headers) if headers else packet,
            _Answer(connection, message.reply) if message.reply else _nobody,
            peer=self._peer,
            channel=message.subject,
            delivery=delivery if packet.id is UNSET else None,
            route=route,
            headers=headers,
            native=message,
        )

    def _wanted(self, packet: Packet, delivery: Delivery | None) -> bool:
        if packet.id is UNSET:
            return self.hears_events or self._in_own_group
        return delivery != "each"  # the queue group has it, too


async def _drained(subscription: Subscription) -> None:
    with suppress(Error):  # nothing comes any more anyway
        await subscription.drain()  # type: ignore[no-untyped-call]


class _Answer:
    """Publishes the packets of one answer."""

    __slots__ = ("_connection", "_inbox")

    def __init__(self, connection: Connection, inbox: str) -> None:
        self._connection, self._inbox = connection, inbox

    def __call__(self, response: Response) -> Awaitable[None] | None:
        full = self._connection.post(self._inbox, codec.encode(response))
        return None if full is None else asyncio.shield(full)


_Sent = tuple[Connection, int]
"""Where a message was published, and how often its subject had been denied there."""


class NatsClient(ClientProxy):
    """Publishes requests and events; one subscription carries all its answers."""

    scheme = "nats"
    Options = Options
    Record = Record

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._opener = _Opener(address, self.options, service)
        self._inbox = self._opener.inbox()
        self._connection: Connection | None = None
        self._known: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        connection = await self._opener.open(self._slow)
        try:
            await self._prepare(connection)
        except BaseException:
            await connection.end()
            raise
        self._connection = connection
        self._known.clear()
        connection.ended.add_done_callback(partial(self._lost, connection))

    async def publish(self, request: Request, context: RpcContext) -> None:
        subject = context.pattern
        sent = await self._put(subject, encode(request), self._inbox + request.id, _headers(context))
        if subject not in self._known:
            # NATS tells whether it is allowed, but nobody waits for that: the answer may be here sooner.
            self._keep(self._check(subject, sent, request.id))

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        sent = await self._put(context.pattern, encode(event), "", _headers(context))
        await self._allowed(context.pattern, sent)

    async def disconnect(self) -> None:
        if self._connection is not None:
            await self._connection.end()
        if self._tasks:
            await asyncio.wait(self._tasks)  # they end with the connection

    def unwrap(self) -> Connection | None:
        return self._connection

    def live(self) -> Connection:
        """Return the connection. Raises Unavailable where it is gone."""
        if self._connection is None:
            raise Unavailable("NATS closed the connection before the message was sent.")
        return self._connection

    async def _prepare(self, connection: Connection) -> None:
        with self._opener.translated():
            await connection.subscribe(
                f"{self._inbox}*",
                cb=self._take,
                pending_msgs_limit=self.options.max_waiting,
                pending_bytes_limit=_MAX_WAITING_BYTES,
            )
        await connection.taken()
        if connection.denied:
            raise Unavailable(f"NATS at {self.address} does not allow {self._inbox}*, where answers come.")

    async def _put(self, subject: str, body: bytes, reply: str, headers: dict[str, str] | None) -> _Sent:
        """Publish a message. Raises RpcException."""
        connection = self.live()
        if subject not in self._known and not _is_literal(subject):
            text = f"{subject!r} is no subject of NATS: no blanks, and no empty words between dots."
            raise RpcException({"statusCode": 400, "code": "bad-pattern", "message": text})
        before = connection.denied[subject.lower()] if connection.denied else 0
        await connection.put(subject, body, reply, headers)
        return connection, before

    async def _allowed(self, subject: str, sent: _Sent) -> None:
        """Return when NATS has taken what was published. Raises RpcException where it did not."""
        connection, before = sent
        await connection.taken()
        if connection.denied and connection.denied[subject.lower()] > before:
            text = f"NATS at {self.address} does not allow {self.service} to be sent {subject!r}."
            raise RpcException({"statusCode": 403, "code": "forbidden", "message": text})
        if len(self._known) < _MOST_KNOWN:
            self._known.add(subject)

    async def _check(self, subject: str, sent: _Sent, id: str) -> None:
        try:
            await self._allowed(subject, sent)
        except RpcException as error:
            self.fail(id, error)

    async def _take(self, message: Msg) -> None:
        id = message.subject[len(self._inbox) :]
        body = message.data
        if not body:
            self.fail(id, Unavailable(f"Nobody listens for {self.service} on {self.address}."))
            return
        try:
            reply = _read_reply(body)
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

    def _slow(self, error: SlowConsumerError) -> None:
        self._opener.slow(error)
        text = "The answers came too fast."
        overflow = RpcException({"statusCode": 500, "code": "stream-overflow", "message": text})
        self.fail(error.subject[len(self._inbox) :], overflow)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lost(self, connection: Connection, _: asyncio.Future[None]) -> None:
        if self._connection is connection:
            self._connection = None
            self._keep(connection.end())
            self.lost("The connection to NATS was lost.")


# Events


class BusOptions(Options, frozen=True, kw_only=True):
    """What the URL of a bus may set; times in seconds. All but `stream` is for JetStream."""

    stream: str = ""
    """The stream of JetStream that keeps the events; without one they are NATS' own, at most once."""
    max_length: Count = 100_000
    """Events that the stream keeps; older ones go, heard or not. For a stream that is not there yet."""
    max_age: Seconds = 7 * 24 * 3600
    replicas: Count = 1
    prefetch: Count = 50
    """How many events a process works on at a time."""
    attempts: Count = 5
    retry_after: Seconds = 1
    """The pause before the second attempt; each further one is five times longer."""
    ack_wait: Seconds = 15
    """How long a process may be silent about an event before another one gets it."""


class NatsBus(NatsClient):
    """Publishes events; `emit` returns when NATS has them, and where there is a stream, when that has."""

    Options = BusOptions

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._streams = _Streams(self._opener, self.options)
        self._acks: dict[str, asyncio.Future[bytes]] = {}
        self._acked = 0

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        if not self.options.stream:
            await super().dispatch_event(event, context)
            return
        body, headers = encode(event), _headers(context)
        subject = f"{self.options.stream}.{context.pattern}"
        answer = await self._store(subject, body, headers)
        if not answer:
            # Somebody has removed the stream, and nobody is there to keep the event.
            await self._streams.make(self.live(), self.options.stream)
            answer = await self._store(subject, body, headers)
        _check_kept(answer, self.address)

    async def _prepare(self, connection: Connection) -> None:
        await super()._prepare(connection)
        if self.options.stream:
            await self._streams.make(connection, self.options.stream)

    async def _store(self, subject: str, body: bytes, headers: dict[str, str] | None) -> bytes:
        self._acked += 1
        token = f"ack{self._acked:x}"
        ack = self._acks[token] = asyncio.get_running_loop().create_future()
        try:
            sent = await self._put(subject, body, self._inbox + token, headers)
            if subject not in self._known:
                await self._allowed(subject, sent)
            async with asyncio.timeout(_PATIENCE):
                return bytes(await ack)
        except TimeoutError:
            raise Unavailable(f"JetStream on {self.address} did not answer within {_PATIENCE:g} s.") from None
        finally:
            del self._acks[token]

    async def _take(self, message: Msg) -> None:
        ack = self._acks.get(message.subject[len(self._inbox) :])
        if ack is None:
            await super()._take(message)
        elif not ack.done():
            ack.set_result(message.data)

    def lost(self, reason: str) -> None:
        super().lost(reason)
        for ack in self._acks.values():
            if not ack.done():
                ack.set_exception(ConnectionLost(reason))


class NatsListener(NatsServer):
    """Hears the events of a bus: NATS' own, or those of a stream where the option `stream` names one."""

    Options = BusOptions

    def __new__(cls, address: Address, dispatcher: Dispatcher) -> Self:
        kind = _StreamListener if address.options.get("stream") and cls is NatsListener else cls
        return object.__new__(kind)  # type: ignore[return-value]  # one of its own kind

    @property
    def routes(self) -> dict[str, Route]:
        """The routes of events."""
        return {name: route for name, route in self.dispatcher.routes.items() if route.events}

    async def listen(self) -> None:
        """Subscribe. Raises ConfigurationError for a pattern that can be no subject, naming it."""
        if self.routes:
            await super().listen()

    def _wanted(self, packet: Packet, delivery: Delivery | None) -> bool:
        if packet.id is UNSET:
            return True
        return self._in_own_group and super()._wanted(packet, delivery)


class _StreamListener(NatsListener):
    """Hears the events of a stream, a bounded number at a time, and acknowledges them after their handlers."""

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._streams = _Streams(self._opener, self.options)
        self._slots = asyncio.Semaphore(self.options.prefetch)
        ways: tuple[Delivery, ...] = ("one", "each")
        heard = [(route, way) for route in self.routes.values() for way in ways if route.listeners(way)]
        share = max(1, self.options.prefetch // max(1, len(heard)))
        self._feeds = [_Feed(self, route, way, share) for route, way in heard]
        self._created: Any = None
        self._left: list[str] = []

    async def subscribe(self) -> None:
        connection = self._connection = await self._opener.open()
        self._subscriptions = []
        stream = await self._streams.make(connection, self.options.stream)
        await self._streams.make(connection, DEAD)
        if stream.created != self._created:
            # Its numbers begin anew: what is at work has nothing left to acknowledge.
            for feed in self._feeds:
                feed.forget()
            self._created = stream.created
        with self._opener.translated():
            for feed in self._feeds:
                self._subscriptions.append(await feed.open(connection, stream))
        await self._allowed(connection)

    async def until_lost(self) -> str:
        ended = self._live().ended
        tasks = [asyncio.create_task(each) for each in (*(feed.pull() for feed in self._feeds), self._stay())]
        try:
            await asyncio.wait([*tasks, ended], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._why_lost()

    async def unsubscribe(self) -> None:
        self._deaf = True  # what comes now is for another process
        await super().unsubscribe()

    async def finish(self, grace: float) -> int:
        late = await super().finish(grace)
        for reply in self._left:
            self.tell(reply, b"-NAK")  # another process need not wait
        await asyncio.gather(*(feed.remove() for feed in self._feeds))
        return late

    async def _stay(self) -> None:
        while True:
            await asyncio.sleep(self.options.ack_wait / 3)
            for feed in self._feeds:
                for reply in feed.running.values() if feed.delivery == "one" else ():
                    self.tell(reply, b"+WPI")

    def hear(self, feed: _Feed, message: Msg, number: int, attempt: int) -> None:
        """Work on an event, or give it back."""
        if self._deaf:
            self.tell(message.reply, b"-NAK")
            return
        if feed.delivery == "each":
            self.tell(message.reply, b"+ACK")
        feed.running[number] = message.reply
        task = asyncio.get_running_loop().create_task(
            self._work(feed, message, attempt, self._created), context=Context()
        )
        self.keep(task)
        task.add_done_callback(partial(self._worked, feed, number, message.reply))

    def _worked(self, feed: _Feed, number: int, reply: str, task: asyncio.Task[None]) -> None:
        feed.done(number, reply)
        if task.cancelled():
            if feed.delivery == "one":
                self._left.append(reply)
        elif (error := task.exception()) is not None:
            logger.error("%s stumbled over an event", self.dispatcher.service, exc_info=error)

    async def _work(self, feed: _Feed, message: Msg, attempt: int, created: Any) -> None:
        async with self._slots:
            outcome, why = await self._outcome(feed, message, attempt)
            if feed.delivery == "each":
                return
            if why:
                await self._bury(message, why)
            if created == self._created and not outcome.startswith(b"-NAK"):
                feed.settle(_number_and_attempt(message.reply)[0], outcome)
            await self._certainly(created, message.reply, outcome)

    async def _outcome(self, feed: _Feed, message: Msg, attempt: int) -> tuple[bytes, str]:
        if attempt > self.options.attempts:
            return b"+TERM", f"its process ended {attempt - 1} times"
        try:
            packet = read_json(message.data)
        except PacketError:
            if feed.delivery == "each":
                dropped.add(self.dispatcher.service, self.scheme, "no-packet")
            return b"+TERM", "it is no packet"
        packet.id = UNSET
        headers: Mapping[str, str] = message.headers or NO_HEADERS
        task = self.handle(
            with_trace(packet, headers) if headers else packet,
            _nobody,
            peer=self._peer,
            channel=message.subject.removeprefix(f"{self.options.stream}."),
            delivery=feed.delivery,
            route=feed.route,
            headers=headers,
            native=message,
        )
        failures = await task if task is not None else []
        if not failures:
            return b"+ACK", ""
        if all(isinstance(failure, InvalidPayload) for failure in failures):
            return b"+TERM", str(failures[0])
        if attempt >= self.options.attempts:
            return b"+TERM", f"attempt {attempt} failed: {failures[0]!r}"
        pause = self.options.retry_after * 5 ** (attempt - 1)
        return b'-NAK {"delay":%d}' % int(pause * 1e9), ""

    async def _bury(self, message: Msg, why: str) -> None:
        logger.error("%s gives up an event of %s: %s", self.dispatcher.service, message.subject, why)
        dropped.add(self.dispatcher.service, self.scheme, "dead-letter")
        subject = f"{DEAD}.{_NO_NAME.sub('-', self.dispatcher.service)}"
        number = str(_number_and_attempt(message.reply)[0])
        headers = {"stream": self.options.stream, "subject": message.subject, "number": number, "error": why}
        while True:
            await self.connected.wait()
            try:
                await self._streams.keep(self._live(), subject, message.data, headers)
                return
            except Unavailable as error:
                logger.debug("%s", error)
                await asyncio.sleep(0.05)
            with suppress(Unavailable, TimeoutError):
                await self._streams.make(self._live(), DEAD)  # somebody may have removed it

    async def _certainly(self, created: Any, reply: str, outcome: bytes) -> None:
        # The work is done: a connection that is lost now is no reason to do it twice.
        while True:
            await self.connected.wait()
            if created != self._created:
                return
            with suppress(Unavailable):
                connection = self._live()
                await connection.put(reply, outcome)
                await connection.taken()
                return
            await asyncio.sleep(0.05)

    def _live(self) -> Connection:
        if self._connection is None:
            raise ConnectionLost("There is no connection to NATS.")
        return self._connection

    def tell(self, reply: str, outcome: bytes) -> None:
        """Tell what became of an event, or of the work on it."""
        if self._connection is not None:
            self._connection.post(reply, outcome)


class _Feed:
    """What one consumer of a stream brings, asked for as there is room."""

    def __init__(self, listener: _StreamListener, route: Route, delivery: Delivery, share: int) -> None:
        self.route, self.delivery = route, delivery
        self.running: dict[int, str] = {}
        """The events at work by their number in the stream, and where to acknowledge them."""
        self._settled: dict[int, bytes] = {}
        self._listener, self._share = listener, share
        self._stream: str = listener.options.stream
        service = listener.dispatcher.service
        digest = hashlib.sha256(f"{service}\0{route.name}".encode()).hexdigest()[:8]
        self._name = f"{_NO_NAME.sub('-', service)[:60]}_{_NO_NAME.sub('-', route.name)[:60]}_{digest}"
        if delivery == "each":
            self._name = f"{self._name}_{os.urandom(6).hex()}"
        self._last: int | None = None
        self._asked = 0
        self._over = asyncio.Event()
        self._free = asyncio.Event()
        self._free.set()
        self._failure = ""
        self._inbox = ""
        self._connection: Connection | None = None

    async def open(self, connection: Connection, stream: StreamInfo) -> Subscription:
        """Make the consumer and hear what it brings. Raises nats.errors.Error."""
        self._connection, self._asked, self._failure = connection, 0, ""
        self._inbox = f"{self._listener._opener.inbox()}0"
        options = self._listener.options
        manager = connection.jsm(timeout=options.connect_timeout)
        config = ConsumerConfig(
            name=self._name,
            filter_subject=f"{self._stream}.{self.route.name}",
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=options.ack_wait,
            max_deliver=-1,  # who counts must also bury
            max_ack_pending=_MOST_UNACKNOWLEDGED,  # those that wait for their next attempt are among them
        )
        if self.delivery == "one":
            # From the first event: it may be older than the first start of its listener.
            config.durable_name, config.deliver_policy = self._name, DeliverPolicy.ALL
        else:
            if self._last is None or self._last > stream.state.last_seq:
                self._last = stream.state.last_seq
            config.deliver_policy, config.opt_start_seq = DeliverPolicy.BY_START_SEQUENCE, self._last + 1
            config.inactive_threshold = 2 * _PULL_FOR
            with suppress(NotFoundError):  # its place in the stream cannot be changed
                await _apart(manager.delete_consumer(self._stream, self._name))
        await _apart(manager.add_consumer(self._stream, config))
        return await connection.subscribe(self._inbox, cb=self._take, pending_msgs_limit=options.max_waiting)

    async def remove(self) -> None:
        """Remove a consumer that nobody will use again."""
        if self.delivery == "each" and self._connection is not None and self._connection.is_connected:
            with suppress(Error, TimeoutError):
                await self._connection.jsm(timeout=_FAREWELL).delete_consumer(self._stream, self._name)

    async def pull(self) -> None:
        """Ask for events for as long as they come. Raises Unavailable when none can come any more."""
        if self._connection is None:
            return
        ask = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._name}"
        while True:
            await self._free.wait()
            self._asked = self._share - len(self.running)
            self._over.clear()
            body = b'{"batch":%d,"expires":%d}' % (self._asked, int(_PULL_FOR * 1e9))
            await self._connection.put(ask, body, self._inbox)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PULL_FOR + _PATIENCE):
                    await self._over.wait()
            if self._failure:
                raise Unavailable(self._failure)

    def done(self, number: int, reply: str) -> None:
        """Forget an event that is done."""
        if self.running.get(number) == reply:
            del self.running[number]
        if len(self.running) < self._share:
            self._free.set()

    def settle(self, number: int, outcome: bytes) -> None:
        """Remember that an event need not be worked on again."""
        self._settled[number] = outcome
        if len(self._settled) > _MOST_KNOWN:
            del self._settled[next(iter(self._settled))]

    def forget(self) -> None:
        """Forget where the stream was."""
        self.running.clear()
        self._settled.clear()
        self._free.set()
        if self._last is not None:
            self._last = 0

    async def _take(self, message: Msg) -> None:
        if not message.reply:
            self._note((message.headers or {}).get("Status", ""), (message.headers or {}).get("Description", ""))
            return
        self._asked -= 1
        number, attempt = _number_and_attempt(message.reply)
        if self.delivery == "each":
            self._last = number
        if number in self._settled:
            # What it said was lost with its connection, or NATS has forgotten it in a crash.
            self._listener.tell(message.reply, self._settled[number])
        elif number not in self.running:
            self._listener.hear(self, message, number, attempt)
        if len(self.running) >= self._share:
            self._free.clear()
        if self._asked <= 0:
            self._over.set()

    def _note(self, status: str, description: str) -> None:
        if status == "503" or (status == "409" and "Deleted" in description):
            self._failure = f"the consumer {self._name} of the stream {self._stream} is gone"
        elif status == "409":
            logger.debug("NATS ends a pull: %s", description)
            asyncio.get_running_loop().call_later(0.2, self._over.set)
            return
        self._over.set()


class _Streams:
    """The streams of JetStream, made by whoever comes first."""

    def __init__(self, opener: _Opener, options: BusOptions) -> None:
        self._opener, self._options = opener, options
        name = options.stream
        if _NO_NAME.search(name) or name == DEAD:
            raise ConfigurationError(
                f"{opener.address}: {name!r} cannot name the stream of events: letters, digits, - and _, not {DEAD!r}."
            )

    async def make(self, connection: Connection, name: str) -> StreamInfo:
        """Make a stream where there is none; one that is there keeps its bounds. Raises Unavailable."""
        with self._opener.translated():
            return await _apart(self._make(connection, name))

    async def _make(self, connection: Connection, name: str) -> StreamInfo:
        manager = connection.jsm(timeout=self._options.connect_timeout)
        try:
            return await manager.stream_info(name)
        except NotFoundError:
            pass
        except ServiceUnavailableError as error:
            raise Unavailable(f"NATS at {self._opener.address} has no JetStream.") from error
        try:
            return await manager.add_stream(
                StreamConfig(
                    name=name,
                    subjects=[f"{name}.>"],
                    max_msgs=self._options.max_length,
                    max_age=self._options.max_age,
                    num_replicas=self._options.replicas,
                    storage=StorageType.FILE,
                )
            )
        except BadRequestError as error:
            if error.err_code != _TAKEN_NAME:
                raise
            return await manager.stream_info(name)  # another was quicker, with other bounds

    async def keep(self, connection: Connection, subject: str, body: bytes, headers: dict[str, str]) -> None:
        """Put a message into its stream. Raises Unavailable where that does not keep it."""
        fits = _size(headers) + len(body) <= connection.max_payload
        with self._opener.translated():
            js = connection.jetstream(timeout=_PATIENCE)
            await _apart(js.publish(subject, body, headers=headers if fits else None))


def _check_kept(answer: bytes, address: Address) -> None:
    try:
        told = codec.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        told = None
    if not isinstance(told, dict) or "stream" not in told or told.get("error"):
        error = told.get("error") if isinstance(told, dict) else None
        why = error.get("description") if isinstance(error, dict) else "there is no stream for it"
        raise Unavailable(f"JetStream on {address} did not keep the event: {why}.")


def _number_and_attempt(reply: str) -> tuple[int, int]:
    # $JS.ACK.<stream>.<consumer>.<attempt>.<number>...; later versions put a domain and an account before these
    words = reply.split(".")
    shift = 0 if len(words) == 9 else 2
    return int(words[5 + shift]), int(words[4 + shift])


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


_REPLY_KEYS = {"id", "response", "err", "isDisposed", "status"}


def _headers(context: RpcContext) -> dict[str, str] | None:
    trace = trace_headers(context.metadata) if context.metadata else None
    record: Record | None = context.record
    if record is None or not record.headers:
        return trace
    return {**trace, **record.headers} if trace else record.headers


def _size(headers: Mapping[str, str]) -> int:
    return 14 + sum(len(name) + len(value.encode("utf-8", "replace")) + 4 for name, value in headers.items())


def _is_subject(text: str) -> bool:
    """Return whether NATS and the driver can be subscribed to it."""
    words = text.split(".")
    wild = all(word in "*>" or not set(word) & {"*", ">"} for word in words)
    return _is_literal(text) and wild and ">" not in words[:-1]


def _is_literal(text: str) -> bool:
    return not _BLANK.search(text) and "" not in text.split(".") and len(text.encode()) <= _MAX_SUBJECT


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "description", None) or str(error) or repr(error)
    return text.removeprefix("nats: ").strip("'").rstrip(".")


def _nobody(response: Response) -> None:
    """Where the answer to an event goes."""
