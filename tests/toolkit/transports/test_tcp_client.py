"""A TCP client among servers of all manners."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from microservices.client import Client
from microservices.exceptions import ConnectionLost, RpcException, Unavailable
from microservices.handlers import message_pattern
from microservices.transports import Address, parse
from microservices.transports.base import Status
from microservices.transports.tcp import TcpClient, TcpServer
from tests.toolkit.conftest import service
from tests.toolkit.transports.contract import PATIENCE, count, echo
from tests.toolkit.transports.wire import Wire, framed, listener, until


@asynccontextmanager
async def calling(port: int, options: str = "") -> AsyncIterator[Client]:
    """Give a client of this port."""
    proxy = TcpClient(parse(f"tcp://127.0.0.1:{port}{options}"), "shop")
    client = Client("shop", lambda: proxy)
    try:
        async with asyncio.timeout(PATIENCE):
            yield client
    finally:
        await client.close()


def status(client: Client) -> Status:
    """Return where a client's connection stands."""
    return client._bound().proxy.status


@asynccontextmanager
async def serving(*functions: Callable[..., Any], port: int = 0) -> AsyncIterator[TcpServer]:
    """Serve these handlers."""
    server = TcpServer(Address("tcp", "127.0.0.1", port, {}), service(*functions))
    await server.listen()
    try:
        yield server
    finally:
        await server.close(0)


async def until_the_end(wire: Wire) -> None:
    """Listen without a word."""
    while await wire.hear() is not None:
        pass


# Answers


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("packets", "values"),
    [
        pytest.param([{"response": 1, "isDisposed": True}], [1], id="merged completion"),
        pytest.param([{"response": 1}, {"isDisposed": True}], [1], id="separate completion"),
        pytest.param([{"response": 1}, {"response": 2, "isDisposed": True}], [1, 2], id="the last one merged"),
        pytest.param([{"response": 1, "isDisposed": False}, {"isDisposed": True}], [1], id="isDisposed false"),
        pytest.param([{"isDisposed": True}], [], id="nothing"),
        pytest.param([{"response": None, "isDisposed": True}], [None], id="null"),
        pytest.param([{}, {"response": 1, "isDisposed": True}], [1], id="only an id"),
        pytest.param([{"response": 1, "isDisposed": True, "trace": "x", "status": "ok"}], [1], id="extra keys"),
        pytest.param([{"response": 1, "err": None, "isDisposed": True}], [1], id="null for an error"),
        pytest.param([{"response": 1, "err": "", "isDisposed": True}], [1], id="empty error"),
        pytest.param([{"response": 1, "isDisposed": True}, {"response": 2, "isDisposed": True}], [1], id="too late"),
    ],
)
async def test_every_form_of_an_answer_is_understood(packets: list[dict[str, Any]], values: list[Any]) -> None:
    async def answer(wire: Wire) -> None:
        while (request := await wire.hear()) is not None:
            stranger = {"response": "for somebody else", "isDisposed": True}
            for packet in packets:
                await wire.say(framed(stranger | {"id": "unknown"}), framed(stranger | {"id": 5}), framed(stranger))
                await wire.say(framed(packet | {"id": request["id"]}))

    async with listener(answer) as port, calling(port) as client:
        streamed = [value async for value in client.stream("ask")]
        first = await client.send("ask")

    assert streamed == values
    assert first == (values[0] if values else None)


@pytest.mark.asyncio
@pytest.mark.parametrize("extra", [{}, {"isDisposed": True}, {"isDisposed": False}, {"response": 1}])
async def test_an_error_counts_whatever_else_the_packet_holds(extra: dict[str, Any]) -> None:
    async def fail(wire: Wire) -> None:
        request = await wire.hear()
        await wire.say(framed({"err": {"code": 7}, "id": request["id"]} | extra))
        await wire.hear()

    async with listener(fail) as port, calling(port) as client:
        with pytest.raises(RpcException) as caught:
            await client.send("ask")

    assert caught.value.error == {"code": 7}


@pytest.mark.asyncio
async def test_half_an_emoji_in_one_answer_leaves_the_other_calls_alone() -> None:
    async def answer(wire: Wire) -> None:
        requests = [await wire.hear(), await wire.hear()]
        await wire.say(framed('{"response":"cut \\ud83d","isDisposed":true,"id":"' + requests[0]["id"] + '"}'))
        await wire.say(framed({"response": "whole 😀", "isDisposed": True, "id": requests[1]["id"]}))
        await wire.hear()

    async with listener(answer) as port, calling(port) as client:
        answers = await asyncio.gather(client.send("ask"), client.send("ask"))

    assert answers == ["cut \ufffd", "whole 😀"]


@pytest.mark.asyncio
async def test_a_slow_reader_of_a_stream_holds_up_no_other_call() -> None:
    async with (
        serving(echo, count) as server,
        calling(server.port) as client,
        aclosing(client.stream("count", 100_000)) as values,
    ):
        first = await anext(values)
        answers = [await client.send("echo", number) for number in range(20)]

    assert first == 0
    assert answers == list(range(20))


@pytest.mark.asyncio
async def test_a_request_tells_how_many_milliseconds_are_left() -> None:
    heard: asyncio.Queue[Any] = asyncio.Queue()

    async def hear(wire: Wire) -> None:
        heard.put_nowait(await wire.hear())

    async with listener(hear) as port, calling(port) as client:
        with pytest.raises(ConnectionLost):
            await client.send("ask", timeout=2.0, metadata={"trace-id": "1"})
        request = await heard.get()

    assert list(request) == ["pattern", "data", "metadata", "id"]
    assert request["metadata"]["trace-id"] == "1"
    assert 0 < int(request["metadata"]["deadline"]) <= 2000


# The connection


@pytest.mark.asyncio
async def test_a_refused_connection_is_unavailable_and_names_the_place() -> None:
    async with serving(echo) as server:
        port = server.port

    async with calling(port) as client:
        with pytest.raises(Unavailable, match=f"shop cannot be reached at tcp://127.0.0.1:{port}") as caught:
            await client.send("echo")

        assert (caught.value.code, caught.value.retryable) == ("unavailable", True)
        assert status(client) is Status.DISCONNECTED


@pytest.mark.asyncio
async def test_the_first_calls_share_one_connection() -> None:
    connections = 0

    async def answer(wire: Wire) -> None:
        nonlocal connections
        connections += 1
        while (request := await wire.hear()) is not None:
            await wire.say(framed({"response": request["data"], "isDisposed": True, "id": request["id"]}))

    async with listener(answer) as port, calling(port) as client:
        answers = await asyncio.gather(*(client.send("echo", number) for number in range(50)))

    assert answers == list(range(50))
    assert connections == 1


@pytest.mark.asyncio
async def test_a_caller_who_gives_up_while_connecting_takes_nobody_along() -> None:
    async with serving(echo) as server, calling(server.port) as client:
        hasty, patient = (asyncio.create_task(client.send("echo", who)) for who in ("hasty", "patient"))
        await asyncio.sleep(0)  # both wait for the connection now
        hasty.cancel()

        assert await patient == "patient"
        assert hasty.cancelled()


@pytest.mark.asyncio
async def test_closing_while_connecting_fails_who_waits() -> None:
    async with serving(echo) as server, calling(server.port) as client:
        calls = [asyncio.create_task(client.send("echo")), asyncio.create_task(client.emit("echo"))]
        await asyncio.sleep(0)
        await client.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [Unavailable, Unavailable]


@pytest.mark.asyncio
async def test_a_lost_connection_fails_all_pending_calls_at_once() -> None:
    async def leave(wire: Wire) -> None:
        for _ in range(20):
            await wire.hear()

    async with listener(leave) as port, calling(port) as client:
        calls = [client.send("ask", timeout=PATIENCE * 2) for _ in range(20)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

        assert {type(outcome) for outcome in outcomes} == {ConnectionLost}
        assert {outcome.code for outcome in outcomes} == {"connection-lost"}
        assert status(client) is Status.DISCONNECTED


@pytest.mark.asyncio
async def test_a_stream_fails_when_its_connection_is_lost() -> None:
    async def leave(wire: Wire) -> None:
        request = await wire.hear()
        await wire.say(framed({"response": 1, "id": request["id"]}))

    async with listener(leave) as port, calling(port) as client:
        values = client.stream("ask")
        first = await anext(values)
        with pytest.raises(ConnectionLost):
            await anext(values)

    assert first == 1


@pytest.mark.asyncio
async def test_a_client_connects_again_when_the_server_is_back() -> None:
    async with serving(echo) as server, calling(server.port) as client:
        port = server.port
        before = await client.send("echo", "before")
        await server.close(0)
        await until(lambda: status(client) is Status.DISCONNECTED)
        with pytest.raises(Unavailable):
            await client.send("echo", "meanwhile")
        async with serving(echo, port=port):
            after = await client.send("echo", "after")

    assert (before, after) == ("before", "after")


@pytest.mark.asyncio
@pytest.mark.parametrize("bad", [b"garbage", b"5#{}", b"2#{]", b"99999999#", b'{"id":"1"}'])
async def test_a_server_that_talks_nonsense_is_left_and_its_calls_fail(bad: bytes) -> None:
    left = asyncio.Event()

    async def babble(wire: Wire) -> None:
        await wire.hear()
        await wire.say(bad + b"     ")
        await until_the_end(wire)
        left.set()

    async with listener(babble) as port, calling(port) as client:
        with pytest.raises(ConnectionLost) as caught:
            await client.send("ask")
        await left.wait()

        assert status(client) is Status.DISCONNECTED
        assert "Connection closed: " in caught.value.message


@pytest.mark.asyncio
async def test_nothing_is_handed_to_a_connection_that_is_ending() -> None:
    async with serving(echo) as server, calling(server.port) as client:
        await client.send("echo")
        client.unwrap().close()

        for call in (client.emit("echo"), client.send("echo")):
            with pytest.raises(Unavailable, match="before the call was sent"):
                await call

        await until(lambda: status(client) is Status.DISCONNECTED)
        assert await client.send("echo", "again") == "again"


@pytest.mark.asyncio
async def test_a_request_too_large_fails_alone() -> None:
    async with serving(echo) as server, calling(server.port, "?max_buffer_size=1000") as client:
        with pytest.raises(RpcException) as caught:
            await client.send("echo", "x" * 2000)

        assert caught.value.code == "packet-too-large"
        assert await client.send("echo", "small") == "small"


@pytest.mark.asyncio
async def test_calls_wait_while_the_server_reads_nothing() -> None:
    heard, go_on = 0, asyncio.Event()

    async def hear_later(wire: Wire) -> None:
        nonlocal heard
        wire.stop_reading()
        await go_on.wait()
        wire.go_on_reading()
        while await wire.hear() is not None:
            heard += 1

    async with listener(hear_later) as port, calling(port, "?max_send_buffer_size=100000") as client:
        await client.emit("first")
        events = [asyncio.create_task(client.emit("event", "x" * 100_000, timeout=PATIENCE)) for _ in range(200)]
        await asyncio.wait(events, timeout=0.2)
        handed_over = sum(event.done() for event in events)
        go_on.set()
        await asyncio.gather(*events)
        await until(lambda: heard == 201)

    assert handed_over < 150


@pytest.mark.asyncio
async def test_too_many_calls_that_wait_refuse_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    started: asyncio.Queue[None] = asyncio.Queue()

    @message_pattern("never")
    async def never() -> None:
        started.put_nowait(None)
        await asyncio.Event().wait()

    async with serving(never) as server, calling(server.port) as client:
        monkeypatch.setattr(client._bound().proxy, "max_pending", 3)
        calls = [asyncio.create_task(client.send("never")) for _ in range(3)]
        for _ in calls:
            await started.get()

        with pytest.raises(Unavailable) as caught:
            await client.send("never")

        assert caught.value.code == "overloaded"
        await client.close()
        await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.asyncio
async def test_those_that_wait_for_a_connection_are_bounded_before_and_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @message_pattern("never")
    async def never() -> None:
        await asyncio.Event().wait()

    async with serving(never) as server, calling(server.port) as client:
        proxy, may_open = client._bound().proxy, asyncio.Event()
        open_now = proxy.open

        async def open_later() -> None:
            await may_open.wait()
            await open_now()

        monkeypatch.setattr(proxy, "open", open_later)
        monkeypatch.setattr(proxy, "max_pending", 3)
        calls = [asyncio.create_task(client.send("never", timeout=PATIENCE)) for _ in range(3)]
        await until(lambda: proxy._waiting == 3)

        with pytest.raises(Unavailable, match="Too many") as before:
            await client.send("never")
        monkeypatch.setattr(proxy, "max_pending", 2)
        may_open.set()
        done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)

        assert before.value.code == "overloaded"
        assert [error.code for error in [task.exception() for task in done] if isinstance(error, Unavailable)] == [
            "overloaded"
        ]
        assert len(waiting) == 2
        await client.close()
        await asyncio.gather(*waiting, return_exceptions=True)


# Age


class Slow:
    """A handler that waits until it is told."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()

        @message_pattern("slow")
        async def slow(data: Any) -> Any:
            self.begun.set()
            await self.gate.wait()
            return data

        self.handler = slow


@pytest.mark.asyncio
async def test_a_client_takes_a_new_connection_in_time_and_the_old_one_answers_what_it_owes() -> None:
    slow = Slow()
    async with serving(slow.handler, echo) as server, calling(server.port, "?max_age=0.05") as client:
        first = asyncio.create_task(client.send("slow", "first"))
        await slow.begun.wait()
        old = client.unwrap()
        await until(lambda: client.unwrap() is not old)
        second = await client.send("echo", "second")
        slow.gate.set()

        assert (await first, second) == ("first", "second")
        await until(old.is_closing)


@pytest.mark.asyncio
async def test_an_old_connection_that_is_lost_fails_what_it_owes_and_nothing_else() -> None:
    slow = Slow()
    async with serving(slow.handler, echo) as server, calling(server.port, "?max_age=0.05") as client:
        first = asyncio.create_task(client.send("slow", "first"))
        await slow.begun.wait()
        old = client.unwrap()
        await until(lambda: client.unwrap() is not old)
        second = asyncio.create_task(client.send("slow", "second"))
        await asyncio.sleep(0)
        old.abort()

        with pytest.raises(ConnectionLost):
            await first
        slow.gate.set()
        assert await second == "second"


@pytest.mark.asyncio
async def test_a_new_connection_that_is_lost_leaves_the_old_one_its_own() -> None:
    slow = Slow()
    async with serving(slow.handler) as server, calling(server.port, "?max_age=0.05") as client:
        first = asyncio.create_task(client.send("slow", "first"))
        await slow.begun.wait()
        old = client.unwrap()
        await until(lambda: client.unwrap() is not old)
        client.unwrap().abort()
        await until(lambda: status(client) is not Status.CONNECTED)
        slow.gate.set()

        assert await first == "first"


@pytest.mark.asyncio
async def test_a_client_keeps_its_connection_where_it_gets_no_new_one() -> None:
    async with serving(echo) as server, calling(server.port, "?max_age=0.05&connect_timeout=0.05") as client:
        await client.send("echo", 1)
        old = client.unwrap()
        assert server._server is not None
        server._server.close()
        proxy: Any = client._bound().proxy
        await until(lambda: proxy._renewing is not None and proxy._renewing.done())

        assert client.unwrap() is old
        assert await client.send("echo", 2) == 2


@pytest.mark.asyncio
async def test_a_connection_that_its_peer_has_ended_is_not_used_even_before_the_loop_tells() -> None:
    ended = threading.Event()

    def serve_two(listening: socket.socket) -> None:
        for _ in range(2):
            peer, _ = listening.accept()
            with peer:
                id = json.loads(peer.recv(1000).partition(b"#")[2])["id"]
                peer.sendall(framed({"response": "hi", "isDisposed": True, "id": id}))
            ended.set()

    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve_two, listening)
        async with calling(listening.getsockname()[1]) as client:
            assert await client.send("hello") == "hi"
            ended.wait(PATIENCE)  # the loop stands still meanwhile

            assert await client.send("hello") == "hi"
        serving.result(PATIENCE)


@pytest.mark.asyncio
async def test_a_client_takes_a_new_connection_after_it_was_told_that_the_peer_ends() -> None:
    slow = Slow()
    async with serving(slow.handler, echo) as first, calling(first.port) as client:
        owed = asyncio.create_task(client.send("slow", "owed"))
        await slow.begun.wait()
        closing = asyncio.create_task(first.close(PATIENCE))
        await asyncio.sleep(0)
        with pytest.raises(RpcException) as told:
            await client.send("echo", 1)
        slow.gate.set()

        assert told.value.code == "draining"
        assert await owed == "owed"
        await closing
        with pytest.raises(Unavailable, match="cannot be reached"):
            await client.send("echo", 2)
