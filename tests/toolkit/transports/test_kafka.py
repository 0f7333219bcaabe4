"""NestJS's Kafka transport: the contract over a real broker, its bytes, groups and offsets."""

import asyncio
import json
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, DeadlineExceeded, RpcException, Unavailable
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import kafka_consumers, parse, read_options
from microservices.transports.base import ClientProxy
from microservices.transports.kafka import KafkaClient, KafkaServer, Options
from microservices.transports.kafka_connection import driver_facts
from microservices.transports.kafka_records import read_value, topic_of, write_value
from tests.brokers import Kafka, free_port
from tests.toolkit.conftest import service
from tests.toolkit.transports.certificates import Authority
from tests.toolkit.transports.contract import (
    PATIENCE,
    BrokerContract,
    TransportContract,
    count,
    echo,
    hearing,
)
from tests.toolkit.transports.wire import Wire, listener, until

pytestmark = pytest.mark.slow

# Tansu looks again for news only when half of a fetch's time has gone by.
COMMON = "fetch_wait=0.01"
GROUP = "session_timeout=1"
EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


@pytest.fixture
def prefix() -> str:
    """What no other test puts before its topics."""
    return f"t{os.urandom(4).hex()}."


@pytest.fixture
def url(kafka_url: str, prefix: str) -> str:
    """A Kafka where this test has all topics for itself; a server of it joins no group, which takes a second."""
    return f"{kafka_url}?{COMMON}&prefix={prefix}&alone=true"


class TestKafka(TransportContract):
    carries_headers = True
    nobody = DeadlineExceeded
    notices_who_leaves = False
    holds_back = False

    @pytest.fixture(autouse=True)
    def use(self, url: str) -> None:
        self.url = url

    async def test_a_request_to_an_event_handler_is_answered(self) -> None:
        """It is not: as with NestJS, an event handler of Kafka hears an event, whoever waits for an answer."""
        heard: asyncio.Queue[Any] = asyncio.Queue()

        @event_pattern("made")
        async def made(data: int, ctx: RpcContext) -> None:
            heard.put_nowait((data, ctx.id))

        async with self.talk(made) as client:
            with pytest.raises(DeadlineExceeded):
                await client.send("made", 1, timeout=0.3)
            call = await heard.get()

        assert call == (1, None)


class TestKafkaRestarted(BrokerContract):
    @pytest.fixture(autouse=True)
    def use(self, own_kafka: Kafka) -> None:
        self.broker = own_kafka
        self.url = f"{own_kafka.url}?{COMMON}&{GROUP}&connect_timeout=0.5"


@asynccontextmanager
async def serving(
    url: str,
    *functions: Callable[..., Any],
    kind: type[KafkaServer] = KafkaServer,
    name: str = "shop",
    grace: float = 1,
) -> AsyncIterator[Any]:
    """Serve these handlers, or hear events with them."""
    async with listened(kind(parse(url), service(*functions, name=name)), grace) as server:
        yield server


@asynccontextmanager
async def listened(server: KafkaServer, grace: float = 1) -> AsyncIterator[Any]:
    """Have a server listen."""
    await server.listen()
    await server.connected.wait()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(grace)


@asynccontextmanager
async def calling(url: str, kind: type[ClientProxy] = KafkaClient) -> AsyncIterator[Client]:
    """Give a client."""
    client = Client("shop", lambda: kind(parse(url), "shop"))
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


class Foreign:
    """A peer that knows nothing of the toolkit."""

    def __init__(self, url: str, prefix: str) -> None:
        self.place = urlsplit(url).netloc
        self.prefix = prefix

    async def __aenter__(self) -> Self:
        # aiokafka refuses a record with neither key nor value, unless a serializer makes it one.
        nothing = {"value_serializer": lambda value: value or None}
        self.producer = AIOKafkaProducer(bootstrap_servers=self.place, **nothing)
        self.admin = AIOKafkaAdminClient(bootstrap_servers=self.place)
        await self.producer.start()
        await self.admin.start()
        self.consumers: list[AIOKafkaConsumer] = []
        return self

    async def __aexit__(self, *_: object) -> None:
        for consumer in self.consumers:
            await consumer.stop()
        await self.producer.stop()
        await self.admin.close()

    async def make(self, *topics: str, partitions: int = 1) -> None:
        """Make topics."""
        await self.admin.create_topics([NewTopic(self.prefix + topic, partitions, 1) for topic in topics])

    async def say(self, topic: str, value: bytes, headers: dict[str, bytes] | None = None, **facts: Any) -> None:
        """Write a record; one without a value for an empty one."""
        pairs = list((headers or {}).items())
        await self.producer.send_and_wait(self.prefix + topic, value, headers=pairs, **facts)

    async def read(self, topic: str, number: int) -> list[Any]:
        """Return the first records of a topic."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.place, fetch_max_wait_ms=10, auto_offset_reset="earliest")
        self.consumers.append(consumer)
        await consumer.start()
        consumer.assign([TopicPartition(self.prefix + topic, 0)])
        return [await consumer.getone() for _ in range(number)]

    async def committed(self, group: str, topic: str, partition: int = 0) -> int:
        """Return the offset that a group has committed."""
        wanted = [TopicPartition(self.prefix + topic, partition)]
        found = await self.admin.list_consumer_group_offsets(self.prefix + group, partitions=wanted)
        return int(found[wanted[0]].offset)

    async def settled(self, group: str, topic: str, offset: int) -> None:
        """Wait until a group has committed so much."""
        while await self.committed(group, topic) != offset:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def foreign(kafka_url: str, prefix: str) -> AsyncIterator[Foreign]:
    """A client of Kafka that knows nothing of the toolkit."""
    async with Foreign(kafka_url, prefix) as peer:
        yield peer


def asking(id: bytes, topic: str) -> dict[str, bytes]:
    """Return the headers of NestJS's requests."""
    return {"kafka_correlationId": id, "kafka_replyTopic": topic.encode(), "kafka_replyPartition": b"0"}


def seen(record: Any) -> tuple[bytes | None, dict[str, bytes]]:
    """Return what a record says."""
    return record.value, dict(record.headers)


# Bytes


@pytest.mark.asyncio
async def test_answers_are_nestjs_records(url: str, foreign: Foreign, prefix: str) -> None:
    @message_pattern("ksum")
    async def ksum(data: list[int]) -> int:
        return sum(data)

    @message_pattern("kstream")
    async def kstream() -> AsyncIterator[int]:
        for number in (1, 2, 3):
            yield number

    @message_pattern("krpc")
    async def krpc() -> None:
        raise RpcException({"status": "error", "message": "boom"})

    @message_pattern("ktext")
    async def ktext() -> str:
        return "as it is"

    @message_pattern("kobject")
    async def kobject() -> Any:
        return {"a": [1, None]}

    @message_pattern("kundef")
    async def kundef() -> None:
        return None

    topics = ("ksum", "kstream", "krpc", "ktext", "kobject", "kundef")
    await foreign.make(*(f"{topic}.reply" for topic in topics))
    async with serving(url, ksum, kstream, krpc, ktext, kobject, kundef):
        for topic in topics:
            await foreign.say(topic, b"[1,2,3]" if topic == "ksum" else b"", asking(b"id1", f"{prefix}{topic}.reply"))
        answers = {topic: await foreign.read(f"{topic}.reply", 3 if topic == "kstream" else 1) for topic in topics}

    id, end = {"kafka_correlationId": b"id1"}, {"kafka_nest-is-disposed": b"\x00"}
    ours = {"kafka_type": b"json"}
    assert {topic: [seen(record) for record in records] for topic, records in answers.items()} == {
        "ksum": [(b"6", id | end | ours)],
        "kstream": [(b"1", id | ours), (b"2", id | ours), (b"3", id | end | ours)],
        "krpc": [(None, id | {"kafka_nest-err": b'{"status":"error","message":"boom"}'} | end)],
        "ktext": [(b"as it is", id | end)],
        "kobject": [(b'{"a":[1,null]}', id | end)],
        "kundef": [(None, id | end)],
    }
    assert {record.partition for records in answers.values() for record in records} == {0}
    assert {record.key for records in answers.values() for record in records} == {None}


@pytest.mark.asyncio
async def test_requests_and_events_are_nestjs_records(url: str, foreign: Foreign, prefix: str) -> None:
    record = {"key": "k1", "headers": {"x-version": "2"}, "timestamp": 1_700_000_000_000, "partition": 0}
    await foreign.make("ask", "ask.reply")
    async with calling(url) as client:
        await client.emit("connected")  # so that no deadline below passes before its request is sent
        for value in ([1, 2], "text", 1.5, True, None, '{"looks":"like JSON"}'):
            call = client.send("ask", value, timeout=0.4, metadata={"trace-id": "t1"})
            with pytest.raises(DeadlineExceeded):
                await call
        await client.emit({"cmd": "made"}, {"id": 7}, options=record)
        requests = [seen(each) for each in await foreign.read("ask", 6)]
        (event,) = await foreign.read("made", 1)

    ids = [headers.pop("kafka_correlationId") for _, headers in requests]
    left = [int(headers.pop("deadline")) for _, headers in requests]
    always = {
        "trace-id": b"t1",
        "kafka_replyTopic": f"{prefix}ask.reply".encode(),
        "kafka_replyPartition": b"0",
    }
    assert requests == [
        (b"[1,2]", always),
        (b"text", always),
        (b"1.5", always | {"kafka_type": b"json"}),
        (b"true", always | {"kafka_type": b"json"}),
        (None, always),
        (b'{"looks":"like JSON"}', always | {"kafka_type": b"text"}),
    ]
    assert len(set(ids)) == 6
    assert all(len(id) > 32 for id in ids)
    assert all(0 < each <= 400 for each in left)
    assert (event.key, event.timestamp, *seen(event)) == (b"k1", 1_700_000_000_000, b'{"id":7}', {"x-version": b"2"})


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("answers", "values"),
    [
        ([(b"6", {"kafka_nest-is-disposed": b"\x00"})], ["6"]),  # scalars are texts, as for NestJS's own clients
        ([(b'{"a":1}', {}), (b"[2]", {"kafka_nest-is-disposed": b"\x00"})], [{"a": 1}, [2]]),
        ([(b"1", {}), (b"", {"kafka_nest-is-disposed": b"\x00"})], ["1"]),  # a completion of its own
        ([(b"", {"kafka_nest-is-disposed": b"\x00"})], [None]),
        ([(b"{cut", {"kafka_nest-is-disposed": b"\x00"})], ["{cut"]),
    ],
)
async def test_a_nestjs_service_is_understood(
    url: str, foreign: Foreign, answers: list[tuple[bytes, dict[str, bytes]]], values: list[Any]
) -> None:
    async def answer() -> None:
        (request,) = await foreign.read("ask", 1)
        id = dict(request.headers)["kafka_correlationId"]
        await foreign.say("ask.reply", b"1", {})  # skipped: it names no request
        await foreign.say("ask.reply", b"1", {"kafka_correlationId": b"unknown", "kafka_nest-is-disposed": b"\x00"})
        for value, headers in answers:
            await foreign.say("ask.reply", value, {"kafka_correlationId": id, **headers})

    await foreign.make("ask", "ask.reply")
    async with calling(url) as client:
        answering = asyncio.create_task(answer())
        got = [value async for value in client.stream("ask")]
        await answering

    assert got == values


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (b"plain", {"status": "error", "message": "plain"}),
        (b'{"status":"error","message":"m"}', {"status": "error", "message": "m"}),
    ],
)
async def test_an_error_of_a_nestjs_service_is_understood(url: str, foreign: Foreign, error: bytes, told: Any) -> None:
    async def answer() -> None:
        (request,) = await foreign.read("ask", 1)
        id = dict(request.headers)["kafka_correlationId"]
        end = {"kafka_nest-err": error, "kafka_nest-is-disposed": b"\x00"}
        await foreign.say("ask.reply", b"", {"kafka_correlationId": id, **end})

    await foreign.make("ask", "ask.reply")
    async with calling(url) as client:
        answering = asyncio.create_task(answer())
        with pytest.raises(RpcException) as caught:
            await client.send("ask")
        await answering

    assert caught.value.to_wire() == told


@pytest.mark.asyncio
async def test_whatever_others_write_becomes_an_event(url: str, foreign: Foreign) -> None:
    values = [
        b'{"id":1}',
        b" {}",
        b"[1]",
        b"5",
        b"true",
        b'"quoted"',
        b"{cut",
        b'{},"x":{}',
        b"\xff\xfe",
        b"\0abc",
        b"",
    ]
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(url, hearing("made", heard)):
        for value in values:
            await foreign.say("made", value, {"x-a": b"\xff"})
        calls = [await heard.get() for _ in values]

    data = [{"id": 1}, " {}", [1], "5", "true", '"quoted"', "{cut", '{},"x":{}', "\ufffd\ufffd", "\0abc", None]
    assert [call[1] for call in calls] == data
    assert [call[2] for call in calls] == [{"x-a": "\ufffd"}] * len(values)


@pytest.mark.parametrize(
    "value", [None, "", "a", "1", "true", "null", "[1]", "{", "{}", 0, -0.5, 10**15, True, False, [], {}, [""], "\0"]
)
def test_a_value_survives_between_our_peers(value: Any) -> None:
    body, kind = write_value(value)
    back = json.loads(bytes(read_value(body, kind)))

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("kind", [None, b"json", b"text", b"none", b"odd"])
@pytest.mark.parametrize("body", [b"\xff", b"{", b'{"a":"\xff"}', b"[" * 3000, b'["\\ud800"]', b"nul", b""])
def test_nothing_that_a_peer_sends_is_no_value(body: bytes, kind: bytes | None) -> None:
    json.loads(bytes(read_value(body, kind)))


@pytest.mark.asyncio
async def test_a_codec_of_ones_own_is_spoken_by_both_sides(
    url: str, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    heard: asyncio.Queue[Any] = asyncio.Queue()
    values = [{"text": "é" * 1000}, "x" * 1000, 5, None, [True]]

    url = f"{url}&codec=zipped.Zipped"
    async with serving(url, echo, count, hearing("made", heard)), calling(url) as client:
        answers = [await client.send("echo", value) for value in values]
        counted = [value async for value in client.stream("count", 3)]
        await client.emit("made", values[0])
        await foreign.say("made", b'"not compressed"')
        await foreign.say("made", b"[1]")
        events = [(await heard.get())[1] for _ in range(3)]
        records = [*await foreign.read("echo", 5), *await foreign.read("echo.reply", 5)]
    sys.modules.pop("zipped")

    assert answers == values
    assert counted == [0, 1, 2]
    assert events == [values[0], '"not compressed"', [1]]
    bodies = [record.value for record in records]
    assert bodies[3] is bodies[8] is None
    assert all(body.startswith(b"x\x9c") and len(body) < 100 for body in bodies if body is not None)


# Names


@pytest.mark.parametrize(
    ("route", "topic"),
    [
        ("users.created", "users.created"),
        ('{"cmd":"get_user"}', "get_user"),
        ('{"cmd":"a","v":1}', "cmd-a-v-1-10088e2176db"),
        ("7", "7"),
        ("é", "--4a99557e4033"),
        (".", ".-cdb4ee2aea69"),
        ("a" * 243, "a" * 243),
        ("a" * 244, f"{'a' * 100}-ad5e672a5b10"),
    ],
)
def test_a_route_has_a_legal_topic(route: str, topic: str) -> None:
    assert topic_of(route) == topic
    assert topic_of(route, "x.").startswith("x.")
    assert len(topic_of(route, "x." * 20) + ".reply") <= 249


@pytest.mark.parametrize(
    ("patterns", "options", "complaint"),
    [
        (("get", {"cmd": "get"}), "", "would share the topic 'get'"),
        (("get", "get.reply"), "", "would carry the answers to 'get'"),
        (("get",), "?prefix=a/", "cannot stand before a topic"),
        (("get",), "?grup=a", "did you mean 'group'"),
        (("get",), "?reply_partition=-1", "Expected `int` >= 0"),
    ],
)
def test_what_cannot_be_is_told_at_start(patterns: tuple[Any, ...], options: str, complaint: str) -> None:
    handlers = [message_pattern(pattern)(lambda: None) for pattern in patterns]

    with pytest.raises(ConfigurationError, match=complaint):
        KafkaServer(parse(f"kafka://127.0.0.1{options}"), service(*handlers))


# Messages


@pytest.mark.asyncio
async def test_a_handler_sees_the_record(url: str, prefix: str) -> None:
    @message_pattern({"cmd": "tell"})
    async def tell(data: Any, ctx: RpcContext) -> Any:
        record = ctx.native
        return [
            ctx.channel,
            record.topic,
            record.partition,
            record.key.decode(),
            ctx.headers["x-a"],
            sorted(ctx.headers),
        ]

    async with serving(url, tell), calling(url) as client:
        answer = await client.send({"cmd": "tell"}, 1, options={"key": "k", "headers": {"x-a": "é"}}, timeout=5)

    ours = ["correlationId", "replyPartition", "replyTopic", "type"]
    names = ["deadline", *(f"kafka_{name}" for name in ours), "x-a"]
    assert answer == [f"{prefix}tell", f"{prefix}tell", 0, "k", "é", names]


@pytest.mark.asyncio
async def test_a_request_that_lacks_where_to_answer_is_an_event(url: str, foreign: Foreign) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @message_pattern("ask")
    async def ask(data: Any, ctx: RpcContext) -> None:
        heard.put_nowait((data, ctx.id))

    async with serving(url, ask):
        await foreign.say("ask", b"a", {"kafka_correlationId": b"1"})
        await foreign.say("ask", b"b", {"kafka_replyTopic": b"x.reply"})
        calls = [await heard.get(), await heard.get()]

    assert calls == [("a", None), ("b", None)]


@pytest.mark.asyncio
async def test_a_server_beside_a_bus_takes_requests_only(url: str, foreign: Foreign, prefix: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    server = KafkaServer(parse(url), service(echo, hearing("echo", heard), hearing("made", heard)))
    server.hears_events = False  # as it is told before it listens

    async with listened(server), calling(url) as client:
        await client.emit("echo", "by the bus")
        answer = await client.send("echo", "by request")
        await foreign.settled("shop-server", "echo", 2)
        topics = {partition.topic for partition in server.unwrap().assignment()}

    assert answer == "by request"
    assert topics == {f"{prefix}echo"}
    assert heard.empty()


@pytest.mark.asyncio
@pytest.mark.parametrize(("topic", "partition"), [(b"ill/egal", b"0"), (b"\xff", b"0"), (b"here.reply", b"77")])
async def test_an_answer_that_can_go_nowhere_hurts_nobody(
    url: str,
    foreign: Foreign,
    prefix: str,
    topic: bytes,
    partition: bytes,
    losses: Callable[[str, str], int],
) -> None:
    await foreign.make("here.reply")
    nowhere = {
        "kafka_correlationId": b"1",
        "kafka_replyTopic": prefix.encode() + topic,
        "kafka_replyPartition": partition,
    }
    async with serving(f"{url}&connect_timeout=0.3", echo), calling(url) as client:
        for _ in range(3):
            await foreign.say("echo", b"lost", nowhere)
        answers = [await client.send("echo", number) for number in range(3)]
        await until(lambda: losses("kafka", "no-reply-topic") + losses("kafka", "unsendable-answer") == 3)

    assert answers == [0, 1, 2]


@pytest.mark.asyncio
async def test_what_one_message_is_told_is_checked(url: str) -> None:
    async with calling(f"{url}&max_message=1000") as client:
        await client.emit("made", 1)
        with pytest.raises(RpcException) as nowhere:
            await client.emit("made", 1, options={"partition": 5})
        with pytest.raises(RpcException) as large:
            await client.emit("made", "x" * 1000)
        with pytest.raises(ConfigurationError, match="partition"):
            await client.emit("made", 1, options={"partition": -1})

    assert [(error.value.status_code, error.value.code) for error in (nowhere, large)] == [
        (400, "no-partition"),
        (413, "too-large"),
    ]


@pytest.mark.asyncio
async def test_an_answer_that_is_too_large_is_an_error(url: str) -> None:
    @message_pattern("large")
    async def large() -> str:
        return "x" * 2000

    async with serving(f"{url}&max_message=1000", large, echo), calling(url) as client:
        with pytest.raises(RpcException, match="more than 1000 bytes"):
            await client.send("large")
        after = await client.send("echo", "still here")

    assert after == "still here"


@pytest.mark.asyncio
async def test_a_request_that_waited_longer_than_its_deadline_is_not_run(
    url: str, foreign: Foreign, prefix: str
) -> None:
    ran: list[Any] = []

    @message_pattern("ask")
    async def ask(data: Any) -> None:
        ran.append(data)

    await foreign.make("ask.reply")
    headers = asking(b"1", f"{prefix}ask.reply") | {"deadline": b"5000"}
    old = int(time.time() * 1000) - 60_000
    async with serving(url, ask):
        await foreign.say("ask", b"old", headers, timestamp_ms=old)
        await foreign.say("ask", b"new", headers)
        answers = await foreign.read("ask.reply", 2)

    assert ran == ["new"]
    assert [b"deadline" in dict(answer.headers).get("kafka_nest-err", b"") for answer in answers] == [True, False]


@pytest.mark.asyncio
async def test_a_long_stream_taken_slowly_arrives_whole(url: str) -> None:
    async with serving(url, count, echo), calling(url) as client:
        await client.send("echo", 1)
        values = []
        async for value in client.stream("count", 5000):
            values.append(value)
            if value % 1000 == 0:
                await asyncio.sleep(0.05)

    assert values == list(range(5000))


@pytest.mark.asyncio
async def test_two_clients_share_a_reply_topic(url: str) -> None:
    async with serving(url, echo), calling(url) as one, calling(url) as other:
        calls = [client.send("echo", number) for number in range(50) for client in (one, other)]
        answers = await asyncio.gather(*calls)

    assert answers == [number for number in range(50) for _ in range(2)]


@pytest.mark.asyncio
async def test_new_patterns_lose_no_answers_to_others(url: str) -> None:
    handlers = []
    for number in range(12):

        @message_pattern(f"ask{number}")
        async def ask(data: Any) -> Any:
            return data

        handlers.append(ask)

    async with serving(url, *handlers), calling(url) as client:
        rounds = [client.send(f"ask{number % (1 + number // 20)}", number) for number in range(240)]
        answers = await asyncio.gather(*rounds)

    assert answers == list(range(240))


# Offsets


@pytest.mark.asyncio
async def test_only_what_is_done_is_committed(url: str, foreign: Foreign) -> None:
    go_on = asyncio.Event()
    started: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def made(data: Any) -> None:
        started.put_nowait(data)
        if data == "2":
            await go_on.wait()

    async with serving(url, made):
        for number in range(6):
            await foreign.say("made", b"%d" % number)
        heard = [await started.get() for _ in range(6)]
        await foreign.settled("shop-server", "made", 2)
        await asyncio.sleep(0.15)  # several commits, if there were anything to commit
        before = await foreign.committed("shop-server", "made")
        go_on.set()
        await foreign.settled("shop-server", "made", 6)

    assert heard == ["0", "1", "2", "3", "4", "5"]
    assert before == 2


@pytest.mark.asyncio
async def test_what_a_closing_process_cannot_finish_comes_again(url: str, foreign: Foreign) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def hangs(data: Any) -> None:
        started.put_nowait(data)
        if data == "hang":
            await asyncio.Event().wait()

    heard: asyncio.Queue[Any] = asyncio.Queue()
    async with serving(url, hangs, grace=0):
        await foreign.say("made", b"done")
        await foreign.say("made", b"hang")
        assert [await started.get(), await started.get()] == ["done", "hang"]
    async with serving(url, hearing("made", heard)):
        call = await heard.get()
        await foreign.settled("shop-server", "made", 2)

    assert call[1] == "hang"
    assert heard.empty()


@pytest.mark.asyncio
async def test_what_comes_again_while_it_is_at_work_is_not_run_twice(url: str, foreign: Foreign, prefix: str) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: Any) -> None:
        started.put_nowait(data)
        await go_on.wait()

    async with serving(f"{url}&session_timeout=0.1", made) as server:
        await foreign.say("made", b"1")
        first = await started.get()
        await server._group.on_partitions_revoked(
            ()
        )  # as a rebalance does, which gives the partition to the same process
        server.unwrap().seek(TopicPartition(f"{prefix}made", 0), 0)
        await foreign.say("made", b"2")
        second = await started.get()
        go_on.set()
        await foreign.settled("shop-server", "made", 2)

    assert (first, second) == ("1", "2")
    assert started.empty()


@pytest.mark.asyncio
async def test_a_group_begins_where_it_is_told(url: str, foreign: Foreign) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    await foreign.make("made")
    await foreign.say("made", b"before")
    async with (
        serving(f"{url}&begin=latest&group=late", hearing("made", heard)),
        serving(f"{url}&group=all", hearing("made", heard)),
    ):
        await foreign.say("made", b"after")
        calls = [(await heard.get())[1] for _ in range(3)]

    assert sorted(calls) == ["after", "after", "before"]


@pytest.mark.asyncio
async def test_a_postfix_and_a_group_name_the_group(url: str, prefix: str) -> None:
    names = [
        KafkaServer(parse(f"{url}{options}"), service(echo))._group.name.removeprefix(prefix)
        for options in ("", "&group=g", "&group=g&postfix=-x", "&postfix=")
    ]

    assert names == ["shop-server", "g-server", "g-x", "shop"]


@pytest.mark.slow
@pytest.mark.asyncio
async def test_processes_of_a_group_share_the_partitions_and_nothing_is_lost(
    kafka_url: str, prefix: str, foreign: Foreign
) -> None:
    url = f"{kafka_url}?{COMMON}&{GROUP}&prefix={prefix}"
    taken: dict[str, list[str]] = {"one": [], "other": []}

    def taking(who: str) -> Callable[..., Any]:
        @event_pattern("made")
        async def take(data: Any) -> None:
            taken[who].append(data)
            await asyncio.sleep(0.01)

        return take

    def total() -> int:
        return len(set(taken["one"]) | set(taken["other"]))

    await foreign.make("made", partitions=4)
    numbers = iter(range(1000))

    async def say(number: int) -> None:
        for _ in range(number):
            n = next(numbers)
            await foreign.say("made", b"%d" % n, partition=n % 4)

    async with serving(url, taking("one")) as first:
        await say(40)
        await until(lambda: total() == 40)
        async with serving(url, taking("other")) as second:
            await until(lambda: len(first.unwrap().assignment()) == len(second.unwrap().assignment()) == 2)
            await say(40)
            await until(lambda: total() == 80)
        await say(40)
        await until(lambda: total() == 120)

    assert len(taken["other"]) >= 20
    assert len(taken["one"]) + len(taken["other"]) < 150  # doubles are few


# Brokers that are away


@pytest.mark.slow
@pytest.mark.asyncio
async def test_closing_is_quick_while_the_broker_is_away(own_kafka: Kafka) -> None:
    url = f"{own_kafka.url}?{COMMON}&{GROUP}&connect_timeout=0.5"
    async with serving(url, echo) as server, calling(url) as client:
        await client.send("echo", 1)
        await asyncio.to_thread(own_kafka.stop)
        begun = time.monotonic()
        await client.close()
        await server.close(1)
        took = time.monotonic() - begun

    assert took < 6


@pytest.mark.asyncio
async def test_nobody_at_the_address_is_told_at_once() -> None:
    async with calling(f"kafka://127.0.0.1:1?{COMMON}") as client:
        for call in (client.send("ask"), client.emit("made")):
            with pytest.raises(Unavailable, match=r"shop cannot be reached at kafka://127\.0\.0\.1:1"):
                await call


@pytest.mark.asyncio
async def test_a_kafka_that_says_nothing_costs_no_more_than_the_deadline() -> None:
    async def silent(wire: Wire) -> None:
        await wire.reader.read()

    async with listener(silent) as port, calling(f"kafka://127.0.0.1:{port}?{COMMON}&connect_timeout=0.5") as client:
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await client.emit("made", 1, timeout=0.05)


async def until_slowly(condition: Callable[[], bool]) -> None:
    """Look now and then until a condition holds that nobody tells of."""
    while not condition():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)


# Bounds


@pytest.mark.asyncio
async def test_a_broker_without_idempotent_producers_is_written_to_without(kafka_url: str, prefix: str) -> None:
    url = f"{kafka_url}?prefix={prefix}&alone=true&fetch_wait=0.01"
    async with serving(url, echo), calling(url) as client:
        answer = await client.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_partition_that_does_not_move_on_is_not_read_without_end(
    url: str, foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_consumers, "_MOST_OPEN", 20)
    go_on = asyncio.Event()
    done = 0

    @event_pattern("made")
    async def made(data: Any) -> None:
        nonlocal done
        if data == "0":
            await go_on.wait()
        done += 1

    await foreign.make("made")
    for number in range(100):
        await foreign.say("made", b"%d" % number)
    async with serving(f"{url}&max_in_flight=5", made):
        await until_slowly(lambda: done >= 19)
        await asyncio.sleep(0.1)  # time enough to read on, if it were allowed to
        before = done
        go_on.set()
        await foreign.settled("shop-server", "made", 100)

    assert before < 30
    assert done == 100


# TLS and users


class HiddenKafka(Kafka):
    """A Kafka that says it is elsewhere: where something speaks TLS for it."""

    door: int

    def _command(self) -> list[str]:
        return [*super()._command()[:-1], f"tcp://127.0.0.1:{self.door}"]


@asynccontextmanager
async def tls_door(port: int, target: int, context: ssl.SSLContext) -> AsyncIterator[None]:
    """Hand what comes over TLS on to a port."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
        writer.close()

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(carry(reader, inside[1]), carry(inside[0], writer))

    server = await asyncio.start_server(through, "127.0.0.1", port, ssl=context)
    async with server:
        yield


@pytest.mark.asyncio
async def test_requests_travel_over_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("kafka")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pair)
    broker = HiddenKafka(tmp_path / "kafka")
    broker.door = free_port()
    url = f"kafka://127.0.0.1:{broker.door}?{COMMON}&alone=true&tls=true&connect_timeout=1"

    with broker:
        async with (
            tls_door(broker.door, broker.port, context),
            serving(f"{url}&cafile={authority.cafile}", echo),
            calling(f"{url}&cafile={authority.cafile}") as client,
            calling(url) as stranger,
        ):
            answer = await client.send("echo", 1)
            with pytest.raises(Unavailable, match="cannot be reached"):
                await stranger.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_user_proves_itself_by_sasl() -> None:
    address = parse("kafka://ann:s%40cret@a,[::1]:9?mechanism=SCRAM-SHA-256&tls=true")
    facts = driver_facts(address, read_options(Options, address), "shop")
    odd = parse("kafka://ann:x@a?mechanism=plain")

    assert facts["bootstrap_servers"] == ["a:9092", "[::1]:9"]
    assert (facts["security_protocol"], facts["sasl_mechanism"]) == ("SASL_SSL", "SCRAM-SHA-256")
    assert (facts["sasl_plain_username"], facts["sasl_plain_password"]) == ("ann", "s@cret")
    with pytest.raises(ConfigurationError, match="'plain' is none of"):
        KafkaServer(odd, service(echo))
