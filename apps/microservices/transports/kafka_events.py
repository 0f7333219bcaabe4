"""Durable events over Kafka: a consumer group for each service, committed after the handlers, in order of each key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from contextvars import Context
from typing import Any, ClassVar

from ..context import RpcContext
from ..dispatcher import Dispatcher, Route
from ..exceptions import InvalidPayload, RpcException, Unavailable
from ..handlers import Delivery
from ..instruments import dropped
from ..packets import Request
from . import Address, Count, Seconds, kafka
from .kafka import KafkaClient, KafkaServer, nobody
from .kafka_records import read_headers, topic_of

logger = logging.getLogger("microservices.kafka")


class Options(kafka.Options, frozen=True, kw_only=True):
    """What the URL of a bus may set; times in seconds."""

    attempts: Count = 5
    retry_after: Seconds = 0.5
    """The pause before the second attempt; each further one is three times longer."""


class KafkaBus(KafkaClient):
    """Sends events; `emit` returns when the cluster has them."""

    Options: ClassVar[type[kafka.Options]] = Options

    async def publish(self, request: Request, context: RpcContext) -> None:
        raise RpcException("An event bus answers no requests.")


class KafkaListener(KafkaServer):
    """Takes the events that a service hears: tries again what fails, and lays aside what goes on failing.

    Events of one key and partition run one after another. What fails finally goes to the topic `dead.<service>`,
    with the headers `dead-topic`, `dead-partition`, `dead-offset` and `dead-error` beside its own.
    """

    Options: ClassVar[type[kafka.Options]] = Options

    def __init__(self, address: Address, dispatcher: Dispatcher) -> None:
        super().__init__(address, dispatcher)
        # What every process gets: read without a group, from the record after the last one read.
        self._told = self._by_topic(self._heard("each"))
        self._last: dict[Any, int] = {}
        self._dead = topic_of(f"dead.{dispatcher.service}", self.options.prefix)
        self._resting: set[asyncio.Task[Any]] = set()

    @property
    def postfix(self) -> str:
        return ""

    @property
    def routes(self) -> dict[str, Route]:
        return self._heard("one")

    def _heard(self, delivery: Delivery) -> dict[str, Route]:
        routes = self.dispatcher.routes
        return {name: route for name, route in routes.items() if self.dispatcher.hears(name, delivery)}

    async def listen(self) -> None:
        if self._routes or self._told:
            await super().listen()

    def let_go(self) -> None:
        # Another process, or this one, begins anew with what waits for its next attempt.
        for task in self._resting:
            task.cancel()

    def _tell(self, record: Any, route: Route, delivery: Delivery) -> asyncio.Task[Any] | None:
        headers = read_headers(record)
        # Not by `handle`: what is tried again is kept as a whole.
        return self.dispatcher.dispatch(
            self.packet(record, headers),
            nobody,
            transport=self.scheme,
            peer=self.url,
            channel=record.topic,
            delivery=delivery,
            route=route,
            headers=headers,
            native=record,
        )

    # For each process

    async def subscribe(self) -> None:
        await super().subscribe()
        connection = self._connection
        if connection is None or not self._told:
            return
        await connection.ensure(dict.fromkeys(self._told, self.options.partitions))
        follower = await connection.consume(list(self._told), auto_offset_reset="latest")
        for partition in follower.assignment():
            end = await follower.position(partition)
            last = self._last.setdefault(partition, end)
            if last < end:  # what came while the connection was lost
                follower.seek(partition, last)
        self._readers.append(connection.run(self._follow(follower)))

    async def _follow(self, follower: Any) -> None:
        while True:
            records = await follower.getmany(timeout_ms=1000, max_records=await self.free())
            for partition, found in records.items():
                for record in found:
                    self._last[partition] = record.offset + 1
                    self.keep(self._tell(record, self._told[record.topic], "each"))

    # For one process

    def _start(self, record: Any) -> asyncio.Task[Any] | None:
        work = self._work(record, None if record.key is None else self.running(record))
        task = self.keep(asyncio.get_running_loop().create_task(work, context=Context()))
        return task if record.key is None else self.lock(record, task)

    async def _work(self, record: Any, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await self._rest(asyncio.wait([before]))
        for attempt in range(1, self.options.attempts + 1):
            task = self._tell(record, self._routes[record.topic], "one")
            failures = await task if task is not None else []
            if not failures:
                return
            if all(isinstance(failure, InvalidPayload) for failure in failures):
                await self._bury(record, str(failures[0]))
                return
            if attempt < self.options.attempts:
                await self._rest(asyncio.sleep(self.options.retry_after * 3 ** (attempt - 1)))
        await self._bury(record, f"attempt {attempt} failed: {failures[0]!r}")

    async def _rest(self, end: Awaitable[Any]) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._resting.add(task)
            try:
                await end
            finally:
                self._resting.discard(task)

    async def _bury(self, record: Any, why: str) -> None:
        logger.error("%s gives up an event of %s: %s", self.dispatcher.service, record.topic, why)
        dropped.add(self.dispatcher.service, self.scheme, "dead-letter")
        facts = {"topic": record.topic, "partition": record.partition, "offset": record.offset, "error": why}
        headers = [(name, value) for name, value in record.headers if value is not None]
        headers += [(f"dead-{name}", str(value).encode("utf-8", "replace")) for name, value in facts.items()]
        value = record.value
        while True:
            # It is committed only when it lies there.
            await self.connected.wait()
            if self._connection is not None:
                try:
                    await self._connection.ensure({self._dead: 1})
                    await self._connection.certainly(self._dead, value, headers, key=record.key)
                    return
                except RpcException as error:
                    if not isinstance(error, Unavailable):
                        value = None  # too large with its headers: these tell where it stands
            await self._rest(asyncio.sleep(self.options.retry_after))
