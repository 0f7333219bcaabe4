"""Who reads from Kafka: a member of a consumer group, which commits, and the answers to a client, without one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiokafka import TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from ..exceptions import Unavailable
from .kafka_connection import KafkaConnection, within

logger = logging.getLogger("microservices.kafka")

_COMMIT_PAUSE = 0.05
_COMMIT_LIMIT = 2.0
_MOST_OPEN = 10_000
_PAGE = 256
_HOLD_LIMIT = 2.0

Work = asyncio.Task[Any]


class _Partition:
    """The records of a partition from the first one at work on; `mark` is the offset before which nothing is."""

    __slots__ = ("committed", "mark", "open")

    def __init__(self) -> None:
        self.open: deque[tuple[int, Work | None]] = deque()
        self.mark = self.committed = -1

    def advance(self) -> None:
        # What was cancelled is not done: another process does it.
        while self.open and ((task := self.open[0][1]) is None or (task.done() and not task.cancelled())):
            self.mark = self.open.popleft()[0] + 1


class Group(ConsumerRebalanceListener):  # type: ignore[misc] # aiokafka's classes are untyped
    """A member of a consumer group: starts work on each record, and commits what is done.

    It commits the highest offset of a partition before which nothing is at work. A partition that goes to another
    member is given back when its work is done, or half a session has passed.
    """

    def __init__(
        self,
        name: str,
        session: float,
        start: Callable[[Any], Work | None],
        room: Callable[[], Awaitable[int]],
        let_go: Callable[[], None],
    ) -> None:
        self.name = name
        self.consumer: Any = None
        self._session = session
        self._start = start
        self._room = room
        self._let_go = let_go
        self._partitions: dict[TopicPartition, _Partition] = {}
        # What comes again while it is still at work is not run twice. With the time, since a topic can be made anew.
        self._at_work: dict[tuple[TopicPartition, int, int], Work] = {}
        self._moved = asyncio.Event()

    async def join(self, connection: KafkaConnection, topics: list[str], begin: str, alone: bool) -> None:
        """Hear these topics. Raises Unavailable."""
        session = int(self._session * 1000)
        self._partitions.clear()
        self.consumer = await connection.consume(
            topics,
            listener=self,
            alone=alone,
            group_id=self.name,
            auto_offset_reset=begin,
            session_timeout_ms=session,
            heartbeat_interval_ms=max(session // 5, 1),
        )
        connection.run(self._keep_committing())

    async def read(self) -> None:
        """Start work on what comes, as much as there is room for."""
        while True:
            for partition in self.consumer.paused():
                if not self._is_long(partition):
                    self.consumer.resume(partition)
            wait = 10 if self.consumer.paused() else 1000
            records = await self.consumer.getmany(timeout_ms=wait, max_records=await self._room())
            for partition, found in records.items():
                for record in found:
                    self._take(partition, record)
                if self._is_long(partition):
                    self.consumer.pause(partition)

    def _is_long(self, partition: TopicPartition) -> bool:
        return partition in self._partitions and len(self._partitions[partition].open) >= _MOST_OPEN

    def _take(self, partition: TopicPartition, record: Any) -> None:
        key = (partition, record.offset, record.timestamp)
        task = self._at_work.get(key)
        if task is None:
            try:
                task = self._start(record)
            except Exception:
                logger.exception("%s stumbled over a record of %s", self.name, record.topic)
            if task is not None:
                self._at_work[key] = task
                task.add_done_callback(partial(self._worked, key))
        self._partitions.setdefault(partition, _Partition()).open.append((record.offset, task))
        if task is None:
            self._moved.set()

    def _worked(self, key: tuple[TopicPartition, int, int], task: Work) -> None:
        del self._at_work[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s stumbled over a record of %s", self.name, key[0].topic, exc_info=error)
        self._moved.set()

    async def _keep_committing(self) -> None:
        while True:
            await self._moved.wait()
            await self._commit()
            await asyncio.sleep(_COMMIT_PAUSE)  # many in one request

    async def _commit(self) -> None:
        self._moved.clear()
        ours = self.consumer.assignment()
        moved = {}
        for partition, records in self._partitions.items():
            records.advance()
            if records.mark > records.committed and partition in ours:
                moved[partition] = records.mark
        if moved:
            try:
                await self.consumer.commit(moved)
            except KafkaError as error:
                # The group has moved on: whoever has the partition now does it again.
                logger.debug("%s could not commit: %s", self.name, error)
                return
        for partition, mark in moved.items():
            if partition in self._partitions:
                self._partitions[partition].committed = mark

    async def settle(self) -> None:
        """Commit all that is done, or give up after a moment."""
        if self.consumer is not None:
            await within(_COMMIT_LIMIT, self._commit())

    async def on_partitions_revoked(self, revoked: Any) -> None:
        # Until this returns the driver reads nothing, and its heartbeats keep the partitions here.
        self._let_go()
        if tasks := [task for records in self._partitions.values() for _, task in records.open if task is not None]:
            await asyncio.wait(tasks, timeout=self._session / 2)
        await self.settle()
        self._partitions.clear()

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Offsets come from what was committed."""


class Replies:
    """The answers to one client: one partition of each reply topic, from where it ended."""

    def __init__(
        self, connection: KafkaConnection, partition: int, receive: Callable[[Any], asyncio.Future[None] | None]
    ) -> None:
        self._connection = connection
        self._partition = partition
        self._receive = receive
        self._consumer: Any = None
        self._next: dict[TopicPartition, int] = {}
        self._held: dict[TopicPartition, tuple[asyncio.Future[None], float]] = {}
        self._wanted: set[str] = set()
        self._heard: set[str] = set()
        self._joining: asyncio.Task[None] | None = None

    def hears(self, topic: str) -> bool:
        """Return whether the answers in a topic are read."""
        return topic in self._heard

    async def join(self, topic: str) -> None:
        """Read the answers in a topic, too; all who wait share one attempt. Raises Unavailable."""
        self._wanted.add(topic)
        while not self.hears(topic):
            if self._joining is None or self._joining.done():
                self._joining = self._connection.run(self._join(self._wanted - self._heard))
            joining = self._joining
            await asyncio.wait([joining])
            if not self.hears(topic) and (joining.cancelled() or joining.exception() is not None):
                raise Unavailable(f"The answers in {topic} cannot be read.")

    async def _join(self, topics: set[str]) -> None:
        if self._consumer is None:
            self._consumer = await self._connection.consume()
        new = [TopicPartition(topic, self._partition) for topic in topics]
        # In one go: an assignment forgets the positions of the one before.
        self._consumer.assign([*self._next, *new])
        self._held.clear()
        for partition, offset in self._next.items():
            self._consumer.seek(partition, offset)
        async with asyncio.timeout(self._connection.options.connect_timeout):
            for partition in new:
                self._next[partition] = await self._consumer.position(partition)
        if not self._heard:
            self._connection.run(self._read())
        self._heard |= topics

    async def _read(self) -> None:
        while True:
            for partition, (full, end) in list(self._held.items()):
                if full.done() or time.monotonic() > end:
                    del self._held[partition]
                    self._consumer.resume(partition)
            wait = 10 if self._held else 1000
            records = await self._consumer.getmany(timeout_ms=wait, max_records=_PAGE)
            for partition, found in records.items():
                self._hand_over(partition, found)

    def _hand_over(self, partition: TopicPartition, records: list[Any]) -> None:
        self._next[partition] = records[-1].offset + 1
        for record in records:
            full = self._receive(record)
            if full is not None and partition not in self._held:
                # Who takes a stream slowly holds back the answers to the same pattern, but not for long.
                self._held[partition] = (full, time.monotonic() + _HOLD_LIMIT)
                self._consumer.pause(partition)
