"""Several instances of a service: the contract once more, where one of two addresses is nobody's; and more."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import pytest
from pytest_django import Settings

from microservices import clients, message_pattern
from microservices.balanced import Balanced
from microservices.client import Client
from microservices.discovery.balancer import Balancer
from microservices.discovery.choosers import CHOOSERS
from microservices.dispatcher import Dispatcher
from microservices.exceptions import DeadlineExceeded, NoHandler, RpcException, Unavailable
from microservices.resilience.policies import Plan
from microservices.transports import Address, parse
from microservices.transports.base import ClientProxy, Status
from microservices.transports.grpc import GrpcClient, GrpcServer
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import service
from tests.toolkit.transports import test_grpc
from tests.toolkit.transports.contract import PATIENCE, TransportContract, echo

NOBODY = "tcp://127.0.0.1:1"


def over(*urls: str, chooser: str = "two-choices") -> Balanced:
    """Return a proxy over these addresses."""
    return Balanced(Balancer("shop", urls, chooser=chooser), lambda url: TcpClient(parse(url), "shop"))


class TestBalanced(TransportContract):
    most_ahead = 8000

    async def serve(self, dispatcher: Dispatcher) -> TcpServer:
        server = TcpServer(Address("tcp", "127.0.0.1", 0, {**self.server_options}), dispatcher)
        await server.listen()
        return server

    def proxy(self, dispatcher: Dispatcher, server: TcpServer) -> ClientProxy:
        return over(NOBODY, f"tcp://127.0.0.1:{server.port}")  # type: ignore[return-value] - it does all that one does


class TestBalancedGrpc(test_grpc.TestGrpc):
    def proxy(self, dispatcher: Dispatcher, server: GrpcServer) -> ClientProxy:
        balancer = Balancer("shop", [f"grpc://127.0.0.1:{port}" for port in (1, server.port)])
        return Balanced(  # type: ignore[return-value]
            balancer,
            lambda url: GrpcClient(test_grpc.address(parse(url).port, self.folder, rpcs=self.rpcs), "shop"),
        )

    async def test_one_that_goes_costs_no_call(self) -> None:
        async with self.talk(echo):
            other = await self.serve(service(echo))
            balancer = Balancer("shop", [f"grpc://127.0.0.1:{server.port}" for server in (self.server, other)])
            connect = self.proxy(self.server.dispatcher, self.server)._connect  # type: ignore[attr-defined]
            balanced = Client("shop", lambda: Balanced(balancer, connect))
            before = [await balanced.send("echo", number) for number in range(20)]
            used = [instance.latency(balancer.clock()) > 0 for instance in balancer.instances.values()]
            await other.close(0)
            after = [await balanced.send("echo", number) for number in range(20)]
            await balanced.close()

        assert (before, used, after) == (list(range(20)), [True, True], list(range(20)))


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

        @message_pattern("names")
        async def names() -> AsyncIterator[str]:
            self.asked += 1
            yield self.name
            if self.error is not None:
                raise self.error

        server = TcpServer(Address("tcp", "127.0.0.1", 0, {}), service(who, names))
        await server.listen()
        stack.push_async_callback(server.close, 0)
        return f"tcp://127.0.0.1:{server.port}"


@asynccontextmanager
async def some(
    names: str, policies: dict[str, Any] | None = None, chooser: str = "two-choices"
) -> AsyncIterator[tuple[Client, list[Named]]]:
    """Serve instances of these names, and call them."""
    async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE):
        instances = [Named(name) for name in names]
        urls = [await instance.listen(stack) for instance in instances]
        plan = Plan("shop", policies or {"retries": 0}, {})
        client = Client("shop", lambda: over(*urls, chooser=chooser), plan=plan)
        stack.push_async_callback(client.close)
        yield client, instances


@pytest.mark.asyncio
async def test_calls_go_to_all_of_them() -> None:
    async with some("ab") as (client, _):
        answers = Counter([await client.send("who") for _ in range(100)])

    assert set(answers) == {"a", "b"}
    assert client.service == "shop"


@pytest.mark.asyncio
async def test_a_retry_goes_to_the_other_one() -> None:
    async with some("ab", {"retry": "safe", "retries": 1, "retry_delay": 0.001}) as (client, instances):
        instances[0].error = RpcException({"statusCode": 503, "message": "Not now."})
        answers = [await client.send("who") for _ in range(20)]

    assert answers == ["b"] * 20
    assert instances[0].asked > 0


@pytest.mark.asyncio
@pytest.mark.parametrize("chooser", CHOOSERS)
async def test_a_second_retry_goes_to_a_third_one(chooser: str) -> None:
    policies = {"retry": "safe", "retries": 2, "retry_delay": 0.001, "breaker": False}
    async with some("abc", policies, chooser) as (client, instances):
        for instance in instances[:2]:
            instance.error = RpcException({"statusCode": 503, "message": "Not now."})
        answers = [await client.send("who") for _ in range(20)]

    assert answers == ["c"] * 20


@pytest.mark.asyncio
async def test_a_second_retry_after_attempts_that_took_too_long_goes_to_a_third_one() -> None:
    policies = {"retry": "safe", "retries": 2, "retry_delay": 0.001, "attempt_timeout": 0.05, "breaker": False}
    async with some("abc", policies, "round-robin") as (client, instances):
        for instance in instances[:2]:
            instance.gate = asyncio.Event()
        answers = [await client.send("who") for _ in range(6)]

    assert answers == ["c"] * 6


@pytest.mark.asyncio
async def test_a_retry_after_an_attempt_that_took_too_long_goes_to_the_other_one() -> None:
    policies = {"retry": "safe", "retries": 1, "retry_delay": 0.001, "attempt_timeout": 0.1}
    async with some("ab", policies) as (client, instances):
        instances[0].gate = asyncio.Event()
        answers = [await client.send("who") for _ in range(5)]

    assert answers == ["b"] * 5


@pytest.mark.asyncio
async def test_a_hedge_goes_to_the_other_one() -> None:
    async with some("ab", {"retry": "safe", "hedge": True}) as (client, instances):
        for _ in range(40):  # until it is known what is long
            await client.send("who")
        instances[0].gate = asyncio.Event()
        answers = [await client.send("who", timeout=2) for _ in range(5)]

    assert answers == ["b"] * 5


@pytest.mark.asyncio
async def test_what_has_never_been_sent_goes_on_whatever_it_is() -> None:
    async with some("ab") as (client, _):
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
async def test_refusals_and_errors_of_callers_say_nothing_of_who_is_asked() -> None:
    async with some("ab", {"retries": 0, "breaker": False}) as (client, instances):
        proxy: Any = client._bound().proxy
        for status, code in ((404, "not-found"), (429, "quota"), (501, "not-mapped"), (503, "overloaded")):
            error = RpcException({"statusCode": status, "code": code, "message": "no"})
            for instance in instances:
                instance.error = error
            for _ in range(40):
                with pytest.raises(RpcException, match="no"):
                    await client.send("who")
        for _ in range(40):
            with pytest.raises(NoHandler):
                await client.send("what")
            with pytest.raises(DeadlineExceeded):
                await client.send("who", timeout=0)  # its time was over before

        assert proxy.balancer.out == []
        assert [instance.pending for instance in proxy.balancer.instances.values()] == [0, 0]


@pytest.mark.asyncio
async def test_one_that_fails_is_left_out() -> None:
    async with some("ab") as (client, instances):
        instances[0].error = RpcException("broken")
        failed = 0
        for _ in range(100):
            try:
                await client.send("who")
            except RpcException:
                failed += 1

    assert 0 < failed <= 5


@pytest.mark.asyncio
async def test_a_stream_that_has_begun_is_not_begun_again_elsewhere() -> None:
    async with some("ab", {"retries": 2, "retry": "safe"}) as (client, instances):
        for instance in instances:
            instance.error = RpcException({"statusCode": 503, "code": "draining", "message": "I leave."})
        async with aclosing(client.stream("names")) as values:
            await anext(values)
            with pytest.raises(RpcException, match="I leave"):
                await anext(values)

    assert sum(instance.asked for instance in instances) == 1


@pytest.mark.asyncio
async def test_a_stream_on_which_nothing_comes_is_no_load() -> None:
    async with some("ab") as (client, _):
        proxy: Any = client._bound().proxy
        async with aclosing(client.stream("names")) as values:
            await anext(values)

            assert [instance.pending for instance in proxy.balancer.instances.values()] == [0, 0]


@pytest.mark.asyncio
async def test_streams_alone_bring_an_instance_back() -> None:
    async with some("ab") as (client, _):
        proxy: Any = client._bound().proxy
        for instance in proxy.balancer.instances.values():
            for _ in range(5):
                instance.begin(0)
                proxy.balancer.done(instance, 0, failed=True)
        assert len(proxy.balancer.out) == 2

        async with aclosing(client.stream("names")) as values:
            await anext(values)

            assert len(proxy.balancer.out) == 1


@pytest.mark.asyncio
async def test_one_that_is_closed_connects_to_nobody() -> None:
    async with some("ab") as (client, instances):
        proxy = client._bound().proxy
        await proxy.close()
        for _ in range(20):
            with pytest.raises(Unavailable, match="closed"):
                await proxy.send(None, client._context(proxy, "who", None, None))

        assert len(proxy.unwrap()) == 1
        assert [instance.asked for instance in instances] == [0, 0]
        assert proxy.status is Status.CLOSED


@pytest.mark.asyncio
async def test_urls_say_how_much_an_instance_is_meant_for_and_where_it_stands(settings: Settings) -> None:
    urls = "tcp://127.0.0.1:1?weight=3&zone=west,tcp://127.0.0.1:2?zone=west,tcp://127.0.0.1:3?zone=east"
    settings.MICROSERVICES = {"CLIENTS": {"shop": {"url": urls, "balance": "round-robin"}}, "ZONE": "west"}
    balancer = clients["shop"].balancer
    assert balancer is not None

    got = Counter(balancer.choose().url for _ in range(40))

    assert got == {"tcp://127.0.0.1:1": 30, "tcp://127.0.0.1:2": 10}
