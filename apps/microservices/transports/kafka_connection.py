"""A connection to a Kafka cluster: aiokafka, held to deadlines and told when nobody answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any

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

from ..exceptions import ConfigurationError, ConnectionLost, RpcException, Unavailable
from . import Address, Count, Seconds
from .kafka_records import Headers
from .tls import TlsOptions

logger = logging.getLogger("microservices.kafka")

_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_NOTHING: Any = object()
"""Stands for no value: aiokafka wants a key or a value, NestJS sends records with neither."""
_THERE_ALREADY = 36
_PULSE = 0.5
_LOOK_LIMIT = 1.0
_JOIN_LIMIT = 60.0
_END_LIMIT = 2.0


class KafkaOptions(TlsOptions, frozen=True, kw_only=True):
    """What the URL of a cluster may set; times in seconds. A user's name in the URL means SASL."""

    tls: bool = False
    mechanism: str = "PLAIN"
    """How the user proves itself: PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."""
    fetch_wait: Seconds = 0.1
    """How long a broker may hold an empty fetch; a client waits as long for the first answers to a new pattern."""
    create_topics: bool = True
    partitions: Count = 1
    """How many partitions a topic is made with: as many processes of a service can share its messages."""
    replication: Count = 1
    max_message: Count = 1_048_576


def driver_facts(address: Address, options: KafkaOptions, name: str) -> dict[str, Any]:
    """Return what every part of aiokafka is told. Raises ConfigurationError for what cannot be."""
    if options.mechanism not in _MECHANISMS:
        raise ConfigurationError(f"{address}: {options.mechanism!r} is none of {', '.join(_MECHANISMS)}.")
    facts: dict[str, Any] = {
        "bootstrap_servers": [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in address.hosts],
        "client_id": name,
        "retry_backoff_ms": 20,
        "security_protocol": ("SASL_" if address.username else "") + ("SSL" if options.tls else "PLAINTEXT"),
    }
    if options.tls:
        facts["ssl_context"] = options.client_context()
    if address.username:
        facts["sasl_mechanism"] = options.mechanism
        facts["sasl_plain_username"], facts["sasl_plain_password"] = address.username, address.password
    return facts


class KafkaConnection:
    """A producer, its consumers and those who work with them, until the cluster does not answer any more."""

    def __init__(self, address: Address, options: KafkaOptions, name: str) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done with the reason, when nothing can be expected here any more."""
        self.options = options
        self.producer: Any = None
        self._where = f"{name} cannot be reached at {address}"
        self._facts = driver_facts(address, options, name)
        self._topics: set[str] = set()
        self._making = asyncio.Lock()
        self._drivers: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect. Raises Unavailable."""
        for idempotent in (True, False):  # some brokers cannot tell a repetition
            self.producer = AIOKafkaProducer(
                **self._facts,
                acks="all",
                enable_idempotence=idempotent,
                max_batch_size=65_536,
                max_request_size=self.options.max_message,
                request_timeout_ms=int(self.options.connect_timeout * 1000),
                value_serializer=_value,
            )
            self._drivers.append(self.producer)
            try:
                await self.producer.start()
                break
            except KafkaError as error:
                await _stop(self._drivers.pop())
                if not idempotent or isinstance(error, KafkaConnectionError):
                    raise self.trouble(error) from error
        self.run(self._beat())

    async def close(self) -> None:
        """Let go of everything within a few seconds, whatever became of the broker."""
        self.fail("the connection is closed")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_END_LIMIT)
        if self.producer is not None:
            # What was not acknowledged is told so; it must not be sent after all, later.
            self.producer._message_accumulator.fail_all(KafkaConnectionError("the connection was closed"))
        await asyncio.gather(*(_stop(driver) for driver in self._drivers))

    def fail(self, reason: str) -> None:
        """Let all know that nothing can be expected here any more."""
        if not self.lost.done():
            self.lost.set_result(reason)

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Own a task until the connection is closed; where it fails, the connection does. Raises ConnectionLost."""
        if self.lost.done():
            work.close()
            raise ConnectionLost(f"{self._where}: {self.lost.result()}.")
        task = asyncio.get_running_loop().create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, KafkaError | RpcException | TimeoutError):
                logger.error("A connection to Kafka stumbled", exc_info=error)
            self.fail(_words(error))

    async def _beat(self) -> None:
        # aiokafka goes on trying, and never tells.
        client, missing = self.producer.client, set[str]()
        while True:
            await asyncio.sleep(_PULSE)
            alive = False
            with suppress(TimeoutError):
                async with asyncio.timeout(self.options.connect_timeout):
                    alive = await client.force_metadata_update()
            if not alive:
                raise Unavailable("no broker answers")
            absent = {topic for topic in self._topics if client.cluster.partitions_for_topic(topic) is None}
            if gone := absent & missing:
                raise Unavailable(f"the topic {min(gone)} is gone")
            missing = absent

    # Topics

    async def ensure(self, topics: Mapping[str, int]) -> None:
        """Make the topics that are not there, with so many partitions. Raises Unavailable."""
        if topics.keys() <= self._topics:
            return
        async with self._making:
            new = {topic: number for topic, number in topics.items() if topic not in self._topics}
            if new:
                await self._make(new)

    async def _make(self, topics: dict[str, int]) -> None:
        trouble = ""
        try:
            async with asyncio.timeout(self.options.connect_timeout):
                if self.options.create_topics:
                    trouble = await self._create(topics)
                for topic in topics:
                    await self.producer.partitions_for(topic)
        except (KafkaError, TimeoutError) as error:
            names = ", ".join(topics)
            raise Unavailable(f"{self._where}: no topic {names} ({trouble or _words(error)}).") from error
        self._topics.update(topics)

    async def _create(self, topics: dict[str, int]) -> str:
        admin = AIOKafkaAdminClient(**self._facts, request_timeout_ms=int(self.options.connect_timeout * 1000))
        try:
            await admin.start()
            new = [NewTopic(topic, number, self.options.replication) for topic, number in topics.items()]
            answer = await admin.create_topics(new)
        finally:
            await admin.close()
        # One that may not be made may be there all the same.
        return "; ".join(
            str(error[2] or error[1]) for error in answer.topic_errors if error[1] not in (0, _THERE_ALREADY)
        )

    async def partitions(self, topic: str) -> set[int]:
        """Return the partitions of a topic. Raises Unavailable where there is none."""
        try:
            async with asyncio.timeout(_LOOK_LIMIT):
                found: set[int] = await self.producer.partitions_for(topic)
        except (KafkaError, TimeoutError) as error:
            self.producer.client._topics.discard(topic)  # aiokafka would ask for it ever after
            raise Unavailable(f"{self._where}: there is no topic {topic}.") from error
        return found

    # Out

    async def send(
        self,
        topic: str,
        value: bytes | None,
        headers: Headers,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        timestamp: int | None = None,
    ) -> asyncio.Future[Any]:
        """Hand a record to the producer; the future ends with its acknowledgement. Raises RpcException."""
        if partition is not None and partition not in await self.partitions(topic):
            message = f"The topic {topic} has no partition {partition}."
            raise RpcException({"statusCode": 400, "code": "no-partition", "message": message})
        content = _NOTHING if value is None else value
        try:
            future: asyncio.Future[Any] = await self.producer.send(topic, content, key, partition, timestamp, headers)
        except KafkaError as error:
            raise self.trouble(error) from error
        future.add_done_callback(_look_at)
        return future

    async def certainly(self, topic: str, value: bytes | None, headers: Headers, **facts: Any) -> None:
        """Send a record; return when the cluster has it. Raises RpcException."""
        await self._unless_lost(await self.send(topic, value, headers, **facts))

    async def flush(self) -> None:
        """Return when all that was handed over is acknowledged, or a moment has passed."""
        await within(_END_LIMIT, self.producer.flush())

    def trouble(self, error: BaseException) -> RpcException:
        """Return what a caller is told of an error of the driver."""
        if isinstance(error, MessageSizeTooLargeError):
            message = f"The message is larger than {self.options.max_message} bytes, or than the broker takes."
            return RpcException({"statusCode": 413, "code": "too-large", "message": message})
        uncertain = isinstance(error, KafkaConnectionError | KafkaTimeoutError | RequestTimedOutError)
        return (ConnectionLost if uncertain else Unavailable)(f"{self._where}: {_words(error)}.")

    async def _unless_lost(self, future: asyncio.Future[Any], limit: float | None = None) -> None:
        await asyncio.wait([future, self.lost], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            reason = self.lost.result() if self.lost.done() else "no answer in time"
            raise ConnectionLost(f"{self._where}: {reason}.")
        if future.cancelled():
            raise ConnectionLost(f"{self._where}: the driver gave up.")
        if (error := future.exception()) is not None:
            raise self.trouble(error) from error

    # In

    async def consume(
        self,
        topics: Iterable[str] = (),
        *,
        listener: ConsumerRebalanceListener | None = None,
        alone: bool = False,
        **facts: Any,
    ) -> Any:
        """Return a consumer of these topics that commits nothing by itself. Raises Unavailable.

        With `alone` it takes all partitions at once, without joining its group. One that begins with the latest
        record hears what is sent from now on.
        """
        consumer = AIOKafkaConsumer(
            **self._facts,
            enable_auto_commit=False,
            fetch_max_wait_ms=int(self.options.fetch_wait * 1000),
            max_partition_fetch_bytes=self.options.max_message,
            metadata_max_age_ms=30_000,
            **facts,
        )
        self._drivers.append(consumer)
        if alone:
            consumer.assign([TopicPartition(topic, n) for topic in topics for n in await self.partitions(topic)])
        elif topics:
            consumer.subscribe(list(topics), listener=listener)
        starting = asyncio.get_running_loop().create_task(consumer.start())
        try:
            await self._unless_lost(starting, _JOIN_LIMIT)
        finally:
            starting.cancel()
            await asyncio.wait([starting])
            _look_at(starting)
        if facts.get("auto_offset_reset") == "latest":
            async with asyncio.timeout(self.options.connect_timeout):
                for partition in consumer.assignment():
                    with suppress(IllegalStateError):  # another member has it by now
                        await consumer.position(partition)
        return consumer


async def within(limit: float, work: Coroutine[Any, Any, Any]) -> None:
    """Give work so many seconds, whatever comes of it."""
    # A task of its own: aiokafka lets the cancellation of its tasks escape into whoever closes it.
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait([task], timeout=limit)
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=1)
        _look_at(task)


_TASKS = tuple(
    f"_{name}_task"
    for name in ("coordination", "heartbeat", "commit_refresh", "reset_committed", "fetch", "sender", "sync")
)


async def _stop(driver: Any) -> None:
    # aiokafka waits for a broker that is away; then its tasks are ended one by one.
    await within(_END_LIMIT, driver.stop())
    client: Any = getattr(driver, "client", None) or driver._client
    owners = (driver, client, *(getattr(driver, name, None) for name in ("_coordinator", "_fetcher", "_sender")))
    found = [getattr(owner, name, None) for owner in owners for name in _TASKS]
    tasks = [task for task in found if isinstance(task, asyncio.Task)]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=1)
        _look_at(*tasks)
    await within(_END_LIMIT, client.close())


def _look_at(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        if future.done() and not future.cancelled():
            future.exception()


def _value(value: Any) -> Any:
    return None if value is _NOTHING else value


def _words(error: BaseException) -> str:
    if isinstance(error, RpcException):
        return error.message
    return str(error).removeprefix(f"{type(error).__name__}: ") or type(error).__name__
