"""Over Redis, NestJS and ourselves understand each other, whoever calls whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from microservices import RpcException, Unavailable
from microservices.client import Client
from microservices.consumers import consumer_handlers
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.transports import load, parse
from tests.interop import consumers
from tests.interop.nest import Answer, NestClient, free_port, nest_client, nest_server
from tests.interop.ours import Heard, OurServer, our_client, our_server

pytestmark = [
    pytest.mark.interop,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(60, func_only=True),  # the first set-up may have to install NestJS
]

LARGE = "é😀x" * 75_000
WAIT = 5


# NestJS calls us. One class after the other: all who listen on a channel answer what is asked there.


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def ours(redis_port: int) -> AsyncIterator[OurServer]:
    """Our server."""
    async with our_server(redis_port, "redis") as ours:
        yield ours


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def nest(redis_port: int, ours: OurServer) -> AsyncIterator[NestClient]:
    """NestJS's client of our server."""
    async with nest_client(redis_port, "redis") as client:
        yield client


class TestNestCallsUs:
    @pytest.mark.parametrize(
        ("pattern", "data", "value"),
        [
            ({"cmd": "sum"}, [1, 2, 3.5], 6.5),
            ("echo", {"text": "é😀\u2028", "list": [1, None, True]}, {"text": "é😀\u2028", "list": [1, None, True]}),
            (5, {}, "5"),
            ({"b": 1, "a": "x"}, {}, '{"a":"x","b":1}'),
            ("second", {}, "second"),
            ({"cmd": "null"}, {}, None),
            ("echo", LARGE, LARGE),
        ],
    )
    async def test_nest_gets_one_value_from_our_handler(
        self, nest: NestClient, pattern: Any, data: Any, value: Any
    ) -> None:
        answer = await nest.send(pattern, data)

        assert answer == Answer([value])

    async def test_nest_gets_each_of_200_concurrent_answers_for_its_own_request(self, nest: NestClient) -> None:
        answer = await nest.send_many("echo", 200)

        assert answer == Answer([{"n": n, "text": f"é😀{n}"} for n in range(200)])

    @pytest.mark.parametrize("count", [0, 1, 3, 1000])
    async def test_nest_gets_every_value_of_our_stream_in_order(self, nest: NestClient, count: int) -> None:
        answer = await nest.send("stream", {"count": count})

        assert answer == Answer(list(range(count)))

    @pytest.mark.parametrize(
        ("pattern", "values", "error"),
        [
            ("rpc-text", [], {"status": "error", "message": "boom"}),
            ("rpc-object", [], {"statusCode": 404, "code": "user-not-found", "message": "nf"}),
            ("unexpected", [], {"status": "error", "message": "Internal server error"}),
            ("stream-then-error", [1], {"status": "error", "message": "broken"}),
        ],
    )
    async def test_nest_gets_our_error_and_no_more_than_it(
        self, nest: NestClient, pattern: str, values: list[Any], error: Any
    ) -> None:
        answer = await nest.send(pattern, {})

        assert answer == Answer(values, error)

    @pytest.mark.parametrize(
        ("pattern", "route"),
        [
            ("noted", "noted"),
            ({"version": 2, "event": "order.placed"}, '{"event":"order.placed","version":2}'),
        ],
    )
    async def test_our_handler_hears_an_event_of_nest(
        self, nest: NestClient, ours: OurServer, pattern: Any, route: str
    ) -> None:
        answer = await nest.emit(pattern, {"text": "é😀"}, metadata={"tenant": "blue"})

        assert answer == Answer([])
        assert await asyncio.wait_for(ours.heard.get(), WAIT) == Heard(route, {"text": "é😀"}, {"tenant": "blue"})

    async def test_our_handler_sees_the_metadata_of_nest(self, nest: NestClient) -> None:
        answer = await nest.send("metadata", {}, metadata={"tenant": "blüe"})

        assert answer == Answer([{"tenant": "blüe"}])

    async def test_a_deadline_that_nest_names_ends_our_handler(self, nest: NestClient) -> None:
        answer = await nest.send("slow", {"ms": 30_000}, metadata={"deadline": "50"})

        assert answer.values == []
        assert (answer.error["statusCode"], answer.error["code"]) == (504, "deadline-exceeded")

    async def test_an_emitter_of_nest_reaches_our_consumer(self, redis_port: int, nest: NestClient) -> None:
        async with our_consumer(redis_port) as heard:
            await nest.emit("order_created", {"id": "o-1", "total": 9.5, "more": []}, metadata={"tenant": "blue"})
            order = await asyncio.wait_for(heard.get(), WAIT)

        assert order == (consumers.Order("o-1", 9.5), "blue")


@asynccontextmanager
async def our_consumer(redis_port: int) -> AsyncIterator[asyncio.Queue[tuple[consumers.Order, str]]]:
    """Have our consumer listen; gives what it hears."""
    heard = consumers.OrdersConsumer.heard = asyncio.Queue()
    executor = Executor(1)
    dispatcher = Dispatcher("ours", list(consumer_handlers("ours", consumers)), executor)
    address = parse(f"redis://127.0.0.1:{redis_port}")
    listener = load(address, "listener")(address, dispatcher)
    await listener.listen()
    try:
        yield heard
    finally:
        await listener.close(0)
        for handler in dispatcher.handlers:
            await handler.mailbox.close()
        executor.close()


# We call NestJS


@pytest_asyncio.fixture(scope="class", loop_scope="session")
async def nest_on_redis(redis_port: int) -> AsyncIterator[None]:
    """NestJS's server."""
    async with nest_server(redis_port, "redis"):
        yield


@pytest_asyncio.fixture(loop_scope="session")
async def client(nest_on_redis: None, redis_port: int) -> AsyncIterator[Client]:
    """Our client of NestJS's server."""
    async with our_client(redis_port, "redis") as client:
        yield client


class TestWeCallNest:
    @pytest.mark.parametrize(
        ("pattern", "data", "value"),
        [
            ({"cmd": "sum"}, [1, 2, 3.5], 6.5),
            ("echo", {"text": "é😀\u2028", "list": [1, None, True]}, {"text": "é😀\u2028", "list": [1, None, True]}),
            ("echo", None, None),
            ({"cmd": "null"}, {}, None),
            ("nothing", {}, None),
            ("echo", LARGE, LARGE),
        ],
    )
    async def test_we_get_one_value_from_a_handler_of_nest(
        self, client: Client, pattern: Any, data: Any, value: Any
    ) -> None:
        answer = await client.send(pattern, data)

        assert answer == value

    async def test_we_get_each_of_200_concurrent_answers_for_its_own_request(self, client: Client) -> None:
        requests = [{"n": n, "text": f"é😀{n}"} for n in range(200)]

        answers = await asyncio.gather(*(client.send("echo", request) for request in requests))

        assert answers == requests

    @pytest.mark.parametrize("count", [0, 1, 3, 1000])
    async def test_we_get_every_value_of_a_stream_of_nest_in_order(self, client: Client, count: int) -> None:
        values = [value async for value in client.stream("stream", {"count": count})]

        assert values == list(range(count))

    @pytest.mark.parametrize(
        ("pattern", "status_code", "code", "message"),
        [
            ("rpc-text", 500, "rpc-error", "boom"),
            ("rpc-object", 404, "user-not-found", "nf"),
            ("unexpected", 500, "internal", "Internal server error"),
        ],
    )
    async def test_we_get_the_error_of_a_handler_of_nest(
        self, client: Client, pattern: str, status_code: int, code: str, message: str
    ) -> None:
        with pytest.raises(RpcException) as caught:
            await client.send(pattern, {})

        assert (caught.value.status_code, caught.value.code, caught.value.message) == (status_code, code, message)

    async def test_we_get_the_values_of_nest_that_come_before_an_error(self, client: Client) -> None:
        values = client.stream("stream-then-error", {})

        first = await anext(values)

        assert first == 1
        with pytest.raises(RpcException, match="broken"):
            await anext(values)

    async def test_a_pattern_that_nobody_handles_fails_at_once(self, client: Client) -> None:
        with pytest.raises(Unavailable, match="Nobody listens"):
            await client.send({"cmd": "nobody"}, {}, timeout=60)

    async def test_nest_sees_our_metadata_and_the_milliseconds_left(self, client: Client) -> None:
        seen = await client.send("metadata", {}, metadata={"tenant": "blüe"}, timeout=3)

        deadline = int(seen.pop("deadline"))
        assert 0 < deadline <= 3000
        assert seen == {"tenant": "blüe"}

    @pytest.mark.parametrize(("pattern", "key"), [("noted", "note"), ("order_created", "order")])
    async def test_a_handler_of_nest_hears_our_event(self, client: Client, pattern: str, key: str) -> None:
        sent = {"text": "é😀", "port": free_port()}
        stored = {"order": sent} if key == "order" else sent

        await client.emit(pattern, sent)

        async with asyncio.timeout(WAIT):
            while stored not in await client.send("notes", {}):  # Nest may answer before it has heard
                pass
