"""NestJS's Kafka transport (nest-wire.md section 12): no envelope; what stands beside the payload is headers.

A record's value is the payload as NestJS writes it: objects and lists as JSON, strings as they are, numbers and
booleans as text, null as no value. So that our own peers get back what went, `kafka_type` says `json` or `text`
where the bytes alone would be misread, and `none` for the end of a stream; NestJS overlooks it.

A server hears in a group and commits what is done: per partition the highest offset before which nothing is open.
A client reads its answers from one partition without a group, from the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from contextvars import Context
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RequestTimedOutError,
)
from msgspec import UNSET, Raw

from .. import codec
from ..context import RpcContext, deadline_on_wire
from ..dispatcher import Dispatcher, Route
from ..exceptions import ConfigurationError, ConnectionLost, InvalidPayload, PacketError, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Event, Packet, Reply, Request, Response, pattern_name
from . import Address, Count, Seconds
from .base import BrokerServer, ClientProxy
from .tls import TlsOptions

logger = logging.getLogger("microservices.kafka")

CORRELATION = "kafka_correlationId"
REPLY_TOPIC = "kafka_replyTopic"
REPLY_PARTITION = "kafka_replyPartition"
ERROR = "kafka_nest-err"
DISPOSED = "kafka_nest-is-disposed"
TYPE = "kafka_type"

_OURS = "kafka_"
_REPLY = ".reply"
_LONGEST_NAME = 249
_LEGAL = re.compile(r"[a-zA-Z0-9._-]+")
_NULL = Raw(b"null")
_NOTHING: Any = object()
"""Stands for no value: aiokafka wants a key or a value, NestJS sends records with neither."""

_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_PULSE = 0.5
_JOIN_LIMIT = 60.0
_END_LIMIT = 2.0
_COMMIT_PAUSE = 0.05
_MOST_ANSWERS = 1000
_MOST_OPEN = 10_000
_MOST_PEERS = 1000
_SKEW = 1000
_PAGE = 256
_HOLD_LIMIT = 2.0

Headers = list[tuple[str, bytes]]


class Options(TlsOptions, frozen=True, kw_only=True):
    """What a URL may set; times in seconds. A user's name in the URL means SASL."""

    tls: bool = False
    mechanism: str = "PLAIN"
    """How the user proves itself: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."""
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
    fetch_wait: Seconds = 0.1
    """How long a broker may hold an empty fetch; a client waits as long for the first answers to a new pattern."""
    create_topics: bool = True
    partitions: Count = 1
    """How many partitions a topic is made with: as many processes of a service can share its messages."""
    replication: Count = 1
    acks: Literal["all", "1", "0"] = "all"
    idempotent: bool = True
    """Whether retries of the driver write no doubles; where a broker cannot, it does without."""
    max_message: Count = 1_048_576
    reply_partition: Annotated[int, msgspec.Meta(ge=0)] = 0
    attempts: Count = 5
    retry_after: Seconds = 0.5
    """A listener's pause before the second attempt; each further one is three times longer."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may say beside one message; `timestamp` in milliseconds since 1970.

    The deadline of a request counts from its timestamp: an old one makes it too late.
    """

    key: str | None = None
    headers: dict[str, str] = {}
    partition: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timestamp: int | None = None


_PLAIN = Record()


# Names


@lru_cache(maxsize=4096)
def topic_of(route: str, prefix: str = "") -> str:
    """Return the topic of a route: its own name, or its short one; where neither is legal, one made of it."""
    longest = _LONGEST_NAME - len(_REPLY) - len(prefix)
    short = pattern_name(route)
    for name in (route, short):
        if _LEGAL.fullmatch(name) and len(name) <= longest and name not in (".", ".."):
            return prefix + name
    tail = hashlib.sha256(route.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    readable = re.sub(r"[^a-zA-Z0-9._-]+", "-", short)[:100]
    return f"{prefix}{readable}-{tail}"


def _checked(address: Address, options: Options) -> None:
    """Raise ConfigurationError, at start, for what would only be found when it connects."""
    if options.prefix and not _LEGAL.fullmatch(options.prefix):
        raise ConfigurationError(
            f"{address}: {options.prefix!r} cannot stand before a topic: letters, digits, dots, _ and - only."
        )
    if options.mechanism not in _MECHANISMS:
        raise ConfigurationError(f"{address}: {options.mechanism!r} is none of {', '.join(_MECHANISMS)}.")
    if options.tls:
        options.client_context()


def _by_topic(routes: Iterable[str], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for route in routes:
        other = found.setdefault(topic_of(route, prefix), route)
        if other != route:
            raise ConfigurationError(f"{other!r} and {route!r} would share the topic {topic_of(route, prefix)!r}.")
    for topic in found:
        if topic.endswith(_REPLY) and topic.removesuffix(_REPLY) in found:
            raise ConfigurationError(f"The topic {topic!r} would carry the answers to {topic.removesuffix(_REPLY)!r}.")
    return found


# Values


def write_value(data: Any) -> tuple[bytes | None, bytes | None]:
    """Return a value as NestJS writes it, and its type where the bytes do not tell.

    Raises what `codec.UNENCODABLE` names.
    """
    if data is None or data is UNSET:
        return None, None
    if isinstance(data, str):
        text = data.encode()
    else:
        body = codec.encode(data)
        if body == b"null":
            return None, None
        if body[0] in b"{[":
            return body, None
        if body[0] != ord('"'):
            return body, b"json"
        text = codec.decode(body).encode()
    return text, b"text" if text[:1] in (b"{", b"[") else None


def read_value(value: bytes | None, kind: bytes | None) -> Raw:
    """Return a value as JSON: what NestJS would make of it, unless a peer of ours says what it is."""
    if value is None:
        return _NULL
    if kind == b"json" or (kind is None and value[:1] in (b"{", b"[")):
        json = _json(value)
        if json is not None:
            return json
    return Raw(codec.encode(value.decode("utf-8", "replace")))


def _json(value: bytes) -> Raw | None:
    try:
        value.decode()
        return msgspec.json.decode(value, type=Raw)
    except UnicodeDecodeError:
        return None
    except (msgspec.DecodeError, RecursionError):
        # Half a character, as JavaScript may send it, is mended where packets are read.
        with suppress(PacketError, msgspec.DecodeError, UnicodeDecodeError):
            mended = codec.decode_reply(b'{"response":' + value + b"}").response
            return mended if isinstance(mended, Raw) else None
        return None


def _encoded(data: Any) -> tuple[bytes | None, bytes | None]:
    try:
        return write_value(data)
    except codec.UNENCODABLE as error:
        raise codec.not_json(error) from error


def _texts(record: Any) -> dict[str, str]:
    return {key: "" if value is None else value.decode("utf-8", "replace") for key, value in record.headers}


def _metadata(headers: Mapping[str, str], timestamp: int) -> Any:
    metadata = {key: value for key, value in headers.items() if not key.startswith(_OURS)}
    if "deadline" in metadata and deadline_on_wire(metadata) is not None:
        # It counts from the sending, and a record may have waited. Clocks need not agree to the second: what
        # looks younger than that keeps half of its time.
        left, age = int(metadata["deadline"]), max(0, int(time.time() * 1000) - timestamp)
        metadata["deadline"] = str(max(0, left - (age if age > _SKEW else min(age, left // 2))))
    return metadata or UNSET


# The connection


def _driver(address: Address, options: Options, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "bootstrap_servers": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in address.hosts],
        "client_id": name,
        "retry_backoff_ms": 50,
        "security_protocol": ("SASL_" if address.username else "") + ("SSL" if options.tls else "PLAINTEXT"),
    }
    if options.tls:
        facts["ssl_context"] = options.client_context()
    if address.username:
        facts["sasl_mechanism"] = options.mechanism
        facts["sasl_plain_username"], facts["sasl_plain_password"] = address.username, address.password
    return facts


_TASKS = tuple(
    f"_{name}_task"
    for name in ("coordination", "heartbeat", "commit_refresh", "reset_committed", "fetch", "sender", "sync")
)


async def _within(limit: float, work: Coroutine[Any, Any, Any]) -> None:
    # A task of its own: aiokafka lets the cancellation of its tasks escape into whoever closes it.
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait([task], timeout=limit)
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=1)
        _look_at(task)


async def _stop(driver: Any) -> None:
    # aiokafka waits for a broker that is away; then its tasks are ended one by one.
    await _within(_END_LIMIT, driver.stop())
    client: Any = getattr(driver, "client", None) or driver._client
    owners = (driver, client, *(getattr(driver, name, None) for name in ("_coordinator", "_fetcher", "_sender")))
    found = [getattr(owner, name, None) for owner in owners for name in _TASKS]
    tasks = [task for task in found if isinstance(task, asyncio.Task)]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1)
        _look_at(*tasks)
    await _within(_END_LIMIT, client.close())


def _look_at(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        if future.done() and not future.cancelled():
            future.exception()


class _Link:
    """A producer, the topics that are there, and whether the cluster answers."""

    def __init__(self, address: Address, options: Options, name: str) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.options = options
        self.driver = _driver(address, options, name)
        self.producer: Any = None
        self.peers: dict[str, None] = {}
        self._where = f"{name} cannot be reached at {address}"
        self._making: dict[str, asyncio.Task[None]] = {}
        self._there: set[str] = set()
        self._beating: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect. Raises Unavailable."""
        options = self.options
        ways = (True, False) if options.idempotent and options.acks == "all" else (False,)
        for idempotent in ways:
            producer = AIOKafkaProducer(
                **self.driver,
                acks="all" if options.acks == "all" else int(options.acks),
                enable_idempotence=idempotent,
                linger_ms=0,
                max_batch_size=65_536,
                max_request_size=options.max_message,
                request_timeout_ms=int(options.connect_timeout * 1000),
                value_serializer=_value,
            )
            try:
                await producer.start()
            except KafkaError as error:
                await _stop(producer)
                if not idempotent or isinstance(error, KafkaConnectionError):
                    raise Unavailable(f"{self._where}: {_words(error)}.") from error
            except BaseException:
                await _stop(producer)
                raise
            else:
                self.producer = producer
                break
        self._beating = asyncio.get_running_loop().create_task(self._beat(), context=Context())

    async def close(self) -> None:
        """Let go of everything within a few seconds, whatever became of the broker."""
        self.fail("the connection is closed")
        making = [task for task in self._making.values() if not task.done()]
        for task in (*making, self._beating):
            if task is not None:
                task.cancel()
                await asyncio.wait([task], timeout=_END_LIMIT)
        if self.producer is not None:
            # What was not acknowledged is told so; it must not be sent after all, later.
            self.producer._message_accumulator.fail_all(KafkaConnectionError("the connection was closed"))
            await _stop(self.producer)

    def fail(self, reason: str) -> None:
        """Let all know that nothing can be expected here any more."""
        if not self.lost.done():
            self.lost.set_result(reason)

    async def _beat(self) -> None:
        client, missing = self.producer.client, set[str]()
        while True:
            await asyncio.sleep(_PULSE)
            alive = False
            with suppress(TimeoutError):
                async with asyncio.timeout(self.options.connect_timeout):
                    alive = await client.force_metadata_update()
            if not alive:
                self.fail("no broker answers")
                return
            absent = {topic for topic in self._there if client.cluster.partitions_for_topic(topic) is None}
            if gone := absent & missing:
                self.fail(f"the topic {min(gone)} is gone")
                return
            missing = absent
            gone = {topic for topic in self.peers if client.cluster.partitions_for_topic(topic) is None}
            if gone:
                self.peers = {topic: None for topic in self.peers if topic not in gone}
                if topics := [*self._there, *self.peers]:  # none would mean all of the cluster's
                    client.set_topics(topics)

    def has(self, topic: str) -> bool:
        """Return whether a topic is known to be there."""
        return topic in self._there

    async def ensure(self, topics: Mapping[str, int]) -> None:
        """Make the topics that are not there, with so many partitions. Raises Unavailable."""
        new = {topic: number for topic, number in topics.items() if topic not in self._making}
        if new:
            task = asyncio.get_running_loop().create_task(self._make(new), context=Context())
            task.add_done_callback(_look_at)
            self._making.update(dict.fromkeys(new, task))
        tasks = {self._making[topic] for topic in topics if topic not in self._there}
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            if task.cancelled():
                raise ConnectionLost(f"{self._where}: the connection was lost.")
            task.result()

    async def _make(self, topics: dict[str, int]) -> None:
        trouble = ""
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                if self.options.create_topics:
                    trouble = await self._create(topics)
                for topic in topics:
                    await self.producer.partitions_for(topic)
            self._there.update(topics)
        except (KafkaError, TimeoutError) as error:
            names = ", ".join(topics)
            raise Unavailable(f"{self._where}: no topic {names} ({trouble or _words(error)}).") from error
        finally:
            for topic in topics:
                if topic not in self._there:
                    self._making.pop(topic, None)

    async def _create(self, topics: dict[str, int]) -> str:
        admin = AIOKafkaAdminClient(**self.driver, request_timeout_ms=int(self.options.connect_timeout * 1000))
        try:
            await admin.start()
            new = [NewTopic(topic, number, self.options.replication) for topic, number in topics.items()]
            answer = await admin.create_topics(new)
        except KafkaError as error:
            return _words(error)
        finally:
            await admin.close()
        # One that is there already has the code 36; one that may not be made may be there all the same.
        return "; ".join(str(error[2] or error[1]) for error in answer.topic_errors if error[1] not in (0, 36))

    async def send(
        self, topic: str, value: bytes | None, headers: Headers, record: Record = _PLAIN, partition: int | None = None
    ) -> asyncio.Future[Any]:
        """Hand a record to the producer; the future ends with its acknowledgement. Raises RpcException."""
        partition = record.partition if partition is None else partition
        if partition is not None and partition not in await self.producer.partitions_for(topic):
            message = f"The topic {topic} has no partition {partition}."
            raise RpcException({"statusCode": 400, "code": "no-partition", "message": message})
        try:
            future: asyncio.Future[Any] = await self.producer.send(
                topic,
                _NOTHING if value is None else value,
                key=None if record.key is None else record.key.encode(),
                partition=partition,
                timestamp_ms=record.timestamp,
                headers=headers,
            )
        except KafkaError as error:
            raise self.trouble(error) from error
        future.add_done_callback(_look_at)
        return future

    async def certainly(self, topic: str, value: bytes | None, headers: Headers, record: Record = _PLAIN) -> None:
        """Send a record; return when the cluster has it. Raises RpcException."""
        future = await self.send(topic, value, headers, record)
        await asyncio.wait([future, self.lost], return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            raise ConnectionLost(f"{self._where}: {self.lost.result()}.")
        if (error := future.exception()) is not None:
            raise self.trouble(error) from error

    def trouble(self, error: BaseException) -> RpcException:
        """Return what a caller is told of a record that was not taken."""
        if isinstance(error, MessageSizeTooLargeError):
            message = f"The message is larger than {self.options.max_message} bytes, or than the broker takes."
            return RpcException({"statusCode": 413, "code": "too-large", "message": message})
        if isinstance(error, KafkaConnectionError | KafkaTimeoutError | RequestTimedOutError):
            return ConnectionLost(f"{self._where}: {_words(error)}.")
        return Unavailable(f"{self._where}: {_words(error)}.")

    def consumer(self, **facts: Any) -> Any:
        """Return a consumer that commits nothing by itself."""
        return AIOKafkaConsumer(
            **self.driver,
            enable_auto_commit=False,
            fetch_max_wait_ms=int(self.options.fetch_wait * 1000),
            max_partition_fetch_bytes=self.options.max_message,
            metadata_max_age_ms=30_000,
            **facts,
        )

    async def started(self, consumer: Any) -> None:
        """Start a consumer. Raises Unavailable."""
        starting = asyncio.get_running_loop().create_task(consumer.start())
        try:
            await asyncio.wait([starting, self.lost], timeout=_JOIN_LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                reason = self.lost.result() if self.lost.done() else f"not joined within {_JOIN_LIMIT:g} s"
                raise Unavailable(f"{self._where}: {reason}.")
            if starting.cancelled():
                raise Unavailable(f"{self._where}: the driver gave up.")
            starting.result()
        except KafkaError as error:
            raise Unavailable(f"{self._where}: {_words(error)}.") from error
        finally:
            starting.cancel()
            await asyncio.wait([starting])
            _look_at(starting)


def _value(value: Any) -> bytes | None:
    return None if value is _NOTHING else value


def _words(error: BaseException) -> str:
    return str(error).removeprefix(f"{type(error).__name__}: ") or type(error).__name__


# The server


class _Cell:
    """A record at work."""

    __slots__ = ("done", "offset", "resting", "task", "tracker")

    def __init__(self, offset: int, tracker: _Tracker) -> None:
        self.offset = offset
        self.tracker = tracker
        self.done = False
        self.resting = False
        self.task: asyncio.Task[Any] | None = None


class _Tracker:
    """What of a partition is at work, in its order; `mark` is the offset before which nothing is."""

    __slots__ = ("cells", "committed", "mark", "paused")

    def __init__(self) -> None:
        self.cells: deque[_Cell] = deque()
        self.mark = self.committed = -1
        self.paused = False

    def advance(self) -> None:
        while self.cells and self.cells[0].done:
            self.mark = self.cells.popleft().offset + 1


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka's classes are untyped
    def __init__(self, revoked: Callable[[], Awaitable[None]]) -> None:
        self._revoked = revoked

    async def on_partitions_revoked(self, revoked: Any) -> None:
        await self._revoked()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Offsets come from what was committed."""


class KafkaServer(BrokerServer):
    """Hears requests and events on the topics named as the service's routes, in the group of the service."""

    scheme = "kafka"
    Options = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        _checked(address, self.options)
        self._routes = self._named(dispatcher.routes)
        self._group = f"{self.options.prefix}{self.options.group or dispatcher.service}{self._postfix()}"
        self._link: _Link | None = None
        self._consumer: Any = None
        self._answers: _Answers | None = None
        self._trackers: dict[TopicPartition, _Tracker] = {}
        # By topic, partition, offset and time: what comes again while it is still at work is not run twice.
        self._at_work: dict[tuple[str, int, int, int], _Cell] = {}
        self._moved = asyncio.Event()

    def _postfix(self) -> str:
        return str(self.options.postfix)

    def _named(self, routes: Iterable[str]) -> dict[str, Route]:
        by_topic = _by_topic(routes, self.options.prefix)
        return {topic: self.dispatcher.routes[route] for topic, route in by_topic.items()}

    def unwrap(self) -> Any:
        return self._consumer

    async def subscribe(self) -> None:
        link = self._link = _Link(self.address, self.options, self.dispatcher.service)
        self._answers = _Answers(link, self.dispatcher.service)
        async with asyncio.timeout(self.options.connect_timeout):
            await link.open()
        await link.ensure(dict.fromkeys(self._routes, self.options.partitions))
        if self._routes:
            await self._join(link)

    async def _join(self, link: _Link) -> None:
        session = int(self.options.session_timeout * 1000)
        consumer = self._consumer = link.consumer(
            group_id=self._group,
            auto_offset_reset=self.options.begin,
            session_timeout_ms=session,
            heartbeat_interval_ms=max(session // 5, 1),
        )
        if self.options.alone:
            consumer.assign(
                [TopicPartition(topic, n) for topic in self._routes for n in await link.producer.partitions_for(topic)]
            )
        else:
            consumer.subscribe(list(self._routes), listener=_Rebalance(self._give_back))
        await link.started(consumer)
        if self.options.begin == "latest":
            # Before anybody is told that it listens: what is sent from now on is heard.
            async with asyncio.timeout(self.options.connect_timeout):
                for partition in consumer.assignment():
                    with suppress(IllegalStateError):
                        await consumer.position(partition)

    async def until_lost(self) -> str:
        link = self._link
        if link is None:
            return "the connection was lost"
        tasks = [asyncio.create_task(work) for work in self._work(link)]
        ends: list[asyncio.Future[Any]] = [link.lost, *tasks]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
        except KafkaError as error:
            return _words(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return link.lost.result() if link.lost.done() else ""

    def _work(self, link: _Link) -> list[Coroutine[Any, Any, None]]:
        return [self._read(), self._commit()] if self._consumer is not None else []

    async def unsubscribe(self) -> None:
        """Nothing is read any more; the heartbeats go on until what runs is done."""

    async def finish(self, grace: float) -> int:
        late = await super().finish(grace)
        await _within(_END_LIMIT, self._settle())
        return late

    async def _settle(self) -> None:
        if self._answers is not None:
            await self._answers.flush()
        await self._commit_now()

    async def disconnect(self) -> None:
        link, self._link = self._link, None
        consumer, self._consumer = self._consumer, None
        answers, self._answers = self._answers, None
        self._trackers.clear()
        if answers is not None:
            await answers.close()
        if consumer is not None:
            await _stop(consumer)
        if link is not None:
            await link.close()

    # Reading

    async def _read(self) -> None:
        most = self.options.max_in_flight
        while True:
            await self.room()
            if self._answers is not None and (congestion := self._answers.congestion()) is not None:
                await congestion
            records = await self._consumer.getmany(timeout_ms=1000, max_records=max(1, most - len(self._tasks)))
            for partition, found in records.items():
                tracker = self._trackers.get(partition)
                if tracker is None:
                    tracker = self._trackers[partition] = _Tracker()
                for record in found:
                    self._take(tracker, record)
                if len(tracker.cells) >= _MOST_OPEN:
                    tracker.paused = True
                    self._consumer.pause(partition)

    def _take(self, tracker: _Tracker, record: Any) -> None:
        key = (record.topic, record.partition, record.offset, record.timestamp)
        cell = self._at_work.get(key)
        if cell is not None:
            cell.tracker = tracker
            tracker.cells.append(cell)
            return
        cell = _Cell(record.offset, tracker)
        tracker.cells.append(cell)
        try:
            task = self._start(record, cell)
        except Exception:
            logger.exception("%s stumbled over a record of %s", self.dispatcher.service, record.topic)
            task = None
        if task is None:
            self._done(cell)
        else:
            cell.task = task
            self._at_work[key] = cell
            task.add_done_callback(partial(self._worked, key, cell))

    def _worked(self, key: tuple[str, int, int, int], cell: _Cell, task: asyncio.Task[Any]) -> None:
        del self._at_work[key]
        if task.cancelled():
            return  # it is not committed, so that another process does it
        if (error := task.exception()) is not None:
            logger.error("%s stumbled over a record of %s", self.dispatcher.service, key[0], exc_info=error)
        self._done(cell)
        if cell.tracker.paused and len(cell.tracker.cells) <= _MOST_OPEN // 2:
            cell.tracker.paused = False
            partition = TopicPartition(key[0], key[1])
            if self._consumer is not None and self._trackers.get(partition) is cell.tracker:
                with suppress(IllegalStateError):
                    self._consumer.resume(partition)

    def _done(self, cell: _Cell) -> None:
        cell.done = True
        cell.tracker.advance()
        self._moved.set()

    def _start(self, record: Any, cell: _Cell) -> asyncio.Task[Any] | None:
        raw = dict(record.headers)
        headers = _texts(record)
        route = self._routes.get(record.topic)
        packet = Packet(data=read_value(record.value, raw.get(TYPE)), metadata=_metadata(headers, record.timestamp))
        answer: Callable[[Response], Awaitable[None] | None] = _nobody
        id, reply_topic = headers.get(CORRELATION), headers.get(REPLY_TOPIC)
        # As in NestJS, an event handler gets an event, whoever waits for an answer.
        if id and reply_topic and route is not None and route.request is not None and self._answers is not None:
            packet.id = Raw(codec.encode(id))
            partition = headers.get(REPLY_PARTITION, "").partition(".")[0]
            answer = _Answer(
                self._answers.box(reply_topic),
                raw[CORRELATION] or b"",
                int(partition) if partition.isascii() and partition.isdigit() and len(partition) < 10 else None,
                self.options.max_message,
            )
        return self.handle(
            packet,
            answer,
            peer=str(self.address),
            channel=record.topic,
            delivery=None,
            route=route,
            headers=headers,
            native=record,
        )

    # Committing

    async def _commit(self) -> None:
        while True:
            await self._moved.wait()
            await self._commit_now()
            await asyncio.sleep(_COMMIT_PAUSE)  # many in one request

    async def _commit_now(self) -> None:
        self._moved.clear()
        consumer = self._consumer
        if consumer is None:
            return
        ours = consumer.assignment()
        moved = {
            partition: (tracker, tracker.mark)
            for partition, tracker in self._trackers.items()
            if tracker.mark > tracker.committed and partition in ours
        }
        if not moved:
            return
        try:
            await consumer.commit({partition: mark for partition, (_, mark) in moved.items()})
        except (KafkaError, IllegalStateError) as error:
            # The group has moved on: whoever has the partition now does it again.
            logger.debug("%s could not commit: %s", self.dispatcher.service, error)
            return
        for tracker, mark in moved.values():
            tracker.committed = max(tracker.committed, mark)

    async def _give_back(self) -> None:
        # Until this returns the driver reads nothing, and its heartbeats keep the partitions here.
        trackers = list(self._trackers.values())
        self._rest_elsewhere()
        tasks = [cell.task for tracker in trackers for cell in tracker.cells if cell.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=self.options.session_timeout / 2)
        await _within(_END_LIMIT, self._commit_now())
        self._trackers.clear()

    def _rest_elsewhere(self) -> None:
        for cell in self._at_work.values():
            if cell.resting and cell.task is not None:
                cell.task.cancel()


def _nobody(response: Response) -> None:
    """Where the answer to an event goes."""


class _Item:
    """A packet of an answer, waiting to be sent."""

    __slots__ = ("correlation", "disposed", "error", "kind", "partition", "sent", "value")

    def __init__(self, correlation: bytes, partition: int | None) -> None:
        self.correlation = correlation
        self.partition = partition
        self.value: bytes | None = None
        self.kind: bytes | None = None
        self.error: bytes | None = None
        self.disposed = False
        self.sent = False

    def headers(self) -> Headers:
        headers = [(CORRELATION, self.correlation)]
        if self.error is not None:
            headers.append((ERROR, self.error))
        if self.disposed:
            headers.append((DISPOSED, b"\x00"))
        if self.kind is not None:
            headers.append((TYPE, self.kind))
        return headers


class _Answer:
    """Puts the packets of one answer into the box of its topic."""

    __slots__ = ("_box", "_correlation", "_last", "_most", "_partition")

    def __init__(self, box: _Box, correlation: bytes, partition: int | None, most: int) -> None:
        self._box = box
        self._correlation = correlation
        self._partition = partition
        self._most = most
        self._last: _Item | None = None

    def __call__(self, response: Response) -> Awaitable[None] | None:
        disposed = response.is_disposed is True
        last = self._last
        if disposed and response.response is UNSET and response.err is UNSET and last is not None and not last.sent:
            last.disposed = True  # as NestJS does: no packet of its own
            return None
        item = _Item(self._correlation, self._partition)
        item.disposed = disposed
        if response.err is not UNSET:
            item.error, item.kind = write_value(response.err)
            item.error = item.error or b""
        elif response.response is UNSET:
            item.kind = b"none"
        else:
            item.value, item.kind = write_value(response.response)
        if item.value is not None and len(item.value) > self._most:
            message = f"The answer has more than {self._most} bytes."
            raise RpcException({"statusCode": 500, "code": "too-large", "message": message})
        self._last = item
        return self._box.put(item)


class _Answers:
    """The answers that wait to be sent, a box for each topic."""

    def __init__(self, link: _Link, service: str) -> None:
        self.link = link
        self.waiting = 0
        self._service = service
        self._boxes: dict[str, _Box] = {}
        self._room: asyncio.Future[None] | None = None

    def box(self, topic: str) -> _Box:
        """Return the box of a topic; it goes when it is empty."""
        return self._boxes.get(topic) or _Box(topic, self)

    def keep(self, box: _Box, kept: bool) -> None:
        if kept:
            self._boxes[box.topic] = box
        elif self._boxes.get(box.topic) is box:
            del self._boxes[box.topic]

    def drop(self, reason: str, number: int = 1) -> None:
        for _ in range(number):
            dropped.add(self._service, KafkaServer.scheme, reason)

    def taken(self, number: int = 1) -> None:
        self.waiting -= number
        if self._room is not None and self.waiting <= _MOST_ANSWERS // 2:
            room, self._room = self._room, None
            room.set_result(None)

    def congestion(self) -> Awaitable[None] | None:
        if self.waiting < _MOST_ANSWERS:
            return None
        if self._room is None:
            self._room = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._room)

    async def flush(self) -> None:
        while tasks := [box.task for box in self._boxes.values() if box.task is not None]:
            await asyncio.wait(tasks)
        await self.link.producer.flush()

    async def close(self) -> None:
        tasks = [box.task for box in self._boxes.values() if box.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._room is not None:
            self._room.set_result(None)
            self._room = None


class _Box:
    """The answers to one topic, in their order; while there are any, a task sends them."""

    def __init__(self, topic: str, answers: _Answers) -> None:
        self.topic = topic
        self.task: asyncio.Task[bool] | None = None
        self._answers = answers
        self._items: deque[_Item] = deque()

    def put(self, item: _Item) -> Awaitable[None] | None:
        self._items.append(item)
        self._answers.waiting += 1
        if self.task is None:
            self._answers.keep(self, True)
            self._begin()
        return self._answers.congestion()

    def _begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._send(), context=Context())
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[bool]) -> None:
        sent = False
        if not task.cancelled():
            if (error := task.exception()) is not None:
                logger.error("Answers to %s could not be sent", self.topic, exc_info=error)
            else:
                sent = task.result()
        if sent and self._items:  # they came while it ended
            self._begin()
            return
        self.task = None
        self._answers.keep(self, False)
        if self._items:
            self._answers.drop("no-reply-topic", len(self._items))
            self._answers.taken(len(self._items))
            self._items.clear()

    async def _send(self) -> bool:
        link = self._answers.link
        if not _LEGAL.fullmatch(self.topic) or len(self.topic) > _LONGEST_NAME:
            return False
        if self.topic not in link.peers:
            if len(link.peers) >= _MOST_PEERS:
                return False
            link.peers[self.topic] = None
        try:
            async with asyncio.timeout(link.options.connect_timeout):
                partitions = sorted(await link.producer.partitions_for(self.topic))
        except (TimeoutError, KafkaError):
            return False  # the pulse forgets it
        while self._items:
            item = self._items.popleft()
            item.sent = True
            partition = item.partition
            if partition is None:  # all of one answer in the same, for their order
                partition = partitions[zlib.crc32(item.correlation) % len(partitions)]
            try:
                await link.send(self.topic, item.value, item.headers(), partition=partition)
            except RpcException:
                self._answers.drop("unsendable-answer")
            finally:
                self._answers.taken()
        return True


# The client


class KafkaBus(ClientProxy):
    """Sends events; `emit` returns when the cluster has them."""

    scheme = "kafka"
    Options = Options
    Record = Record

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        _checked(address, self.options)
        self._link: _Link | None = None
        self._links: set[_Link] = set()
        self._watching: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        link = _Link(self.address, self.options, self.service)
        try:
            await link.open()
        except BaseException:
            await link.close()
            raise
        self._link = link
        self._links.add(link)
        task = asyncio.get_running_loop().create_task(self._watch(link), context=Context())
        self._watching.add(task)
        task.add_done_callback(self._watching.discard)

    async def _watch(self, link: _Link) -> None:
        reason = await asyncio.shield(link.lost)
        if self._link is link:
            self._link = None
            self.lost(f"{self.service} cannot be reached at {self.address}: {reason}.")
        await self._let_go(link)

    async def _let_go(self, link: _Link) -> None:
        await link.close()
        self._links.discard(link)

    async def disconnect(self) -> None:
        self._link = None
        tasks = list(self._watching)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for link in list(self._links):
            await self._let_go(link)

    def unwrap(self) -> Any:
        return None if self._link is None else self._link.producer

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")

    async def dispatch_event(self, event: Event, context: RpcContext) -> None:
        link, topic = self._live(), topic_of(context.pattern, self.options.prefix)
        value, kind = _encoded(event.data)
        record = context.record or _PLAIN
        headers = self._headers(event.metadata, record, {TYPE: kind})
        if not link.has(topic):
            await link.ensure({topic: self.options.partitions})
        await link.certainly(topic, value, headers, record)

    def _live(self) -> _Link:
        if self._link is None:
            raise ConnectionLost(f"{self.service} cannot be reached at {self.address}: the connection was lost.")
        return self._link

    @staticmethod
    def _headers(metadata: Any, record: Any, ours: dict[str, bytes | None]) -> Headers:
        named: dict[str, bytes] = {}
        if metadata is not UNSET:
            named = {
                key: value.encode("utf-8", "replace") for key, value in metadata.items() if not key.startswith(_OURS)
            }
        named.update((key, value.encode("utf-8", "replace")) for key, value in record.headers.items())
        named.update((key, value) for key, value in ours.items() if value is not None)
        return list(named.items())


class KafkaClient(KafkaBus):
    """Sends requests and events; hears the answers to a topic on `<topic>.reply`."""

    # Every client of a pattern reads every answer: an id must not be guessed.
    id_bytes = 16

    def __init__(self, address: Address, service: str) -> None:
        super().__init__(address, service)
        self._replies: dict[_Link, _Replies] = {}
        self._partition = str(self.options.reply_partition).encode()
        self._begun: set[str] = set()

    async def open(self) -> None:
        self._begun.clear()
        await super().open()
        link = self._live()
        self._replies[link] = _Replies(link, self._on_reply)

    async def _let_go(self, link: _Link) -> None:
        if (replies := self._replies.pop(link, None)) is not None:
            await replies.close()
        await super()._let_go(link)

    def abandon(self, id: str) -> None:
        self._begun.discard(id)

    async def publish(self, request: Request, context: RpcContext) -> None:
        link, topic = self._live(), topic_of(context.pattern, self.options.prefix)
        value, kind = _encoded(request.data)
        record = context.record or _PLAIN
        ours = {
            CORRELATION: request.id.encode(),
            REPLY_TOPIC: f"{topic}{_REPLY}".encode(),
            REPLY_PARTITION: self._partition,
            TYPE: kind,
        }
        replies, metadata = self._replies[link], request.metadata
        try:
            async with asyncio.timeout(context.remaining()):
                if not replies.hears(topic):
                    await replies.join(topic)
                    if metadata is not UNSET and (left := context.remaining()) is not None:
                        metadata = {**metadata, "deadline": str(int(left * 1000))}
                headers = self._headers(metadata, record, ours)
                future = await link.send(topic, value, headers, record)
        except TimeoutError:
            return  # the call has a timer of its own
        except Unavailable as error:
            self.fail(request.id, error)
            return
        future.add_done_callback(partial(self._sent, link, request.id))

    def _sent(self, link: _Link, id: str, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            self.fail(id, link.trouble(error))

    def _on_reply(self, record: Any) -> asyncio.Future[None] | None:
        headers = dict(record.headers)
        correlation = headers.get(CORRELATION)
        id = "" if correlation is None else correlation.decode("utf-8", "replace")
        if id not in self._pending:
            return None  # somebody else's, or of one who gave up
        kind = headers.get(TYPE)
        reply = Reply(id=id)
        if ERROR in headers:
            reply.err = codec.decode(read_value(headers[ERROR], kind))
            reply.is_disposed = True
        else:
            reply.is_disposed = DISPOSED in headers
            # NestJS has no word for an end without a value: after others, null is none.
            ended = record.value is None and kind is None and reply.is_disposed and id in self._begun
            if kind != b"none" and not ended:
                reply.response = read_value(record.value, kind)
        if reply.is_disposed:
            self._begun.discard(id)
        elif len(self._begun) < self.max_pending:
            self._begun.add(id)
        return self.receive(reply)


class _Replies:
    """The answers to one client: one partition of each reply topic, from where it ended."""

    def __init__(self, link: _Link, receive: Callable[[Any], asyncio.Future[None] | None]) -> None:
        self._link = link
        self._receive = receive
        self._consumer: Any = None
        self._next: dict[TopicPartition, int] = {}
        self._held: dict[TopicPartition, tuple[asyncio.Future[None], float, deque[Any]]] = {}
        self._wanted: set[TopicPartition] = set()
        self._heard: set[str] = set()
        self._joining: dict[str, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    def hears(self, topic: str) -> bool:
        """Return whether the answers to a topic are read."""
        return topic in self._heard

    async def join(self, topic: str) -> None:
        """Read the answers to a topic, too; all who wait share one attempt. Raises Unavailable."""
        task = self._joining.get(topic)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._join(topic), context=Context())
            task.add_done_callback(_look_at)
            self._joining[topic] = task
        await asyncio.wait([task])
        if task.cancelled():
            raise ConnectionLost("The connection was lost.")
        task.result()

    async def _join(self, topic: str) -> None:
        link, options = self._link, self._link.options
        partition = TopicPartition(topic + _REPLY, options.reply_partition)
        try:
            await link.ensure({topic: options.partitions, partition.topic: options.reply_partition + 1})
            if partition.partition not in await link.producer.partitions_for(partition.topic):
                raise Unavailable(f"The topic {partition.topic} has no partition {partition.partition}.")
            self._wanted.add(partition)
            async with self._lock:  # those who wait meanwhile come together with the next one
                if self._wanted:
                    await self._assign()
            self._heard.add(topic)
        except KafkaError as error:
            raise Unavailable(f"The answers to {topic} cannot be read: {_words(error)}.") from error
        finally:
            del self._joining[topic]

    async def _assign(self) -> None:
        if self._consumer is None:
            consumer = self._link.consumer()
            self._consumer = consumer
            await self._link.started(consumer)
        consumer = self._consumer
        new, self._wanted = self._wanted, set()
        try:
            # In one go: an assignment forgets the positions of the one before.
            consumer.assign([*self._next, *new])
            self._held.clear()
            for partition, offset in self._next.items():
                consumer.seek(partition, offset)
            async with asyncio.timeout(self._link.options.connect_timeout):
                await consumer.seek_to_end(*new)
                for partition in new:
                    self._next[partition] = await consumer.position(partition)
        except BaseException as error:
            self._link.fail(f"its answers cannot be read: {_words(error)}")
            raise
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read(), context=Context())

    async def _read(self) -> None:
        reason = "no answers can be read"
        try:
            while True:
                free = [partition for partition in self._next if partition not in self._held]
                if not self._held:
                    found = await self._consumer.getmany(timeout_ms=1000, max_records=_PAGE)
                elif free:
                    found = await self._consumer.getmany(*free, timeout_ms=10, max_records=_PAGE)
                else:
                    found = {}
                    await asyncio.wait([full for full, _, _ in self._held.values()], timeout=0.1)
                for partition, records in found.items():
                    self._hand_over(partition, deque(records))
                for partition, (full, end, records) in list(self._held.items()):
                    if full.done() or time.monotonic() > end:
                        del self._held[partition]
                        self._hand_over(partition, records)
        except KafkaError as error:
            reason = _words(error)
        finally:
            self._link.fail(reason)

    def _hand_over(self, partition: TopicPartition, records: deque[Any]) -> None:
        while records:
            record = records.popleft()
            self._next[partition] = record.offset + 1
            full = self._receive(record)
            if full is not None:
                # Who takes a stream slowly holds back the answers to the same pattern, but not for long.
                self._held[partition] = (full, time.monotonic() + _HOLD_LIMIT, records)
                return

    async def close(self) -> None:
        tasks = [*self._joining.values(), *([self._reading] if self._reading is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
            _look_at(*tasks)
        if self._consumer is not None:
            await _stop(self._consumer)


# Events as a bus


class KafkaListener(KafkaServer):
    """Takes the events that a service hears: tries again what fails, and lays aside what goes on failing.

    Events of one key and partition run one after another. What fails finally goes to the topic `dead.<service>`,
    with the headers `dead-topic`, `dead-partition`, `dead-offset` and `dead-error` beside its own.
    """

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        self._routes = self._named(self._heard("one"))
        self._told = self._named(self._heard("each"))
        self._dead = topic_of(f"dead.{dispatcher.service}", self.options.prefix)
        self._keys: dict[tuple[str, int, bytes], asyncio.Task[None]] = {}
        self._follower: Any = None
        self._last: dict[TopicPartition, int] = {}

    def _postfix(self) -> str:
        return ""

    def _heard(self, delivery: Delivery) -> list[str]:
        return [route for route in self.dispatcher.routes if self.dispatcher.hears(route, delivery)]

    async def listen(self) -> None:
        if self._routes or self._told:
            await super().listen()

    async def subscribe(self) -> None:
        await super().subscribe()
        link = self._link
        if link is None or not self._told:
            return
        await link.ensure(dict.fromkeys(self._told, self.options.partitions))
        follower = self._follower = link.consumer(auto_offset_reset="latest")
        follower.subscribe(list(self._told))
        await link.started(follower)
        ours = list(follower.assignment())
        async with asyncio.timeout(self.options.connect_timeout):
            await follower.seek_to_end(*ours)
            for partition in ours:
                end = await follower.position(partition)
                last = self._last.get(partition)
                if last is not None and last <= end:  # what came while the connection was lost
                    follower.seek(partition, last)
                else:
                    self._last[partition] = end

    def _work(self, link: _Link) -> list[Coroutine[Any, Any, None]]:
        return super()._work(link) + ([self._follow()] if self._follower is not None else [])

    async def unsubscribe(self) -> None:
        self._rest_elsewhere()

    async def disconnect(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            await _stop(follower)
        await super().disconnect()

    async def _follow(self) -> None:
        while True:
            await self.room()
            free = max(1, self.options.max_in_flight - len(self._tasks))
            records = await self._follower.getmany(timeout_ms=1000, max_records=free)
            for partition, found in records.items():
                for record in found:
                    self._last[partition] = record.offset + 1
                    self.keep(self._tell(record, self._told[record.topic], "each"))

    def _tell(self, record: Any, route: Route, delivery: Delivery) -> asyncio.Task[Any] | None:
        headers = _texts(record)
        return self.dispatcher.dispatch(
            Packet(
                data=read_value(record.value, dict(record.headers).get(TYPE)),
                metadata=_metadata(headers, record.timestamp),
            ),
            _nobody,
            transport=self.scheme,
            peer=str(self.address),
            channel=record.topic,
            delivery=delivery,
            route=route,
            headers=headers,
            native=record,
        )

    def _start(self, record: Any, cell: _Cell) -> asyncio.Task[Any] | None:
        before = key = None
        if record.key is not None:
            key = (record.topic, record.partition, record.key)
            before = self._keys.get(key)
        work = self._try(record, cell, before)
        task = asyncio.get_running_loop().create_task(work, context=Context())
        if key is not None:
            self._keys[key] = task
            task.add_done_callback(partial(self._unlock, key))
        return self.keep(task)

    def _unlock(self, key: tuple[str, int, bytes], task: asyncio.Task[None]) -> None:
        if self._keys.get(key) is task:
            del self._keys[key]

    async def _try(self, record: Any, cell: _Cell, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            cell.resting = True
            await asyncio.wait([before])
            cell.resting = False
        pause = self.options.retry_after
        for attempt in range(1, self.options.attempts + 1):
            task = self._tell(record, self._routes[record.topic], "one")
            failures = await task if task is not None else []
            if not failures:
                return
            if all(isinstance(failure, InvalidPayload) for failure in failures):
                why = str(failures[0])
                break
            why = f"attempt {attempt} failed: {failures[0]!r}"
            if attempt < self.options.attempts:
                await self._rest(cell, pause)
                pause *= 3
        await self._bury(record, cell, why)

    async def _rest(self, cell: _Cell, pause: float) -> None:
        # Meanwhile it may be cancelled: then another process, or this one, begins anew.
        cell.resting = True
        await asyncio.sleep(pause)
        cell.resting = False

    async def _bury(self, record: Any, cell: _Cell, why: str) -> None:
        logger.error("%s gives up an event of %s: %s", self.dispatcher.service, record.topic, why)
        dropped.add(self.dispatcher.service, self.scheme, "dead-letter")
        facts = {"topic": record.topic, "partition": record.partition, "offset": record.offset, "error": why}
        headers = [(name, value) for name, value in record.headers if value is not None]
        headers += [(f"dead-{name}", str(value).encode("utf-8", "replace")) for name, value in facts.items()]
        key = None if record.key is None else record.key.decode("utf-8", "replace")
        value = record.value
        while True:
            # It is committed only when it lies there.
            await self.connected.wait()
            link = self._link
            if link is not None:
                try:
                    await link.ensure({self._dead: 1})
                    await link.certainly(self._dead, value, headers, Record(key=key))
                    return
                except RpcException as error:
                    if not isinstance(error, Unavailable):
                        value = None  # too large with its headers: these tell where it stands
            await self._rest(cell, self.options.retry_after)
