"""What only RabbitMQ has: exchanges for all, acknowledgements, and queues that must be declared alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import aio_pika
import pytest
import pytest_asyncio
from aio_pika.abc import AbstractChannel

from microservices import NoHandler, RpcException, Unavailable, message_pattern
from tests.interop.links import Link
from tests.interop.nest import VERSIONS, Answer, nest_client, nest_server
from tests.interop.ours import our_client, our_server

LINKS = [Link("amqp", version) for version in VERSIONS]
NO_HANDLER = "There is no matching message handler defined in the remote service."
WAIT = 5

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
    pytest.mark.parametrize("link", LINKS, ids=str),
]


@pytest_asyncio.fixture(loop_scope="session")
async def broker(rabbitmq: str) -> AsyncIterator[AbstractChannel]:
    """A channel of somebody who is neither NestJS nor ours."""
    async with await aio_pika.connect(rabbitmq) as connection, connection.channel() as channel:
        yield channel


@pytest_asyncio.fixture(loop_scope="session")
async def name(broker: AbstractChannel) -> AsyncIterator[str]:
    """What a queue and an exchange of this test are called."""
    name = f"interop-{uuid4().hex}"
    yield name
    await broker.queue_delete(name)
    await broker.exchange_delete(name)


async def left(broker: AbstractChannel, queue: str) -> int:
    """Return how many messages are in a queue when its servers have gone: among them what they never acknowledged."""
    async with asyncio.timeout(WAIT):
        while True:
            found = (await broker.declare_queue(queue, passive=True)).declaration_result
            if not found.consumer_count:
                return found.message_count or 0


class TestNestCallsUs:
    @pytest.mark.case("fanout exchange")
    async def test_each_of_our_servers_hears_an_event_of_nest(self, link: Link, rabbitmq: str, name: str) -> None:
        url = f"{rabbitmq}?exchange={name}&exchange_type=fanout&exclusive=true"
        told = {"exchange": name, "exchangeType": "fanout"}
        async with (
            our_server(url) as one,
            our_server(url) as other,
            nest_client(rabbitmq, version=link.version, **told) as nest,
        ):
            await nest.emit("noted", {"text": "é😀"})
            heard = [await asyncio.wait_for(server.heard.get(), WAIT) for server in (one, other)]
            answer = await nest.send({"cmd": "sum"}, [1, 2])  # both answer; the first one wins

        assert [(event.pattern, event.data) for event in heard] == [("noted", {"text": "é😀"})] * 2
        assert answer == Answer([3])

    @pytest.mark.case("acknowledgements (noAck: false)")
    async def test_we_acknowledge_whatever_nest_sends(
        self, link: Link, rabbitmq: str, broker: AbstractChannel, name: str
    ) -> None:
        async with (
            our_server(f"{rabbitmq}?queue={name}&no_ack=false&prefetch_count=3") as ours,
            nest_client(rabbitmq, version=link.version, queue=name) as nest,
        ):
            many = await nest.send_many("echo", 20)
            streamed = await nest.send("stream", {"count": 3})
            failed = await nest.send("rpc-text", {})
            unknown = await nest.send("unknown", {})
            await nest.emit("unheard", {})
            await nest.emit("noted", 1)
            heard = await asyncio.wait_for(ours.heard.get(), WAIT)

        assert len(many.values) == 20
        assert streamed == Answer([0, 1, 2])
        assert failed.error == {"status": "error", "message": "boom"}
        assert unknown == Answer([], NO_HANDLER)
        assert heard.data == 1
        assert await left(broker, name) == 0

    @pytest.mark.case("what one server leaves undone, another does")
    async def test_nest_does_what_our_server_has_not_finished(self, link: Link, rabbitmq: str, name: str) -> None:
        asked = asyncio.Event()

        @message_pattern("who")
        async def never_answer() -> None:
            asked.set()
            await asyncio.Event().wait()

        async with AsyncExitStack() as ours:
            await ours.enter_async_context(our_server(f"{rabbitmq}?queue={name}&no_ack=false", never_answer))
            async with nest_client(rabbitmq, version=link.version, queue=name) as nest:
                asking = asyncio.create_task(nest.send("who", {}))
                await asyncio.wait_for(asked.wait(), WAIT)
                async with nest_server(rabbitmq, version=link.version, name="b", queue=name, noAck=False):
                    await ours.aclose()
                    answer = await asking

        assert answer == Answer(["b"])

    @pytest.mark.case("a queue that the other side has declared otherwise")
    async def test_our_server_says_that_the_queue_of_nest_is_another(
        self, link: Link, rabbitmq: str, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        told: dict[str, Any] = {"queue": name, "queueOptions": {"durable": False}}
        async with nest_client(rabbitmq, version=link.version, **told) as nest:
            await nest.emit("noted", "so that it connects")
            async with our_server(f"{rabbitmq}?queue={name}&connect_timeout=0.5"):
                pass

        assert "406 PRECONDITION_FAILED" in caplog.text
        assert f"'{name}'" in caplog.text


class TestWeCallNest:
    @pytest.mark.case("fanout exchange")
    async def test_each_server_of_nest_hears_our_event(self, link: Link, rabbitmq: str, name: str) -> None:
        told: dict[str, Any] = {"exchange": name, "exchangeType": "fanout", "queueOptions": {"autoDelete": True}}
        queues = [f"{name}-{number}" for number in (1, 2)]
        async with AsyncExitStack() as stack:
            servers = (nest_server(rabbitmq, version=link.version, name=queue, queue=queue, **told) for queue in queues)
            await asyncio.gather(*map(stack.enter_async_context, servers))
            client = await stack.enter_async_context(our_client(f"{rabbitmq}?exchange={name}&exchange_type=fanout"))
            await client.emit("noted", {"text": "é😀"})
            answer = await client.send("who", {})
            heard = []
            for queue in queues:
                of_one = await stack.enter_async_context(our_client(f"{rabbitmq}?queue={queue}&auto_delete=true"))
                heard.append(await of_one.send("notes", {}))

        assert heard == [[{"text": "é😀"}]] * 2
        assert answer in queues

    @pytest.mark.case("acknowledgements (noAck: false)")
    async def test_nest_acknowledges_whatever_we_send(
        self, link: Link, rabbitmq: str, broker: AbstractChannel, name: str
    ) -> None:
        async with (
            nest_server(rabbitmq, version=link.version, queue=name, noAck=False, prefetchCount=3),
            our_client(f"{rabbitmq}?queue={name}") as client,
        ):
            many = await asyncio.gather(*(client.send("echo", n) for n in range(20)))
            streamed = [value async for value in client.stream("stream", {"count": 3})]
            with pytest.raises(RpcException, match="boom"):
                await client.send("rpc-text", {})
            with pytest.raises(NoHandler):
                await client.send("unknown", {})
            await client.emit("unheard", {})
            await client.emit("noted", 1)
            notes = await client.send("notes", {})

        assert many == list(range(20))
        assert streamed == [0, 1, 2]
        assert notes == [1]
        assert await left(broker, name) == 0

    @pytest.mark.case("a queue that the other side has declared otherwise")
    async def test_our_client_says_that_the_queue_of_nest_is_another(
        self, link: Link, rabbitmq: str, name: str
    ) -> None:
        told: dict[str, Any] = {"queue": name, "queueOptions": {"durable": False}}
        async with (
            nest_server(rabbitmq, version=link.version, **told),
            our_client(f"{rabbitmq}?queue={name}") as client,
            our_client(f"{rabbitmq}?queue={name}&durable=false") as agreeing,
        ):
            with pytest.raises(Unavailable, match=f"406 PRECONDITION_FAILED.*'durable'.*'{name}'"):
                await client.send("echo", 1)
            assert await agreeing.send("echo", 1) == 1
