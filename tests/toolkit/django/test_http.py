"""The connections of the embedded HTTP server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest

from microservices.http import HEAD_LIMIT, HttpConnection
from microservices.instruments import dropped
from microservices.serving import HttpServer, bind

pytestmark = pytest.mark.asyncio

HEAD = b"GET / HTTP/1.1\r\nhost: here\r\n"


async def large(scope: Any, receive: Any, send: Any) -> None:
    """Answer with more than a connection holds."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(1000):
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    await send({"type": "http.response.body"})


async def small(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@contextlib.asynccontextmanager
async def serving(application: Any, **limits: Any) -> AsyncIterator[int]:
    with bind("127.0.0.1", 0) as bound:
        server = HttpServer(application)
        server.config.http = partial(HttpConnection, name="here", **limits)  # type: ignore[assignment]
        task = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            yield bound.getsockname()[1]
        finally:
            server.finish(0.1)
            await task


@contextlib.asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def count(reason: str) -> int:
    return dropped.value("here", "http-connections", reason)


async def test_one_connection_too_many_is_closed_at_once() -> None:
    before = count("too-many")

    async with (
        serving(small, most=2) as port,
        connection(port) as (reader, writer),
        connection(port),
        connection(port) as (third, _),
    ):
        refused = await asyncio.wait_for(_rest(third), 5)
        writer.write(HEAD + b"\r\n")
        answer = await asyncio.wait_for(reader.readline(), 5)

    assert refused == b""
    assert answer == b"HTTP/1.1 200 OK\r\n"
    assert count("too-many") == before + 1


async def test_a_head_without_an_end_is_cut_off() -> None:
    before = count("too-large")

    async with serving(small) as port, connection(port) as (reader, writer):
        writer.write(HEAD)
        for _ in range(2 * HEAD_LIMIT // 1024):
            writer.write(b"x-more: " + b"x" * 1014 + b"\r\n")
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        refused = await asyncio.wait_for(_rest(reader), 5)

    assert b"200" not in refused
    assert count("too-large") == before + 1


async def test_large_bodies_are_not_taken_for_heads() -> None:
    before = count("too-large")

    async with serving(_reading) as port, connection(port) as (reader, writer):
        for _ in range(2):
            writer.write(HEAD.replace(b"GET", b"POST") + b"content-length: %d\r\n\r\n" % (10 * HEAD_LIMIT))
            writer.write(b"x" * 10 * HEAD_LIMIT)
            await writer.drain()
            assert await asyncio.wait_for(reader.readuntil(b"ok"), 5)

    assert count("too-large") == before


async def test_half_a_request_is_not_waited_for() -> None:
    before = count("half-request")

    async with serving(small, patience=0.05) as port, connection(port) as (reader, writer):
        writer.write(HEAD)
        refused = await asyncio.wait_for(_rest(reader), 5)

    assert refused == b""
    assert count("half-request") == before + 1


async def test_half_of_the_next_request_is_not_waited_for_either() -> None:
    async with serving(small, patience=0.05) as port, connection(port) as (reader, writer):
        writer.write(HEAD + b"\r\n" + HEAD)
        answers = await asyncio.wait_for(_rest(reader), 5)

    assert answers.count(b"HTTP/1.1 200 OK") == 1


async def test_a_peer_that_says_nothing_is_let_go() -> None:
    before = count("half-request")

    async with serving(small, patience=0.05) as port, connection(port) as (reader, _):
        refused = await asyncio.wait_for(_rest(reader), 5)

    assert refused == b""
    assert count("half-request") == before


async def test_a_peer_that_never_reads_is_cut_off() -> None:
    before = count("slow-reader")
    ended = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await large(scope, receive, send)
        finally:
            ended.set()

    async with serving(application, patience=0.1) as port:
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.sendall(HEAD + b"\r\n")
            await asyncio.wait_for(ended.wait(), 10)

    assert count("slow-reader") == before + 1


async def test_a_slow_answer_is_waited_for() -> None:
    may_answer = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await may_answer.wait()
        await small(scope, receive, send)

    async with serving(slow, patience=0.01) as port, connection(port) as (reader, writer):
        writer.write(HEAD + b"\r\n")
        asyncio.get_running_loop().call_later(0.1, may_answer.set)
        answer = await asyncio.wait_for(reader.readline(), 5)

    assert answer == b"HTTP/1.1 200 OK\r\n"


async def _reading(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await small(scope, receive, send)


async def _rest(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionError):
        return await reader.read()
    return b""
