"""Several instances of a service: the contract once more, where one of two addresses is nobody's; and more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from microservices import message_pattern
from microservices.balanced import Balanced
from microservices.client import Client
from microservices.discovery.balancer import Balancer
from microservices.dispatcher import Dispatcher
from microservices.exceptions import RpcException, Unavailable
from microservices.resilience.policies import Plan
from microservices.transports import Address, parse
from microservices.transports.base import ClientProxy, Status
from microservices.transports.grpc import GrpcClient, GrpcServer
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, TransportContract
from tests.toolkit.transports.test_grpc import address as grpc_address
from tests.toolkit.transports.test_grpc import doors_opened

NOBODY = "tcp://127.0.0.1:1"


def over(*urls: str) -> Balanced:
    """Return a proxy over these addresses."""
    return Balanced(Balancer("shop", urls), lambda url: TcpClient(parse(url), "shop"))


class TestBalanced(TransportContract):
    most_ahead = 8000

    async def serve(self, dispatcher: Dispatcher) -> TcpServer:
        server = TcpServer(Address("tcp", "127.0.0.1", 0, {**self.server_options}), dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: TcpServer) -> ClientProxy:
        return over(NOBODY, f"tcp://127.0.0.1:{server.port}")  # type: ignore[return-value] - it does all that one does


class Named:
    """An instance that tells its name, or fails."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = 0
        self.error: RpcException | None = None
        self.gate: asyncio.Event | None = None

    async def listen(self, stack: AsyncExitStack) -> str:
        @message_pattern("who")
        async def who() -> str:
            self.asked += 1
            if self.gate is not None:
                await self.gate.wait()
            if self.error is not None:
                raise self.error
            return self.name

        server = TcpServer(Address("tcp", "127.0.0.1", 0, {}), service(who))
        await server.listen()
        stack.push_async_callback(server.close, 0)
        return f"tcp://127.0.0.1:{server.port}"


@asynccontextmanager
async def two(policies: dict[str, Any] | None = None) -> AsyncIterator[tuple[Client, list[Named]]]:
    """Serve two instances, and call them."""
    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
        instances = [Named("a"), Named("b")]
        urls = [await instance.listen(stack) for instance in instances]
        plan = Plan("shop", policies or {"retries": 0}, {})
        client = Client("shop", lambda: over(*urls), plan=plan)
        stack.push_async_callback(client.close)
        yield client, instances


@pytest.mark.asyncio
async def test_calls_go_to_all_of_them() -> None:
    async with two() as (client, _):
        answers = Counter([await client.send("who") for _ in range(100)])

    assert set(answers) == {"a", "b"}
    assert client.service == "shop"


@pytest.mark.asyncio
async def test_a_retry_goes_to_the_other_one() -> None:
    async with two({"retry": "safe", "retries": 1, "retry_delay": 0.001}) as (client, instances):
        instances[0].error = RpcException({"statusCode": 503, "message": "Not now."})
        answers = [await client.send("who") for _ in range(20)]

    assert answers == ["b"] * 20
    assert instances[0].asked > 0


@pytest.mark.asyncio
async def test_a_retry_after_an_attempt_that_took_too_long_goes_to_the_other_one() -> None:
    policies = {"retry": "safe", "retries": 1, "retry_delay": 0.001, "attempt_timeout": 0.1}
    async with two(policies) as (client, instances):
        instances[0].gate = asyncio.Event()
        answers = [await client.send("who") for _ in range(5)]

    assert answers == ["b"] * 5


@pytest.mark.asyncio
async def test_a_hedge_goes_to_the_other_one() -> None:
    async with two({"retry": "safe", "hedge": True}) as (client, instances):
        for _ in range(40):  # until it is known what is long
            await client.send("who")
        instances[0].gate = asyncio.Event()
        answers = [await client.send("who", timeout=2) for _ in range(5)]

    assert answers == ["b"] * 5


@pytest.mark.asyncio
async def test_what_has_never_been_sent_goes_on_whatever_it_is() -> None:
    async with two() as (client, _):
        url = next(iter(client._bound().proxy.unwrap()))
        away = Client("shop", lambda: over(NOBODY, url), plan=Plan("shop", {"retry": "never", "retries": 0}, {}))
        answers = [await away.send("who") for _ in range(20)]
        await away.close()

    assert answers == ["a"] * 20


@pytest.mark.asyncio
async def test_where_nobody_is_there_it_is_told_once() -> None:
    client = Client("shop", lambda: over(NOBODY, "tcp://127.0.0.1:2"))

    with pytest.raises(Unavailable, match="cannot be reached"):
        await client.send("who")

    assert client.status is Status.DISCONNECTED
    assert [bound.used for bound in client.bounds] == [0, 0]
    proxy = client._bound().proxy
    await client.close()
    assert proxy.status is Status.CLOSED


@pytest.mark.asyncio
async def test_refusals_and_answers_of_4xx_say_nothing_of_who_gives_them() -> None:
    async with two() as (client, instances):
        proxy: Any = client._bound().proxy
        for status, code in ((404, "not-found"), (429, "quota"), (503, "overloaded")):
            error = RpcException({"statusCode": status, "code": code, "message": "no"})
            for instance in instances:
                instance.error = error
            for _ in range(40):
                with pytest.raises(RpcException, match="no"):
                    await client.send("who")

        assert proxy.balancer.out == []
        assert [instance.pending for instance in proxy.balancer.instances.values()] == [0, 0]


@pytest.mark.asyncio
async def test_one_that_fails_is_left_out() -> None:
    async with two() as (client, instances):
        instances[0].error = RpcException("broken")
        failed = 0
        for _ in range(100):
            try:
                await client.send("who")
            except RpcException:
                failed += 1

    assert 0 < failed <= 5


@pytest.mark.asyncio
async def test_calls_by_grpc_go_to_all_of_them_and_past_nobody(tmp_path: Path) -> None:
    served: list[GrpcServer] = []
    rpcs: dict[str, str] = {}
    for name in ("a", "b"):
        handlers = named(name)
        rpcs = doors_opened(handlers, tmp_path)
        server = GrpcServer(grpc_address(0, tmp_path), service(*handlers))
        await server.listen()
        served.append(server)
    ports = (1, *(each.port for each in served))  # at the first there is nobody
    places = {str(place): place for place in (grpc_address(port, tmp_path, rpcs=rpcs) for port in ports)}
    balancer = Balancer("shop", places)
    client = Client("shop", lambda: Balanced(balancer, lambda url: GrpcClient(places[url], "shop")))
    async with asyncio.timeout(PATIENCE):
        answers = Counter([await client.send("who") for _ in range(60)])
    await client.close()
    for server in served:
        await server.close(0)

    assert set(answers) == {"a", "b"}


def named(name: str) -> tuple[Any, ...]:
    @message_pattern("who")
    async def who() -> str:
        return name

    return (who,)
