"""NestJS's RabbitMQ transport: the contract over a real broker, and foreign peers."""

import asyncio
import json
import os
import ssl
import struct
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import compress, product
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import aio_pika
import pytest
import pytest_asyncio
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import (
    ConfigurationError,
    ConnectionLost,
    DeadlineExceeded,
    NoHandler,
    RpcException,
    Unavailable,
)
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import parse
from microservices.transports.amqp import Message, Properties
from microservices.transports.amqp_frames import facts_of, short
from microservices.transports.base import Status
from microservices.transports.rmq import RmqClient, RmqServer
from tests.brokers import RabbitMQ
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
from tests.toolkit.transports.front import front
from tests.toolkit.transports.wire import Wire, listener, until

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"


def unique(name: str) -> str:
    """Return a name that no other test has."""
    return f"{name}-{os.urandom(6).hex()}"


def joined(url: str, options: str) -> str:
    """Return the URL with options."""
    return f"{url}?{options}"


class TestRmq(TransportContract):
    carries_headers = True
    notices_who_leaves = False  # the protocol has no word for it
    holds_back = False
    options = ""

    @pytest.fixture(autouse=True)
    def use(self, rabbitmq_url: str) -> None:
        # The queue goes with its last consumer.
        self.url = joined(rabbitmq_url, f"queue={unique('shop')}&durable=false&auto_delete=true{self.options}")


class TestRmqAcknowledged(TestRmq):
    server_options = MappingProxyType({"no_ack": "false"})

    def serving(self, url: str) -> Any:
        self.server_options = {**self.server_options, "no_ack": "false"}
        return super().serving(url)


class TestRmqWildcards(TestRmq):
    wildcard = ("users.*", "users.created")
    nobody = Unavailable  # no queue is bound by such a key
    options = "&wildcards=true"


class TestRmqRestarted(BrokerContract):
    @pytest.fixture(autouse=True)
    def use(self, own_rabbitmq: RabbitMQ) -> None:
        self.broker = own_rabbitmq
        queue = unique("shop")
        self.url = joined(own_rabbitmq.url, f"queue={queue}&durable=false&auto_delete=true&connect_timeout=0.5")


# What the tests below are made of


@pytest.fixture
def queue() -> str:
    """A queue's name that no other test has."""
    return unique("shop")


@pytest_asyncio.fixture
async def foreign(rabbitmq_url: str, queue: str) -> AsyncIterator[AbstractChannel]:
    """A channel of a client that knows nothing of the toolkit; what the test has named goes with it."""
    async with await aio_pika.connect(rabbitmq_url) as connection, connection.channel() as channel:
        yield channel
        for name in (queue, f"{queue}.dead"):
            await channel.queue_delete(name)
        await channel.exchange_delete(queue)


@asynccontextmanager
async def serving(url: str, queue: str, *functions: Callable[..., Any], options: str = "") -> AsyncIterator[RmqServer]:
    """Serve these handlers."""
    server = RmqServer(parse(f"{url}?queue={queue}&durable=false{options}"), service(*functions))
    await server.listen()
    try:
        async with asyncio.timeout(PATIENCE):
            yield server
    finally:
        await server.close(0)


@asynccontextmanager
async def calling(url: str, queue: str, options: str = "") -> AsyncIterator[Client]:
    """Give a client."""
    proxy = RmqClient(parse(f"{url}?queue={queue}&durable=false{options}"), "shop")
    client = Client("shop", lambda: proxy)
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


async def next_of(queue: aio_pika.abc.AbstractQueue) -> AbstractIncomingMessage:
    """Wait for the next message of a queue."""
    while True:
        message = await queue.get(no_ack=True, fail=False)
        if message is not None:
            return message
        await asyncio.sleep(0.005)


async def eventually(look: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Look until what is wanted is there."""
    async with asyncio.timeout(PATIENCE):
        while await look() != wanted:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


async def waiting(channel: AbstractChannel, queue: str) -> int:
    """Return how many messages of a queue nobody has been given."""
    declared = await channel.declare_queue(queue, passive=True)
    return declared.declaration_result.message_count or 0


async def tell(channel: AbstractChannel, queue: str, body: Any, **properties: Any) -> None:
    """Publish as a foreigner does: bytes as they are, anything else as JSON."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    await channel.default_exchange.publish(aio_pika.Message(text, **properties), queue)


def die(server: Any) -> None:
    """Do what SIGKILL does: nothing more."""
    assert server._keeping is not None
    assert server._connection is not None
    server._keeping.cancel()
    server._connection.transport.abort()


# Bytes, as NestJS writes them


@pytest.mark.asyncio
async def test_a_request_travels_as_nestjs_writes_it(rabbitmq_url: str, queue: str, foreign: AbstractChannel) -> None:
    requests = await foreign.declare_queue(queue, durable=False)

    async with calling(rabbitmq_url, queue) as client:
        call = asyncio.create_task(client.send({"cmd": "sum"}, [1, "é"], timeout=PATIENCE))
        message = await next_of(requests)
        request = json.loads(message.body)
        await tell(foreign, message.reply_to or "", {"response": 6}, correlation_id=message.correlation_id)
        await tell(foreign, message.reply_to or "", {"isDisposed": True}, correlation_id=message.correlation_id)
        answer = await call

    assert list(request) == ["pattern", "data", "metadata", "id"]
    assert (request["pattern"], request["data"]) == ({"cmd": "sum"}, [1, "é"])
    assert request["id"] == message.correlation_id
    assert (message.reply_to or "").startswith("amq.rabbitmq.reply-to.")
    assert (message.content_type, message.message_id, message.headers) == (None, None, {})
    assert message.delivery_mode == aio_pika.DeliveryMode.NOT_PERSISTENT
    assert 0 < float(message.expiration or 0) <= PATIENCE
    assert answer == 6


@pytest.mark.asyncio
async def test_an_event_travels_as_nestjs_writes_it(rabbitmq_url: str, queue: str, foreign: AbstractChannel) -> None:
    events = await foreign.declare_queue(queue, durable=False)

    async with calling(rabbitmq_url, queue) as client:
        await client.emit({"b": 1, "a": "x"}, {"id": 1})
        message = await next_of(events)

    assert json.loads(message.body) == {"pattern": {"b": 1, "a": "x"}, "data": {"id": 1}}
    assert (message.reply_to, message.correlation_id, message.expiration) == (None, None, None)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("pattern", "data", "bodies"),
    [
        ("echo", "é", ['{"response":"é","isDisposed":true}']),
        ("count", 2, ['{"response":0}', '{"response":1}', '{"isDisposed":true}']),
        ("fail", None, ['{"err":{"status":"error","message":"boom"},"isDisposed":true}']),
    ],
)
async def test_answers_travel_as_nestjs_writes_them(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, pattern: str, data: Any, bodies: list[str]
) -> None:
    @message_pattern("fail")
    async def fail() -> None:
        raise RpcException("boom")

    async with serving(rabbitmq_url, queue, echo, count, fail):
        own = await foreign.declare_queue(exclusive=True)
        asked = {"pattern": pattern, "data": data, "id": "in the body"}
        await tell(foreign, queue, asked, reply_to=own.name, correlation_id="7")
        answers = [await next_of(own) for _ in bodies]

    assert [answer.body.decode() for answer in answers] == bodies
    assert {(answer.correlation_id, answer.delivery_mode, len(answer.headers)) for answer in answers} == {("7", 1, 0)}


@pytest.mark.asyncio
async def test_that_nobody_handles_a_request_is_told_as_nestjs_tells_it(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    async with serving(rabbitmq_url, queue, echo):
        own = await foreign.declare_queue(exclusive=True)
        await tell(foreign, queue, {"pattern": "x", "data": 1, "id": 7}, reply_to=own.name, correlation_id="c")
        answer = await next_of(own)

    assert json.loads(answer.body) == {"id": 7, "err": NoHandler().to_wire(), "status": "error"}
    assert answer.correlation_id == "c"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"headers": {"x": "1"}},
        {"content_type": "application/json"},
        {"content_encoding": "utf-8", "priority": 3},
        {"content_type": "application/json", "headers": {"x": [1]}, "priority": 3, "expiration": 60, "message_id": "m"},
    ],
)
async def test_a_request_with_any_properties_is_answered(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, properties: dict[str, Any]
) -> None:
    async with serving(rabbitmq_url, queue, echo):
        own = await foreign.declare_queue(exclusive=True)
        asked = {"pattern": "echo", "data": 1, "id": 7}
        await tell(foreign, queue, asked, reply_to=own.name, correlation_id="c", **properties)
        answer = await next_of(own)

    assert (answer.body, answer.correlation_id) == (b'{"response":1,"isDisposed":true}', "c")


# Peers of all manners


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "odd",
    [
        b"no JSON",
        b"",
        b"[1,2]",
        b"5",
        b"null",
        b"\xff\xfe",
        b"\x00\x3c\x00\x3c",  # as a delivery begins
        b'{"total":1}',
        b'{"data":1}',
        b'{"pattern":"unknown","data":1}',
        b'{"pattern":null,"data":1}',
        b'{"pattern":true,"data":1}',
    ],
)
@pytest.mark.parametrize("no_ack", ["true", "false"])
async def test_what_has_no_route_is_dropped_and_hurts_nobody(
    rabbitmq_url: str,
    queue: str,
    foreign: AbstractChannel,
    odd: bytes,
    no_ack: str,
    losses: Callable[[str, str], int],
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(rabbitmq_url, queue, hearing("made", heard), options=f"&no_ack={no_ack}"):
        await tell(foreign, queue, odd)
        await tell(foreign, queue, {"pattern": "made", "data": 1})
        call = await heard.get()

    assert call == ("made", 1, {})
    assert losses("amqp", "unknown-event") == 1
    assert await waiting(foreign, queue) == 0  # not even what was refused


def test_a_header_is_read_by_hand_as_pamqp_has_written_it() -> None:
    told = {
        "content_type": "application/json",
        "content_encoding": "gzip",
        "headers": {"x": [1]},
        "delivery_mode": 2,
        "priority": 3,
        "correlation_id": "é" * 100,
        "reply_to": "amq.rabbitmq.reply-to.g1h2",
        "expiration": "5000",
        "message_id": "m",
    }
    for chosen in product([False, True], repeat=len(told)):
        some = dict(compress(told.items(), chosen))
        header = bytes(12) + Properties(**some).marshal()
        expected = tuple(short(some[name]) if name in some else b"" for name in ("correlation_id", "reply_to"))
        assert facts_of(header) == (*expected, "headers" in some)
        for length in range(len(header)):
            assert all(not text or len(text) == text[0] + 1 for text in facts_of(header[:length])[:2])


@pytest.mark.asyncio
@pytest.mark.parametrize("size", [1, 7, 30])
async def test_messages_may_come_in_pieces(rabbitmq_url: str, queue: str, size: int) -> None:
    async with serving(rabbitmq_url, queue, echo) as server, calling(rabbitmq_url, queue) as client:
        connection = server.unwrap()
        assert connection is not None
        take = connection.data_received

        def take_pieces(data: bytes) -> None:
            for start in range(0, len(data), size):
                take(data[start : start + size])

        connection.data_received = take_pieces  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as calls:
            answers = [calls.create_task(client.send("echo", "x" * length)) for length in (0, 1, 300)]

    assert [len(answer.result()) for answer in answers] == [0, 1, 300]


@pytest.mark.asyncio
async def test_properties_that_cannot_be_read_hurt_nobody(rabbitmq_url: str, queue: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async with serving(rabbitmq_url, queue, hearing("made", heard)), calling(rabbitmq_url, queue) as client:
        await client.emit("made", 1)
        proxy = client._bound().proxy
        assert proxy._confirming is not None
        body = b'{"pattern":"made","data":2}'
        await proxy._confirming.hand_over("", queue, b"\x04\x00\x02\xff\xfe", body, mandatory=True)
        calls = [(await heard.get())[1] for _ in range(2)]

    assert calls == [1, 2]


@pytest.mark.asyncio
async def test_a_routing_key_that_cannot_be_read_hurts_nobody(rabbitmq_url: str, queue: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    options = f"&exchange={queue}&exchange_type=fanout&auto_delete=true"
    publish = b"\x00\x3c\x00\x28\x00\x00" + bytes([len(queue)]) + queue.encode() + b"\x02\xff\xfe\x00"
    header = b"\x00\x3c\x00\x00" + (27).to_bytes(8, "big") + b"\x00\x00"

    async with (
        serving(rabbitmq_url, queue, hearing("made", heard), options=options),
        calling(rabbitmq_url, queue, options) as client,
    ):
        await client.emit("made", 1)
        connection = client._bound().proxy.unwrap()
        for kind, payload in ((1, publish), (2, header), (3, b'{"pattern":"made","data":2}')):
            connection.write(struct.pack(">BHI", kind, 2, len(payload)) + payload + b"\xce")
        calls = [(await heard.get())[1] for _ in range(2)]

    assert calls == [1, 2]


@pytest.mark.asyncio
async def test_a_request_that_nobody_can_be_answered_is_an_event(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @message_pattern("ask")
    async def ask(data: Any, ctx: RpcContext) -> str:
        heard.put_nowait((data, ctx.id))
        return "for nobody"

    async with serving(rabbitmq_url, queue, ask):
        await tell(foreign, queue, {"pattern": "ask", "data": 1, "id": "7"})
        call = await heard.get()

    assert call == (1, None)


@pytest.mark.asyncio
async def test_a_trace_that_only_the_headers_tell_is_the_calls_own(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    async with serving(rabbitmq_url, queue, hearing("made", heard)), calling(rabbitmq_url, queue) as client:
        await tell(foreign, queue, {"pattern": "made", "data": 1}, headers={"traceparent": trace})
        from_headers = await heard.get()
        await client.emit("made", 2, metadata={"traceparent": trace})
        from_client = await heard.get()

    assert from_headers == ("made", 1, {"traceparent": trace})
    assert from_client == ("made", 2, {"traceparent": trace})


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"response":1,"isDisposed":true}', 1),
        (b'{"id":"another","response":1,"isDisposed":true}', 1),  # the property tells
        (b'{"total":1}', {"total": 1}),
        (b"[1]", [1]),
        (b"5", 5),
        (b'"text"', "text"),
    ],
)
async def test_whatever_others_answer_is_the_answer(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, body: bytes, answer: Any
) -> None:
    requests = await foreign.declare_queue(queue, durable=False)

    async with calling(rabbitmq_url, queue) as client:
        call = asyncio.create_task(client.send("ask", 1))
        message = await next_of(requests)
        await tell(foreign, message.reply_to or "", b'{"response":0}', correlation_id="of nobody")
        await tell(foreign, message.reply_to or "", body, correlation_id=message.correlation_id)

        assert await call == answer


@pytest.mark.asyncio
async def test_an_answer_that_is_no_json_fails_its_call(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    requests = await foreign.declare_queue(queue, durable=False)

    async with calling(rabbitmq_url, queue) as client:
        call = asyncio.create_task(client.send("ask", 1))
        message = await next_of(requests)
        await tell(foreign, message.reply_to or "", b"no JSON", correlation_id=message.correlation_id)
        with pytest.raises(RpcException) as caught:
            await call

    assert caught.value.code == "no-packet"


# Nobody there


@pytest.mark.asyncio
async def test_without_a_queue_both_verbs_fail_at_once(rabbitmq_url: str, queue: str) -> None:
    async with calling(rabbitmq_url, queue, "&no_assert=true") as client:
        for call in (client.send("echo", 1, timeout=PATIENCE), client.emit("made", 1)):
            with pytest.raises(Unavailable, match="Nobody listens for shop on amqp://"):
                await call
        async with serving(rabbitmq_url, queue, echo):
            answer = await client.send("echo", 2)

    assert answer == 2


@pytest.mark.asyncio
async def test_a_request_that_nobody_took_in_time_does_not_stay_in_the_queue(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    async with calling(rabbitmq_url, queue) as client:
        with pytest.raises(DeadlineExceeded):
            await client.send("echo", 1, timeout=0.05)
        await eventually(lambda: waiting(foreign, queue), 0)


@pytest.mark.asyncio
async def test_an_event_to_an_exchange_without_listeners_is_counted(
    rabbitmq_url: str, queue: str, losses: Callable[[str, str], int]
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    options = "&wildcards=true"

    async with (
        serving(rabbitmq_url, queue, hearing("made", heard), options=options),
        calling(rabbitmq_url, queue, options) as client,
    ):
        await asyncio.gather(*(client.emit(name, 1) for name in ("unheard", "made", "unheard", "made")))
        calls = [await heard.get(), await heard.get()]

    assert calls == [("made", 1, {})] * 2
    assert losses("amqp", "nobody-listens") == 2


# Options


@pytest.mark.asyncio
async def test_both_sides_must_tell_the_same_of_a_queue(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    await foreign.declare_queue(queue, durable=False, arguments={"x-max-length": 5})

    async with calling(rabbitmq_url, queue) as client, calling(rabbitmq_url, queue, "&max_length=5") as other:
        with pytest.raises(Unavailable, match="406 PRECONDITION_FAILED - inequivalent arg 'x-max-length'"):
            await client.send("echo", 1)
        await other.emit("made", 1)

    assert await waiting(foreign, queue) == 1


@pytest.mark.asyncio
async def test_a_server_that_may_not_have_its_queue_says_why(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, caplog: pytest.LogCaptureFixture
) -> None:
    await foreign.declare_queue(queue, durable=False, arguments={"x-max-length": 5})

    async with serving(rabbitmq_url, queue, echo, options="&connect_timeout=0.2") as server:
        assert server.status is Status.CONNECTING
    assert caplog.text.count("406 PRECONDITION_FAILED") == 1


@pytest.mark.asyncio
async def test_the_queue_is_named_as_the_service_where_nothing_else_is_said(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    server = RmqServer(parse(f"{rabbitmq_url}?auto_delete=true"), service(echo, name=queue))
    client = Client(queue, lambda: RmqClient(parse(f"{rabbitmq_url}?auto_delete=true"), queue))
    await server.listen()
    try:
        declared = await foreign.declare_queue(queue, passive=True)
        answer = await client.send("echo", 1)
    finally:
        await client.close()
        await server.close(0)

    assert declared.declaration_result.consumer_count == 1
    assert answer == 1


@pytest.mark.asyncio
async def test_a_queue_can_be_declared_with_all_that_it_may_have(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    options = (
        "&message_ttl=1.5&expires=60&dead_letter_exchange=amq.direct&dead_letter_routing_key=x&max_length=9"
        '&max_priority=4&queue_type=classic&queue_arguments={"x-overflow":"reject-publish"}'
    )
    arguments = {
        "x-message-ttl": 1500,
        "x-expires": 60_000,
        "x-dead-letter-exchange": "amq.direct",
        "x-dead-letter-routing-key": "x",
        "x-max-length": 9,
        "x-max-priority": 4,
        "x-queue-type": "classic",
        "x-overflow": "reject-publish",
    }

    async with serving(rabbitmq_url, queue, echo, options=options) as server:
        assert server.status is Status.CONNECTED
        await foreign.declare_queue(queue, durable=False, arguments=arguments)  # 406 if anything else were declared


@pytest.mark.asyncio
async def test_a_fanout_reaches_every_process_and_the_first_answer_counts(rabbitmq_url: str, queue: str) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()
    options = f"&exchange_type=fanout&exchange={queue}&exclusive=true"
    url = f"{rabbitmq_url}?{options[1:]}"
    servers = [RmqServer(parse(url), service(hearing("made", heard), echo)) for _ in range(2)]
    for server in servers:
        await server.listen()
    try:
        async with calling(rabbitmq_url, queue, options) as client:
            await client.emit("made", 1)
            calls = [await heard.get(), await heard.get()]
            answer = await client.send("echo", 2)
    finally:
        for server in servers:
            await server.close(0)

    assert calls == [("made", 1, {})] * 2
    assert answer == 2


@pytest.mark.asyncio
async def test_an_exchange_of_somebody_elses_leads_to_the_queue(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def hear(data: Any, ctx: RpcContext) -> None:
        heard.put_nowait((ctx.channel, data))

    options = f"&exchange={queue}&exchange_type=direct&routing_key=orders"
    async with serving(rabbitmq_url, queue, hear, options=options), calling(rabbitmq_url, queue, options) as client:
        exchange = await foreign.get_exchange(queue)
        await exchange.publish(aio_pika.Message(b'{"pattern":"made","data":1}'), "orders")
        through_exchange = await heard.get()
        await client.emit("made", 2)
        to_queue = await heard.get()

    assert (through_exchange, to_queue) == (("orders", 1), (queue, 2))


@pytest.mark.asyncio
async def test_a_codec_of_ones_own_is_spoken_by_both_sides(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    heard: asyncio.Queue[Any] = asyncio.Queue()
    options = "&codec=zipped.Zipped"

    async with calling(rabbitmq_url, queue, options) as client:
        await client.emit("made", 1)
        zipped = await next_of(await foreign.get_queue(queue))
        async with serving(rabbitmq_url, queue, echo, hearing("made", heard), options=options):
            await client.emit("made", 2)
            await tell(foreign, queue, {"pattern": "made", "data": "not compressed"})
            events = [(await heard.get())[1] for _ in range(2)]
            answer = await client.send("echo", {"text": "é" * 1000})

    assert json.loads(zlib.decompress(zipped.body)) == {"pattern": "made", "data": 1}
    assert events == [2, "not compressed"]
    assert answer == {"text": "é" * 1000}


@pytest.mark.asyncio
async def test_what_a_client_says_of_every_message_is_said(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    events = await foreign.declare_queue(queue, durable=False)

    async with calling(rabbitmq_url, queue, '&persistent=true&headers={"x-from":"us","x-kind":"a"}') as client:
        await client.emit("made", 1, options={"headers": {"x-kind": "b", "x-number": 5}})
        message = await next_of(events)

    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert message.headers == {"x-from": "us", "x-kind": "b", "x-number": 5}


@pytest.mark.asyncio
async def test_a_record_says_all_that_a_message_may_say(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    events = await foreign.declare_queue(queue, durable=False)
    said = {
        "headers": {"x": 1},
        "priority": 3,
        "expiration": 30.5,
        "persistent": True,
        "message_id": "m",
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "reply_to": "elsewhere",
        "timestamp": 1_700_000_000,
        "type": "t",
        "user_id": "guest",
        "app_id": "a",
    }

    async with calling(rabbitmq_url, queue) as client:
        await client.emit("made", 1, options=said)
        message = await next_of(events)

    assert message.timestamp is not None
    assert {
        "headers": message.headers,
        "priority": message.priority,
        "expiration": message.expiration,
        "persistent": message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT,
        "message_id": message.message_id,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "reply_to": message.reply_to,
        "timestamp": int(message.timestamp.timestamp()),
        "type": message.type,
        "user_id": message.user_id,
        "app_id": message.app_id,
    } == said


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"message_id": "x" * 256}, "AMQP cannot carry"),
        ({"headers": {"x": object()}}, "AMQP cannot carry"),
    ],
)
async def test_what_amqp_cannot_carry_fails_its_message_alone(
    rabbitmq_url: str, queue: str, options: dict[str, Any], complaint: str
) -> None:
    async with serving(rabbitmq_url, queue, echo), calling(rabbitmq_url, queue) as client:
        for call in (client.send("echo", 1, options=options), client.emit("echo", 1, options=options)):
            with pytest.raises(RpcException, match=complaint):
                await call
        answer = await client.send("echo", 2)

    assert answer == 2


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("qeue=x", "did you mean 'queue'"),
        ("max_in_flight=0", "Expected `int` >= 1"),
        ("exchange_type=cloud", "Invalid enum value 'cloud'"),
        ("queue_arguments=[1]", "'queue_arguments' is no JSON object"),
        ("exchange_type=fanout", "An exchange needs a name"),
    ],
)
@pytest.mark.parametrize("side", ["server", "client"])
async def test_a_bad_option_is_explained(query: str, complaint: str, side: str) -> None:
    address = parse(f"amqp://127.0.0.1?{query}")
    with pytest.raises(ConfigurationError, match=complaint):
        RmqServer(address, service(echo)) if side == "server" else RmqClient(address, "shop")


@pytest.mark.asyncio
async def test_headers_that_amqp_has_no_form_for_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="AMQP cannot carry this"):
        RmqClient(parse('amqp://127.0.0.1?headers={"x":9223372036854775808}'), "shop")


@pytest.mark.asyncio
async def test_names_that_amqp_has_no_room_for_are_refused(rabbitmq_url: str, queue: str) -> None:
    long = "é" * 128
    with pytest.raises(ConfigurationError, match="255 bytes"):
        RmqServer(parse("amqp://127.0.0.1?wildcards=true"), service(hearing(long, asyncio.Queue())))
    async with calling(rabbitmq_url, queue, "&wildcards=true") as client:
        for call in (client.send(long, 1), client.emit(long, 1)):
            with pytest.raises(RpcException, match="255 bytes") as caught:
                await call
            assert caught.value.status_code == 400


@pytest.mark.asyncio
async def test_routes_whose_events_come_another_way_are_not_bound(
    rabbitmq_url: str, queue: str, losses: Callable[[str, str], int]
) -> None:
    server = RmqServer(
        parse(f"{rabbitmq_url}?queue={queue}&durable=false&wildcards=true"),
        service(echo, hearing("made", asyncio.Queue())),
    )
    server.hears_events = False
    await server.listen()
    try:
        async with calling(rabbitmq_url, queue, "&wildcards=true") as client:
            await client.emit("made", 1)
            answer = await client.send("echo", 1)
    finally:
        await server.close(0)

    assert answer == 1
    assert losses("amqp", "nobody-listens") == 1


# What a handler is told


@pytest.mark.asyncio
async def test_a_handler_sees_the_message_itself(rabbitmq_url: str, queue: str) -> None:
    seen: asyncio.Queue[RpcContext] = asyncio.Queue()

    @message_pattern("ask")
    async def ask(data: Any, ctx: RpcContext) -> None:
        seen.put_nowait(ctx)

    async with serving(rabbitmq_url, queue, ask), calling(rabbitmq_url, queue) as client:
        await client.send("ask", 1, options={"headers": {"x": "1"}, "priority": 2})
        ctx = await seen.get()

    message = ctx.native
    assert isinstance(message, Message)
    assert (ctx.channel, ctx.transport, dict(ctx.headers)) == (queue, "amqp", {"x": "1"})
    assert (message.routing_key, message.exchange, message.redelivered) == (queue, "", False)
    assert (message.properties.priority, message.properties.correlation_id) == (2, ctx.id)


# Acknowledgements


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["request", "event"])
async def test_what_a_dead_process_was_working_on_goes_to_another(rabbitmq_url: str, queue: str, kind: str) -> None:
    started: asyncio.Queue[Any] = asyncio.Queue()

    @message_pattern("work")
    async def hang(data: Any) -> None:
        started.put_nowait(data)
        await asyncio.Event().wait()

    @message_pattern("work")
    async def work(data: Any, ctx: RpcContext) -> Any:
        started.put_nowait(("again", ctx.native.redelivered))
        return data

    options = "&no_ack=false"
    async with calling(rabbitmq_url, queue) as client, serving(rabbitmq_url, queue, hang, options=options) as victim:
        call = asyncio.create_task(client.send("work", 1) if kind == "request" else client.emit("work", 1))
        first = await started.get()
        die(victim)
        async with serving(rabbitmq_url, queue, work, options=options):
            second = await started.get()
            answer = await call

    assert (first, second) == (1, ("again", True))
    assert answer == (1 if kind == "request" else None)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("policy", "data", "tries"), [("reject", 1, 1), ("requeue", 1, 2), ("requeue", "no number", 0)]
)
async def test_a_failed_event_goes_to_the_dead_letter_exchange(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, policy: str, data: Any, tries: int
) -> None:
    ran = []
    dead = await foreign.declare_queue(f"{queue}.dead")

    @event_pattern("made")
    def made(data: int) -> None:
        ran.append(data)
        raise ValueError("unlucky")

    options = f"&no_ack=false&on_failure={policy}&dead_letter_exchange=&dead_letter_routing_key={dead.name}"
    options = options.replace("exchange=&", "exchange=amq.direct&")
    await dead.bind("amq.direct", dead.name)
    async with (
        serving(rabbitmq_url, queue, made, options=options),
        calling(rabbitmq_url, queue, f"&dead_letter_exchange=amq.direct&dead_letter_routing_key={dead.name}") as client,
    ):
        await client.emit("made", data)
        letter = await next_of(dead)

    assert json.loads(letter.body)["data"] == data
    assert len(ran) == tries


@pytest.mark.asyncio
async def test_a_request_that_was_answered_with_an_error_is_done(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    ran = []

    @message_pattern("fail")
    async def fail() -> None:
        ran.append(1)
        raise RpcException("boom")

    async with (
        calling(rabbitmq_url, queue) as client,
        serving(rabbitmq_url, queue, fail, echo, options="&no_ack=false&on_failure=requeue"),
    ):
        with pytest.raises(RpcException, match="boom"):
            await client.send("fail")
        with pytest.raises(NoHandler):
            await client.send("unknown")
        await client.send("echo", 1)

    assert ran == [1]
    assert await waiting(foreign, queue) == 0


@pytest.mark.asyncio
async def test_a_handler_may_settle_its_message_itself(rabbitmq_url: str, queue: str, foreign: AbstractChannel) -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    @event_pattern("made")
    async def made(data: Any, ctx: RpcContext) -> None:
        message: Message = ctx.native
        message.nack(requeue=not message.redelivered)
        message.ack()  # too late
        heard.put_nowait((data, message.redelivered))

    async with (
        serving(rabbitmq_url, queue, made, options="&no_ack=false") as server,
        calling(rabbitmq_url, queue) as client,
    ):
        await client.emit("made", 1)
        calls = [await heard.get(), await heard.get()]
        status = server.status

    assert calls == [(1, False), (1, True)]
    assert status is Status.CONNECTED
    assert await waiting(foreign, queue) == 0


# Bounds


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "options", ["max_in_flight=3", "max_in_flight=3&no_ack=false", "no_ack=false&prefetch_count=3"]
)
async def test_a_flood_of_events_waits_and_none_is_lost(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, options: str
) -> None:
    running, most, heard = 0, 0, 0
    slow_one, others = asyncio.Event(), asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        nonlocal running, most, heard
        running, heard = running + 1, heard + 1
        most = max(most, running)
        await (slow_one if data == 2 else others).wait()
        running -= 1

    async with (
        serving(rabbitmq_url, queue, made, options=f"&{options}"),
        calling(rabbitmq_url, queue) as client,
    ):
        await asyncio.gather(*(client.emit("made", number) for number in range(100)))
        await until(lambda: heard == 3)
        await waiting(foreign, queue)  # time enough to start a fourth, if it were allowed to
        meanwhile = heard
        others.set()  # while the last one of the three goes on
        await until(lambda: heard == 100)
        slow_one.set()

    assert (meanwhile, most) == (3, 3)


@pytest.mark.asyncio
async def test_a_broker_that_takes_no_answers_brings_no_more_requests(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    @message_pattern("page", inline=True)
    def page(data: int) -> str:
        return "x" * 50_000

    async with front(rabbitmq_url) as passing:
        url = f"amqp://127.0.0.1:{passing.port}"
        async with serving(url, queue, page) as server, calling(rabbitmq_url, queue) as client:
            passing.taking.clear()
            calls = [asyncio.create_task(client.send("page", number, timeout=30)) for number in range(1000)]
            connection = server.unwrap()
            await until(lambda: connection.congestion() is not None)
            for _ in range(50):  # time enough to answer them all, if they came
                await waiting(foreign, queue)
            unsent = connection.transport.get_write_buffer_size()
            passing.taking.set()
            answers = await asyncio.gather(*calls)

    assert unsent < 8 * 1024 * 1024
    assert {len(answer) for answer in answers} == {50_000}


@pytest.mark.asyncio
async def test_closing_takes_what_has_arrived_and_nothing_more(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    heard: list[int] = []
    go_on = asyncio.Event()

    @event_pattern("made")
    async def made(data: int) -> None:
        heard.append(data)
        await go_on.wait()

    async with calling(rabbitmq_url, queue) as client:
        async with serving(rabbitmq_url, queue, made, options="&max_in_flight=3") as server:
            for number in range(10):
                await client.emit("made", number)
            await until(lambda: len(heard) == 3)
            closing = asyncio.create_task(server.close(PATIENCE))
            await asyncio.sleep(0)
            go_on.set()
            await closing
        await client.emit("made", 10)

        assert heard == list(range(10))
        assert await waiting(foreign, queue) == 1


@pytest.mark.asyncio
async def test_a_stream_that_is_taken_too_slowly_fails_and_hurts_no_other_call(rabbitmq_url: str, queue: str) -> None:
    all_sent = asyncio.Event()

    @message_pattern("flood")
    async def flood() -> AsyncIterator[int]:
        for number in range(3000):
            yield number
        all_sent.set()

    async with serving(rabbitmq_url, queue, flood, echo), calling(rabbitmq_url, queue) as client:
        values = client.stream("flood")
        first = await anext(values)
        await all_sent.wait()
        others = [await client.send("echo", number) for number in range(3)]
        with pytest.raises(RpcException) as caught:
            async for _ in values:
                pass

    assert (first, others) == (0, [0, 1, 2])
    assert caught.value.code == "stream-overflow"


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["send", "emit"])
async def test_a_broker_that_says_nothing_costs_no_more_than_the_deadline(verb: str) -> None:
    async def silent(wire: Wire) -> None:
        await wire.reader.read()

    async with listener(silent) as port, calling(f"amqp://127.0.0.1:{port}", "shop") as client:
        with pytest.raises(DeadlineExceeded):
            await getattr(client, verb)("echo", 1, timeout=0.05)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x00\x09\x01", b"\x01\x00\x00\xff\xff\xff\xff\xce"]
)
async def test_what_speaks_no_amqp_is_no_broker(greeting: bytes) -> None:
    async def other(wire: Wire) -> None:
        await wire.say(greeting)
        await wire.reader.read()

    async with listener(other) as port, calling(f"amqp://127.0.0.1:{port}", "shop") as client:
        with pytest.raises(Unavailable, match="no AMQP"):
            await client.send("echo", 1)


# Connections


@pytest.mark.asyncio
async def test_a_wrong_password_is_told(rabbitmq_url: str) -> None:
    url = rabbitmq_url.replace("guest:guest@", "guest:secret@")

    async with calling(url, "shop") as client:
        with pytest.raises(Unavailable, match="403 ACCESS_REFUSED") as caught:
            await client.send("echo", 1)

    assert "secret" not in str(caught.value)


@pytest.mark.asyncio
async def test_amqps_is_tls(rabbitmq_url: str, queue: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("rabbitmq"))

    trust = f"&cafile={authority.cafile}"
    async with front(rabbitmq_url, context) as passing:
        url = f"amqps://127.0.0.1:{passing.port}"
        async with serving(url, queue, echo, options=trust), calling(url, queue, trust) as client:
            answer = await client.send("echo", 1)
        async with calling(url, queue) as stranger:
            with pytest.raises(Unavailable, match="cannot be reached"):
                await stranger.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_the_first_of_several_hosts_that_answers_is_taken(rabbitmq_url: str, queue: str) -> None:
    url = rabbitmq_url.replace("@", "@127.0.0.1:1,")

    async with serving(url, queue, echo), calling(url, queue) as client:
        answer = await client.send("echo", 1)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_host_that_says_nothing_leaves_time_for_the_next_one(rabbitmq_url: str, queue: str) -> None:
    async def silent(wire: Wire) -> None:
        await wire.reader.read()

    async with listener(silent) as port:
        url = rabbitmq_url.replace("@", f"@127.0.0.1:{port},")
        async with serving(rabbitmq_url, queue, echo), calling(url, queue, "&connect_timeout=1") as client:
            answer = await client.send("echo", 1, timeout=PATIENCE)

    assert answer == 1


@pytest.mark.asyncio
async def test_a_queue_that_somebody_deleted_is_declared_again(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(rabbitmq_url, queue, echo) as server, calling(rabbitmq_url, queue) as client:
        await client.send("echo", 1)
        await foreign.queue_delete(queue)
        await until(lambda: server.status is Status.RECONNECTING)
        await until(lambda: server.status is Status.CONNECTED)
        answer = await client.send("echo", 2)

    assert answer == 2
    assert "the queue is gone" in caplog.text


@pytest.mark.asyncio
async def test_an_exchange_that_somebody_deleted_fails_what_was_sent_to_it_and_is_declared_again(
    rabbitmq_url: str, queue: str, foreign: AbstractChannel
) -> None:
    options = "&wildcards=true"
    async with calling(rabbitmq_url, queue, options) as client:
        await client.emit("made", 1)
        await foreign.exchange_delete(queue)
        with pytest.raises(Unavailable, match="404 NOT_FOUND"):
            await client.emit("made", 2)
        await client.emit("made", 3)
        await foreign.exchange_delete(queue)
        with pytest.raises(Unavailable, match="404 NOT_FOUND"):
            await client.send("made", 4)


@pytest.mark.asyncio
async def test_both_sides_notice_a_connection_that_went_without_a_word(own_rabbitmq: RabbitMQ, queue: str) -> None:
    started: asyncio.Queue[str] = asyncio.Queue()

    @message_pattern("never")
    async def never() -> None:
        started.put_nowait("never")
        await asyncio.Event().wait()

    url = own_rabbitmq.url
    async with serving(url, queue, never, echo) as server, calling(url, queue) as client:
        calls = [asyncio.create_task(client.send("never")), asyncio.create_task(anext(client.stream("never")))]
        for _ in calls:
            await started.get()
        await asyncio.to_thread(own_rabbitmq.drop)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await until(lambda: server.status is Status.CONNECTED)
        answer = await client.send("echo", 1)

    assert [type(outcome) for outcome in outcomes] == [ConnectionLost] * 2
    assert answer == 1


@pytest.mark.asyncio
async def test_a_broker_that_is_short_of_memory_costs_no_more_than_the_deadline(
    own_rabbitmq: RabbitMQ, queue: str
) -> None:
    alarm = "{resource_limit, memory, node()}"
    async with serving(own_rabbitmq.url, queue, echo), calling(own_rabbitmq.url, queue) as client:
        await client.send("echo", 1)
        await asyncio.to_thread(own_rabbitmq._tell, f"rabbit_alarm:set_alarm({{{alarm}, []}})")
        try:
            for call in (client.emit("echo", 2, timeout=0.1), client.send("echo", 3, timeout=0.1)):
                with pytest.raises(DeadlineExceeded):
                    await call
            waits = asyncio.create_task(client.send("echo", 4))
        finally:
            await asyncio.to_thread(own_rabbitmq._tell, f"rabbit_alarm:clear_alarm({alarm})")
        answer = await waits

    assert answer == 4


@pytest.mark.asyncio
@pytest.mark.slow
async def test_a_broker_that_falls_silent_is_lost_after_two_heartbeats(rabbitmq_url: str, queue: str) -> None:
    silent = asyncio.Event()
    _, _, place = rabbitmq_url.rpartition("@")
    host, _, port = place.partition("/")[0].partition(":")

    async def between(wire: Wire) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))

        async def carry() -> None:
            while data := await reader.read(65536):
                if not silent.is_set():
                    await wire.say(data)

        carrying = asyncio.create_task(carry())
        while data := await wire.reader.read(65536):
            writer.write(data)
        carrying.cancel()
        writer.close()

    async with (
        serving(rabbitmq_url, queue, echo),
        listener(between) as door,
        calling(f"amqp://127.0.0.1:{door}", queue, "&heartbeat=1") as client,
    ):
        await client.send("echo", 1)
        silent.set()
        with pytest.raises(ConnectionLost, match="silent"):
            await client.send("echo", 2)


def test_properties_that_nobody_can_read_are_none() -> None:
    depth = 3000
    table = b""
    for _ in range(depth):
        table = b"\1aF" + len(table).to_bytes(4) + table
    header = b"\0\x3c\0\0" + (0).to_bytes(8) + b"\x20\0" + len(table).to_bytes(4) + table

    channel: Any = SimpleNamespace(connection=SimpleNamespace(address="amqp://test"))
    message = Message(channel, 1, False, "", "orders", True, header, *facts_of(header), b"{}")

    assert message.has_headers
    assert message.headers == {}
