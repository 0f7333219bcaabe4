"""Each recorded exchange with a real NestJS: our server in its server's place, our client in its client's."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw

from microservices import codec
from microservices.client import Client
from microservices.context import RpcContext
from microservices.exceptions import NoHandler, RpcException
from microservices.handlers import event_pattern, message_pattern
from microservices.transports import Address, parse
from microservices.transports.base import ClientProxy
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import service
from tests.toolkit.transports.wire import Wire, connection, listener

CASES = json.loads((Path(__file__).parent / "golden" / "tcp.json").read_text())["cases"]
REQUESTS = [case for case in CASES if not case["name"].startswith("event")]
EVENTS = [case for case in CASES if case["name"].startswith("event")]


def named(case: dict[str, str]) -> str:
    """Return what a case is called in a test's name."""
    return case["name"]


# The service that was recorded, in our words (tests/interop/server.js).


@message_pattern({"cmd": "sum"})
async def add(data: list[int]) -> int:
    """Add numbers."""
    return sum(data)


@message_pattern("echo")
def echo(data: Any) -> Any:
    """Give back what came."""
    return data


@message_pattern({"cmd": "null"})
async def null() -> None:
    """Answer null."""
    return


@message_pattern("nothing")
async def nothing() -> AsyncIterator[None]:
    """Answer nothing, as a JavaScript function that returns nothing."""
    return
    yield


@message_pattern("stream")
async def stream(data: dict[str, int]) -> AsyncIterator[int]:
    """Stream numbers."""
    for number in range(data["count"]):
        yield number


@message_pattern("metadata")
async def metadata(data: Any, ctx: RpcContext) -> dict[str, str]:
    """Tell what travelled beside the data."""
    return ctx.metadata


@message_pattern("rpc-text")
async def fail_with_text() -> None:
    """Fail with a text."""
    raise RpcException("boom")


@message_pattern("rpc-object")
async def fail_with_object() -> None:
    """Fail with a mapping."""
    raise RpcException({"statusCode": 404, "code": "user-not-found", "message": "nf"})


@message_pattern("unexpected")
async def fail_unexpectedly() -> None:
    """Fail with a bug."""
    raise ValueError("secret")


@message_pattern("stream-then-error")
async def stream_then_fail() -> AsyncIterator[int]:
    """Stream a number and fail."""
    yield 1
    raise RpcException("broken")


@message_pattern(5)
async def pattern_text() -> str:
    """Tell the pattern as NestJS's context does: as it was registered."""
    return "5"


@message_pattern({"b": 1, "a": "x"})
async def pattern_text_of_object() -> str:
    """Tell the pattern as NestJS's context does: as it was registered."""
    return '{"b":1,"a":"x"}'


HANDLERS = [
    *(add, echo, null, nothing, stream, metadata, fail_with_text, fail_with_object, fail_unexpectedly),
    *(stream_then_fail, pattern_text, pattern_text_of_object),
]


def packets(frames: str) -> list[str]:
    """Cut recorded frames into their bodies."""
    bodies = []
    while frames:
        length, _, rest = frames.partition("#")
        units = rest.encode("utf-16-le")
        bodies.append(units[: int(length) * 2].decode("utf-16-le"))
        frames = units[int(length) * 2 :].decode("utf-16-le")
    return bodies


def merged(bodies: list[str]) -> list[str]:
    """Merge a completion of its own into the value before it, as NestJS does when both leave together."""
    id_of_last = bodies[-1].removeprefix('{"isDisposed":true,')
    if len(bodies) > 1 and id_of_last != bodies[-1] and '"err"' not in bodies[-2]:
        value = bodies[-2].removesuffix(f",{id_of_last}")
        return [*bodies[:-2], f'{value},"isDisposed":true,{id_of_last}']
    return bodies


# Our server


async def exchange(said: str, *more: Callable[..., Any]) -> list[str]:
    """Say a recorded client's bytes to our server and return the bodies that it answers."""
    server = TcpServer(Address("tcp", "127.0.0.1", 0, {}), service(*HANDLERS, *more))
    await server.listen()
    async with asyncio.timeout(5), connection(server.port) as peer:
        await peer.say(said.encode())
        peer.writer.write_eof()
        heard = (await peer.reader.read()).decode()
        await server.close(1)
    return packets(heard)


@pytest.mark.asyncio
@pytest.mark.parametrize("case", REQUESTS, ids=named)
async def test_our_server_answers_a_nestjs_client_as_nestjs_does(case: dict[str, str]) -> None:
    expected = packets(case["server"])

    bodies = merged(await exchange(case["client"]))

    if case["name"] == "error-unknown-pattern":  # its keys are in an order of their own
        assert [json.loads(body) for body in bodies] == [json.loads(body) for body in expected]
    else:
        assert bodies == expected


@pytest.mark.asyncio
@pytest.mark.parametrize("case", EVENTS, ids=named)
async def test_our_server_hears_the_events_of_a_nestjs_client(case: dict[str, str]) -> None:
    heard = []

    @event_pattern(["noted", {"a": "x", "b": 1}])
    async def note(data: Any, ctx: RpcContext) -> None:
        heard.append((ctx.pattern, data))

    answer = await exchange(case["client"], note)

    assert answer == []
    assert heard == [(json.loads(packets(case["client"])[0])["pattern"], {"k": 1})]


# Our client

OUTCOMES = {
    "request-sum": [6],
    "request-echo-text": ["😀é"],
    "request-object-pattern": ['{"b":1,"a":"x"}'],
    "request-number-pattern": ["5"],
    "request-null": [None],
    "request-nothing": [],
    "request-stream": [0, 1, 2],
    "request-metadata": [{"trace-id": "é1"}],
    "error-rpc-text": ["boom"],
    "error-rpc-object": [{"statusCode": 404, "code": "user-not-found", "message": "nf"}],
    "error-unexpected": ["Internal server error"],
    "error-after-value": [1, "broken"],
    "error-unknown-pattern": [NoHandler().error],
}
"""What `client.send(...).subscribe` would be given, value by value; an error as what `RpcException` holds."""


@pytest.mark.asyncio
@pytest.mark.parametrize("case", REQUESTS, ids=named)
async def test_our_client_asks_as_nestjs_does_and_is_given_the_same(case: dict[str, str]) -> None:
    recorded = json.loads(packets(case["client"])[0])
    said = b""

    async def answer(wire: Wire) -> None:
        nonlocal said
        said = await wire.reader.readexactly(len(case["client"].encode()))
        await wire.say(case["server"].encode())
        await wire.hear()

    outcome: list[Any] = []
    async with listener(answer) as port, calling(port, recorded["id"]) as proxy:
        context = RpcContext(
            service="shop",
            pattern="",
            raw_pattern=Raw(codec.encode(recorded["pattern"])),
            transport="tcp",
            side="client",
            metadata=recorded.get("metadata"),
        )
        try:
            async for value in ClientProxy.stream(proxy, recorded["data"], context):
                outcome.append(codec.decode(value))
        except RpcException as error:
            outcome.append(error.error)

    assert said.decode() == case["client"]
    assert outcome == OUTCOMES[case["name"]]


@pytest.mark.asyncio
@pytest.mark.parametrize("case", EVENTS, ids=named)
async def test_our_client_tells_events_as_nestjs_does(case: dict[str, str]) -> None:
    pattern = {"b": 1, "a": "x"} if case["name"] == "event-object-pattern" else "noted"
    said: asyncio.Queue[bytes] = asyncio.Queue()

    async def hear(wire: Wire) -> None:
        said.put_nowait(await wire.reader.read())

    async with listener(hear) as port, calling(port, "0") as proxy:
        client = Client("shop", lambda: proxy)
        await client.emit(pattern, {"k": 1})
        await client.close()
        heard = await said.get()

    assert heard.decode() == case["client"]


@asynccontextmanager
async def calling(port: int, id: str) -> AsyncIterator[TcpClient]:
    """Give a client whose first request has this id."""
    proxy = TcpClient(parse(f"tcp://127.0.0.1:{port}"), "shop")
    proxy._prefix, proxy._count = id[:-1], int(id[-1], 16) - 1
    try:
        async with asyncio.timeout(5):
            yield proxy
    finally:
        await proxy.close()
