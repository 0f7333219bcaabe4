"""Ourselves: a server with the handlers of server.js and some more, and a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
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


class OurServer(NamedTuple):
    """Our server's port, and what its event handlers heard."""

    port: int
    heard: asyncio.Queue[Heard]


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
    fail_with_text,
    fail_with_object,
    fail_unexpectedly,
    stream_then_fail,
    pattern_text,
    place,
)


@asynccontextmanager
async def our_server(port: int, scheme: str = "tcp") -> AsyncIterator[OurServer]:
    """Serve all handlers until the block ends; `port` is our own, or that of a broker."""
    heard: asyncio.Queue[Heard] = asyncio.Queue()

    @event_pattern(["noted", {"event": "order.placed", "version": 2}])
    async def note(data: Any, context: RpcContext) -> None:
        heard.put_nowait(Heard(context.pattern, data, context.metadata))

    executor = Executor(4)
    dispatcher = Dispatcher("ours", [Handler(function) for function in (*HANDLERS, note)], executor)
    address = parse(f"{scheme}://127.0.0.1:{port}")
    server = load(address, "server")(address, dispatcher)
    await server.listen()
    try:
        yield OurServer(port, heard)
    finally:
        await server.close(grace=0)
        executor.close()


@asynccontextmanager
async def our_client(port: int, scheme: str = "tcp") -> AsyncIterator[Client]:
    """Call whoever listens on `port`, or on the broker there."""
    address = parse(f"{scheme}://127.0.0.1:{port}")
    client = Client("nest", lambda: load(address, "client")(address, "nest"))
    try:
        yield client
    finally:
        await client.close()
