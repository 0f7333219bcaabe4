"""Ourselves: a server with the handlers of server.js and some more, and a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple

from msgspec import Meta, Struct

from microservices import RpcContext, RpcException, event_pattern, message_pattern
from microservices.client import Client
from microservices.dispatcher import Dispatcher
from microservices.executor import Executor
from microservices.handlers import Handler
from microservices.transports import load, parse


class Count(Struct):
    count: int


class Pause(Struct):
    ms: int


class Line(Struct):
    quantity: Annotated[int, Meta(gt=0)]


class Order(Struct):
    lines: list[Line]


class Heard(NamedTuple):
    """An event as its handler saw it."""

    pattern: str
    data: Any
    metadata: dict[str, str]
    channel: str = ""
    headers: Mapping[str, Any] = {}


class OurServer(NamedTuple):
    """Our server's URL, and what its event handlers heard."""

    url: str
    heard: asyncio.Queue[Heard]

    @property
    def port(self) -> int:
        return parse(self.url).port


@message_pattern({"cmd": "sum"}, inline=True)
def add(numbers: list[float]) -> float:
    return sum(numbers)


@message_pattern("echo")
async def echo(data: Any) -> Any:
    return data


@message_pattern({"cmd": "null"})
def answer_null() -> None:
    return None


@message_pattern("nothing")
async def answer_nothing() -> AsyncIterator[Any]:
    return
    yield


@message_pattern("stream")
async def stream(data: Count) -> AsyncIterator[int]:
    for number in range(data.count):
        yield number


@message_pattern("slow")
async def slow(data: Pause) -> int:
    await asyncio.sleep(data.ms / 1000)
    return data.ms


@message_pattern("metadata")
async def metadata(data: Any, context: RpcContext) -> dict[str, str]:
    return context.metadata


@message_pattern("headers")
async def headers(data: Any, context: RpcContext) -> dict[str, str]:
    return dict(context.headers)


@message_pattern("rpc-text")
def fail_with_text() -> None:
    raise RpcException("boom")


@message_pattern("rpc-object")
async def fail_with_object() -> None:
    raise RpcException({"statusCode": 404, "code": "user-not-found", "message": "nf"})


@message_pattern("unexpected")
def fail_unexpectedly() -> None:
    raise ValueError("secret")


@message_pattern("stream-then-error")
async def stream_then_fail() -> AsyncIterator[int]:
    yield 1
    raise RpcException("broken")


@message_pattern([5, {"b": 1, "a": "x"}, "first", "second"])
async def pattern_text(data: Any, context: RpcContext) -> str:
    return context.pattern


@message_pattern({"cmd": "place", "version": 2})
def place(order: Order) -> int:
    return sum(line.quantity for line in order.lines)


HANDLERS = (
    add,
    echo,
    answer_null,
    answer_nothing,
    stream,
    slow,
    metadata,
    headers,
    fail_with_text,
    fail_with_object,
    fail_unexpectedly,
    stream_then_fail,
    pattern_text,
    place,
)


@asynccontextmanager
async def our_server(
    url: str, *more: Callable[..., Any], name: str = "ours", wildcard: str = ""
) -> AsyncIterator[OurServer]:
    """Serve all handlers, and `more`, until the block ends; `url` is our own, or that of a broker.

    Events are heard by their names, and by a `wildcard`.
    """
    heard: asyncio.Queue[Heard] = asyncio.Queue()

    def note(data: Any, context: RpcContext) -> None:
        told = Heard(context.pattern, data, context.metadata, context.channel, dict(context.headers))
        loop.call_soon_threadsafe(heard.put_nowait, told)

    loop = asyncio.get_running_loop()
    patterns = ["noted", {"event": "order.placed", "version": 2}, *([wildcard] if wildcard else [])]
    event_pattern(patterns)(note)
    executor = Executor(4)
    dispatcher = Dispatcher(name, [Handler(function) for function in (*HANDLERS, note, *more)], executor)
    address = parse(url)
    server = load(address, "server")(address, dispatcher)
    await server.listen()
    try:
        yield OurServer(url, heard)
    finally:
        await server.close(grace=0)
        executor.close()


@asynccontextmanager
async def our_client(url: str, name: str = "nest") -> AsyncIterator[Client]:
    """Call whoever listens at `url`, or on the broker there."""
    address = parse(url)
    client = Client(name, lambda: load(address, "client")(address, name))
    try:
        yield client
    finally:
        await client.close()
